"""The front end's part: from a client's request to steering requests that the engine can trust, or to HTTP 400.

Nothing here patches vLLM; ``hooks.py`` calls it with what vLLM's routes show.
"""

import asyncio
import hashlib
import hmac
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from costeer_vllm.engine import settings
from costeer_vllm.engine.link import admit
from costeer_vllm.errors import AdmissionRefused, InvalidParameter
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import PROTOCOL_VERSION, Admit, Admitted, Query, Turn, Vocabulary
from costeer_vllm.request import Options, SteeringRequest, parse_admitted, to_extra_args

_tickets = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Permission:
    """The hub's answer to one client request: who steers it, and with which proof."""

    options: Options
    worker: str
    key_digest: str | None = field(repr=False)  # whoever has it can make grants
    vocabulary: str | None = None  # the server's fingerprint

    def steer(self, request_id: str, query: Query) -> dict[str, Any]:
        """What goes into ``extra_args["costeer"]`` for one prompt of the request.

        Raises:
            InvalidParameter: if the engine would not take it, such as a query that is too long: better here than in mid-stream.
        """
        options = self.options
        query = msgspec.structs.replace(query, ref=options.context_ref)
        grant = None if self.key_digest is None else keys.grant(self.key_digest, self.worker, query)
        extra_args = to_extra_args(
            SteeringRequest(
                request=request_id,
                worker=self.worker,
                query=query,
                strength=options.strength,
                deadline_ms=options.deadline_ms,
                on_missing=options.on_missing,
                grant=grant,
                confidence=options.confidence,
                fusion=options.fusion,
                candidates=options.candidates,
                rounding=options.rounding,
                max_bits=options.max_bits,
                vocabulary=self.vocabulary,
            )
        )
        parse_admitted(extra_args)
        return extra_args

    def cache_salt(self) -> str:
        """Keeps prefix-cache hits, and their timing, among requests steered by the same worker under the same key."""
        scope = f"{self.worker}\0{self.key_digest}".encode()
        return hmac.new(settings.cache_secret(), scope, hashlib.sha256).hexdigest()[:32]


async def ask_permission(options: Options, user: str | None, vocabulary: Vocabulary) -> Permission:
    """Ask the hub which edge worker steers a request, without blocking the event loop.

    Raises:
        AdmissionRefused: with the hub's sentence, if no worker may or can.
        HubUnavailable: if the hub does not answer.
    """
    return await asyncio.to_thread(_ask_permission, options, user, vocabulary)


def _ask_permission(options: Options, user: str | None, vocabulary: Vocabulary) -> Permission:
    digest = None if options.key is None else keys.key_digest(options.key)
    user = (user or "")[:512] or None
    question = Admit(PROTOCOL_VERSION, next(_tickets), vocabulary, options.worker, user, digest, options.fusion)
    answer = admit(settings.hub_endpoint(), settings.attach_key(), question)
    if not isinstance(answer, Admitted):
        raise AdmissionRefused(f"costeer: {answer.sentence}")
    return Permission(options, answer.worker, digest if answer.keyed else None, vocabulary.fingerprint)


def chat_query(conversation: Iterable[Mapping[str, Any]], continue_final_message: bool) -> Query:
    """A rendered conversation -> Query.

    Raises:
        InvalidParameter: if it is empty or a part of it is not text.
    """
    turns = [Turn(str(message["role"]), _text(message.get("content"), i)) for i, message in enumerate(conversation)]
    if not turns:
        raise InvalidParameter("messages", "absent", "given as messages: token ids of a prefill elsewhere cannot be steered")
    return Query(messages=turns, continue_final_message=continue_final_message)


def prompt_query(prompt: object) -> Query:
    """One prompt of a completion request, text or token ids -> Query.

    Raises:
        InvalidParameter: for anything else, such as embeddings.
    """
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return Query(prompt=prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
        return Query(prompt_ids=prompt)
    raise InvalidParameter("prompt", type(prompt).__name__, "text or a list of token ids for a steered request")


def _text(content: object, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(_parts(content, index))


def _parts(content: object, index: int) -> Iterator[str]:
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not (
            isinstance(part, Mapping) and kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str)
        ):
            raise InvalidParameter(f"messages[{index}].content", f"a part of type {kind}", "text for a steered request")
        yield part["text"]
