"""Who is attached, who steers what, and where each frame goes. No socket, no clock: ``now`` is passed in, in seconds.

The router is fed whole frames and answers with what to send, in order. A destination is an edge connection (an int, chosen by
the owner of the sockets) or an engine identity (bytes, the ZeroMQ routing id); a frame of None closes the edge connection after
all that was sent to it before. Begin, Advance, Candidates, Delta, Choice and End are forwarded byte for byte.

The life of a stream, seen from here:

    Begin from an engine             -> live: forwarded to the worker, which may answer with Deltas
    End from the engine              -> finished: forwarded, its counts are kept in a report
    Candidates from the engine       -> forwarded to the worker, which may answer with a Choice
    End from the worker, or it left  -> orphan: the engine is told; kept without a worker until the engine's End brings the counts
    the worker is back               -> the engine is told (Reattached), and may send a Begin again
    the engine left or fell silent   -> finished with reason engine_gone: the worker is told
"""

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, TypeAlias, TypedDict

from costeer_vllm import __version__
from costeer_vllm.errors import RemoteProtocolError
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    MAX_GUESS_BYTES,
    PROTOCOL_VERSION,
    Admit,
    Admitted,
    Advance,
    Attach,
    Attached,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    EndReason,
    Fusion,
    Join,
    Joined,
    Message,
    Reattached,
    Refused,
    decode_edge_to_hub,
    decode_engine_to_hub,
    encode,
)

logger = logging.getLogger("costeer.hub")

Destination: TypeAlias = int | bytes
Send: TypeAlias = tuple[Destination, bytes | None]
RefusedCode = Literal["version", "attach_key", "name_taken", "full", "worker", "steering_key", "join", "vocabulary", "fusion"]

MAX_NAMES_LISTED = 8
# Of one stream between two questions: the answer, the guesses that an engine keeps, and those that were under way before them.
MAX_UNASKED_BYTES = MAX_FRAME_BYTES + 2 * MAX_GUESS_BYTES
MAX_SENTENCE = 1024  # characters, as in protocol.messages.Sentence


@dataclass(frozen=True)
class Limits:
    """What one hub holds at most."""

    max_attachments: int = 10_000
    max_engines: int = 1024
    max_streams: int = 20_000  # live and orphan
    max_reports: int = 4096  # finished streams remembered, newest first
    stream_ttl_s: float = 600.0  # without a frame from the engine a stream is ended; an orphan is forgotten
    heartbeat_s: float = 10.0  # between two WebSocket pings
    attach_timeout_s: float = 10.0  # from the connection to its Attach
    queue_frames: int = 1024  # waiting for one edge connection
    queue_bytes: int = 16 * 2**20


@dataclass(slots=True)
class Attachment:
    """An edge worker's live connection."""

    connection: int
    attach: Attach
    since: float
    streams: set[str] = field(default_factory=set)  # live ones


@dataclass(slots=True)
class Engine:
    """A joined engine worker."""

    streams: set[str] = field(default_factory=set)  # live and orphan


@dataclass(slots=True)
class HubStream:
    """One stream that its engine has not ended yet."""

    stream: str
    request: str
    worker: str
    engine: bytes
    connection: int | None  # None: an orphan
    started: float
    seen: float  # last frame from the engine; of an orphan: when it became one
    positions: int = 0  # asked: Begins and Advances
    answers: int = 0  # Deltas or Choices
    bytes_up: int = 0  # edge worker -> engine: the same
    bytes_down: int = 0  # engine -> edge worker: Begin, Advance and Candidates
    bytes_unasked: int = 0  # edge worker -> engine since the last question
    reason: EndReason | None = None  # why it is an orphan


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished stream did."""

    stream: str
    request: str
    worker: str
    engine: bytes
    started: float
    reason: EndReason
    positions: int
    answers: int
    bytes_up: int
    bytes_down: int
    tokens_steered: int = 0
    tokens_missed: int = 0


class Traffic:
    """Frames and bytes of one direction and one message type."""

    __slots__ = ("frames", "num_bytes")

    def __init__(self) -> None:
        self.frames = 0
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self.frames += 1
        self.num_bytes += num_bytes


@dataclass
class Totals:
    """Everything counted since the start. Keys are fixed words, never names."""

    traffic: defaultdict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))  # direction, type
    malformed: Counter[str] = field(default_factory=Counter)  # link
    dropped: Counter[str] = field(default_factory=Counter)  # reason
    attaches: Counter[str] = field(default_factory=Counter)  # outcome
    admissions: Counter[str] = field(default_factory=Counter)  # outcome
    closed: Counter[str] = field(default_factory=Counter)  # edge connections that the hub closed, why
    ended: Counter[str] = field(default_factory=Counter)  # reason
    tokens_steered: int = 0
    tokens_missed: int = 0


class StreamRow(TypedDict):
    """One stream as the HTTP interface shows it."""

    stream: str
    request: str
    worker: str
    state: Literal["live", "finished"]
    reason: EndReason | None
    tokens_steered: int
    tokens_missed: int
    positions: int
    answers: int
    bytes_up: int
    bytes_down: int


class WorkerRow(TypedDict):
    """One edge worker as the HTTP interface shows it."""

    name: str
    model: str
    vocab_size: int
    keyed: bool
    streams: int
    attached_s: float


class Router:
    """All state of a hub and the rules that change it."""

    def __init__(self, limits: Limits | None = None, attach_key: str | None = None) -> None:
        self.limits = limits or Limits()
        self.totals = Totals()
        self.attachments: dict[int, Attachment] = {}  # by connection
        self.workers: dict[str, Attachment] = {}  # the same, by name
        self.engines: dict[bytes, Engine] = {}  # by identity
        self.streams: dict[str, HubStream] = {}  # oldest first
        self.reports: deque[Report] = deque(maxlen=self.limits.max_reports)
        self._detached: defaultdict[str, set[str]] = defaultdict(set)  # worker -> its orphans that it may take up again
        self._attach_key = attach_key
        self._warned: set[bytes] = set()

    # --- frames from edge workers -------------------------------------------------------------------------------------

    def from_edge(self, connection: int, frame: bytes, now: float) -> list[Send]:
        """One binary frame of an edge connection.

        Raises:
            RemoteProtocolError: close the connection with a protocol error, then call ``edge_lost``.
        """
        try:
            message = decode_edge_to_hub(frame)
        except Exception:  # decoders also raise UnicodeDecodeError and RecursionError, and their texts quote the frame
            self.totals.malformed["edge"] += 1
            raise RemoteProtocolError(f"a frame of {len(frame)} bytes is no message of an edge worker") from None
        self._count("from_edge", message, frame)
        attachment = self.attachments.get(connection)
        if isinstance(message, Attach):
            if attachment is not None:
                raise RemoteProtocolError("a second Attach on one connection")
            return self._attach(connection, message, now)
        if attachment is None:
            raise RemoteProtocolError(f"{type(message).__name__} before Attach")
        stream = self.streams.get(message.stream)
        if stream is None or stream.connection is None:
            self.totals.dropped["late"] += 1  # it crossed an End: the normal race
            return []
        if stream.connection != connection:
            raise RemoteProtocolError(f"{type(message).__name__} for a stream of another edge worker")
        if isinstance(message, (Delta, Choice)):
            return self._answer_of_edge(stream, message, frame)
        return self._edge_end(stream, message, frame, now)

    def edge_lost(self, connection: int, now: float) -> list[Send]:
        """The connection is gone, whoever closed it; nothing happens the second time."""
        attachment = self.attachments.pop(connection, None)
        if attachment is None:
            return []
        del self.workers[attachment.attach.worker]
        logger.info("edge worker '%s' detached, %d live streams", attachment.attach.worker, len(attachment.streams))
        sends: list[Send] = []
        for stream_id in list(attachment.streams):
            stream = self.streams[stream_id]
            self._orphan(stream, "detached", now)
            self._send_engine(sends, stream.engine, End(stream_id, "detached", "the edge worker's connection is gone"))
        return sends

    def _attach(self, connection: int, attach: Attach, now: float) -> list[Send]:
        refused = self._refuse_attach(attach)
        if refused is not None:
            self.totals.attaches[refused.code] += 1
            sends: list[Send] = []
            self._send_edge(sends, connection, refused)
            return [*sends, (connection, None)]
        former = self.workers.get(attach.worker)
        sends = []
        if former is not None:  # the same process came back before its old connection was noticed to be dead
            sends += [*self.edge_lost(former.connection, now), (former.connection, None)]
        attachment = Attachment(connection, attach, now)
        self.attachments[connection] = self.workers[attach.worker] = attachment
        self.totals.attaches["attached"] += 1
        logger.info("edge worker '%s' attached, %d attached now", attach.worker, len(self.attachments))
        self._send_edge(sends, connection, Attached(attach.worker, self.limits.heartbeat_s))
        for stream_id in sorted(self._detached.pop(attach.worker, ())):
            self._send_engine(sends, self.streams[stream_id].engine, Reattached(stream_id))
        return sends

    def _refuse_attach(self, attach: Attach) -> Refused | None:
        if attach.version != PROTOCOL_VERSION:
            return Refused("version", version_sentence("edge worker", attach.version))
        if self._attach_key is not None and not keys.same(attach.attach_key, self._attach_key):
            state = "missing" if attach.attach_key is None else "wrong"
            return Refused("attach_key", f"the attach key is {state}: give the edge worker the key that the hub was started with")
        former = self.workers.get(attach.worker)
        if former is None:
            if len(self.attachments) < self.limits.max_attachments:
                return None
            return Refused("full", f"the hub holds {len(self.attachments)} edge workers: use another hub or raise its limit")
        if keys.same(former.attach.instance, attach.instance):
            return None
        sentence = f"worker is '{attach.worker}': another edge worker is attached under this name; stop it or choose another name"
        return Refused("name_taken", sentence)

    def _answer_of_edge(self, stream: HubStream, answer: Delta | Choice, frame: bytes) -> list[Send]:
        if stream.bytes_unasked > MAX_UNASKED_BYTES:
            self.totals.dropped["unasked"] += 1
            return []
        stream.bytes_unasked += len(frame)
        stream.answers += 1
        stream.bytes_up += len(frame)
        self._count("to_engine", answer, frame)
        return [(stream.engine, frame)]

    def _edge_end(self, stream: HubStream, end: End, frame: bytes, now: float) -> list[Send]:
        self._orphan(stream, end.reason, now)
        self._count("to_engine", end, frame)
        return [(stream.engine, frame)]

    # --- frames from engines and front ends ---------------------------------------------------------------------------

    def from_engine(self, identity: bytes, frame: bytes, now: float) -> list[Send]:
        """One frame of an engine peer; whatever it holds, nothing is raised."""
        try:
            message = decode_engine_to_hub(frame)
        except Exception:  # as in from_edge
            self.totals.malformed["engine"] += 1
            self._warn_once(identity, "sent a frame of %d bytes that is no message of an engine", len(frame))
            return []
        self._count("from_engine", message, frame)
        if isinstance(message, Join):
            return self._join(identity, message)
        if isinstance(message, Admit):
            return self._admit(identity, message)
        engine = self.engines.get(identity)
        if engine is None:
            return self._not_joined(identity, message)
        if isinstance(message, (Advance, Candidates)):
            return self._forward(identity, message, frame, now)
        if isinstance(message, Begin):
            return self._begin(identity, engine, message, frame, now)
        return self._engine_end(identity, message, frame)

    def engine_lost(self, identity: bytes) -> list[Send]:
        """The connection of an engine peer is gone: its streams end with engine_gone; nothing happens the second time."""
        self._warned.discard(identity)
        engine = self.engines.pop(identity, None)
        if engine is None:
            return []
        logger.info("engine %s left, %d streams", identity.hex(), len(engine.streams))
        sends: list[Send] = []
        for stream_id in engine.streams:
            self._end_edge(sends, self.streams[stream_id], "the engine's connection is gone")
        return sends

    def _join(self, identity: bytes, join: Join) -> list[Send]:
        answer = self._joined(identity, join)
        if isinstance(answer, Joined) and identity not in self.engines:
            self.engines[identity] = Engine()
            logger.info("engine %s joined", identity.hex())
        return self._answer(identity, answer)

    def _joined(self, identity: bytes, join: Join) -> Joined | Refused:
        if join.version != PROTOCOL_VERSION:
            return Refused("version", version_sentence("server", join.version))
        if identity not in self.engines and len(self.engines) >= self.limits.max_engines:
            return Refused("full", f"the hub holds {len(self.engines)} engines: use another hub or raise its limit")
        return Joined(f"costeer hub {__version__}")

    def _not_joined(self, identity: bytes, message: Begin | Advance | Candidates | End) -> list[Send]:
        self.totals.dropped["not_joined"] += 1
        if isinstance(message, End):
            self._add_late_counts(identity, message)  # its connection broke and is back
        return self._answer(identity, Refused("join", "the hub does not know this engine: send Join first"))

    def _admit(self, identity: bytes, admit: Admit) -> list[Send]:
        answer = self._admission(admit)
        self.totals.admissions["admitted" if isinstance(answer, Admitted) else answer.code] += 1
        return self._answer(identity, answer)

    def _admission(self, admit: Admit) -> Admitted | Refused:
        if admit.version != PROTOCOL_VERSION:
            return _refuse(admit, "version", version_sentence("server", admit.version))
        attachment = self._resolve(admit)
        if isinstance(attachment, str):
            return _refuse(admit, "worker", attachment)
        attach = attachment.attach
        if attach.vocabulary.fingerprint != admit.vocabulary.fingerprint:
            return _refuse(
                admit,
                "vocabulary",
                f"worker '{attach.worker}' runs a small model that does not share the vocabulary of the server's model: "
                "start it with a small model of the same family as the server's",
            )
        if attach.key_digest is not None and not keys.same(admit.key_digest, attach.key_digest):
            state = "missing" if admit.key_digest is None else "wrong"
            sentence = f"key is {state} for worker '{attach.worker}': pass the steering key that it was started with"
            return _refuse(admit, "steering_key", sentence)
        if admit.fusion not in attach.fusions:
            return _refuse(admit, "fusion", _no_consent(attach, admit.fusion))
        return Admitted(admit.ticket, attach.worker, attach.key_digest is not None)

    def _resolve(self, admit: Admit) -> Attachment | str:
        """The worker that an Admit means, or the sentence that says why there is none."""
        named = self.workers.get(admit.worker or admit.user or "")
        if named is not None:
            return named
        if admit.worker is None and len(self.workers) == 1:
            return next(iter(self.workers.values()))
        given = "worker is not given" if admit.worker is None else f"worker is '{admit.worker}'"
        if not self.workers:
            return f'{given} and no edge worker is attached: start one with "costeer edge --hub ..."'
        listed = self._names()
        if admit.worker is None:
            return f"{given} and {len(self.workers)} are attached: name one of {listed}"
        return f"{given}: no edge worker of that name is attached; attached now: {listed}"

    def _names(self) -> str:
        """Names for a refusal; a worker with a steering key keeps its name to itself, a hub with an attach key all of them."""
        shown = (name for name, a in self.workers.items() if self._attach_key is None and a.attach.key_digest is None)
        names = list(islice(shown, MAX_NAMES_LISTED))
        others = len(self.workers) - len(names)
        if not names:
            return f"{others} whose names are not shown"
        return ", ".join(f"'{name}'" for name in names) + (f" and {others} more" if others else "")

    def _begin(self, identity: bytes, engine: Engine, begin: Begin, frame: bytes, now: float) -> list[Send]:
        stream = self.streams.get(begin.stream)
        if stream is not None and stream.engine != identity:
            self.totals.dropped["foreign_stream"] += 1
            return self._answer(identity, End(begin.stream, "failed", "another engine has a stream of this name"))
        if stream is None:
            if len(self.streams) >= self.limits.max_streams:
                sentence = f"the hub holds {len(self.streams)} streams, its most"
                return self._answer(identity, End(begin.stream, "overloaded", sentence))
            stream = HubStream(begin.stream, begin.request, begin.worker, identity, None, now, now)
            self.streams[begin.stream] = stream
            engine.streams.add(begin.stream)
        sends: list[Send] = []
        attachment = self.workers.get(begin.worker)
        self._leave(sends, stream, attachment)
        self._leave_detached(stream)
        stream.request, stream.worker, stream.seen = begin.request, begin.worker, now
        refusal = _refuse_begin(begin, attachment)
        if refusal is not None:
            self._orphan(stream, refusal.reason, now)
            self._send_engine(sends, identity, refusal)
            return sends
        assert attachment is not None  # else refused
        attachment.streams.add(begin.stream)
        stream.connection, stream.reason = attachment.connection, None
        self._ask(sends, stream, begin, frame)
        return sends

    def _forward(self, identity: bytes, message: Advance | Candidates, frame: bytes, now: float) -> list[Send]:
        sends: list[Send] = []
        stream = self.streams.get(message.stream)
        if stream is None:
            self.totals.dropped["unknown_stream"] += 1
            self._send_engine(sends, identity, End(message.stream, "unknown_stream", "the hub has no stream of this name"))
        elif stream.engine != identity:
            self.totals.dropped["foreign_stream"] += 1
        elif stream.connection is None:
            self.totals.dropped["late"] += 1  # it crossed our End
        else:
            stream.seen = now
            self._ask(sends, stream, message, frame)
        return sends

    def _engine_end(self, identity: bytes, end: End, frame: bytes) -> list[Send]:
        stream = self.streams.get(end.stream)
        if stream is not None and stream.engine != identity:
            self.totals.dropped["foreign_stream"] += 1
            return []
        if stream is None:
            self.totals.dropped["unknown_stream"] += 1
            self._add_late_counts(identity, end)
            return []
        connection = stream.connection
        self._finish(stream, stream.reason or end.reason, end.tokens_steered, end.tokens_missed)
        if connection is None:
            return []
        self._count("to_edge", end, frame)
        return [(connection, frame)]

    # --- streams ------------------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Send]:
        """End the streams whose engine fell silent, forget the orphans whose counts never came; call it every few seconds."""
        sends: list[Send] = []
        oldest = now - self.limits.stream_ttl_s
        for stream in [stream for stream in self.streams.values() if stream.seen < oldest]:
            self._end_edge(sends, stream, f"the engine was silent for {self.limits.stream_ttl_s:.0f} s")
        return sends

    def _ask(self, sends: list[Send], stream: HubStream, message: Begin | Advance | Candidates, frame: bytes) -> None:
        assert stream.connection is not None
        stream.positions += not isinstance(message, Candidates)
        stream.bytes_down += len(frame)
        stream.bytes_unasked = 0
        self._count("to_edge", message, frame)
        sends.append((stream.connection, frame))

    def _leave(self, sends: list[Send], stream: HubStream, attachment: Attachment | None) -> None:
        """A stream that begins again takes leave of its former worker, unless it is ``attachment``."""
        if stream.connection is None or (attachment is not None and stream.connection == attachment.connection):
            return
        self._send_edge(sends, stream.connection, End(stream.stream, "preempted"))
        self.attachments[stream.connection].streams.discard(stream.stream)
        stream.connection = None

    def _orphan(self, stream: HubStream, reason: EndReason, now: float) -> None:
        self._detach(stream)
        stream.reason, stream.seen = reason, now
        if reason == "detached":
            self._detached[stream.worker].add(stream.stream)

    def _detach(self, stream: HubStream) -> None:
        attachment = self.attachments.get(stream.connection) if stream.connection is not None else None
        if attachment is not None:
            attachment.streams.discard(stream.stream)
        stream.connection = None
        self._leave_detached(stream)

    def _leave_detached(self, stream: HubStream) -> None:
        if (waiting := self._detached.get(stream.worker)) is not None:
            waiting.discard(stream.stream)
            if not waiting:
                del self._detached[stream.worker]

    def _finish(self, stream: HubStream, reason: EndReason, tokens_steered: int = 0, tokens_missed: int = 0) -> None:
        self._detach(stream)
        del self.streams[stream.stream]
        engine = self.engines.get(stream.engine)
        if engine is not None:
            engine.streams.discard(stream.stream)
        self.totals.ended[reason] += 1
        self._count_tokens(tokens_steered, tokens_missed)
        self.reports.append(
            Report(
                stream=stream.stream,
                request=stream.request,
                worker=stream.worker,
                engine=stream.engine,
                started=stream.started,
                reason=reason,
                positions=stream.positions,
                answers=stream.answers,
                bytes_up=stream.bytes_up,
                bytes_down=stream.bytes_down,
                tokens_steered=tokens_steered,
                tokens_missed=tokens_missed,
            )
        )

    def _add_late_counts(self, identity: bytes, end: End) -> None:
        """An engine's counts for a stream that was given up without them: it was silent, or its connection broke."""
        for index, report in enumerate(self.reports):
            if report.stream == end.stream and report.engine == identity and report.reason == "engine_gone":
                if report.tokens_steered == report.tokens_missed == 0:
                    self._count_tokens(end.tokens_steered, end.tokens_missed)
                    self.reports[index] = replace(report, tokens_steered=end.tokens_steered, tokens_missed=end.tokens_missed)
                return

    def _count_tokens(self, steered: int, missed: int) -> None:
        self.totals.tokens_steered += steered
        self.totals.tokens_missed += missed

    def _end_edge(self, sends: list[Send], stream: HubStream, sentence: str) -> None:
        """The engine is gone: tell the worker, if there is one, and close the books without counts."""
        if stream.connection is not None:
            self._send_edge(sends, stream.connection, End(stream.stream, "engine_gone", sentence))
        self._finish(stream, stream.reason or "engine_gone")

    # --- small helpers ------------------------------------------------------------------------------------------------

    def _send_edge(self, sends: list[Send], connection: int, message: Message) -> None:
        frame = encode(message)
        self._count("to_edge", message, frame)
        sends.append((connection, frame))

    def _send_engine(self, sends: list[Send], identity: bytes, message: Message) -> None:
        frame = encode(message)
        self._count("to_engine", message, frame)
        sends.append((identity, frame))

    def _answer(self, identity: bytes, message: Message) -> list[Send]:
        sends: list[Send] = []
        self._send_engine(sends, identity, message)
        return sends

    def _count(self, direction: str, message: Message, frame: bytes) -> None:
        self.totals.traffic[direction, type(message).__name__].add(len(frame))

    def _warn_once(self, identity: bytes, what: str, *values: object) -> None:
        if identity in self._warned or len(self._warned) >= self.limits.max_engines:
            return
        self._warned.add(identity)
        logger.warning("engine peer %s " + what + "; it is dropped and counted, as are all further ones", identity.hex(), *values)

    # --- views --------------------------------------------------------------------------------------------------------

    def worker_rows(self, now: float) -> list[WorkerRow]:
        """The attached edge workers, oldest first."""
        return [
            WorkerRow(
                name=a.attach.worker,
                model=a.attach.model,
                vocab_size=a.attach.vocabulary.size,
                keyed=a.attach.key_digest is not None,
                streams=len(a.streams),
                attached_s=round(now - a.since, 3),
            )
            for a in self.attachments.values()
        ]

    def stream_rows(self, limit: int) -> list[StreamRow]:
        """Live and finished streams, those begun last first."""
        recent: list[HubStream | Report] = []
        recent += islice(reversed(self.streams.values()), limit)
        recent += islice(reversed(self.reports), limit)
        recent.sort(key=lambda stream: -stream.started)
        return [_row(stream) for stream in recent[:limit]]

    def streams_of(self, name: str) -> list[StreamRow]:
        """Live and finished streams whose stream id or request id is ``name``, oldest first."""
        return [_row(stream) for stream in self._all() if name in (stream.stream, stream.request)]

    def _all(self) -> Iterator[HubStream | Report]:
        yield from self.reports
        yield from self.streams.values()


def version_sentence(peer: str, version: int) -> str:
    """Who speaks which protocol, and which side to upgrade."""
    older = "the hub" if version > PROTOCOL_VERSION else f"the {peer}"
    return (
        f"the {peer} speaks protocol version {version}, this hub (costeer-vllm {__version__}) {PROTOCOL_VERSION}: "
        f"upgrade {older} with pip install --upgrade costeer-vllm"
    )


def _refuse_begin(begin: Begin, attachment: Attachment | None) -> End | None:
    if attachment is None:
        return End(begin.stream, "detached", f"worker is '{begin.worker}': no edge worker of that name is attached")
    if begin.fusion not in attachment.attach.fusions:
        return End(begin.stream, "refused", _no_consent(attachment.attach, begin.fusion))
    if begin.vocabulary not in (None, attachment.attach.vocabulary.fingerprint):
        return End(begin.stream, "refused", f"worker '{begin.worker}' is back with a small model of another vocabulary")
    if begin.grant is not None and attachment.attach.key_digest is None:
        return End(begin.stream, "refused", f"worker '{begin.worker}' is back without the steering key of the request")
    if begin.stream in attachment.streams or len(attachment.streams) < attachment.attach.max_streams:
        return None
    return End(begin.stream, "overloaded", f"worker '{begin.worker}' already steers {len(attachment.streams)} streams, its most")


def _no_consent(attach: Attach, fusion: Fusion) -> str:
    """Also of a worker that is too old to know the word: it would answer with deltas where none may leave the device."""
    return f"fusion is '{fusion}': worker '{attach.worker}' consents to {' and '.join(attach.fusions)} fusion only"


def _refuse(admit: Admit, code: RefusedCode, sentence: str) -> Refused:
    if len(sentence) > MAX_SENTENCE:
        sentence = sentence[: MAX_SENTENCE - 3] + "..."
    return Refused(code, sentence, admit.ticket)


def _row(stream: HubStream | Report) -> StreamRow:
    finished = isinstance(stream, Report)
    return StreamRow(
        stream=stream.stream,
        request=stream.request,
        worker=stream.worker,
        state="finished" if finished else "live",
        reason=stream.reason,
        tokens_steered=stream.tokens_steered if isinstance(stream, Report) else 0,
        tokens_missed=stream.tokens_missed if isinstance(stream, Report) else 0,
        positions=stream.positions,
        answers=stream.answers,
        bytes_up=stream.bytes_up,
        bytes_down=stream.bytes_down,
    )
