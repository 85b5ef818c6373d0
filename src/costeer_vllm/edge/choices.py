"""The choices of one edge-fused stream: each needs a Candidates frame from the engine and a delta from the small model.

The two come in any order. A question gets one choice: asked again (a frame was repeated), it is given again, so that nobody
learns more by asking twice; and so it is for whatever comes at the prefix of a stream's newest choice. Every other question, be
it of the same position, is drawn with a random number of its own: two choices made with the same one would tell more together
than the sum of what each of them tells.
"""

import hashlib
import hmac
import math
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from costeer_vllm.candidates import BasePolicy, decode_candidates
from costeer_vllm.delta import finite
from costeer_vllm.edge.disclosure import Disclosure, Disclosures
from costeer_vllm.edge.fusion import Drawn
from costeer_vllm.errors import InvalidCandidates, InvalidParameter
from costeer_vllm.protocol.messages import Begin, Candidates, Choice, Sampling, encode
from costeer_vllm.steering import check_finite, check_strength

MAX_CHOICES = 2**17  # of a request that goes on: as many as the longest replay has tokens

_Prefix: TypeAlias = tuple[int, int]  # position and prefix hash


@dataclass(eq=False, slots=True)
class Chooser:
    """What chooses for one stream."""

    stream: str
    strength: float
    sampling: Sampling
    disclosure: Disclosure
    seed: bytes  # of the stream's random numbers: secret
    base: tuple[_Prefix, BasePolicy, bytes] | None = None  # the newest candidates, and the digest of the question
    delta: tuple[_Prefix, npt.NDArray[np.float32]] | None = None  # the newest, [vocab]
    choice: Choice | None = None  # the newest
    drawn: Drawn | None = None  # the same, until somebody has looked
    bits: float = 0.0  # told by this stream

    def offered(self, candidates: Candidates) -> Choice | None:
        """The choice among ``candidates``, if their delta is there.

        Raises:
            InvalidCandidates: if they cannot be used, or too much has been asked.
        """
        prefix = candidates.position, candidates.prefix_hash
        if self.choice is not None and prefix == (self.choice.position, self.choice.prefix_hash):
            return self.choice
        self.base = prefix, decode_candidates(candidates.payload), self._question(candidates)
        return self._choose()

    def weighed(self, position: int, prefix_hash: int, delta: npt.NDArray[np.float32]) -> Choice | None:
        """The choice by ``delta [vocab]``, if its candidates are there.

        Raises:
            InvalidCandidates: if none of them is an id that the small model knows, or too much has been asked.
        """
        self.delta = (position, prefix_hash), delta
        return self._choose()

    def take_drawn(self) -> Drawn | None:
        """How the newest choice came about, once."""
        drawn, self.drawn = self.drawn, None
        return drawn

    def _choose(self) -> Choice | None:
        if self.base is None or self.delta is None or self.base[0] != self.delta[0]:
            return None
        (position, prefix_hash), base, question = self.base
        delta = self.delta[1]
        self.base = self.delta = None
        token = self.disclosure.choices.get(question)
        if token is None and len(self.disclosure.choices) >= MAX_CHOICES:
            raise InvalidCandidates(f"more than {MAX_CHOICES} choices were asked for in one request")
        if token is None:
            token = self.disclosure.choices[question] = self._draw(_known(base, len(delta)), delta, _uniform(question))
        self.choice = Choice(self.stream, position, prefix_hash, token)
        return self.choice

    def _draw(self, base: BasePolicy, delta: npt.NDArray[np.float32], uniform: float) -> int:
        drawn = self.disclosure.draw(base, finite(delta[base.ids]), self.strength, self.sampling, uniform)
        self.drawn = drawn
        self.bits += drawn.bits
        return drawn.token

    def _question(self, candidates: Candidates) -> bytes:
        """A digest of all that the server decides on about this token."""
        asked = candidates.position, candidates.prefix_hash, candidates.payload
        return hmac.digest(self.seed, encode(asked), hashlib.sha256)


def chooser(begin: Begin, disclosures: Disclosures, secret: bytes) -> Chooser:
    """The chooser of a stream that begins; ``disclosures`` and ``secret`` are the device's.

    Without a seed the random numbers are the stream's own. A seed that a client gives has passed through the server: it is mixed
    with the secret, so that the same seed gives the same answer to the same question, candidates and all, on this device and yet
    tells the server nothing of the numbers.

    Raises:
        InvalidParameter: if a sampling parameter is not in its range.
    """
    sampling = begin.sampling
    assert sampling is not None
    check_strength("strength", begin.strength)
    _check("temperature", sampling.temperature, 0, math.inf)
    _check("top_p", sampling.top_p, 0, 1)
    _check("min_p", sampling.min_p, 0, 1)
    _check("confidence", sampling.confidence, 0, 1)
    if sampling.max_bits is not None:
        _check("max_bits", sampling.max_bits, 0, math.inf)
    disclosure = disclosures.of(begin.request, begin.query.ref, sampling.max_bits)  # a budget that is no number must not reach it
    own = f"stream {begin.stream} of {begin.request}, {disclosure.num_over} times over"
    origin = own if sampling.seed is None else f"seed {sampling.seed}"
    query = msgspec.structs.replace(begin.query, ref=disclosures.scope(begin.query.ref))
    # By a seed other requests may draw, too, and within other budgets; without one a stream may begin again within less.
    by = msgspec.structs.replace(sampling, max_bits=None) if sampling.seed is None else sampling
    asked = origin, query, begin.strength, by
    return Chooser(begin.stream, begin.strength, sampling, disclosure, hmac.digest(secret, encode(asked), hashlib.sha256))


def _uniform(digest: bytes) -> float:
    """A random number in [0, 1)."""
    return int.from_bytes(digest[:8], "little") / 2**64 * (1 - 2**-53)


def _check(field: str, value: float, least: float, most: float) -> None:
    if not least <= check_finite(field, value) <= most:
        raise InvalidParameter(field, value, f"a number from {least:g} to {most:g}")


def _known(base: BasePolicy, num_tokens: int) -> BasePolicy:
    """Without the ids that only the large model has: padding of its embeddings."""
    known = int(np.searchsorted(base.ids, num_tokens))
    if not known:
        raise InvalidCandidates("none of the candidates is a token of the small model")
    return base if known == len(base.ids) else BasePolicy(base.ids[:known], base.log_probs[:known], base.mass_left)
