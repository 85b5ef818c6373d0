"""Look-ahead in the evaluator and over a real link: unasked deltas are exact, come once, and change no token."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from costeer_vllm.delta import DenseDelta, decode
from costeer_vllm.edge import ahead as ahead_module
from costeer_vllm.edge.evaluator import Evaluator
from costeer_vllm.edge.loading import load
from costeer_vllm.edge.settings import EdgeSettings
from costeer_vllm.edge.streams import Answer, NoRoom, Order, Read
from costeer_vllm.protocol.messages import MAX_GUESS_BYTES, Choice, Delta, End, Fusion, Query, Turn
from costeer_vllm.protocol.stream import extend_hash

from .hub import GREEDY, QUERY, Link, advance, attached, begin, candidates, run, settings_for
from .test_worker import VOCAB, Twin

STRENGTH = 1.5
PAYLOAD = 5 + 4 * VOCAB


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> EdgeSettings:
    return settings_for(model_dir, tmp_path)


@pytest.fixture(scope="module")
def twin(model_dir: Path, tokenizer: Any) -> Twin:
    return Twin(model_dir, tokenizer)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are never sure, and a loopback is never slow: here look-ahead pays all the same."""
    for name in ("MIN_WORTH", "MIN_ROUND_TRIP_S", "MIN_SHARE"):
        monkeypatch.setattr(ahead_module, name, 0.0)


class Device:
    """An evaluator without a worker around it."""

    def __init__(self, settings: EdgeSettings) -> None:
        self.evaluator: Evaluator = load(settings).evaluator
        self.pace = self.evaluator.pace
        self.pace.round_trip_s, self.pace.asked_s = 0.050, 0.060
        self.reads: list[Read | NoRoom] = []

    def ask(self, tokens: list[int], keep: int, serial: int = 1, fusion: Fusion = "cloud", **fields: Any) -> list[Answer]:
        place = len(tokens), extend_hash(0, tokens)
        options = {"strength": STRENGTH, "guess_bytes": MAX_GUESS_BYTES, **fields}
        return self.turn(Order(serial, keep, tuple(tokens[keep:]), *place, None, fusion, **options))

    def begin(self, tokens: list[int], query: Query = QUERY, serial: int = 1, fusion: Fusion = "cloud", **fields: Any) -> Any:
        place = len(tokens), extend_hash(0, tokens)
        options = {"strength": STRENGTH, "guess_bytes": MAX_GUESS_BYTES, **fields}
        answers = self.turn(Order(serial, 0, tuple(tokens), *place, query, fusion, **options))
        while not any(answer.serial == serial for answer in answers):  # parts of a long prompt
            answers = self.turn()
        return answers

    def turn(self, *orders: Order) -> list[Answer]:
        results = self.evaluator.turn(list(orders), [])
        answers = [result for result in results if isinstance(result, Answer)]
        self.reads += [result for result in results if isinstance(result, (Read, NoRoom))]
        assert len(answers) + sum(isinstance(result, (Read, NoRoom)) for result in results) == len(results), results
        return answers

    def guess(self, most: int) -> list[Answer]:
        """One per turn, while there is something to guess."""
        guesses: list[Answer] = []
        while len(guesses) < most and self.evaluator.is_busy:
            guesses += self.turn()
        return guesses


def check(twin: Twin, answer: Answer, before: list[int], query: Query = QUERY) -> None:
    """``before``: the generated ids before the guessed ones."""
    assert isinstance(answer.delta, bytes)
    assert answer.position == len(before) + len(answer.guessed)
    twin.check(Delta("s", answer.position, answer.prefix_hash, answer.delta), query, [*before, *answer.guessed])


def stand_in(twin: Twin, tokens: list[int]) -> list[int]:
    """The two tokens likeliest after ``tokens``: of the large model nothing is known but that it is like the small one."""
    policy = twin.without(QUERY, tokens) + STRENGTH * twin.delta(QUERY, tokens)
    likeliest: list[int] = np.argsort(-policy)[:2].tolist()
    return likeliest


# --- the evaluator ---


def test_it_goes_on_along_the_likeliest_tokens(settings: EdgeSettings, twin: Twin) -> None:
    device = Device(settings)
    check(twin, device.begin([9, 8])[0], [9, 8])
    told: set[tuple[int, ...]] = {()}
    for guess in device.guess(12):
        assert guess.guessed[:-1] in told, "a prefix before those that continue it"
        assert guess.guessed[-1] in stand_in(twin, [9, 8, *guess.guessed[:-1]])
        assert guess.guessed not in told
        told.add(guess.guessed)
        check(twin, guess, [9, 8])
    assert len(told) == 13


def test_what_was_told_is_not_told_again_and_a_miss_goes_back(settings: EdgeSettings, twin: Twin) -> None:
    device = Device(settings)
    device.begin([])
    tokens: list[int] = []
    told = {guess.guessed for guess in device.guess(8)}
    path = max(told, key=len)
    for token in path:
        tokens.append(token)
        for guess in device.ask(tokens, len(tokens) - 1):  # the turn goes to a guess
            assert guess.guessed
            check(twin, guess, tokens)
    guesses = device.guess(3)
    assert len(guesses) == 3
    for guess in guesses:
        check(twin, guess, tokens)
    missed = next(token for token in range(VOCAB) if token not in stand_in(twin, tokens))
    tokens.append(missed)
    (answer,) = device.ask(tokens, len(tokens) - 1)
    assert answer.guessed == ()
    check(twin, answer, tokens)
    for guess in device.guess(3):
        check(twin, guess, tokens)


def test_a_guess_without_numbers_ends_the_guessing_and_not_the_stream(
    settings: EdgeSettings, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena holds what the guess left there, and not-a-numbers outlast a mask: it must be gone."""
    device = Device(settings)
    device.begin([])
    model = device.evaluator._model
    step = model.step

    @torch.inference_mode()
    def broken(pairs: Any) -> Any:
        found = step(pairs)
        for row in (row for pair in pairs for row in pair.rows):
            for tensor in (*model._arena.keys, *model._arena.values):
                tensor[row.index, row.length - 1] = np.nan
        return tuple(rows * np.nan for rows in found)

    told = device.guess(2)
    while len(device.evaluator._guesses()[1]) < 3:
        told += device.turn()
    monkeypatch.setattr(model, "step", broken)
    assert device.turn() == []
    monkeypatch.setattr(model, "step", step)
    assert not device.evaluator.is_busy
    tokens = list(told[0].guessed)
    assert device.ask(tokens, 0) == [], "it was told before"
    tokens.append(next(token for token in range(VOCAB) if token not in stand_in(twin, tokens)))
    assert len(tokens) == 2, "not where the numbers failed"
    answers = device.ask(tokens, 1)
    while not answers:
        answers = device.turn()
    check(twin, answers[0], tokens)
    assert not device.evaluator.is_busy


def test_a_sibling_that_comes_true_goes_on_too(settings: EdgeSettings, twin: Twin) -> None:
    """Two guesses stand at one place of the arena, one after the other; whichever comes true, what follows it is right."""
    device = Device(settings)
    device.begin([])
    first, second = stand_in(twin, [])
    told = {guess.guessed for guess in device.guess(12)}
    assert {(first,), (second,)} <= told
    for guess in [*device.ask([second], 0), *device.guess(6)]:
        check(twin, guess, [second])


def test_going_back_and_asking_again_are_answered(settings: EdgeSettings, twin: Twin) -> None:
    device = Device(settings)
    device.begin([5, 6, 7])
    device.guess(4)
    for tokens, keep in (([5, 6, 7], 3), ([5, 6], 2), ([5, 9, 9], 1)):
        (answer,) = device.ask(tokens, keep)
        assert answer.guessed == ()
        check(twin, answer, tokens)
        device.guess(3)


def test_real_questions_come_first_and_guesses_of_all_streams_share_a_window(settings: EdgeSettings, twin: Twin) -> None:
    device = Device(settings)
    other = Query(messages=[Turn("user", "Once upon a time")])
    device.begin([])
    answers = device.begin([], other, serial=2)
    assert [(answer.serial, answer.guessed) for answer in answers] == [(2, ())], "no guess of the first beside it"
    guesses = device.turn()
    assert sorted(guess.serial for guess in guesses) == [1, 2]
    for guess in guesses:
        check(twin, guess, [], QUERY if guess.serial == 1 else other)


def test_neither_edge_fusion_nor_an_engine_that_keeps_none_gets_guesses(settings: EdgeSettings) -> None:
    device = Device(settings)
    device.begin([], serial=1, fusion="edge")
    device.begin([], serial=2, guess_bytes=0)
    assert not device.evaluator.is_busy
    device = Device(replace(settings, look_ahead=False))
    device.begin([])
    assert not device.evaluator.is_busy


def test_nothing_is_guessed_where_it_does_not_pay(settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "MIN_ROUND_TRIP_S", 0.1)
    device = Device(settings)
    device.begin([])
    assert not device.evaluator.is_busy


def test_bytes_in_flight_keep_to_what_the_engine_keeps(settings: EdgeSettings) -> None:
    device = Device(settings)
    device.begin([], guess_bytes=3 * PAYLOAD)
    assert len(device.guess(10)) == 3
    assert not device.evaluator.is_busy


def test_guesses_stay_within_the_positions(settings: EdgeSettings) -> None:
    device = Device(settings)
    device.begin([1])
    device.guess(1)
    pair = device.evaluator._pairs[1]
    device.evaluator._model.max_positions = pair.prompt_length + 3
    assert max(len(guess.guessed) for guess in device.guess(10)) == 2


def test_the_end_of_the_text_is_not_guessed(settings: EdgeSettings, twin: Twin) -> None:
    device = Device(settings)
    device.evaluator._end = stand_in(twin, [])[0]
    device.begin([])
    assert all(device.evaluator._end not in guess.guessed for guess in device.guess(8))


def test_what_the_model_thought_of_each_token_is_told_as_without(settings: EdgeSettings, twin: Twin) -> None:
    reads = []
    for look_ahead in (False, True):
        device = Device(replace(settings, look_ahead=look_ahead))
        device.evaluator._tells_reads = True
        device.begin([])
        tokens: list[int] = []
        for position in range(6):
            device.guess(6)
            tokens.append(stand_in(twin, tokens)[0] if position != 3 else 17)
            device.ask(tokens, position)
        reads.append(device.reads)
    assert [read.token for read in reads[0]] == [read.token for read in reads[1]]
    assert len(reads[0]) == 6
    for without, ahead in zip(*reads, strict=True):
        assert (ahead.with_context, ahead.without_context) == pytest.approx(
            (without.with_context, without.without_context), rel=1e-3
        )


# --- over a real link ---


class Engine:
    """The engine's side of one stream, with a large model that is the small one without context, and wilful now and then."""

    def __init__(self, link: Link, twin: Twin) -> None:
        self.link, self.twin = link, twin
        self.answers: dict[tuple[int, int], Delta] = {}

    async def receive(self) -> None:
        answer = await self.link.receive()
        assert isinstance(answer, Delta), answer
        prefix = answer.position, answer.prefix_hash
        assert prefix not in self.answers, "told twice"
        self.answers[prefix] = answer

    async def generate(self, num_tokens: int) -> list[int]:
        await self.link.send(begin("s", strength=STRENGTH, guess_bytes=MAX_GUESS_BYTES))
        tokens: list[int] = []
        while True:
            while (place := (len(tokens), extend_hash(0, tokens))) not in self.answers:
                await self.receive()
            delta = decode(self.answers[place].payload, VOCAB)
            assert isinstance(delta, DenseDelta)
            if len(tokens) == num_tokens:
                return tokens
            base = self.twin.without(QUERY, tokens)
            if len(tokens) % 5 == 3:
                base = base + np.random.default_rng(len(tokens)).normal(0, 20, VOCAB)
            tokens.append(int((base + STRENGTH * delta.values).argmax()))
            await self.link.send(advance("s", tokens))


def test_the_tokens_are_the_same_with_and_without(settings: EdgeSettings, twin: Twin) -> None:
    texts: list[list[int]] = []
    num_answers: list[int] = []

    async def main(look_ahead: bool) -> None:
        async with attached(replace(settings, look_ahead=look_ahead)) as (_, link, _):
            engine = Engine(link, twin)
            texts.append(await engine.generate(30))
            if look_ahead:  # nothing is asked, and more comes
                for _ in range(3):
                    await engine.receive()
            num_answers.append(len(engine.answers))
            await link.send(End("s", "finished"))

    run(main(False))
    run(main(True))
    assert texts[0] == texts[1]
    assert num_answers[0] == 31
    assert num_answers[1] > 33


def test_no_delta_leaves_the_device_in_edge_fusion(settings: EdgeSettings) -> None:
    async def main() -> None:
        async with attached(settings) as (_, link, worker):
            worker._evaluator.pace.asked_s = 0.060
            await link.send(begin("s", sampling=GREEDY, guess_bytes=MAX_GUESS_BYTES))
            tokens: list[int] = []
            for _ in range(6):
                choice = await link.ask(candidates("s", tokens, {3: -0.5, 5: -1.0, 7: -2.0}))
                assert isinstance(choice, Choice)
                tokens.append(choice.token)
                await link.send(advance("s", tokens))

    run(main())


def test_a_guess_is_a_sent_frame_of_the_books(settings: EdgeSettings) -> None:
    async def main() -> None:
        sent: list[bytes] = []
        async with attached(settings, on_frame_sent=sent.append) as (_, link, worker):
            worker._evaluator.pace.asked_s = 0.060
            await link.send(begin("s", guess_bytes=2 * PAYLOAD))
            for _ in range(3):
                assert isinstance(await link.receive(), Delta)
            trace = worker._books.traces.find("s")
            assert trace is not None
            assert trace.bytes_up == sum(map(len, sent[1:]))
            assert len(sent) == 1 + 3

    run(main())


def test_the_round_trip_is_measured(settings: EdgeSettings) -> None:
    async def main() -> None:
        async with attached(settings) as (_, link, worker):
            while not worker._evaluator.pace.round_trip_s:
                await link.ask(begin("s"))

    run(main())
