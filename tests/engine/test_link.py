"""The engine's link over real sockets: it never blocks, never raises, and counts what it loses."""

import logging
import socket
import time

import msgspec
import pytest
import zmq

from costeer_vllm.engine.link import _MAX_BYTES_AT_ONCE, _MAX_FRAMES_AT_ONCE, _MAX_QUEUED_FRAMES, HubLink, admit
from costeer_vllm.errors import HubUnavailable
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    MAX_QUERY_BYTES,
    PROTOCOL_VERSION,
    Admit,
    Admitted,
    Advance,
    Begin,
    Delta,
    End,
    HubToEngine,
    Join,
    Joined,
    Query,
    Refused,
    Turn,
    Vocabulary,
    encode,
)

from .fake_hub import TIMEOUT_S, FakeHub

VOCABULARY = Vocabulary("0" * 64, 100)
QUESTION = Admit(PROTOCOL_VERSION, 5, VOCABULARY, "laptop")


def unused_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def receive(link: HubLink, count: int) -> list[HubToEngine]:
    """``count`` messages, however many calls that takes."""
    messages: list[HubToEngine] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(messages) < count:
        left = deadline - time.monotonic()
        assert left > 0, f"only {len(messages)} of {count} messages came"
        messages += link.receive(left)
    return messages


@pytest.fixture
def link(hub: FakeHub):  # type: ignore[no-untyped-def]
    link = HubLink(hub.endpoint, None)
    hub.next(Join)
    assert receive(link, 1) == [Joined("a hub")]
    yield link
    link.close()


def test_a_link_introduces_itself(hub: FakeHub) -> None:
    link = HubLink(hub.endpoint, None)
    assert hub.next(Join) == Join(PROTOCOL_VERSION)
    link.close()


def test_messages_go_both_ways_in_order(hub: FakeHub, link: HubLink) -> None:
    for position in range(50):
        assert link.send(Advance("s", position, 1, [2]))
    assert [hub.next(Advance).position for _ in range(50)] == list(range(50))
    hub.send(*(Delta("s", position, 1, b"x") for position in range(50)))
    assert [message.position for message in receive(link, 50) if isinstance(message, Delta)] == list(range(50))


def test_nothing_there_is_an_empty_answer(link: HubLink) -> None:
    assert list(link.receive(0.0)) == []
    assert list(link.receive(-1.0)) == []
    assert list(link.receive(0.001)) == []


def test_malformed_frames_are_counted_and_the_others_heard(hub: FakeHub, link: HubLink) -> None:
    good = encode(End("s", "finished"))
    nested = b"\x82\xa4type\xa5Delta\xa1x" + b"\x91" * 100_000  # a RecursionError inside the decoder
    not_unicode = b"\x82\xa4type\xa6Joined\xa3hub\xa3\xff\xfe\xfd"  # a UnicodeDecodeError
    bad = [b"\xc1", b"\x80", good[:-1], nested, not_unicode, encode(Join(1)), msgspec.msgpack.encode([1, 2])]
    for frame in bad:
        hub.send(frame, good)
    assert receive(link, len(bad)) == [End("s", "finished")] * len(bad)
    assert link.num_malformed == len(bad)


def test_a_flood_is_read_in_portions(hub: FakeHub, link: HubLink) -> None:
    """Whoever floods the hub must not keep the model waiting past its deadline."""
    frame, total = encode(End("unknown", "failed")), 2 * _MAX_FRAMES_AT_ONCE + 100
    hub.send(*[frame] * total)
    count = 0
    while count < total:
        portion = sum(1 for _ in link.receive(TIMEOUT_S))
        assert 0 < portion <= _MAX_FRAMES_AT_ONCE
        count += portion
    assert count == total


def test_a_flood_of_large_frames_is_read_in_portions(hub: FakeHub, link: HubLink) -> None:
    size, total = 3 * 2**20, 30
    hub.send(*[encode(Delta("s", 1, 1, bytes(size)))] * total)
    portions = []
    while sum(portions) < total:
        portions.append(sum(1 for _ in link.receive(TIMEOUT_S)))
        assert 0 < portions[-1] <= _MAX_BYTES_AT_ONCE // size + 1
    assert sum(portions) == total


def test_without_a_hub_nothing_blocks_and_what_is_dropped_is_counted() -> None:
    link = HubLink(unused_endpoint(), None)
    sent = [link.send(Advance("s", 1, 1, [2])) for _ in range(_MAX_QUEUED_FRAMES + 500)]
    assert sent.count(False) == link.num_dropped > 0
    assert sent.count(True) <= _MAX_QUEUED_FRAMES
    assert not sent[-1]
    assert list(link.receive(0.0)) == []
    link.close()


def test_messages_sent_before_the_hub_is_there_arrive_when_it_is(hub: FakeHub) -> None:
    first = HubLink(hub.endpoint, None)
    assert first.send(Advance("s", 1, 1, [2]))  # the connection is not made yet
    hub.next(Join)
    assert hub.next(Advance) == Advance("s", 1, 1, [2])
    first.close()


def test_what_the_hub_would_not_take_is_not_sent(hub: FakeHub, link: HubLink) -> None:
    """A frame beyond its limit would make the hub break the connection, with the streams of all others."""
    content = "\u20ac" * (MAX_QUERY_BYTES // 2)
    query = Query(messages=[Turn("user", content)] * 3)
    assert not link.send(Begin("s", "r", "laptop", query, 1.0))
    assert not link.send(Begin("s", "r", "laptop", Query(prompt="\ud800"), 1.0))
    assert not link.send(Advance("s", 1, 1, [2**70]))
    assert link.num_dropped == 3
    assert link.send(Begin("t", "r", "laptop", Query(prompt="x" * MAX_QUERY_BYTES), 1.0))
    assert hub.next(Begin).stream == "t"
    assert len(encode(Begin("s", "r", "laptop", query, 1.0))) > MAX_FRAME_BYTES


def test_a_closed_link_does_not_raise(hub: FakeHub) -> None:
    link = HubLink(hub.endpoint, None)
    link.close()
    assert not link.send(Join(PROTOCOL_VERSION))
    assert list(link.receive(0.0)) == []


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://", "tcp://host", "http://127.0.0.1:1", "ipc://"])
def test_what_is_no_address_is_told(endpoint: str) -> None:
    with pytest.raises(HubUnavailable, match="is no address"):
        HubLink(endpoint, None)
    with pytest.raises(HubUnavailable, match="is no address"):
        admit(endpoint, None, QUESTION)


def test_the_attach_key_encrypts_tcp() -> None:
    hub = FakeHub(attach_key="attach-me")
    link = HubLink(hub.endpoint, "attach-me")
    try:
        assert hub.next(Join) == Join(PROTOCOL_VERSION)
        assert receive(link, 1) == [Joined("a hub")]
    finally:
        link.close()
        hub.close()


def test_links_have_identities_of_their_own(hub: FakeHub) -> None:
    """Two engines of one machine, or an engine and its front end, must not be taken for one."""
    links = [HubLink(hub.endpoint, None) for _ in range(3)]
    for _ in links:
        hub.next(Join)
    assert all(receive(link, 1) == [Joined("a hub")] for link in links)
    for link in links:
        link.close()


# Admission


@pytest.mark.parametrize("reply", [Admitted(5, "laptop", True), Refused("worker", "no such worker", 5)])
def test_admission_is_the_answer_with_the_tickets_number(hub: FakeHub, reply: HubToEngine) -> None:
    others = [Admitted(4, "other", False), Joined("x"), Refused("worker", "late", 6), End("s", "failed")]
    hub.answer = lambda message: [*others, reply]
    assert admit(hub.endpoint, None, QUESTION, timeout_s=TIMEOUT_S) == reply
    assert hub.next(Admit) == QUESTION


def test_admission_without_an_answer_says_so() -> None:
    endpoint = unused_endpoint()
    with pytest.raises(HubUnavailable, match=rf"{endpoint} did not answer within 0.05 s"):
        admit(endpoint, None, QUESTION, timeout_s=0.05)


def test_admission_with_a_wrong_attach_key_says_what_it_may_be_and_shows_no_key() -> None:
    hub = FakeHub(attach_key="attach-me")
    try:
        with pytest.raises(HubUnavailable, match="same attach key") as caught:
            admit(hub.endpoint, "attach-you", QUESTION, timeout_s=0.2)
        assert "attach-you" not in str(caught.value)
        assert hub.received == []
    finally:
        hub.close()


def test_links_leave_no_sockets_behind(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    """One admission per request, for years: more than the sockets that one context allows."""
    caplog.set_level(logging.ERROR)
    limit = zmq.Context.instance().get(zmq.MAX_SOCKETS)
    hub.answer = lambda message: [Admitted(5, "laptop", False)] if isinstance(message, Admit) else []
    for _ in range(min(limit + 10, 1100)):
        assert admit(hub.endpoint, None, QUESTION, timeout_s=TIMEOUT_S) == Admitted(5, "laptop", False)
