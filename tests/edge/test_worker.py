"""A real worker over a real WebSocket: what it answers, what it refuses, and what it survives."""

import asyncio
import logging
import random
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from costeer_vllm.delta import STEP, DenseDelta, SparseDelta, decode
from costeer_vllm.edge import worker as worker_module
from costeer_vllm.edge.evaluator import NO_CONTEXT, Evaluator
from costeer_vllm.edge.prompts import Surround, prompts
from costeer_vllm.edge.small_model import SmallModel
from costeer_vllm.edge.worker import AttachmentRefused, EdgeSettings, EdgeWorker, attach_url
from costeer_vllm.edge.worker import run as run_worker
from costeer_vllm.errors import InvalidParameter, Unsupported
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import Attach, Choice, Delta, End, Message, Query, Refused, Sampling, Turn, decode_edge_to_hub
from costeer_vllm.protocol.stream import extend_hash
from costeer_vllm.vocab import fingerprint

from .hub import (
    CONTEXT,
    GREEDY,
    QUERY,
    TIMEOUT_S,
    Hub,
    Link,
    advance,
    attached,
    begin,
    candidates,
    run,
    running,
    settings_for,
    welcome,
)

VOCAB = 640


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> EdgeSettings:
    return settings_for(model_dir, tmp_path)


class Twin:
    """The same model without windows or caches."""

    def __init__(self, model_dir: Path, tokenizer: Any) -> None:
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(model_dir).eval(), tokenizer

    def delta(self, query: Query, generated: list[int], context: str = CONTEXT) -> np.ndarray:
        log_with, log_without = self.rows(query, generated, context)
        return log_with - log_without

    def without(self, query: Query, generated: list[int]) -> np.ndarray:
        return self.rows(query, generated, CONTEXT)[1]

    @torch.inference_mode()
    def rows(self, query: Query, generated: list[int], context: str) -> list[np.ndarray]:
        rows = [torch.tensor([ids + generated]) for ids in prompts(query, Surround(f"{context}\n\n"), self.tokenizer)]
        return [torch.log_softmax(self.model(row).logits[0, -1].double(), -1).numpy() for row in rows]

    def check(self, answer: Delta | End, query: Query, generated: list[int], context: str = CONTEXT) -> None:
        assert isinstance(answer, Delta), answer
        assert (answer.position, answer.prefix_hash) == (len(generated), extend_hash(0, generated))
        found = decode(answer.payload, VOCAB)
        assert isinstance(found, DenseDelta)
        expected = self.delta(query, generated, context)
        np.testing.assert_allclose(found.values, expected, atol=1e-4)
        assert found.values.argmax() == expected.argmax()


@pytest.fixture(scope="module")
def twin(model_dir: Path, tokenizer: Any) -> Twin:
    return Twin(model_dir, tokenizer)


# --- the stream ---


def test_a_stream_from_begin_to_end(settings: EdgeSettings, twin: Twin, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        sent: list[bytes] = []
        async with attached(settings, on_frame_sent=sent.append) as (_, link, _):
            twin.check(await link.ask(begin("s")), QUERY, [])
            generated: list[int] = []
            for token in (17, 300, 5, 599, 639):
                generated.append(token)
                twin.check(await link.ask(advance("s", generated)), QUERY, generated)
            await link.send(End("s", "finished"))
            end = await link.ask(advance("s", [*generated, 1]))
            assert end == End("s", "unknown_stream", "this edge worker does not know the stream")
        assert len(sent) == 1 + 6 + 1

    with caplog.at_level(logging.INFO, "costeer.edge"):
        run(main())
    assert any(message.startswith("attached as 'laptop' to ws://127.0.0.1:") for message in caplog.messages)


def test_replay_going_back_and_asking_again(settings: EdgeSettings, twin: Twin) -> None:
    async def main() -> None:
        async with attached(settings) as (_, link, _):
            generated = [9, 8, 7, 6, 5]
            twin.check(await link.ask(begin("s", tokens=generated)), QUERY, generated)
            for keep, new in ((5, [4, 3]), (2, [1, 1, 1]), (5, []), (3, [])):
                generated = generated[:keep] + new
                twin.check(await link.ask(advance("s", generated, len(new))), QUERY, generated)
            await link.send(End("s", "preempted"))
            twin.check(await link.ask(begin("s", tokens=[1, 2])), QUERY, [1, 2])
            twin.check(await link.ask(begin("s")), QUERY, [])

    run(main())


def test_only_the_newest_prefix_is_answered(settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model thread is held, frames pile up: they become one answer."""
    held, release = threading.Event(), threading.Event()
    turn = Evaluator.turn

    def held_turn(self: Evaluator, orders: Any, closed: Any) -> Any:
        held.set()
        assert release.wait(TIMEOUT_S)
        return turn(self, orders, closed)

    monkeypatch.setattr(Evaluator, "turn", held_turn)

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.send(begin("s"))
            await asyncio.get_running_loop().run_in_executor(None, held.wait, TIMEOUT_S)
            generated = list(range(20))
            for count in range(1, 21):
                await link.send(advance("s", generated[:count]))
            await link.send(advance("other", [1]))  # answered at once: all frames before it have been taken in
            assert (await link.receive()).stream == "other"
            release.set()
            twin.check(await link.receive(), QUERY, generated)
            twin.check(await link.ask(advance("s", [*generated, 1])), QUERY, [*generated, 1])

    run(main())


def test_eight_streams_side_by_side(settings: EdgeSettings, twin: Twin) -> None:
    rng = random.Random(0)
    queries = [
        QUERY,
        Query(prompt="Once upon a time"),
        Query(prompt_ids=[300, 301, 302]),
        Query(messages=[Turn("user", "word " * 400)]),
        *(Query(messages=[Turn("user", "Hello " * n)]) for n in range(1, 5)),
    ]

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            generated: dict[str, list[int]] = {f"s{i}": [] for i in range(8)}
            for i, query in enumerate(queries):
                await link.send(begin(f"s{i}", query))
            for _ in range(6):
                answers = [await link.receive() for _ in generated]
                assert {answer.stream for answer in answers} == set(generated)
                for answer in answers:
                    twin.check(answer, queries[int(answer.stream[1:])], generated[answer.stream])
                for name in rng.sample(sorted(generated), 8):
                    generated[name].append(rng.randrange(VOCAB))
                    await link.send(advance(name, generated[name]))

    run(main())


def test_a_long_prompt_does_not_hold_up_the_others(settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a prompt and steps of other streams alternate: several answers come before the prompt's."""
    monkeypatch.setattr("costeer_vllm.edge.small_model.PREFILL_TOKENS", 64)
    long = Query(messages=[Turn("user", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 20)])

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.ask(begin("short"))
            generated: list[int] = []
            await link.send(begin("long", long))
            while True:
                generated.append(3)
                answer = await link.ask(advance("short", generated))
                if answer.stream == "long":
                    break
                twin.check(answer, QUERY, generated)
            twin.check(answer, long, [])
            assert len(generated) >= 5

    run(main())


def test_streams_that_begin_together_evaluate_the_context_once(
    settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = "I like long walks on the beach. " * 100
    Path(settings.context).write_text(context)
    num_ids = len(prompts(QUERY, Surround(f"{context}\n\n"), twin.tokenizer)[0])
    evaluated: list[int] = []
    once = SmallModel._run

    def counted(self: SmallModel, module: Any, parts: Any, **kwargs: Any) -> Any:
        evaluated.append(sum(count for _, count in parts))
        return once(self, module, parts, **kwargs)

    monkeypatch.setattr(SmallModel, "_run", counted)

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            queries = {f"s{i}": Query(messages=[Turn("user", f"Question {i}?")]) for i in range(6)}
            evaluated.clear()
            for name, query in queries.items():
                await link.send(begin(name, query))
            for _ in queries:
                answer = await link.receive()
                twin.check(answer, queries[answer.stream], [], context)

    run(main())
    assert num_ids > 600
    assert sum(evaluated) < 1.5 * num_ids


def test_a_request_chooses_among_contexts(settings: EdgeSettings, twin: Twin, tmp_path: Path) -> None:
    file = tmp_path / "contexts.jsonl"
    file.write_text('{"ref": "ann", "before": "I am Ann.\\n\\n"}\n{"ref": "cid", "before": "I am Cid.\\n\\n"}\n')

    def asking(ref: str | None) -> Query:
        return Query(messages=QUERY.messages, ref=ref)

    async def main() -> None:
        async with attached(replace(settings, contexts=str(file))) as (_, link, _):
            for ref, context in (("ann", "I am Ann."), ("cid", "I am Cid."), (None, CONTEXT)):
                twin.check(await link.ask(begin(f"s-{ref}", asking(ref))), QUERY, [], context)
            end = await link.ask(begin("s", asking("eve")))
            assert isinstance(end, End)
            assert (end.reason, "does not have" in end.sentence, "eve" in end.sentence) == ("failed", True, False)

    run(main())


def test_sparse_deltas(settings: EdgeSettings, twin: Twin) -> None:
    async def main() -> None:
        async with attached(replace(settings, delta="sparse")) as (_, link, _):
            answer = await link.ask(begin("s"))
            assert isinstance(answer, Delta)
            found, expected = decode(answer.payload, VOCAB), twin.delta(QUERY, [])
            assert isinstance(found, SparseDelta)
            assert len(found.ids) > 1
            shift = found.values - expected[found.ids]  # one constant, the tail
            assert np.ptp(shift) < STEP + 1e-4

    run(main())


def test_an_edit_of_the_context_takes_effect_at_the_next_begin(settings: EdgeSettings, twin: Twin) -> None:
    async def main() -> None:
        async with attached(settings) as (_, link, _):
            twin.check(await link.ask(begin("a")), QUERY, [])
            Path(settings.context).write_text("I live at the North Pole.")
            twin.check(await link.ask(advance("a", [5])), QUERY, [5])
            twin.check(await link.ask(begin("b")), QUERY, [], "I live at the North Pole.")
            Path(settings.context).unlink()
            end = await link.ask(begin("c"))
            assert end == End("c", "failed", NO_CONTEXT)
            twin.check(await link.ask(advance("a", [5, 6])), QUERY, [5, 6])

    run(main())


# --- edge fusion ---

STRENGTH = 1.5


def base_policy(seed: int, num: int = 40) -> dict[int, float]:
    """Log-probabilities of some tokens, by id; padding of a larger vocabulary is among them."""
    rng = np.random.default_rng(seed)
    ids = [*rng.choice(VOCAB, num - 2, replace=False).tolist(), VOCAB, VOCAB + 63]
    return dict(zip(ids, np.log(rng.dirichlet(np.ones(num))).tolist(), strict=True))


async def generate(link: Link, stream: str, sampling: Sampling, num_tokens: int = 6, query: Query = QUERY) -> list[int]:
    """A whole edge-fused stream; the base policies are those of ``base_policy``."""
    await link.send(begin(stream, query, sampling=sampling, strength=STRENGTH))
    generated: list[int] = []
    for position in range(num_tokens):
        choice = await link.ask(candidates(stream, generated, base_policy(position)))
        assert choice == Choice(stream, position, extend_hash(0, generated), getattr(choice, "token", None))
        generated.append(choice.token)
        await link.send(advance(stream, generated))
    await link.send(End(stream, "finished"))
    return generated


def greedy_reference(twin: Twin, generated: list[int], query: Query = QUERY) -> int:
    """Base policy and delta fused by the definition, without the package's own fusion."""
    base, delta = base_policy(len(generated)), twin.delta(query, generated)
    return max((token for token in base if token < VOCAB), key=lambda token: base[token] + STRENGTH * delta[token])


def test_an_edge_fused_stream_chooses_its_tokens_and_sends_nothing_else(settings: EdgeSettings, twin: Twin) -> None:
    sent: list[bytes] = []

    async def main() -> None:
        async with attached(settings, on_frame_sent=sent.append) as (_, link, _):
            generated = await generate(link, "s", GREEDY)
            assert generated == [greedy_reference(twin, generated[:i]) for i in range(len(generated))]
            end = await link.ask(candidates("s", generated, base_policy(0)))
            assert isinstance(end, End)
            assert end.reason == "unknown_stream"

    run(main())
    up = [decode_edge_to_hub(frame) for frame in sent]
    assert [type(message) for message in up] == [Attach, *[Choice] * 6, End]
    assert max(len(frame) for frame in sent[1:7]) < 100


def test_an_edge_fused_stream_draws_as_it_is_asked_to(settings: EdgeSettings, twin: Twin) -> None:
    """The same seed gives the same answer on this device; with the two likeliest tokens only, one of them is drawn."""

    async def main() -> None:
        async with attached(settings) as (_, link, worker):
            seeds = {"a": 4, "b": 4, "c": 5}
            answers = [await generate(link, name, Sampling(temperature=5.0, seed=seed)) for name, seed in seeds.items()]
            assert answers[0] == answers[1] != answers[2]
            told = [worker._books.disclosures.of(name, None) for name in "abc"]
            assert told[0].bits == pytest.approx(told[1].bits, abs=1e-3)
            assert told[0].bits != pytest.approx(told[2].bits, abs=1e-3)
            assert [len(one.drawn) for one in told] == [6, 6, 6]
            delta = twin.delta(QUERY, [])
            fused = {t: value + STRENGTH * delta[t] for t, value in base_policy(0).items() if t < VOCAB}
            likeliest = sorted(fused, key=fused.__getitem__)[-2:]
            drawn = {(await generate(link, f"k{i}", Sampling(50.0, top_k=2), 1))[0] for i in range(25)}
            assert drawn == set(likeliest)

    run(main())


def test_candidates_may_come_before_the_small_model_is_done_and_after(
    settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Semaphore(0)
    turn = Evaluator.turn

    def counted(self: Evaluator, orders: Any, closed: Any) -> Any:
        results = turn(self, orders, closed)
        for _ in results:
            done.release()
        return results

    monkeypatch.setattr(Evaluator, "turn", counted)

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            for stream, is_late in (("late", True), ("early", False)):
                await link.send(begin(stream, sampling=GREEDY, strength=STRENGTH))
                if is_late:
                    assert await asyncio.get_running_loop().run_in_executor(None, done.acquire, True, TIMEOUT_S)
                offered = candidates(stream, [], base_policy(0))
                choice = await link.ask(offered)
                assert choice == Choice(stream, 0, 0, greedy_reference(twin, []))
                assert await link.ask(offered) == choice

    run(main())


def test_edge_and_cloud_fusion_side_by_side(settings: EdgeSettings, twin: Twin) -> None:
    for delta in ("lossless", "sparse"):

        async def main(delta: Any = delta) -> None:
            async with attached(replace(settings, delta=delta)) as (_, link, _):
                answer = await link.ask(begin("cloud"))
                assert isinstance(answer, Delta)
                generated = await generate(link, "edge", GREEDY, 2)
                assert generated[0] == greedy_reference(twin, [])
                answer = await link.ask(advance("cloud", [5]))
                assert isinstance(answer, Delta)
                found, expected = decode(answer.payload, VOCAB), twin.delta(QUERY, [5])
                assert len(found.values) > 1
                shift = found.values - (expected if isinstance(found, DenseDelta) else expected[found.ids])
                assert np.ptp(shift) < STEP + 1e-4

        run(main())


def test_a_device_of_tokens_only_sends_no_delta(settings: EdgeSettings, twin: Twin) -> None:
    sent: list[bytes] = []

    async def main() -> None:
        tokens_only = replace(settings, tokens_only=True, max_bits=0.0)
        async with attached(tokens_only, on_frame_sent=sent.append) as (hub, link, worker):
            assert hub.attaches[0].fusions == ("edge",)
            end = await link.ask(begin("cloud"))
            assert end == End("cloud", "refused", "this edge worker does not consent to cloud fusion")
            generated = await generate(link, "s", GREEDY)
            base = [{t: p for t, p in base_policy(i).items() if t < VOCAB} for i in range(6)]
            assert generated == [max(one, key=one.__getitem__) for one in base], "with no budget the base policy decides"
            assert worker._books.disclosures.of("s", None, 50.0).max_bits == 0.0

    run(main())
    assert not [frame for frame in sent if isinstance(decode_edge_to_hub(frame), Delta)]


def test_a_device_consents_to_both_fusions_unless_it_is_told(settings: EdgeSettings) -> None:
    async def main() -> None:
        async with attached(settings) as (hub, _, _):
            assert hub.attaches[0].fusions == ("cloud", "edge")

    run(main())


def test_a_chooser_that_fails_ends_its_stream_and_the_others_go_on(settings: EdgeSettings, twin: Twin) -> None:
    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.send(begin("good", sampling=GREEDY, strength=STRENGTH))
            await link.send(begin("bad", sampling=GREEDY))
            end = await link.ask(candidates("bad", [], {VOCAB: -0.7, VOCAB + 1: -0.7}))
            assert end == End("bad", "failed", "none of the candidates is a token of the small model")
            end = await link.ask(begin("worse", sampling=Sampling(top_p=float("nan"))))
            assert isinstance(end, End)
            assert (end.reason, "top_p is nan" in end.sentence) == ("failed", True)
            choice = await link.ask(candidates("good", [], base_policy(0)))
            assert choice == Choice("good", 0, 0, greedy_reference(twin, []))

    run(main())


# --- what cannot be served ---


def test_bad_streams_are_ended_and_good_ones_go_on(settings: EdgeSettings, twin: Twin) -> None:
    bad: list[tuple[Message, str, str]] = [
        (advance("bad", [1, 2, 3], num_new=1), "failed", "a gap"),
        (advance("bad", [VOCAB]), "failed", "outside the small model's 640"),
        (replace_hash(advance("bad", [1])), "failed", "not those that were sent"),
        (begin("bad", worker="desk"), "failed", "is named laptop"),
        (begin("bad", Query(prompt_ids=[5] * 2048)), "refused", "a query of 2048 tokens and the private context .* 2048"),
        (begin("bad", Query(prompt="")), "failed", "cannot turn the query into a prompt"),
        (begin("bad", Query(prompt_ids=[1] * 1900), tokens=[1] * 1000), "refused", "longer than the small model's 2048"),
    ]

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.ask(begin("good"))
            generated: list[int] = []
            for message, reason, sentence in bad:
                await link.ask(begin("bad"))
                end = await link.ask(message)
                assert isinstance(end, End)
                assert (end.stream, end.reason) == ("bad", reason)
                assert re.search(sentence, end.sentence), end.sentence
                generated.append(4)
                twin.check(await link.ask(advance("good", generated)), QUERY, generated)

    run(main())


def replace_hash(message: Any) -> Message:
    return type(message)(message.stream, message.position, message.prefix_hash ^ 1, message.tokens)


def test_at_most_max_streams(settings: EdgeSettings) -> None:
    async def main() -> None:
        async with attached(replace(settings, max_streams=2)) as (hub, link, _):
            assert hub.attaches[0].max_streams == 2
            assert isinstance(await link.ask(begin("a")), Delta)
            assert isinstance(await link.ask(begin("b")), Delta)
            end = await link.ask(begin("c"))
            assert isinstance(end, End)
            assert end.reason == "overloaded"
            await link.send(End("a", "finished"))
            assert isinstance(await link.ask(begin("c")), Delta)

    run(main())


def test_the_steering_key_is_demanded(settings: EdgeSettings) -> None:
    key = "open sesame"

    async def main() -> None:
        async with attached(replace(settings, steering_key=key)) as (hub, link, _):
            assert hub.attaches[0].key_digest == keys.key_digest(key)
            grant = keys.grant(keys.key_digest(key), "laptop", QUERY)
            for wrong in (None, "0" * 64):
                end = await link.ask(begin("s", grant=wrong))
                assert isinstance(end, End)
                assert end.reason == "refused"
            end = await link.ask(begin("s", Query(prompt="another query"), grant=grant))
            assert isinstance(end, End)
            assert isinstance(await link.ask(begin("s", grant=grant)), Delta)

    run(main())


# --- trouble ---


def test_an_exception_in_the_model_ends_the_streams_of_its_window_only(
    settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SmallModel.step
    errors = [torch.OutOfMemoryError("secret"), KeyError("secret"), MemoryError()]
    failing: list[Exception] = []

    def maybe(self: SmallModel, pairs: Any) -> Any:
        if failing:
            raise failing.pop()
        return step(self, pairs)

    monkeypatch.setattr(SmallModel, "step", maybe)

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.ask(begin("good"))
            for error in errors:
                await link.ask(begin("bad"))
                failing.append(error)
                end = await link.ask(advance("bad", [1]))
                assert end == End("bad", "failed", "the small model of the edge worker fails")
            twin.check(await link.ask(advance("good", [1])), QUERY, [1])

    run(main())


def test_not_a_number_is_never_sent(settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SmallModel.step
    broken: list[bool] = []

    def maybe(self: SmallModel, pairs: Any) -> Any:
        log_with, log_without = step(self, pairs)
        return (log_with * float("nan"), log_without) if broken else (log_with, log_without)

    monkeypatch.setattr(SmallModel, "step", maybe)

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.ask(begin("s"))
            broken.append(True)
            end = await link.ask(advance("s", [1]))
            assert end == End("s", "failed", "the small model of the edge worker gives no numbers")
            broken.clear()
            twin.check(await link.ask(begin("s")), QUERY, [])

    run(main())


def test_an_exception_beside_the_model_ends_all_streams_and_the_worker_lives_on(
    settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Evaluator._take
    failing: list[Exception] = []

    def maybe(self: Evaluator, order: Any) -> Any:
        if failing:
            raise failing.pop()
        return take(self, order)

    monkeypatch.setattr(Evaluator, "_take", maybe)

    async def main() -> None:
        async with attached(settings) as (_, link, _):
            await link.ask(begin("a"))
            await link.ask(begin("b"))
            failing.append(RuntimeError("secret"))
            ends = [await link.ask(begin("new")), await link.receive(), await link.receive()]
            assert all(isinstance(end, End) and end.reason == "failed" for end in ends)
            assert {end.stream for end in ends} == {"a", "b", "new"}
            twin.check(await link.ask(begin("c")), QUERY, [])

    run(main())


def test_a_lost_connection_is_made_again_and_its_streams_are_gone(settings: EdgeSettings, twin: Twin) -> None:
    async def main() -> None:
        async with attached(settings) as (hub, link, _):
            for _ in range(3):
                twin.check(await link.ask(begin("s")), QUERY, [])
                await link.send(advance("s", [1]))  # its answer finds no one
                await link.websocket.close(1012)
                link = await hub.link()
                end = await link.ask(advance("s", [1]))
                assert isinstance(end, End)
                assert end.reason == "unknown_stream"
            link.websocket.transport.abort()
            twin.check(await (await hub.link()).ask(begin("s")), QUERY, [])
            assert len({attach.instance for attach in hub.attaches}) == 1

    run(main())


def test_a_hub_that_is_not_there_yet_is_dialled_until_it_is(settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        warnings: asyncio.Queue[str] = asyncio.Queue()
        monkeypatch.setattr(worker_module.log, "warning", lambda message, *args: warnings.put_nowait(message % args))
        async with Hub() as former:
            url = former.url
        worker = EdgeWorker(replace(settings, hub=url), retry=worker_module.Retry(0.001, 0.001))
        task = asyncio.create_task(worker.run())
        for _ in range(3):
            assert "failed or was lost" in await asyncio.wait_for(warnings.get(), TIMEOUT_S)
        worker.stop()
        await asyncio.wait_for(task, TIMEOUT_S)

    run(main())


def test_refusals(settings: EdgeSettings) -> None:
    def refuse(code: Any) -> Any:
        return lambda attach: Refused(code, f"because of {code}\n")

    async def main() -> None:
        for code in ("version", "attach_key"):
            async with Hub() as hub:
                hub.replies = [refuse(code)]
                async with running(hub, settings) as (_, task):
                    with pytest.raises(AttachmentRefused, match=f"the hub refuses: because of {code} $"):
                        await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)
        async with Hub() as hub:
            hub.replies = [refuse("name_taken"), refuse("name_taken"), refuse("full"), lambda _: End("x", "finished"), welcome]
            async with running(hub, settings) as (_, _task):
                while len(hub.attaches) < 5:
                    await hub.link()
        async with Hub() as hub:
            hub.replies = [refuse("name_taken")] * 10
            async with running(hub, settings, retry=worker_module.Retry(0.001, 10.0, name_taken=3)) as (_, task):
                with pytest.raises(AttachmentRefused, match="name_taken"):
                    await asyncio.wait_for(asyncio.shield(task), TIMEOUT_S)
            assert len(hub.attaches) == 4

    run(main())


def test_what_an_attach_says(settings: EdgeSettings, tokenizer: Any) -> None:
    async def main() -> None:
        async with attached(replace(settings, attach_key="k")) as (hub, _, _):
            attach = hub.attaches[0]
            assert (attach.worker, attach.model, attach.attach_key, attach.key_digest) == ("laptop", "tiny-qwen2", "k", None)
            assert attach.vocabulary == fingerprint(tokenizer.get_vocab())
            assert str(Path(settings.model).parent) not in str(attach)

    run(main())


# --- settings and exit codes ---


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("server:8770", "ws://server:8770/v1/attach"),
        ("ws://server:8770/", "ws://server:8770/v1/attach"),
        ("ws://server:8770/v1/attach", "ws://server:8770/v1/attach"),
        ("http://10.0.0.1:1/hub", "ws://10.0.0.1:1/hub/v1/attach"),
        ("https://hub.example.org", "wss://hub.example.org/v1/attach"),
        ("wss://[::1]:8770", "wss://[::1]:8770/v1/attach"),
    ],
)
def test_hub_addresses(given: str, url: str) -> None:
    assert attach_url(given) == url


@pytest.mark.parametrize(
    "given", ["", "ftp://server", "ws://", "ws://server:99999", "ws://me:word@server", "ws://s/?a=1", "ws://[::1"]
)
def test_hub_addresses_that_are_none(given: str) -> None:
    with pytest.raises(InvalidParameter, match="hub is"):
        attach_url(given)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "-x"),
        ("name", "a b"),
        ("name", "a" * 129),
        ("name", "a\n"),
        ("delta", "dense"),
        ("dtype", "float8"),
        ("attach_key", ""),
        ("steering_key", "x" * 513),
        ("max_streams", 0),
        ("max_streams", 4097),
        ("threads", 0),
        ("hub", "gopher://x"),
        ("max_bits", 5.0),  # without tokens_only, deltas would tell more
    ],
)
def test_settings_that_cannot_be_used(settings: EdgeSettings, field: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match=field):
        replace(settings, **{field: value})


@pytest.mark.parametrize("max_bits", [-0.1, float("nan"), float("inf")])
def test_a_budget_that_is_none(settings: EdgeSettings, max_bits: float) -> None:
    with pytest.raises(InvalidParameter, match="max_bits"):
        replace(settings, tokens_only=True, max_bits=max_bits)


def test_keys_are_not_shown(settings: EdgeSettings) -> None:
    assert "sesame" not in repr(replace(settings, attach_key="sesame 1", steering_key="sesame 2"))
    with pytest.raises(InvalidParameter) as caught:
        replace(settings, steering_key="sesame" * 100)
    assert "sesame" not in str(caught.value)


def test_exit_codes_and_sentences(settings: EdgeSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_worker(replace(settings, context=str(tmp_path / "nothing"))) == worker_module.EXIT_INVALID
    assert run_worker(replace(settings, model=str(tmp_path))) == worker_module.EXIT_INVALID
    assert run_worker(replace(settings, template=str(tmp_path / "nothing"))) == worker_module.EXIT_INVALID
    (tmp_path / "broken.jinja").write_text("{{ messages")
    assert run_worker(replace(settings, template=str(tmp_path / "broken.jinja"))) == worker_module.EXIT_INVALID
    for sentence in ("context is", "model is", "template is", "cannot be rendered"):
        assert any(sentence in message for message in caplog.messages), sentence


def test_a_refusal_and_a_crash_have_their_exit_codes(settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def hub_thread(ready: threading.Event, addresses: list[str], done: threading.Event) -> None:
        async def main() -> None:
            async with Hub() as hub:
                hub.replies = [lambda attach: Refused("version", "too new")]
                addresses.append(hub.url)
                ready.set()
                await asyncio.get_running_loop().run_in_executor(None, done.wait, TIMEOUT_S)

        asyncio.run(main())

    ready, addresses, done = threading.Event(), list[str](), threading.Event()
    thread = threading.Thread(target=hub_thread, args=(ready, addresses, done))
    thread.start()
    try:
        assert ready.wait(TIMEOUT_S)
        assert run_worker(replace(settings, hub=addresses[0])) == worker_module.EXIT_REFUSED
    finally:
        done.set()
        thread.join()
    monkeypatch.setattr(worker_module, "load", lambda _: 1 / 0)
    assert run_worker(settings) == worker_module.EXIT_FAILED


def test_a_signal_ends_a_worker_quietly(settings: EdgeSettings) -> None:
    program = (
        "import logging, sys; from costeer_vllm.edge.worker import EdgeSettings, run; logging.basicConfig(level='INFO');"
        "sys.exit(run(EdgeSettings(hub=sys.argv[1], name='laptop', model=sys.argv[2], context=sys.argv[3], threads=1)))"
    )

    async def main() -> None:
        async with Hub() as hub:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, hub.url, settings.model, settings.context, stderr=asyncio.subprocess.PIPE
            )
            link = await asyncio.wait_for(hub.links.get(), 3 * TIMEOUT_S)  # it imports a lot first
            assert isinstance(await link.ask(begin("s")), Delta)
            process.send_signal(signal.SIGTERM)
            _, written = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
            assert process.returncode == worker_module.EXIT_STOPPED, written
            assert b"attached as 'laptop' to ws://" in written
            assert b"Traceback" not in written

    run(main())


def test_a_tokenizer_without_a_template_needs_one(settings: EdgeSettings, tmp_path: Path, model_dir: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    for file in bare.glob("chat_template*"):
        file.unlink()

    async def refused() -> None:
        await EdgeWorker(replace(settings, model=str(bare))).run()

    with pytest.raises(Unsupported, match="pass --template"):
        asyncio.run(refused())
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")

    async def main() -> None:
        async with attached(replace(settings, model=str(bare), template=str(tmp_path / "plain.jinja"))) as (_, link, _):
            assert isinstance(await link.ask(begin("s")), Delta)

    run(main())


@pytest.mark.parametrize("room", [0, 3])
def test_a_context_without_room_is_not_told_by_a_refusal(settings: EdgeSettings, twin: Twin, room: int) -> None:
    """Edge fusion: the row with context reaches the last position first. The server sees the row without it only."""
    most = 2048
    context = Surround(f"{CONTEXT}\n\n")
    more = len(prompts(Query(prompt_ids=[7]), context, twin.tokenizer)[0]) - 1  # ids of the context
    query = Query(prompt_ids=[7] * (most - room + 1 - more))

    async def main() -> None:
        async with attached(settings) as (_, link, worker):
            generated = await generate(link, "s", GREEDY, query=query)
            with_context = [greedy_reference(twin, generated[:i], query) for i in range(room)]
            plain = [max((t for t in base_policy(i) if t < VOCAB), key=base_policy(i).__getitem__) for i in range(room, 6)]
            assert generated == with_context + plain
            assert worker._books.disclosures.of("s", None).has_no_room
            refused = await link.ask(begin("t", Query(prompt_ids=[7] * most), sampling=GREEDY))
            assert isinstance(refused, End)
            assert refused.reason == "refused"

    run(main())
