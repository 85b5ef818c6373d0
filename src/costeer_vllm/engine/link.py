"""The engine's end of the hub link: one ZeroMQ DEALER, typed messages, no thread of ours.

ZeroMQ's own I/O thread moves the bytes, so ``send`` returns at once and nothing here ever competes for the interpreter lock.
"""

import contextlib
import math
import time
import uuid
from collections.abc import Iterator

import zmq

from costeer_vllm.errors import HubUnavailable
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Admit,
    Admitted,
    Advance,
    Begin,
    Candidates,
    End,
    HubToEngine,
    Join,
    Joined,
    Refused,
    decode_hub_to_engine,
    encode,
)

_MAX_QUEUED_FRAMES = 10_000  # per direction; beyond it frames are dropped and their tokens counted as missed
_MAX_FRAMES_AT_ONCE = 4_096  # read before the clock is looked at again: a flood must not hold up the model
_MAX_BYTES_AT_ONCE = 64 * 2**20  # the same: a hundred lossless deltas over 152,064 entries


def connect(endpoint: str, attach_key: str | None) -> zmq.Socket[bytes]:
    """A DEALER connected to the hub's engine endpoint (``tcp://`` or ``ipc://``); ZeroMQ keeps reconnecting by itself.

    Raises:
        HubUnavailable: if ``endpoint`` is not an address.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, b"E" + uuid.uuid4().bytes)
    socket.setsockopt(zmq.LINGER, 200)
    socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED_FRAMES)
    socket.setsockopt(zmq.RCVHWM, _MAX_QUEUED_FRAMES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + 4096)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if attach_key is not None and endpoint.startswith("tcp://"):
        hub_public, _ = keys.curve_keypair(attach_key)
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, hub_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(0)
        raise HubUnavailable(f"costeer: the hub's engine endpoint {endpoint} is no address: {error}") from None
    return socket


class HubLink:
    """An engine worker's link: ``send`` and ``receive`` never raise. Not thread-safe: used by the thread that runs the model."""

    def __init__(self, endpoint: str, attach_key: str | None) -> None:
        self._socket = connect(endpoint, attach_key)
        self.num_malformed = 0
        self.num_dropped = 0
        self.join()

    def join(self) -> None:
        """Introduce this engine to the hub, at start and whenever a hub that restarted does not know it."""
        self.send(Join(PROTOCOL_VERSION))

    def send(self, message: Join | Begin | Advance | Candidates | End) -> bool:
        """Queue a message. False, and counted, if it is dropped: the hub has not taken the last 10,000, or would not take it."""
        try:
            frame = encode(message)
            if len(frame) <= MAX_FRAME_BYTES:  # else the hub would break the connection that all streams share
                self._socket.send(frame, zmq.NOBLOCK)
                return True
        except (zmq.ZMQError, ValueError, OverflowError):  # the queue is full; or a text or number that msgpack cannot hold
            pass
        self.num_dropped += 1
        return False

    def receive(self, timeout_s: float) -> Iterator[HubToEngine]:
        """The messages that are there, after waiting up to ``timeout_s`` for the first; malformed ones are counted only."""
        with contextlib.suppress(zmq.ZMQError):  # EAGAIN: no more is there
            self._socket.poll(math.ceil(max(0.0, timeout_s) * 1000))
            num_frames = num_bytes = 0
            while num_frames < _MAX_FRAMES_AT_ONCE and num_bytes < _MAX_BYTES_AT_ONCE:
                frame = self._socket.recv(zmq.NOBLOCK)
                num_frames, num_bytes = num_frames + 1, num_bytes + len(frame)
                try:
                    message = decode_hub_to_engine(frame)
                except Exception:  # decoders also raise UnicodeDecodeError and RecursionError
                    self.num_malformed += 1
                    continue
                yield message

    def close(self) -> None:
        """Close at once; queued frames have 200 ms to leave."""
        self._socket.close()


def admit(endpoint: str, attach_key: str | None, request: Admit, timeout_s: float = 3.0) -> Admitted | Refused:
    """Ask the hub whether and by whom a request is steered. Blocks; safe in any thread, since it uses a socket of its own.

    Raises:
        HubUnavailable: if no answer comes within ``timeout_s`` seconds, or ``endpoint`` is not an address.
    """
    for answer in _answers(endpoint, attach_key, request, timeout_s):
        if isinstance(answer, (Admitted, Refused)) and answer.ticket == request.ticket:
            return answer
    raise _unavailable(endpoint, timeout_s)


def check_hub(endpoint: str, attach_key: str | None, timeout_s: float) -> None:
    """Make sure, before a server starts, that the hub is there, takes our key and speaks our protocol.

    Raises:
        HubUnavailable: if it does not, with what to do.
    """
    for answer in _answers(endpoint, attach_key, Join(PROTOCOL_VERSION), timeout_s):
        if isinstance(answer, Joined):
            return
        if isinstance(answer, Refused):
            raise HubUnavailable(f"costeer: {answer.sentence}")
    raise _unavailable(endpoint, timeout_s)


def _answers(endpoint: str, attach_key: str | None, question: Admit | Join, timeout_s: float) -> Iterator[HubToEngine]:
    """What the hub says to one question on a connection of its own, until ``timeout_s`` have passed."""
    socket = connect(endpoint, attach_key)
    try:
        socket.send(encode(question))
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0 and socket.poll(math.ceil(left * 1000)):
            try:
                answer = decode_hub_to_engine(socket.recv())
            except Exception:  # decoders also raise UnicodeDecodeError and RecursionError
                continue
            yield answer
    finally:
        socket.close(0)


def _unavailable(endpoint: str, timeout_s: float) -> HubUnavailable:
    sentence = f"costeer: the hub at {endpoint} did not answer within {timeout_s:g} s; is it running, with the same attach key?"
    return HubUnavailable(sentence)
