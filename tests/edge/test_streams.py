"""The streams of an attachment without a socket, a clock or a model."""

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest

from costeer_vllm.edge.disclosure import Disclosures, Promise
from costeer_vllm.edge.streams import OVER, Answer, Order, Streams
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import Advance, Candidates, Choice, Delta, End, Query, Sampling
from costeer_vllm.protocol.stream import extend_hash

from .hub import GREEDY, QUERY, advance, begin, candidates

VOCAB = 100


def make(limit: int = 4, key: str | None = None, **options: Any) -> Streams:
    return Streams("laptop", num_tokens=VOCAB, max_positions=50, limit=limit, steering_key=key, **options)


def test_a_begin_becomes_one_order() -> None:
    streams = make()
    assert streams.feed(begin("a", tokens=[1, 2]), 0.0) is None
    assert (streams.num_asked, len(streams)) == (1, 1)
    order = Order(1, 0, (1, 2), 2, extend_hash(0, [1, 2]), QUERY, strength=begin("a").strength)
    assert streams.take_orders() == ([order], [])
    assert streams.take_orders() == ([], [])
    prefix_hash = extend_hash(0, [1, 2])
    assert streams.answered(Answer(1, 2, prefix_hash, b"delta")) == Delta("a", 2, prefix_hash, b"delta")
    assert streams.answered(Answer(1, 1, extend_hash(0, [1]), b"")) is None


def test_advances_melt_into_one_order_for_the_newest_prefix() -> None:
    streams = make()
    streams.feed(begin("a"), 0.0)
    streams.take_orders()
    for position in range(1, 5):
        assert streams.feed(advance("a", list(range(position))), 0.0) is None
    assert streams.answered(Answer(1, 0, 0, b"")) is None, "a newer prefix is asked for"
    (order,), _ = streams.take_orders()
    assert (order.keep, order.tokens, order.position, order.query) == (0, (0, 1, 2, 3), 4, None)


def test_an_advance_that_goes_back_keeps_what_is_still_right() -> None:
    streams = make()
    streams.feed(begin("a", tokens=[1, 2, 3, 4, 5]), 0.0)
    streams.take_orders()
    assert streams.feed(Advance("a", 4, extend_hash(0, [1, 2, 3, 9]), [2, 3, 9]), 0.0) is None
    (order,), _ = streams.take_orders()
    assert (order.keep, order.tokens, order.position) == (3, (9,), 4)
    assert streams.feed(Advance("a", 2, extend_hash(0, [1, 2]), []), 0.0) is None
    (order,), _ = streams.take_orders()
    assert (order.keep, order.tokens, order.position) == (2, (), 2)


def test_orders_add_up_to_the_generated_ids_whatever_comes_between() -> None:
    rng = random.Random(0)
    streams = Streams("laptop", 100, 10_000, 4, None)
    streams.feed(begin("a"), 0.0)
    generated: list[int] = []
    evaluated: list[int] = []
    for _ in range(500):
        start = len(generated) if rng.random() < 0.7 else rng.randint(0, len(generated))
        generated = generated[:start] + [rng.randrange(3) for _ in range(rng.randint(0, 4))]
        known = rng.randint(0, start)
        assert streams.feed(advance("a", generated, len(generated) - known), 0.0) is None
        if rng.random() < 0.5:
            (order,), _ = streams.take_orders()
            evaluated = evaluated[: order.keep] + list(order.tokens)
            assert evaluated == generated
            assert (order.position, order.prefix_hash) == (len(generated), extend_hash(0, generated))


def test_what_cannot_be_served_is_ended() -> None:
    streams = make(limit=1)

    def reason(message: object) -> str:
        end = streams.feed(message, 0.0)  # type: ignore[arg-type]
        assert isinstance(end, End)
        return end.reason

    assert reason(advance("nobody", [1])) == "unknown_stream"
    assert reason(begin("a", worker="desk")) == "failed"
    assert reason(begin("a", query=Query())) == "failed"
    assert reason(begin("a", query=Query(prompt="x", prompt_ids=[1]))) == "failed"
    assert reason(begin("a", query=Query(prompt_ids=[100]))) == "failed"
    assert reason(begin("a", tokens=[100])) == "failed"
    assert len(streams) == 0
    for wrong in (
        advance("a", [1, 2, 3], num_new=1),  # a gap
        Advance("a", 1, 0, [5, 6]),  # before the beginning
        Advance("a", 1, 12345, [5]),  # another history
        advance("a", [100]),  # not in the vocabulary
    ):
        assert streams.feed(begin("a"), 0.0) is None
        assert reason(begin("b")) == "overloaded"
        assert reason(wrong) == "failed"
        assert len(streams) == 0
    streams.feed(begin("a"), 0.0)
    assert reason(advance("a", [1] * 51, 51)) == "refused"


def test_a_stream_that_begins_again_is_a_new_one() -> None:
    streams = make()
    streams.feed(begin("a"), 0.0)
    streams.take_orders()
    streams.feed(begin("a", tokens=[7]), 0.0)
    (order,), closed = streams.take_orders()
    assert (order.serial, order.position, closed) == (2, 1, [1])
    assert streams.answered(Answer(1, 0, 0, b"")) is None
    assert streams.fail(1, "failed", "") is None
    assert streams.fail(2, "failed", "so") == End("a", "failed", "so")


def test_closing_tells_the_evaluator_only_of_streams_it_knows() -> None:
    streams = make()
    streams.feed(begin("a"), 0.0)
    streams.feed(End("a", "finished"), 0.0)
    streams.feed(End("a", "finished"), 0.0)
    assert streams.take_orders() == ([], [])
    streams.feed(begin("b"), 0.0)
    streams.feed(begin("c"), 0.0)
    streams.take_orders()
    streams.clear()
    assert sorted(streams.take_orders()[1]) == [2, 3]
    assert len(streams) == 0


def test_idle_streams_are_closed() -> None:
    streams = make()
    streams.feed(begin("a"), 0.0)
    streams.feed(begin("b"), 0.0)
    streams.feed(advance("b", [1]), 100.0)
    assert [end.stream for end in streams.expire(50.0)] == ["a"]
    assert len(streams) == 1


def test_grants() -> None:
    streams = make(key="open sesame")
    digest = keys.key_digest("open sesame")
    for grant in (None, "0" * 64, keys.grant(keys.key_digest("other"), "laptop", QUERY), keys.grant(digest, "desk", QUERY)):
        end = streams.feed(begin("a", grant=grant), 0.0)
        assert end is not None
        assert end.reason == "refused"
    assert streams.feed(begin("a", grant=keys.grant(digest, "laptop", QUERY)), 0.0) is None


# Edge fusion

BASE = {3: math.log(0.5), 5: math.log(0.3), 8: math.log(0.2)}
TOWARDS_5 = 9 * np.eye(VOCAB, dtype=np.float32)[5]


def edge_fused(streams: Streams, stream: str = "a", sampling: Sampling = GREEDY, **fields: Any) -> int:
    """Begin it and take its order; returns its serial."""
    assert streams.feed(begin(stream, sampling=sampling, **fields), 0.0) is None
    (order,), _ = streams.take_orders()
    assert order.fusion == "edge"
    return order.serial


def answer(serial: int, generated: list[int], delta: np.ndarray = TOWARDS_5) -> Answer:
    return Answer(serial, len(generated), extend_hash(0, generated), delta)


@pytest.mark.parametrize("candidates_first", [True, False])
def test_an_edge_fused_stream_chooses_once_it_has_candidates_and_delta(candidates_first: bool) -> None:
    disclosures = Disclosures()
    streams = make(disclosures=disclosures)
    serial = edge_fused(streams)
    generated: list[int] = []
    for _ in range(3):
        choice = Choice("a", len(generated), extend_hash(0, generated), 5)
        if candidates_first:
            assert streams.feed(candidates("a", generated, BASE), 0.0) is None
            assert streams.answered(answer(serial, generated)) == choice
        else:
            assert streams.answered(answer(serial, generated)) is None, "nothing leaves for want of candidates"
            assert streams.feed(candidates("a", generated, BASE), 0.0) == choice
        assert streams.feed(candidates("a", generated, BASE), 0.0) == choice
        generated.append(5)
        assert streams.feed(advance("a", generated), 0.0) is None
        (order,), _ = streams.take_orders()
        assert (order.fusion, order.position) == ("edge", len(generated))
    assert len(disclosures.of("a", None).drawn) == 3


def test_an_order_says_where_its_delta_is_fused() -> None:
    streams = make()
    streams.feed(begin("a"), 0.0)
    streams.feed(begin("b", sampling=GREEDY), 0.0)
    assert [order.fusion for order in streams.take_orders()[0]] == ["cloud", "edge"]


@pytest.mark.parametrize(
    "wrong",
    [
        candidates("a", [], BASE),
        candidates("a", [7, 8], BASE),
        candidates("a", [9], BASE),
        Candidates("a", 1, 0, b"not looked at"),
    ],
)
def test_candidates_of_another_prefix_are_late_and_change_nothing(wrong: Candidates) -> None:
    streams = make()
    serial = edge_fused(streams, tokens=[7])
    assert streams.feed(wrong, 0.0) is None
    assert streams.answered(answer(serial, [7])) is None
    assert streams.feed(wrong, 0.0) is None
    assert streams.feed(candidates("a", [7], BASE), 0.0) == Choice("a", 1, extend_hash(0, [7]), 5)


def test_a_delta_that_is_late_chooses_nothing() -> None:
    streams = make()
    serial = edge_fused(streams)
    streams.feed(candidates("a", [], BASE), 0.0)
    streams.feed(advance("a", [3]), 0.0)
    assert streams.answered(answer(serial, [])) is None, "a newer prefix is asked for"
    streams.take_orders()
    assert streams.answered(answer(serial, [])) is None
    assert streams.feed(candidates("a", [3], BASE), 0.0) is None
    assert streams.answered(answer(serial, [3])) == Choice("a", 1, extend_hash(0, [3]), 5)


def test_candidates_for_a_stream_that_is_not_there() -> None:
    end = make().feed(candidates("nobody", [], BASE), 0.0)
    assert end == End("nobody", "unknown_stream", "this edge worker does not know the stream")


def test_candidates_for_a_stream_that_is_fused_in_the_cloud_end_it() -> None:
    streams = make()
    streams.feed(begin("a"), 0.0)
    streams.take_orders()
    assert streams.feed(candidates("a", [], BASE), 0.0) == End(
        "a", "failed", "candidates came for a stream that is fused in the cloud"
    )
    assert len(streams) == 0
    assert streams.take_orders() == ([], [1])


UNUSABLE = Candidates("a", 0, 0, b"")
PADDING = candidates("a", [], {VOCAB: -0.7, VOCAB + 1: -0.7})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [(UNUSABLE, "candidates of 0 bytes have no header"), (PADDING, "none of the candidates is a token of the small model")],
)
@pytest.mark.parametrize("candidates_first", [True, False])
def test_a_chooser_that_fails_ends_its_stream_and_no_other(given: Candidates, sentence: str, candidates_first: bool) -> None:
    streams = make()
    serial, other = edge_fused(streams), edge_fused(streams, "b")
    steps: list[Any] = [lambda: streams.feed(given, 0.0), lambda: streams.answered(answer(serial, []))]
    found = [step() for step in (steps if candidates_first else reversed(steps))]
    assert End("a", "failed", sentence) in found
    assert len(streams) == 1
    assert streams.take_orders() == ([], [serial]), "the evaluator is told"
    assert streams.answered(answer(serial, [])) is None
    streams.feed(candidates("b", [], BASE), 0.0)
    assert streams.answered(answer(other, [])) == Choice("b", 0, 0, 5)


@pytest.mark.parametrize(
    ("fusions", "given", "sentence"),
    [
        (("edge",), None, "this edge worker does not consent to cloud fusion"),
        (("cloud",), GREEDY, "this edge worker does not consent to edge fusion"),
        (("edge",), GREEDY, None),
        (("cloud",), None, None),
        (("cloud", "edge"), GREEDY, None),
        (("cloud", "edge"), None, None),
    ],
)
def test_a_fusion_needs_consent(fusions: Any, given: Sampling | None, sentence: str | None) -> None:
    streams = make(fusions=fusions)
    end = streams.feed(begin("a", sampling=given), 0.0)
    assert end == (None if sentence is None else End("a", "refused", sentence))
    assert len(streams) == streams.num_asked == int(sentence is None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampling": Sampling(temperature=math.nan)}, "temperature is nan; it must be a finite number"),
        ({"sampling": Sampling(temperature=-1.0)}, "temperature is -1.0"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p is 1.5; it must be a number from 0 to 1"),
        ({"sampling": Sampling(min_p=-0.5)}, "min_p is -0.5"),
        ({"sampling": Sampling(confidence=math.nan)}, "confidence is nan"),
        ({"sampling": Sampling(max_bits=-1.0)}, "max_bits is -1.0"),
        ({"sampling": GREEDY, "strength": math.inf}, "strength is inf"),
        ({"sampling": GREEDY, "strength": -1001.0}, "strength is -1001.0"),
    ],
)
def test_a_begin_whose_sampling_cannot_be_is_ended_in_words(fields: dict[str, Any], words: str) -> None:
    streams = make()
    edge_fused(streams)
    end = streams.feed(begin("a", **fields), 0.0)
    assert isinstance(end, End)
    assert (end.stream, end.reason) == ("a", "failed")
    assert words in end.sentence
    assert len(streams) == 0
    assert streams.take_orders() == ([], [1])


def test_a_stream_that_goes_on_after_a_preemption_goes_on_with_its_requests_budget() -> None:
    disclosures = Disclosures()
    streams = make(disclosures=disclosures)
    sampling = Sampling(temperature=0.0, max_bits=6.0)
    generated: list[int] = []
    strengths = []
    for name in ("a", "a2", "a3"):
        serial = edge_fused(streams, name, sampling, request="r", tokens=generated)
        streams.feed(candidates(name, generated, BASE), 0.0)
        choice = streams.answered(answer(serial, generated))
        assert isinstance(choice, Choice)
        generated.append(choice.token)
        strengths.append(disclosures.of("r", None).drawn[-1].strength)
        streams.feed(End(name, "preempted"), 0.0)
    assert generated == [5, 3, 3]
    assert strengths[0] == 1.0
    assert max(strengths[1:]) < 1.0, "a second token like the first would have told 5 bits more"
    assert math.log2(16 / 0.3) < disclosures.of("r", None).bits <= 6.0


def test_the_devices_own_budget_holds_for_requests_that_ask_for_none() -> None:
    streams = make(disclosures=Disclosures(1.0))
    serial = edge_fused(streams)
    streams.feed(candidates("a", [], BASE), 0.0)
    assert streams.answered(answer(serial, [])) == Choice("a", 0, 0, 3), "5 would have told 5.7 bits"


def test_candidates_keep_a_stream_from_being_idle() -> None:
    streams = make()
    for name in ("a", "b"):
        edge_fused(streams, name)
    streams.feed(candidates("b", [], BASE), 100.0)
    assert [end.stream for end in streams.expire(50.0)] == ["a"]


def test_two_devices_choose_differently_with_the_same_seed_and_one_device_the_same() -> None:
    flat = {token: math.log(1 / VOCAB) for token in range(VOCAB)}

    def tokens(streams: Streams, name: str) -> list[int]:
        generated: list[int] = []
        serial = edge_fused(streams, name, Sampling(seed=5))
        for _ in range(10):
            streams.feed(candidates(name, generated, flat), 0.0)
            choice = streams.answered(answer(serial, generated, np.zeros(VOCAB, np.float32)))
            assert isinstance(choice, Choice)
            generated.append(choice.token)
            streams.feed(advance(name, generated), 0.0)
            streams.take_orders()
        return generated

    one, other = make(), make()
    first = tokens(one, "a")
    assert tokens(one, "b") == first
    assert tokens(other, "a") != first


def test_a_guess_goes_out_while_it_may_come_true() -> None:
    streams = make()
    streams.feed(begin("a", tokens=[1], strength=1.5, guess_bytes=1000), 3.0)
    (order,), _ = streams.take_orders()
    assert (order.strength, order.guess_bytes, order.at) == (1.5, 1000, 3.0)

    def guess(*tokens: int, guessed: int) -> Delta | Choice | End | None:
        return streams.answered(Answer(1, len(tokens), extend_hash(0, tokens), b"delta", tokens[len(tokens) - guessed :]))

    delta = Delta("a", 3, extend_hash(0, [1, 4, 5]), b"delta")
    assert guess(1, 4, 5, guessed=2) == delta
    streams.feed(advance("a", [1, 4]), 0.0)
    assert guess(1, 4, 5, guessed=2) == delta, "the token that came is the one that was guessed"
    assert guess(1, 6, 5, guessed=2) is None
    assert guess(1, 4, 5, guessed=0) is None, "that would have been an answer to something else"
    streams.feed(advance("a", [1, 4, 5]), 0.0)
    assert guess(1, 4, 5, guessed=2) == delta, "asked for meanwhile, and not yet ordered"
    streams.feed(advance("a", [1, 4, 5, 6]), 0.0)
    assert guess(1, 4, 5, guessed=2) is None
    streams.feed(advance("a", [1], num_new=0), 0.0)
    assert guess(1, 4, 5, guessed=1) is None, "the stream went back to before what was guessed"


def test_when_the_app_has_its_answer_no_further_token_is_read() -> None:
    """A guess for it may have been held back: without a word the engine would wait for it."""
    disclosures = Disclosures()
    streams = make(disclosures=disclosures)
    with disclosures.promise("cloud", Promise("cloud")):
        assert streams.feed(begin("b", msgspec.structs.replace(QUERY, ref="cloud")), 0.0) is None
        assert streams.feed(advance("b", [7]), 0.0) is None
    assert streams.feed(advance("b", [7, 8]), 0.0) == End("b", "refused", OVER)
    assert streams.take_orders() == ([], [])


def test_when_the_app_has_its_answer_its_streams_get_no_more() -> None:
    disclosures = Disclosures()
    streams = make(disclosures=disclosures)
    with disclosures.promise("edge", Promise("edge")), disclosures.promise("cloud", Promise("cloud")):
        asked = msgspec.structs.replace(QUERY, ref="edge")
        serial = edge_fused(streams, "a", query=asked)
        refused = streams.feed(begin("c", asked), 0.0)
        assert refused == End("c", "refused", "this edge worker does not consent to cloud fusion")
        assert streams.feed(begin("b", msgspec.structs.replace(QUERY, ref="cloud")), 0.0) is None
        (order,), _ = streams.take_orders()
        streams.feed(candidates("a", [], BASE), 0.0)
        assert streams.answered(answer(serial, [])) == Choice("a", 0, 0, 5)
        assert streams.feed(advance("a", [5]), 0.0) is None
        streams.take_orders()
    assert streams.feed(candidates("a", [5], BASE), 0.0) == End("a", "refused", OVER)
    assert streams.answered(Answer(order.serial, 1, extend_hash(0, [7]), b"delta", (7,))) is None
    assert streams.answered(Answer(order.serial, 0, 0, b"delta")) == End("b", "refused", OVER)
    assert len(streams) == 0
