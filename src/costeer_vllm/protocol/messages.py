"""Every message that crosses a process boundary, on one screen.

Messages are tagged msgspec structs in msgpack, one per frame; nothing is ever pickled. Unknown fields are ignored and every
field added later must have a default, so that old edge workers keep working; an unknown ``version`` is refused with a sentence.

    edge worker  -> hub     Attach, Delta, Choice, End
    hub          -> edge    Attached, Refused, Begin, Advance, Candidates, End
    engine       -> hub     Join, Admit, Begin, Advance, Candidates, End
    hub          -> engine  Joined, Admitted, Refused, Delta, Choice, End, Reattached

In cloud fusion a Begin and each Advance are answered with a Delta; in edge fusion they are not, but each Candidates is answered
with a Choice. What belongs to a stream is routed by it and forwarded byte for byte. No message has a field for private context,
but a query may name one that the edge worker keeps.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 4 * 2**20  # a lossless float32 delta over 152,064 entries takes 608,256 bytes
MAX_QUERY_BYTES = 2**20
MAX_CANDIDATES = 1024
MIN_ROUNDING, MAX_ROUNDING = 1e-3, 1.0  # nats: the step of a candidate's log-probability, of which 16 bits must reach far enough
MAX_TOKENS = 2**17  # ids in one message: the longest replay
MAX_GUESSES = 32  # deltas that an engine keeps, for each stream, of prefixes that may come true
MAX_GUESS_BYTES = 2 * 2**20  # of their payloads: three lossless ones over 152,064 entries

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@:-]*\Z")]
StreamId: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=192, pattern=r"^[\x21-\x7e]+\Z")]
ContextRef: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]
Sentence: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024)]
Key: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Position: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TokenIds: TypeAlias = Annotated[list[TokenId], msgspec.Meta(max_length=MAX_TOKENS)]
PrefixHash: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]  # 64 bits; see protocol/stream.py
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Digest: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]  # SHA-256, hex
Fusion: TypeAlias = Literal["cloud", "edge"]  # where the base policy and the delta meet: in the engine, or in the edge worker


class Message(msgspec.Struct, frozen=True, tag=True):
    """One frame on a link."""


class Vocabulary(msgspec.Struct, frozen=True):
    """What two models must share for ids to mean the same: see ``vocab.fingerprint``."""

    fingerprint: Digest
    size: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]  # number of tokens, without padding


class Turn(msgspec.Struct, frozen=True):
    """One chat message of the query, text only."""

    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: Annotated[str, msgspec.Meta(max_length=MAX_QUERY_BYTES)]


class Query(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the large model is asked, without any private context: exactly one of messages, prompt and prompt_ids is set."""

    messages: Annotated[list[Turn], msgspec.Meta(max_length=4096)] | None = None
    prompt: Annotated[str, msgspec.Meta(max_length=MAX_QUERY_BYTES)] | None = None
    prompt_ids: TokenIds | None = None
    continue_final_message: bool = False
    ref: ContextRef | None = None  # which of the edge worker's contexts: a name without a meaning; None: the only one


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an edge worker that fuses draws a token: vLLM's sampling parameters of the same names, and what limits steering."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None
    confidence: float = 1.0  # as in the request
    max_bits: float | None = None  # as in the request


class Attach(Message, frozen=True):
    """An edge worker asks to serve under a name."""

    version: int
    worker: Name
    instance: Key  # random per process: the same instance may replace its own half-open connection
    model: Annotated[str, msgspec.Meta(max_length=512)]
    vocabulary: Vocabulary
    attach_key: Key | None = None
    key_digest: Digest | None = None  # of the steering key, if the worker has one: see protocol/keys.py
    max_streams: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    fusions: Annotated[tuple[Fusion, ...], msgspec.Meta(min_length=1, max_length=2)] = ("cloud",)  # that it consents to


class Attached(Message, frozen=True):
    """The hub accepts; the edge worker must answer WebSocket pings that come every ``heartbeat_s`` seconds."""

    worker: Name
    heartbeat_s: float


class Refused(Message, frozen=True):
    """The hub refuses an Attach, a Join or an Admit: a code for programs, a sentence that says what to do for people.

    ``join`` answers any other message of an engine that the hub does not know (it restarted): Join again.
    """

    code: Annotated[str, msgspec.Meta(max_length=64)]  # the router's RefusedCode: newer hubs may know more
    sentence: Sentence
    ticket: Count = 0  # of the Admit that is refused


class Join(Message, frozen=True):
    """An engine introduces itself; before that only Admit is heard. A second Join of the same peer changes nothing."""

    version: int


class Joined(Message, frozen=True):
    """The hub knows the engine."""

    hub: Sentence  # name and version, for logs


class Admit(Message, frozen=True):
    """A front end asks which edge worker would steer a request, and whether it may; needs no Join before."""

    version: int
    ticket: Count
    vocabulary: Vocabulary
    worker: Name | None = None  # None: the one named like ``user``, else the only one attached
    user: Annotated[str, msgspec.Meta(max_length=512)] | None = None
    key_digest: Digest | None = None  # of the key that the request presents
    fusion: Fusion = "cloud"


class Admitted(Message, frozen=True):
    """The request may be steered by ``worker``."""

    ticket: Count
    worker: Name
    keyed: bool  # the worker has a steering key: Begin must carry a grant


class Begin(Message, frozen=True):
    """A stream starts, or starts anew after an interruption: the edge worker prefills both rows and, in cloud fusion, answers."""

    stream: StreamId
    request: StreamId  # the client's request; its n > 1 children are streams of their own
    worker: Name
    query: Query
    strength: float  # c_T; in cloud fusion the engine applies it, and the worker knows by it what is worth sending and guessing
    tokens: TokenIds = []  # generated before, oldest first; position is their number
    grant: Digest | None = None  # see protocol/keys.py
    sampling: Sampling | None = None  # None: cloud fusion
    guess_bytes: Count = 0  # of unasked Deltas that the engine keeps for this stream, MAX_GUESSES at the most; 0: none
    vocabulary: Digest | None = None  # the server's fingerprint: a worker of another one has other tokens under these ids

    @property
    def fusion(self) -> Fusion:
        """What the stream asks for."""
        return "cloud" if self.sampling is None else "edge"


class Advance(Message, frozen=True):
    """Tokens were chosen: ``tokens`` are the last ones before ``position``, whatever the edge worker guessed or missed."""

    stream: StreamId
    position: Position
    prefix_hash: PrefixHash  # of all generated ids up to position
    tokens: TokenIds


class Delta(Message, frozen=True):
    """The edge worker's delta for exactly one prefix, asked for or guessed; any other use is forbidden."""

    stream: StreamId
    position: Position
    prefix_hash: PrefixHash
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME_BYTES)]  # see delta/


class Candidates(Message, frozen=True):
    """Edge fusion: the base policy's likeliest tokens at one prefix, of which the edge worker chooses one."""

    stream: StreamId
    position: Position
    prefix_hash: PrefixHash
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_FRAME_BYTES)]  # see candidates.py


class Choice(Message, frozen=True):
    """Edge fusion: the token for exactly one prefix. It is all that leaves the device."""

    stream: StreamId
    position: Position
    prefix_hash: PrefixHash
    token: TokenId


EndReason = Literal["finished", "preempted", "detached", "engine_gone", "refused", "overloaded", "unknown_stream", "failed"]


class End(Message, frozen=True):
    """The stream is over for the sender; counts are filled in by the engine."""

    stream: StreamId
    reason: EndReason
    sentence: Sentence = ""
    tokens_steered: Count = 0
    tokens_missed: Count = 0


class Reattached(Message, frozen=True):
    """The edge worker of a stream that ended as ``detached`` is there again: the engine may Begin it anew."""

    stream: StreamId


EdgeToHub: TypeAlias = Attach | Delta | Choice | End
HubToEdge: TypeAlias = Attached | Refused | Begin | Advance | Candidates | End
EngineToHub: TypeAlias = Join | Admit | Begin | Advance | Candidates | End
HubToEngine: TypeAlias = Joined | Admitted | Refused | Delta | Choice | End | Reattached

encode = msgspec.msgpack.Encoder().encode
decode_edge_to_hub = msgspec.msgpack.Decoder(EdgeToHub).decode
decode_hub_to_edge = msgspec.msgpack.Decoder(HubToEdge).decode
decode_engine_to_hub = msgspec.msgpack.Decoder(EngineToHub).decode
decode_hub_to_engine = msgspec.msgpack.Decoder(HubToEngine).decode
