"""A hub for the engine's tests: a real ROUTER socket in a thread that plays the hub and the edge workers behind it."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import zmq

from costeer_vllm.candidates import BasePolicy, decode_candidates
from costeer_vllm.delta import encode_lossless
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import (
    Advance,
    Begin,
    Candidates,
    Choice,
    Delta,
    End,
    HubToEngine,
    Join,
    Joined,
    Message,
    decode_engine_to_hub,
    encode,
)
from costeer_vllm.protocol.stream import extend_hash

TIMEOUT_S = 20.0  # for what must happen; a test that needs it fails

M = TypeVar("M", bound=Message)
Answer = Callable[[Message], Iterable[HubToEngine]]


def silence(message: Message) -> Iterable[HubToEngine]:
    """A hub whose edge workers say nothing."""
    return [Joined("a hub")] if isinstance(message, Join) else []


class FakeHub:
    """Records what engines send and answers with ``answer``; a test may also send by itself."""

    def __init__(self, answer: Answer = silence, attach_key: str | None = None) -> None:
        self.answer = answer
        self.received: list[Message] = []
        self._read = 0  # how many of them ``next`` has handed out
        self._news = threading.Condition()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if attach_key is not None:
            self._router.curve_server = True
            self._router.curve_secretkey = keys.curve_keypair(attach_key)[1]
        self.endpoint = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._control = self._context.socket(zmq.PAIR)
        self._control.bind("inproc://control")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, *messages: HubToEngine | bytes) -> None:
        """Messages, or frames as they are, to the engine that was heard last."""
        for message in messages:
            self._control.send(message if isinstance(message, bytes) else encode(message))

    def next(self, kind: type[M]) -> M:
        """The next message from the engine, which must be of ``kind``."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.received) > self._read, TIMEOUT_S), f"no {kind.__name__} came"
            message = self.received[self._read]
            self._read += 1
        assert isinstance(message, kind), message
        return message

    def wait_for(self, condition: Callable[[list[Message]], bool]) -> None:
        """Until ``condition`` holds of all that was received."""
        with self._news:
            assert self._news.wait_for(lambda: condition(self.received), TIMEOUT_S), self.received

    def messages(self, kind: type[M]) -> list[M]:
        """What was received of one kind."""
        with self._news:
            return [message for message in self.received if isinstance(message, kind)]

    def close(self) -> None:
        self._control.send(b"")
        self._thread.join(TIMEOUT_S)
        self._control.close(0)
        self._context.destroy(linger=0)

    def _run(self) -> None:
        orders = self._context.socket(zmq.PAIR)
        orders.connect("inproc://control")
        poller = zmq.Poller()
        poller.register(orders, zmq.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        engine = b""
        while True:
            ready = dict(poller.poll())
            if self._router in ready:
                engine, frame = self._router.recv_multipart()
                message = decode_engine_to_hub(frame)
                with self._news:
                    self.received.append(message)
                    self._news.notify_all()
                for reply in self.answer(message):
                    with contextlib.suppress(zmq.ZMQError):  # the engine may have closed its link after what it sent
                        self._router.send_multipart([engine, encode(reply)])
            elif orders in ready:
                frame = orders.recv()
                if not frame:
                    orders.close(0)
                    return
                self._router.send_multipart([engine, frame])


def delta_of(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """The delta that the edge worker of these tests has for a prefix: any other prefix has quite another."""
    return np.random.default_rng([7, *tokens]).normal(0, 2, vocab_size).astype(np.float32)


def choice_of(tokens: Sequence[int], ids: Sequence[int]) -> int:
    """The candidate that the edge worker of these tests chooses after a prefix, likely or not."""
    return int(ids[(3 * sum(tokens) + len(tokens)) % len(ids)])


class ExactEdges:
    """Answers every Begin and Advance with the exact delta of its prefix, and ends a stream that does not hold together.

    An edge-fused stream is answered when its Candidates come, with one of them.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.prefixes: dict[str, list[int]] = {}
        self.offers: dict[str, list[BasePolicy]] = {}  # of the edge-fused streams, in order
        self.problems: list[str] = []

    def __call__(self, message: Message) -> Iterable[HubToEngine]:
        match message:
            case Join():
                return [Joined("a hub")]
            case Begin():
                if message.stream in self.prefixes:
                    self.problems.append(f"{message.stream} begins twice")
                self.prefixes[message.stream] = list(message.tokens)
                if message.sampling is not None:
                    self.offers[message.stream] = []
                return self.answer(message.stream)
            case Advance():
                prefix = self.prefixes.get(message.stream)
                if prefix is None:
                    self.problems.append(f"{message.stream} advances without a beginning")
                    return [End(message.stream, "unknown_stream")]
                prefix += message.tokens
                if (message.position, message.prefix_hash) != (len(prefix), extend_hash(0, prefix)):
                    self.problems.append(f"{message.stream} advances to a prefix that is not {prefix}")
                return self.answer(message.stream)
            case Candidates():
                return [self.choice(message)]
            case End():
                if self.prefixes.pop(message.stream, None) is None:
                    self.problems.append(f"{message.stream} ends without a beginning")
        return []

    def answer(self, stream: str) -> list[Delta]:
        return [] if stream in self.offers else [self.delta(stream)]

    def choice(self, offer: Candidates) -> Choice:
        prefix = self.prefixes[offer.stream]
        if (offer.position, offer.prefix_hash) != (len(prefix), extend_hash(0, prefix)):
            self.problems.append(f"{offer.stream} offers for a prefix that is not {prefix}")
        base = decode_candidates(offer.payload)
        self.offers[offer.stream].append(base)
        return Choice(offer.stream, offer.position, offer.prefix_hash, choice_of(prefix, base.ids))

    def delta(self, stream: str) -> Delta:
        prefix = self.prefixes[stream]
        payload = encode_lossless(delta_of(prefix, self.vocab_size))
        return Delta(stream, len(prefix), extend_hash(0, prefix), payload)
