"""The streams of an attachment without a socket, a clock or a model."""

import random

from costeer_vllm.edge.streams import Answer, Order, Streams
from costeer_vllm.protocol import keys
from costeer_vllm.protocol.messages import Advance, Delta, End, Query
from costeer_vllm.protocol.stream import extend_hash

from .hub import QUERY, advance, begin


def make(limit: int = 4, key: str | None = None) -> Streams:
    return Streams("laptop", num_tokens=100, max_positions=50, limit=limit, steering_key=key)


def test_a_begin_becomes_one_order() -> None:
    streams = make()
    assert streams.feed(begin("a", tokens=[1, 2]), 0.0) is None
    assert (streams.num_asked, len(streams)) == (1, 1)
    assert streams.take_orders() == ([Order(1, 0, (1, 2), 2, extend_hash(0, [1, 2]), QUERY)], [])
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
