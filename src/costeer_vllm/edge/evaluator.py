"""The model thread's half of the edge worker: orders in, payloads out, one window of the small model per turn.

While no stream waits for an answer the windows go to guesses: one for each of the streams that look ahead (``ahead.py``).

Whatever goes wrong here ends the streams it happened to, with a fixed sentence; the text of an exception is never passed on, for
it may hold a part of the private context.
"""

import contextlib
import logging
import math
from typing import Any

import numpy as np
import torch

from costeer_vllm.delta import encode_lossless, encode_sparse
from costeer_vllm.edge.ahead import NUM_LIKELY, Ahead, LogProbs, Pace, Path, Told
from costeer_vllm.edge.context import ChoosingFailed, PrivateContexts
from costeer_vllm.edge.prompts import RenderingFailed, prompts, where
from costeer_vllm.edge.retrieval import Retriever
from costeer_vllm.edge.settings import Encoding
from costeer_vllm.edge.small_model import STEP_TOKENS, Pair, SmallModel, TooLong
from costeer_vllm.edge.store import ContextUnreadable
from costeer_vllm.edge.streams import Answer, Failure, NoRoom, Order, Read, Result
from costeer_vllm.protocol.messages import EndReason

NO_CONTEXT = "the edge worker does not have, or cannot read any more, the private context that is asked for"

log = logging.getLogger("costeer.edge")


class Evaluator:
    """All open streams in the small model. One thread uses it."""

    def __init__(
        self,
        model: SmallModel,
        tokenizer: Any,
        template: str | None,
        contexts: PrivateContexts,
        encoding: Encoding,
        retriever: Retriever,
        tells_reads: bool = False,
        look_ahead: bool = True,
    ) -> None:
        """``tells_reads``: whether somebody wants to know what the small model thought of each token."""
        self._tells_reads, self._look_ahead = tells_reads, look_ahead
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._contexts, self._encoding, self._retriever = contexts, encoding, retriever
        self._pairs: dict[int, Pair] = {}
        self._asked: dict[int, Order] = {}  # to be answered, the longest waiting first
        self._ahead: dict[int, Ahead] = {}  # cloud fusion
        self._prefill_next = False
        self._end = tokenizer.eos_token_id  # what would follow it is not asked for
        self.pace = Pace()

    @property
    def is_busy(self) -> bool:
        """Whether another turn has something to do."""
        return bool(self._asked or self._guesses())

    def turn(self, orders: list[Order], closed: list[int]) -> list[Result]:
        """Take orders, then evaluate one window: the next ids of all streams that need only those, or a part of one prompt.

        The two kinds of windows alternate, so that no stream waits for more than one part of another's prompt. Raises nothing.
        """
        try:
            return self._turn(orders, closed)
        except Exception as error:  # none that a stream in particular caused
            log.error("the model thread fails: %s", where(error))
        serials = {*self._pairs, *(order.serial for order in orders)}
        return [self._give_up(serial, "failed", "the edge worker failed and starts afresh") for serial in sorted(serials)]

    def _turn(self, orders: list[Order], closed: list[int]) -> list[Result]:
        for serial in closed:
            self._close(serial)
        results: list[Result] = [read for order in orders if (read := self._read(order))]
        results += [told for order in orders if (told := self._take(order))]
        short = [serial for serial in self._asked if _is_short(self._pairs[serial])]
        long = next((serial for serial in self._asked if not _is_short(self._pairs[serial])), None)
        if long is not None and (self._prefill_next or not short):
            self._prefill_next = False
            return results + self._guarded(self._prefill, [long])
        self._prefill_next = True
        if short:
            return results + self._guarded(self._step, short)
        return results + self._guarded(self._guess, sorted(self._guesses()))

    def _take(self, order: Order) -> Failure | NoRoom | None:
        told = self._open(order) if order.query is not None else None
        pair = self._pairs.get(order.serial)
        if pair is None:  # it cannot be opened, or was given up in the meantime; its Failure is on the way
            return told
        if self._was_told(order, pair):
            return told
        pair.rewrite(order.keep, order.tokens)
        limit = self._model.max_positions
        if pair.length > limit and order.fusion == "edge" and len(pair.without_context.ids) <= limit:
            told = self._do_without(order.serial, pair)
        elif pair.length > limit:
            return self._give_up(order.serial, "refused", f"the stream is longer than the small model's {limit} positions")
        self._asked[order.serial] = order
        return told

    def _was_told(self, order: Order, pair: Pair) -> bool:
        """Whether the delta that an order asks for is on its way already; ``pair`` then holds its prefix."""
        ahead = self._ahead.get(order.serial)
        if ahead is None or order.query is not None:
            return False
        if not ahead.advance(order.keep, order.tokens, order.position, order.prefix_hash, order.at, self.pace):
            return False
        if pair.agreement(order.keep, order.tokens) < len(order.tokens):  # a less likely guess came true
            pair.rewrite(order.keep, order.tokens)
        return True

    def _do_without(self, serial: int, pair: Pair) -> NoRoom:
        """Go on with two rows without context: in edge fusion a refusal would tell how long the context is, uncounted."""
        ids, num_generated = pair.without_context.ids, pair.num_generated
        prompt, generated = ids[: len(ids) - num_generated], ids[len(ids) - num_generated :]
        self._model.discard(pair)
        self._pairs[serial] = again = self._model.open(prompt, prompt)
        again.rewrite(0, generated)
        return NoRoom(serial)

    def _read(self, order: Order) -> Read | None:
        """What the small model thought of the token that was chosen at the newest position."""
        ahead = self._ahead.get(order.serial)
        if ahead is None or ahead.root is None or ahead.root.rows is None or ahead.position != order.keep or not order.tokens:
            return None
        token = order.tokens[0]
        with_context, without_context = ahead.root.rows
        return Read(order.serial, token, math.exp(without_context[token]), math.exp(with_context[token]))

    def _open(self, order: Order) -> Failure | NoRoom | None:
        assert order.query is not None
        try:
            context = self._contexts.around(order.query.ref, order.query, self._retriever)
            with_ids, without_ids = prompts(order.query, context, self._tokenizer, self._template)
            if order.fusion == "edge" and len(with_ids) >= self._model.max_positions > len(without_ids):  # see _do_without
                self._pairs[order.serial] = self._model.open(without_ids, without_ids)
                return NoRoom(order.serial)
            self._pairs[order.serial] = self._model.open(with_ids, without_ids)
            if order.fusion == "cloud":
                max_bytes = order.guess_bytes if self._look_ahead else 0
                self._ahead[order.serial] = Ahead(order.position, order.prefix_hash, order.strength, max_bytes)
        except TooLong as error:
            return Failure(order.serial, "refused", str(error))
        except ContextUnreadable as error:
            log.error("%s", error)
            return Failure(order.serial, "failed", NO_CONTEXT)
        except ChoosingFailed as error:
            log.error("stream %d: %s", order.serial, error)
            return Failure(order.serial, "failed", NO_CONTEXT)
        except RenderingFailed as error:
            log.error("stream %d: %s", order.serial, error)
            return Failure(order.serial, "failed", "the edge worker cannot turn the query into a prompt of its small model")
        except Exception as error:  # out of memory, mostly
            log.error("stream %d cannot be opened: %s", order.serial, where(error))
            return Failure(order.serial, "failed", "the edge worker cannot open another stream")
        return None

    def _guarded(self, evaluate: Any, serials: list[int]) -> list[Result]:
        """``evaluate(serials)``; if it raises, the streams are given up."""
        try:
            results: list[Result] = evaluate(serials)
            return results
        except Exception as error:
            log.error("the small model fails: %s", where(error))
        return [self._give_up(serial, "failed", "the small model of the edge worker fails") for serial in serials]

    def _prefill(self, serials: list[int]) -> list[Result]:
        (serial,) = serials
        pair = self._pairs[serial]
        self._model.reuse(pair)
        if pair.is_ready:
            num_ids = sum(len(row.ids) for row in pair.rows)
            log.debug("stream %d: %d of the %d ids of its prompts were known", serial, pair.num_reused, num_ids)
            return self._step(serials)
        self._model.prefill(pair)
        return []

    def _step(self, serials: list[int]) -> list[Result]:
        return self._evaluate(dict.fromkeys(serials, ()))

    def _guess(self, serials: list[int]) -> list[Result]:
        paths = self._guesses()
        for serial in serials:
            self._pairs[serial].rewrite(self._ahead[serial].position, paths[serial])
        return self._evaluate(paths) if paths else []

    def _guesses(self) -> dict[int, Path]:
        """For every stream the path that it should tell next unasked, if there is one."""
        if not self.pace.pays:
            return {}
        paths = {serial: ahead.next(self.pace.reach, STEP_TOKENS) for serial, ahead in self._ahead.items()}
        return {serial: path for serial, path in paths.items() if path and self._fits(serial, path)}

    def _fits(self, serial: int, path: Path) -> bool:
        length = self._pairs[serial].prompt_length + self._ahead[serial].position + len(path)
        return length <= self._model.max_positions

    def _evaluate(self, paths: dict[int, Path]) -> list[Result]:
        """One window for the newest ids of these streams: those of a question, where the path is empty, or of a guess."""
        serials = sorted(paths, key=lambda serial: self._pairs[serial].with_context.index)
        log_with, log_without = self._model.step([self._pairs[serial] for serial in serials])
        is_bad = torch.isnan(log_with.amax(-1) + log_without.amax(-1)).tolist()
        likely = self._likely(serials, log_with, log_without)
        answers = list[Result]()
        for serial, bad, *row in zip(serials, is_bad, likely, log_with.cpu().numpy(), log_without.cpu().numpy(), strict=True):
            if bad and paths[serial]:
                self._stop_guessing(serial)
            elif bad:
                answers.append(self._give_up(serial, "failed", "the small model of the edge worker gives no numbers"))
            elif (answer := self._answer(serial, paths[serial], *row)) is not None:
                answers.append(answer)
        return answers

    def _likely(self, serials: list[int], log_with: torch.Tensor, log_without: torch.Tensor) -> list[list[tuple[int, float]]]:
        """What may come next in each stream, the likeliest first: ids and probabilities in the stand-in of ``ahead``."""
        if not self.pace.pays or not any(serial in self._ahead for serial in serials):
            return [[] for _ in serials]
        strengths = [self._ahead[serial].strength if serial in self._ahead else 0.0 for serial in serials]
        stand_in = torch.lerp(log_without, log_with, log_with.new_tensor(strengths)[:, None])
        stand_in.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)  # an id that a row cannot produce
        top = stand_in.topk(NUM_LIKELY)
        shares = (top.values - stand_in.logsumexp(-1, keepdim=True)).exp()
        rows = zip(top.indices.tolist(), shares.tolist(), strict=True)
        return [[(token, p) for token, p in zip(*row, strict=True) if token != self._end] for row in rows]

    def _answer(
        self, serial: int, path: Path, likely: list[tuple[int, float]], with_context: LogProbs, without_context: LogProbs
    ) -> Answer | None:
        order = None if path else self._asked.pop(serial)
        ahead = self._ahead.get(serial)
        if ahead is None:
            assert order is not None
            return Answer(serial, order.position, order.prefix_hash, _difference(with_context, without_context))
        payload = self._encoded(ahead.strength, with_context, without_context)
        rows = (with_context.astype(np.float16), without_context.astype(np.float16)) if self._tells_reads else None
        if not ahead.tell(path, Told(likely, rows), len(payload)):
            return None
        return Answer(serial, ahead.position + len(path), ahead.hash_of(path), payload, path)

    def _stop_guessing(self, serial: int) -> None:
        """The small model gives no numbers for a continuation that may never come: the stream goes on without a trace of it."""
        ahead, pair = self._ahead[serial], self._pairs[serial]
        ahead.stop()
        pair.rewrite(ahead.position, ())
        self._model.wipe(pair)

    def _encoded(self, strength: float, with_context: LogProbs, without_context: LogProbs) -> bytes:
        if self._encoding == "sparse":
            return encode_sparse(with_context, without_context, strength)
        return encode_lossless(_difference(with_context, without_context))

    def _give_up(self, serial: int, reason: EndReason, sentence: str) -> Failure:
        self._asked.pop(serial, None)
        self._ahead.pop(serial, None)
        pair = self._pairs.pop(serial, None)
        if pair is not None:
            with contextlib.suppress(Exception):  # an accelerator in such a state that not even zeros can be written
                self._model.discard(pair)
        return Failure(serial, reason, sentence)

    def _close(self, serial: int) -> None:
        self._asked.pop(serial, None)
        self._ahead.pop(serial, None)
        pair = self._pairs.pop(serial, None)
        if pair is not None:
            self._model.close(pair)


def _is_short(pair: Pair) -> bool:
    return pair.pending <= STEP_TOKENS


def _difference(with_context: LogProbs, without_context: LogProbs) -> LogProbs:
    with np.errstate(invalid="ignore"):  # -inf - -inf
        delta: LogProbs = with_context - without_context
    return delta
