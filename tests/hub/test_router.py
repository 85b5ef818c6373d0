"""The rules of the hub with nothing but a router: frames are pushed in, and what it would send is collected by destination."""

import logging
from collections import defaultdict

import msgspec
import pytest
from ends import OTHER_VOCABULARY, VOCABULARY, admit, advance, attach, begin, candidates, choice, delta, edge_begin
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from costeer_vllm.errors import RemoteProtocolError
from costeer_vllm.hub.metrics import build_registry
from costeer_vllm.hub.router import MAX_UNASKED_BYTES, Limits, Router
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    Admitted,
    Advance,
    Attached,
    Begin,
    Delta,
    End,
    Join,
    Joined,
    Reattached,
    Refused,
    decode_hub_to_edge,
    decode_hub_to_engine,
    encode,
)

ALICE, BOB, CAROL = 1, 2, 3  # edge connections
ENGINE, OTHER = b"engine", b"other"
CLOSED = "closed"


class Ends:
    """Both fake ends: what they received, newest last, what they believe to be live, and a clock that is set by hand."""

    def __init__(self, limits=None, attach_key=None):
        self.router = Router(limits, attach_key)
        self.now = 0.0
        self.received = defaultdict(list)
        self.frames = defaultdict(list)
        self.believed = defaultdict(set)  # by destination: streams that began and did not end

    def deliver(self, sends):
        for destination, frame in sends:
            decode = decode_hub_to_edge if isinstance(destination, int) else decode_hub_to_engine
            message = CLOSED if frame is None else decode(frame)
            self.received[destination].append(message)
            self.frames[destination].append(frame)
            self.believe(destination, message)

    def believe(self, who, message):
        """``who`` sent or received ``message``."""
        if isinstance(message, Begin):
            self.believed[who].add(message.stream)
        elif isinstance(message, End):
            self.believed[who].discard(message.stream)
        elif message == CLOSED or (isinstance(message, Refused) and message.code == "join"):
            self.believed[who].clear()

    def edge_frame(self, connection, frame):
        """False if the hub closed the connection."""
        try:
            sends = self.router.from_edge(connection, frame, self.now)
        except RemoteProtocolError:
            self.edge_lost(connection)
            return False
        self.deliver(sends)
        return True

    def edge_lost(self, connection):
        self.believe(connection, CLOSED)
        self.deliver(self.router.edge_lost(connection, self.now))

    def engine_lost(self, identity):
        self.believe(identity, CLOSED)
        self.deliver(self.router.engine_lost(identity))

    def edge(self, connection, message):
        frame = encode(message)
        self.deliver(self.router.from_edge(connection, frame, self.now))
        self.believe(connection, message)
        return frame

    def engine(self, identity, message):
        frame = encode(message)
        self.believe(identity, message)
        self.deliver(self.router.from_engine(identity, frame, self.now))
        return frame

    def last(self, destination):
        return self.received[destination][-1]

    def take(self, destination):
        return self.received.pop(destination, [])

    def quiet(self):
        """Whether nothing was sent since everything was taken."""
        return not any(self.received.values())

    def forget(self):
        self.received.clear()
        self.frames.clear()

    def check(self):
        """What must hold after every frame."""
        router = self.router
        assert {a.attach.worker: a for a in router.attachments.values()} == router.workers
        for connection, attachment in router.attachments.items():
            assert attachment.connection == connection
            assert attachment.streams == self.believed[connection]
            for stream in attachment.streams:
                assert router.streams[stream].connection == connection
        for name, stream in router.streams.items():
            assert stream.stream == name
            assert name in router.engines[stream.engine].streams
            assert (stream.connection is None) == (stream.reason is not None)
            assert stream.connection is None or name in router.attachments[stream.connection].streams
            assert stream.connection is None or name in self.believed[stream.engine]
        assert sum(len(engine.streams) for engine in router.engines.values()) == len(router.streams)


@pytest.fixture
def ends():
    """One worker, one engine."""
    ends = Ends()
    ends.edge(ALICE, attach("alice", fusions=("cloud", "edge")))
    ends.engine(ENGINE, Join(1))
    ends.forget()
    yield ends
    ends.check()


class TestAttach:
    def test_accepted(self):
        ends = Ends()
        ends.edge(ALICE, attach("alice"))
        assert ends.take(ALICE) == [Attached("alice", 10.0)]

    @pytest.mark.parametrize(("version", "who"), [(0, "upgrade the edge worker"), (2, "upgrade the hub")])
    def test_an_unknown_version(self, version, who):
        ends = Ends()
        ends.edge(ALICE, attach(version=version))
        refused, closed = ends.take(ALICE)
        assert (refused.code, closed) == ("version", CLOSED)
        assert f"version {version}, this hub" in refused.sentence
        assert who in refused.sentence

    @pytest.mark.parametrize(("given", "state"), [(None, "missing"), ("wrong", "wrong"), ("", None), ("kéy", "wrong")])
    def test_the_attach_key(self, given, state):
        ends = Ends(attach_key="right")
        if state is None:
            with pytest.raises(RemoteProtocolError):
                ends.edge(ALICE, attach(attach_key=given))
            return
        ends.edge(ALICE, attach(attach_key=given))
        refused, closed = ends.take(ALICE)
        assert (refused.code, closed) == ("attach_key", CLOSED)
        assert state in refused.sentence
        assert "right" not in refused.sentence
        ends.edge(BOB, attach(attach_key="right"))
        assert ends.last(BOB) == Attached("alice", 10.0)

    def test_a_hub_without_a_key_takes_any(self):
        ends = Ends()
        ends.edge(ALICE, attach(attach_key="whatever"))
        assert isinstance(ends.last(ALICE), Attached)

    def test_the_name_is_taken_by_another_process(self, ends):
        ends.edge(BOB, attach("alice", instance="2"))
        refused, closed = ends.take(BOB)
        assert (refused.code, closed) == ("name_taken", CLOSED)
        assert ends.take(ALICE) == []

    def test_the_same_process_replaces_its_half_open_connection(self, ends):
        ends.engine(ENGINE, begin())
        ends.forget()
        ends.edge(BOB, attach("alice"))
        assert ends.take(ALICE) == [CLOSED]
        assert ends.take(ENGINE) == [End("s", "detached", "the edge worker's connection is gone"), Reattached("s")]
        assert isinstance(ends.last(BOB), Attached)
        ends.edge_lost(ALICE)
        assert list(ends.router.attachments) == [BOB]

    def test_a_worker_that_is_back_is_told_to_the_engines_whose_streams_it_had(self, ends):
        for name in ("a", "b", "over"):
            ends.engine(ENGINE, begin(name))
        ends.edge_lost(ALICE)
        ends.engine(ENGINE, End("over", "finished"))
        ends.forget()
        ends.edge(BOB, attach("alice"))
        assert ends.take(ENGINE) == [Reattached("a"), Reattached("b")]
        ends.engine(ENGINE, begin("a", tokens=[1, 2]))
        ends.edge(BOB, delta("a", 2))
        assert ends.take(ENGINE) == [delta("a", 2)]

    def test_each_return_is_told_once_and_only_to_streams_that_are_still_without_a_worker(self, ends):
        ends.engine(ENGINE, begin("a"))
        ends.edge_lost(ALICE)
        ends.edge(BOB, attach("alice"))
        ends.engine(ENGINE, begin("a"))
        ends.edge_lost(BOB)
        ends.engine(ENGINE, begin("a"))  # refused: nobody is there
        ends.forget()
        ends.edge(CAROL, attach("alice"))
        assert ends.take(ENGINE) == [Reattached("a")]
        assert not ends.router._detached

    def test_a_stream_that_the_worker_ended_itself_is_not_offered_to_it_again(self, ends):
        ends.engine(ENGINE, begin("a"))
        ends.edge(ALICE, End("a", "failed", "no"))
        ends.edge_lost(ALICE)
        ends.forget()
        ends.edge(BOB, attach("alice"))
        assert ends.take(ENGINE) == []

    def test_a_worker_that_is_back_with_other_tokens_or_without_the_key_gets_no_stream(self, ends):
        mine = VOCABULARY.fingerprint
        ends.engine(ENGINE, begin("a", vocabulary=mine))
        ends.engine(ENGINE, begin("b", vocabulary="0" * 64))
        refused = ends.take(ENGINE)[-1]
        assert (refused.stream, refused.reason) == ("b", "refused")
        assert "another vocabulary" in refused.sentence
        ends.engine(ENGINE, begin("c", grant="1" * 64))
        refused = ends.take(ENGINE)[-1]
        assert (refused.reason, "without the steering key" in refused.sentence) == ("refused", True)
        ends.edge(ALICE, delta("a"))
        assert ends.take(ENGINE)[-1] == delta("a")

    def test_full(self):
        ends = Ends(Limits(max_attachments=1))
        ends.edge(ALICE, attach("alice"))
        ends.edge(BOB, attach("bob"))
        refused, closed = ends.take(BOB)
        assert (refused.code, closed) == ("full", CLOSED)
        ends.edge(CAROL, attach("alice"))
        assert isinstance(ends.last(CAROL), Attached)

    def test_the_order_of_messages(self, ends):
        for message in (delta(), choice(), End("s", "finished")):
            with pytest.raises(RemoteProtocolError, match="before Attach"):
                ends.edge(BOB, message)
        with pytest.raises(RemoteProtocolError, match="second Attach"):
            ends.edge(ALICE, attach("alice"))

    @pytest.mark.parametrize(
        "frame",
        [
            b"",
            b"\xc1",
            b"private text",
            encode(Join(1)),
            encode(begin()),
            encode(candidates()),
            encode(attach("a", fusions=("everywhere",))),
            encode(attach("a", fusions=())),
            encode(delta("s")).replace(b"\xa1s", b"\xa1\xff"),
            encode(attach("a")).replace(b"\xa1a", b"\xa1\n"),
            b"\x82\xa4type\xa5Delta\xa1x" + b"\x91" * 100_000,
        ],
        ids=range(11),
    )
    def test_a_frame_that_is_no_message(self, ends, frame, caplog):
        with pytest.raises(RemoteProtocolError) as error:
            ends.router.from_edge(ALICE, frame, 0)
        assert str(error.value) == f"a frame of {len(frame)} bytes is no message of an edge worker"
        assert error.value.__cause__ is None
        assert "private" not in caplog.text

    @pytest.mark.parametrize("name", ["alice\n", "", " alice", "a" * 129, "/etc", "ä"])
    def test_a_name_that_is_none(self, ends, name):
        with pytest.raises(RemoteProtocolError):
            ends.edge(BOB, attach(name))


class TestJoin:
    def test_joined_and_again(self, ends):
        ends.engine(ENGINE, begin())
        ends.forget()
        ends.engine(ENGINE, Join(1))
        assert isinstance(ends.last(ENGINE), Joined)
        assert list(ends.router.streams) == ["s"]
        assert ends.take(ALICE) == []

    def test_an_unknown_version(self, ends):
        ends.engine(OTHER, Join(2))
        assert ends.last(OTHER).code == "version"
        assert OTHER not in ends.router.engines

    def test_full(self):
        ends = Ends(Limits(max_engines=1))
        ends.engine(ENGINE, Join(1))
        ends.engine(OTHER, Join(1))
        assert ends.last(OTHER).code == "full"

    @pytest.mark.parametrize("message", [begin(), advance(), candidates(), End("s", "finished")])
    def test_nothing_is_heard_before(self, ends, message):
        ends.engine(OTHER, message)
        assert ends.take(OTHER) == [Refused("join", "the hub does not know this engine: send Join first")]
        assert ends.router.totals.dropped["not_joined"] == 1
        assert ends.take(ALICE) == []

    def test_a_frame_that_is_no_message_is_logged_once_per_peer(self, ends, caplog):
        for _ in range(3):
            assert ends.router.from_engine(ENGINE, b"\xc1private", 0) == []
            assert ends.router.from_engine(OTHER, b"", 0) == []
        assert ends.router.totals.malformed["engine"] == 6
        assert len(caplog.records) == 2
        assert "private" not in caplog.text
        ends.engine(ENGINE, begin())
        assert ends.last(ALICE).stream == "s"


class TestAdmit:
    def ask(self, *workers, **fields):
        ends = Ends()
        for connection, worker in enumerate(workers, 1):
            worker = attach(worker) if isinstance(worker, str) else worker
            ends.edge(connection, worker)
        ends.engine(OTHER, admit(9, **fields))
        (answer,) = ends.take(OTHER)
        assert answer.ticket == 9
        assert isinstance(answer, Admitted) or ends.router.totals.admissions == {answer.code: 1}
        return answer

    @pytest.mark.parametrize(
        ("workers", "fields", "worker"),
        [
            (["a", "b"], {"worker": "b"}, "b"),
            (["a", "b"], {"user": "b"}, "b"),
            (["a", "b"], {"worker": "a", "user": "b"}, "a"),
            (["a"], {}, "a"),
            (["a"], {"user": "somebody"}, "a"),
        ],
    )
    def test_who_is_meant(self, workers, fields, worker):
        assert self.ask(*workers, **fields) == Admitted(9, worker, False)

    @pytest.mark.parametrize(
        ("workers", "fields", "sentence"),
        [
            ([], {}, 'worker is not given and no edge worker is attached: start one with "costeer edge --hub ..."'),
            ([], {"worker": "x"}, "worker is 'x' and no edge worker is attached: start one with \"costeer edge --hub ...\""),
            (["a", "b"], {"worker": "x"}, "worker is 'x': no edge worker of that name is attached; attached now: 'a', 'b'"),
            (["a"], {"worker": "x", "user": "a"}, "worker is 'x': no edge worker of that name is attached; attached now: 'a'"),
            (["a", "b", "c"], {"user": "x"}, "worker is not given and 3 are attached: name one of 'a', 'b', 'c'"),
            (
                [f"w{i}" for i in range(10)],
                {},
                "worker is not given and 10 are attached: name one of 'w0', 'w1', 'w2', 'w3', 'w4', 'w5', 'w6', 'w7' and 2 more",
            ),
        ],
    )
    def test_nobody_is_meant(self, workers, fields, sentence):
        assert self.ask(*workers, **fields) == Refused("worker", sentence, 9)

    def test_names_of_workers_with_a_key_are_not_listed(self):
        keyed = [attach(name, key_digest=keys.key_digest(name)) for name in ("k1", "k2")]
        assert "name one of 2 whose names are not shown" in self.ask(*keyed).sentence
        assert "name one of 'open' and 2 more" in self.ask(*keyed, "open").sentence

    def test_a_sentence_is_never_too_long(self):
        names = [f"{i}" * 128 for i in range(9)]
        answer = self.ask(*names, worker="x" * 128)
        assert len(answer.sentence) == 1024

    def test_the_vocabulary_differs(self):
        answer = self.ask("a", vocabulary=OTHER_VOCABULARY)
        assert answer.code == "vocabulary"
        assert "small model of the same family" in answer.sentence

    @pytest.mark.parametrize(("key", "state"), [(None, "missing"), ("wrong", "wrong")])
    def test_the_steering_key(self, key, state):
        right = keys.key_digest("right")
        worker = attach("a", key_digest=right)
        answer = self.ask(worker, key_digest=key and keys.key_digest(key))
        assert answer == Refused(
            "steering_key", f"key is {state} for worker 'a': pass the steering key that it was started with", 9
        )
        assert self.ask(worker, key_digest=right) == Admitted(9, "a", True)

    def test_a_key_for_a_worker_without_one_is_not_looked_at(self):
        assert self.ask("a", key_digest=keys.key_digest("any")) == Admitted(9, "a", False)

    def test_an_unknown_version(self):
        assert self.ask("a", version=2).code == "version"

    @pytest.mark.parametrize(
        ("fusions", "fusion", "consents"),
        [
            (("cloud",), "edge", "cloud"),
            (("edge",), "cloud", "edge"),
            (("cloud", "edge"), "cloud", None),
            (("cloud", "edge"), "edge", None),
            (("edge", "cloud"), "cloud", None),
            (("edge",), "edge", None),
            (("cloud",), "cloud", None),
        ],
    )
    def test_a_fusion_needs_the_workers_consent(self, fusions, fusion, consents):
        answer = self.ask(attach("a", fusions=fusions), fusion=fusion)
        if consents is None:
            assert answer == Admitted(9, "a", False)
        else:
            assert answer == Refused("fusion", f"fusion is '{fusion}': worker 'a' consents to {consents} fusion only", 9)

    def test_a_worker_that_is_too_old_to_say_so_consents_to_cloud_fusion_only(self):
        """It would answer with deltas where none may leave the device."""
        fields = msgspec.msgpack.decode(encode(attach("a")))
        del fields["fusions"]
        ends = Ends()
        ends.edge_frame(ALICE, msgspec.msgpack.encode(fields))
        for fusion, expected in (("edge", "fusion"), ("cloud", None)):
            ends.engine(OTHER, admit(9, fusion=fusion))
            assert getattr(ends.last(OTHER), "code", None) == expected
        assert ends.router.totals.admissions == {"fusion": 1, "admitted": 1}

    def test_a_front_end_that_is_too_old_to_say_so_asks_for_cloud_fusion(self):
        fields = msgspec.msgpack.decode(encode(admit(9)))
        del fields["fusion"]
        ends = Ends()
        ends.edge(ALICE, attach("a", fusions=("edge",)))
        ends.deliver(ends.router.from_engine(OTHER, msgspec.msgpack.encode(fields), 0))
        assert ends.last(OTHER).code == "fusion"

    def test_the_key_is_asked_for_before_the_consent(self):
        """Who may not use a worker learns nothing of its settings."""
        worker = attach("a", key_digest=keys.key_digest("right"), fusions=("edge",))
        assert self.ask(worker).code == "steering_key"


class TestStream:
    def test_every_frame_is_forwarded_as_it_came(self, ends):
        sent = [ends.engine(ENGINE, begin()), ends.engine(ENGINE, advance())]
        # A field of a later version must survive: forwarding re-encodes nothing.
        later = encode(advance("s", 2)).replace(b"\x85", b"\x86", 1) + b"\xa5added\x01"
        ends.deliver(ends.router.from_engine(ENGINE, later, 0))  # not an ``engine``: it holds a message we do not know yet
        sent += [later, ends.engine(ENGINE, End("s", "finished"))]
        assert ends.frames[ALICE] == sent

    def test_the_report(self, ends):
        ends.engine(ENGINE, begin(tokens=[1, 2]))
        up = len(ends.edge(ALICE, delta("s", 2)))
        (row,) = ends.router.streams_of("r")
        assert (row["state"], row["positions"], row["answers"]) == ("live", 1, 1)
        down = len(ends.engine(ENGINE, advance("s", 3)))
        ends.engine(ENGINE, End("s", "finished", tokens_steered=5, tokens_missed=2))
        assert ends.router.streams == {}
        (row,) = ends.router.streams_of("s")
        assert row["bytes_up"] == up
        assert row["bytes_down"] == len(encode(begin(tokens=[1, 2]))) + down
        assert (row["state"], row["reason"], row["worker"]) == ("finished", "finished", "alice")
        assert (row["tokens_steered"], row["tokens_missed"], row["positions"], row["answers"]) == (5, 2, 2, 1)
        assert (ends.router.totals.tokens_steered, ends.router.totals.tokens_missed) == (5, 2)

    def test_an_edge_fused_stream_is_forwarded_as_it_came(self, ends):
        down, up = [ends.engine(ENGINE, edge_begin())], []
        for position in range(3):
            down.append(ends.engine(ENGINE, candidates("s", position, bytes([position]) * 50)))
            up.append(ends.edge(ALICE, choice("s", position)))
            down.append(ends.engine(ENGINE, advance("s", position + 1)))
        down.append(ends.engine(ENGINE, End("s", "finished", tokens_steered=3)))
        assert ends.frames[ALICE] == down
        assert ends.frames[ENGINE] == up
        (row,) = ends.router.streams_of("r")
        assert (row["positions"], row["answers"], row["tokens_steered"]) == (4, 3, 3)
        assert row["bytes_up"] == sum(map(len, up))
        assert row["bytes_down"] == sum(map(len, down[:-1]))  # all but the End
        traffic = {key: (value.frames, value.num_bytes) for key, value in ends.router.totals.traffic.items()}
        for way in ("from_edge", "to_engine"):
            assert traffic[way, "Choice"] == (3, sum(map(len, up)))
        for way in ("from_engine", "to_edge"):
            assert traffic[way, "Candidates"] == (3, sum(map(len, down[1:-1:2])))

    def test_candidates_keep_a_stream_alive(self, ends):
        for name in ("silent", "talking"):
            ends.engine(ENGINE, edge_begin(name))
        ends.now = 500
        ends.engine(ENGINE, candidates("talking"))
        ends.deliver(ends.router.sweep(601))
        assert list(ends.router.streams) == ["talking"]

    def test_candidates_of_no_stream_of_another_engine_and_of_an_orphan(self, ends):
        ends.engine(ENGINE, candidates("what"))
        assert ends.take(ENGINE) == [End("what", "unknown_stream", "the hub has no stream of this name")]
        ends.engine(OTHER, Join(1))
        ends.engine(ENGINE, edge_begin())
        ends.forget()
        ends.engine(OTHER, candidates())
        assert ends.quiet()
        assert ends.router.totals.dropped["foreign_stream"] == 1
        ends.edge(ALICE, End("s", "failed"))
        ends.forget()
        ends.engine(ENGINE, candidates())
        ends.edge(ALICE, choice())
        assert ends.quiet()
        assert ends.router.totals.dropped["late"] == 2

    @pytest.mark.parametrize(("fusions", "fusion", "consents"), [(("cloud",), "edge", "cloud"), (("edge",), "cloud", "edge")])
    def test_a_begin_without_consent_reaches_no_worker(self, ends, fusions, fusion, consents):
        """Admission was asked of another worker of this name, or not at all."""
        ends.edge(BOB, attach("bob", fusions=fusions))
        ends.forget()
        ends.engine(ENGINE, (edge_begin if fusion == "edge" else begin)(worker="bob"))
        sentence = f"fusion is '{fusion}': worker 'bob' consents to {consents} fusion only"
        assert ends.take(ENGINE) == [End("s", "refused", sentence)]
        for message in (candidates(), advance()):
            ends.engine(ENGINE, message)
        assert ends.quiet()
        assert ends.router.attachments[BOB].streams == set()
        ends.engine(ENGINE, End("s", "finished", tokens_missed=2))
        (row,) = ends.router.streams_of("s")
        assert (row["reason"], row["tokens_missed"], row["bytes_down"]) == ("refused", 2, 0)

    def test_a_stream_that_begins_again_in_another_fusion_needs_consent_again(self, ends):
        ends.edge(BOB, attach("bob", fusions=("edge",)))
        ends.engine(ENGINE, edge_begin(worker="bob"))
        ends.forget()
        ends.engine(ENGINE, begin(worker="bob"))
        assert ends.take(ENGINE)[0].reason == "refused"
        ends.edge_lost(BOB)
        ends.believed[BOB].clear()

    def test_two_engines_do_not_disturb_each_other(self, ends):
        ends.engine(OTHER, Join(1))
        ends.engine(ENGINE, begin())
        ends.forget()
        ends.engine(OTHER, begin())
        assert ends.take(OTHER) == [End("s", "failed", "another engine has a stream of this name")]
        ends.engine(OTHER, advance())
        ends.engine(OTHER, End("s", "finished", tokens_missed=99))
        assert ends.quiet()
        assert ends.router.totals.dropped["foreign_stream"] == 3
        assert ends.router.totals.tokens_missed == 0
        ends.edge(ALICE, delta())
        assert len(ends.take(ENGINE)) == 1

    def test_an_unknown_stream_is_answered_to_an_advance_only(self, ends):
        ends.engine(ENGINE, advance("what"))
        assert ends.take(ENGINE) == [End("what", "unknown_stream", "the hub has no stream of this name")]
        ends.engine(ENGINE, End("what", "finished"))
        assert ends.quiet()

    def test_an_unknown_worker(self, ends):
        ends.engine(ENGINE, begin(worker="nobody"))
        (end,) = ends.take(ENGINE)
        assert (end.stream, end.reason) == ("s", "detached")
        ends.engine(ENGINE, advance())
        assert ends.quiet()
        ends.engine(ENGINE, End("s", "finished", tokens_missed=7))
        assert ends.router.streams_of("r")[0]["tokens_missed"] == 7
        assert ends.router.streams_of("r")[0]["reason"] == "detached"

    def test_a_worker_has_its_most_streams(self, ends):
        ends.edge(BOB, attach("bob", max_streams=2))
        for name in "abc":
            ends.engine(ENGINE, begin(name, "bob"))
        assert [message.stream for message in ends.take(BOB)[1:]] == ["a", "b"]
        (end,) = ends.take(ENGINE)
        assert (end.stream, end.reason) == ("c", "overloaded")
        ends.engine(ENGINE, begin("a", "bob"))
        ends.engine(ENGINE, End("a", "finished"))
        ends.engine(ENGINE, begin("d", "bob"))
        assert [message.stream for message in ends.take(BOB)] == ["a", "a", "d"]

    def test_the_hub_has_its_most_streams(self):
        ends = Ends(Limits(max_streams=1))
        ends.edge(ALICE, attach())
        ends.engine(ENGINE, Join(1))
        ends.engine(ENGINE, begin("a"))
        ends.forget()
        ends.engine(ENGINE, begin("b"))
        assert ends.take(ENGINE)[0].reason == "overloaded"
        ends.engine(ENGINE, begin("a"))
        assert ends.take(ALICE)[0].stream == "a"

    def test_a_stream_begins_again_at_another_worker(self, ends):
        ends.edge(BOB, attach("bob"))
        ends.engine(ENGINE, begin())
        ends.forget()
        ends.engine(ENGINE, begin(worker="bob"))
        assert ends.take(ALICE) == [End("s", "preempted")]
        assert ends.take(BOB) == [begin(worker="bob")]
        ends.check()
        ends.engine(ENGINE, begin(worker="nobody"))
        assert ends.take(BOB) == [End("s", "preempted")]

    def test_the_edge_ends_it(self, ends):
        ends.engine(ENGINE, begin())
        frame = ends.edge(ALICE, End("s", "overloaded", "no memory"))
        assert ends.frames[ENGINE] == [frame]
        ends.forget()
        ends.edge(ALICE, delta())
        ends.edge(ALICE, End("s", "failed"))
        ends.engine(ENGINE, advance())
        assert ends.quiet()
        assert ends.router.totals.dropped["late"] == 3
        ends.engine(ENGINE, End("s", "finished", tokens_steered=1, tokens_missed=2))
        assert ends.quiet()
        assert ends.router.streams_of("s")[0]["reason"] == "overloaded"
        assert ends.router.streams_of("s")[0]["tokens_missed"] == 2

    def test_it_begins_again_after_the_edge_ended_it(self, ends):
        ends.engine(ENGINE, begin())
        ends.edge(ALICE, End("s", "overloaded"))
        ends.forget()
        ends.engine(ENGINE, begin())
        ends.edge(ALICE, delta())
        assert len(ends.take(ALICE)) == len(ends.take(ENGINE)) == 1

    def test_a_late_delta_is_dropped(self, ends):
        ends.engine(ENGINE, begin())
        ends.engine(ENGINE, End("s", "finished"))
        ends.forget()
        ends.edge(ALICE, delta())
        assert ends.quiet()

    def test_what_an_edge_sends_unasked_is_bounded_until_the_next_question(self, ends):
        """Nobody bounds a queue of frames in bytes: one worker alone must not fill the hub's and the engine's."""
        ends.engine(ENGINE, begin())
        ends.forget()
        large = Delta("s", 1, 1, bytes(2**20))
        for _ in range(100):
            ends.edge(ALICE, large)
        heard = len(ends.take(ENGINE))
        assert heard == MAX_UNASKED_BYTES // 2**20
        assert ends.router.totals.dropped["unasked"] == 100 - heard
        ends.engine(ENGINE, Advance("s", 1, 1, [2]))
        ends.edge(ALICE, large)
        assert len(ends.take(ENGINE)) == 1

    def test_a_delta_for_the_stream_of_another_worker(self, ends):
        ends.edge(BOB, attach("bob"))
        ends.engine(ENGINE, begin())
        ends.forget()
        for message in (delta(), choice(), End("s", "failed")):
            with pytest.raises(RemoteProtocolError, match="another edge worker"):
                ends.edge(BOB, message)
        assert ends.quiet()

    def test_reports_are_bounded(self):
        ends = Ends(Limits(max_reports=3))
        ends.edge(ALICE, attach())
        ends.engine(ENGINE, Join(1))
        for i in range(10):
            ends.now = i
            ends.engine(ENGINE, begin(f"s{i}"))
            ends.engine(ENGINE, End(f"s{i}", "finished"))
        assert [row["stream"] for row in ends.router.stream_rows(100)] == ["s9", "s8", "s7"]

    def test_streams_are_listed_newest_first(self, ends):
        for i, name in enumerate("abcd"):
            ends.now = i
            ends.engine(ENGINE, begin(name))
        ends.engine(ENGINE, End("c", "finished"))
        assert [(row["stream"], row["state"]) for row in ends.router.stream_rows(3)] == [
            ("d", "live"),
            ("c", "finished"),
            ("b", "live"),
        ]


class TestLosses:
    def test_an_edge_worker_leaves(self, ends):
        ends.engine(ENGINE, begin("a"))
        ends.engine(ENGINE, begin("b"))
        ends.forget()
        ends.edge_lost(ALICE)
        assert {(end.stream, end.reason) for end in ends.take(ENGINE)} == {("a", "detached"), ("b", "detached")}
        assert ends.router.edge_lost(ALICE, 2) == []
        assert ends.router.attachments == ends.router.workers == {}
        ends.engine(ENGINE, End("a", "finished", tokens_missed=3))
        assert ends.router.streams_of("a")[0]["tokens_missed"] == 3
        assert list(ends.router.streams) == ["b"]

    def test_an_engine_leaves(self, ends):
        ends.engine(ENGINE, begin("a"))
        ends.engine(ENGINE, begin("b"))
        ends.edge(ALICE, End("b", "failed"))
        ends.forget()
        ends.engine_lost(ENGINE)
        assert ends.take(ALICE) == [End("a", "engine_gone", "the engine's connection is gone")]
        assert ends.router.engine_lost(ENGINE) == []
        assert ends.router.streams == ends.router.engines == {}
        assert {report.stream: report.reason for report in ends.router.reports} == {"a": "engine_gone", "b": "failed"}

    @pytest.mark.parametrize("joins_again", [True, False])
    def test_counts_that_come_after_the_connection_was_back(self, ends, joins_again):
        ends.engine(OTHER, Join(1))
        ends.engine(ENGINE, begin("a"))
        ends.engine_lost(ENGINE)
        if joins_again:
            ends.engine(ENGINE, Join(1))
        for _ in range(2):
            ends.engine(OTHER, End("a", "finished", tokens_steered=100))
            ends.engine(ENGINE, End("a", "finished", tokens_steered=4, tokens_missed=1))
        (row,) = ends.router.streams_of("a")
        assert (row["reason"], row["tokens_steered"], row["tokens_missed"]) == ("engine_gone", 4, 1)
        assert (ends.router.totals.tokens_steered, ends.router.totals.tokens_missed) == (4, 1)

    def test_a_silent_engine(self, ends):
        ends.engine(ENGINE, begin("silent"))
        ends.engine(ENGINE, begin("talking"))
        ends.now = 500
        ends.engine(ENGINE, advance("talking"))
        ends.forget()
        ends.deliver(ends.router.sweep(600))
        assert ends.quiet()
        ends.deliver(ends.router.sweep(601))
        assert ends.take(ALICE) == [End("silent", "engine_gone", "the engine was silent for 600 s")]
        assert list(ends.router.streams) == ["talking"]

    def test_an_orphan_is_forgotten(self, ends):
        ends.engine(ENGINE, begin())
        ends.now = 100
        ends.edge(ALICE, End("s", "failed"))
        ends.forget()
        ends.deliver(ends.router.sweep(650))
        assert list(ends.router.streams) == ["s"]
        ends.deliver(ends.router.sweep(701))
        assert ends.quiet()
        assert ends.router.streams == {}
        assert ends.router.streams_of("s")[0]["reason"] == "failed"


def test_logs_name_workers_and_nothing_else(ends, caplog):
    caplog.set_level(logging.DEBUG)
    ends.edge(BOB, attach("bob", attach_key="secret-key", key_digest=keys.key_digest("k")))
    ends.engine(ENGINE, begin(worker="bob"))
    ends.engine(ENGINE, admit(worker="nobody"))
    ends.edge_lost(BOB)
    assert [record.getMessage() for record in caplog.records] == [
        "edge worker 'bob' attached, 2 attached now",
        "edge worker 'bob' detached, 1 live streams",
    ]


def test_metrics_hold_no_names(ends):
    ends.engine(ENGINE, begin())
    ends.edge(ALICE, delta())
    ends.engine(ENGINE, End("s", "finished", tokens_steered=3))
    text = generate_latest(build_registry(ends.router)).decode()
    assert 'costeer_hub_frames_total{direction="to_engine",type="Delta"} 1.0' in text
    assert 'costeer_hub_streams_ended_total{reason="finished"} 1.0' in text
    assert 'costeer_hub_tokens_total{outcome="steered"} 3.0' in text
    assert "alice" not in text


CONNECTIONS = st.sampled_from([ALICE, BOB, CAROL])
IDENTITIES = st.sampled_from([ENGINE, OTHER])
STREAMS = st.sampled_from(["s1", "s2", "s3"])
WORKERS = st.sampled_from(["alice", "bob", "nobody"])
EDGE_MESSAGES = st.one_of(
    st.builds(
        attach,
        WORKERS,
        st.sampled_from("12"),
        version=st.sampled_from([1, 1, 1, 2]),
        max_streams=st.integers(1, 2),
        fusions=st.sampled_from([("cloud",), ("edge",), ("cloud", "edge")]),
    ),
    st.builds(delta, STREAMS),
    st.builds(choice, STREAMS),
    st.builds(End, STREAMS, st.sampled_from(["failed", "overloaded"])),
)
ENGINE_MESSAGES = st.one_of(
    st.builds(Join, st.sampled_from([1, 1, 1, 2])),
    st.builds(admit, worker=st.none() | WORKERS, vocabulary=st.just(VOCABULARY)),
    st.builds(begin, STREAMS, WORKERS),
    st.builds(edge_begin, STREAMS, WORKERS),
    st.builds(advance, STREAMS),
    st.builds(candidates, STREAMS),
    st.builds(End, STREAMS, st.just("finished"), tokens_steered=st.integers(0, 3)),
)
STEPS = st.one_of(
    st.tuples(st.just("edge"), CONNECTIONS, EDGE_MESSAGES),
    st.tuples(st.just("engine"), IDENTITIES, ENGINE_MESSAGES),
    st.tuples(st.just("edge junk"), CONNECTIONS, st.binary(max_size=8)),
    st.tuples(st.just("engine junk"), IDENTITIES, st.binary(max_size=8)),
    st.tuples(st.just("edge lost"), CONNECTIONS, st.none()),
    st.tuples(st.just("engine lost"), IDENTITIES, st.none()),
    st.tuples(st.just("later"), st.integers(0, 400), st.none()),
)


def perform(ends, step):
    match step:
        case ("edge", connection, message):
            if ends.edge_frame(connection, encode(message)):
                ends.believe(connection, message)
        case ("engine", identity, message):
            ends.engine(identity, message)
        case ("edge junk", connection, frame):
            assert not ends.edge_frame(connection, frame)
        case ("engine junk", identity, frame):
            assert ends.router.from_engine(identity, frame, ends.now) == []
        case ("edge lost", connection, _):
            ends.edge_lost(connection)
        case ("engine lost", identity, _):
            ends.engine_lost(identity)
        case ("later", seconds, _):
            ends.now += seconds
            ends.deliver(ends.router.sweep(ends.now))


@settings(max_examples=400)
@given(st.lists(STEPS, max_size=60))
def test_any_order_of_frames_and_losses_keeps_the_books_straight(steps):
    ends = Ends(Limits(max_streams=2, max_attachments=2))
    for step in steps:
        perform(ends, step)
        ends.check()
    router = ends.router
    assert router.totals.tokens_steered == sum(report.tokens_steered for report in router.reports)
    assert len(router.stream_rows(1000)) == len(router.streams) + len(router.reports)
    for connection in (ALICE, BOB, CAROL):
        ends.edge_lost(connection)
    for identity in (ENGINE, OTHER):
        ends.engine_lost(identity)
    ends.check()
    assert router.streams == router.attachments == router.workers == router.engines == {}
