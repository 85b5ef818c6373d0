"""Two rows per stream in one arena give what a plain forward pass over each whole sequence gives."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from costeer_vllm.edge import small_model
from costeer_vllm.edge.small_model import Pair, SmallModel, TooLong
from costeer_vllm.errors import InvalidParameter, Unsupported

VOCAB = 211
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # far from uniform predictions
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_hidden_layers=2)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_hidden_layers=2)),
    "mistral, all layers sliding": (
        MistralForCausalLM,
        MistralConfig(**SIZES, num_hidden_layers=2, head_dim=8, sliding_window=16),
    ),
    "gemma2, soft caps": (Gemma2ForCausalLM, Gemma2Config(**SIZES, **SLIDING, num_hidden_layers=3, query_pre_attn_scalar=8)),
    "gemma3, sliding and full": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SIZES, **SLIDING, num_hidden_layers=3, query_pre_attn_scalar=8),
    ),
}


def make(architecture: str) -> tuple[SmallModel, Any]:
    """The model under test and a twin that knows no windows."""
    kind, config = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    model = kind(copy.deepcopy(config)).eval()
    twin = copy.deepcopy(model)
    if architecture.startswith("gemma2"):
        model.set_attn_implementation("eager")
        twin.set_attn_implementation("eager")
    return SmallModel(model), twin


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair_of_models(request: pytest.FixtureRequest) -> tuple[SmallModel, Any]:
    return make(request.param)


@pytest.fixture(scope="module")
def qwen2() -> tuple[SmallModel, Any]:
    return make("qwen2")


@torch.inference_mode()
def plain(twin: Any, ids: list[int]) -> Tensor:
    return torch.log_softmax(twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float(), dim=-1)


def evaluate(model: SmallModel, pair: Pair) -> tuple[Tensor, Tensor]:
    model.reuse(pair)
    while not pair.is_ready:
        model.prefill(pair)
        model.reuse(pair)
    log_with, log_without = model.step([pair])
    return log_with[0], log_without[0]


def check(twin: Any, pair: Pair, log_with: Tensor, log_without: Tensor) -> None:
    for row, found in zip(pair.rows, (log_with, log_without), strict=True):
        expected = plain(twin, row.ids)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert found.argmax() == expected.argmax()


def some_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def test_prefill_in_windows_then_steps(pair_of_models: tuple[SmallModel, Any]) -> None:
    model, twin = pair_of_models
    rng = random.Random(2)
    pair = model.open(some_ids(rng, 700), some_ids(rng, 30))
    check(twin, pair, *evaluate(model, pair))
    for position in range(20):
        pair.rewrite(position, some_ids(rng, 1))
        check(twin, pair, *evaluate(model, pair))
    model.close(pair)


def test_ragged_streams_that_come_and_go(pair_of_models: tuple[SmallModel, Any]) -> None:
    model, twin = pair_of_models
    rng = random.Random(3)
    shared = some_ids(rng, 25)
    pairs: list[Pair] = []
    for _ in range(60):
        if len(pairs) < 2 or (len(pairs) < 9 and rng.random() < 0.4):
            query = some_ids(rng, rng.randint(1, 40))
            pair = model.open([*shared, *query] if rng.random() < 0.7 else some_ids(rng, rng.randint(5, 90)), query)
            pair.rewrite(0, some_ids(rng, rng.choice((0, 0, 5))))  # a replay
            check(twin, pair, *evaluate(model, pair))
            pairs.append(pair)
        if rng.random() < 0.25:
            (model.close if rng.random() < 0.8 else model.discard)(pairs.pop(rng.randrange(len(pairs))))
        chosen = rng.sample(pairs, rng.randint(1, len(pairs))) if pairs else []
        for pair in chosen:
            keep = pair.num_generated if rng.random() < 0.8 else rng.randint(0, pair.num_generated)
            pair.rewrite(keep, some_ids(rng, rng.choice((1, 1, 1, 2, 5))))
        if chosen:
            for pair, log_with, log_without in zip(chosen, *model.step(chosen), strict=True):
                check(twin, pair, log_with, log_without)
    for pair in pairs:
        model.close(pair)
    assert not model._open
    assert len(model._free) + len(model._remembered) + 1 == model._arena.num_rows


def test_going_back_and_asking_again(pair_of_models: tuple[SmallModel, Any]) -> None:
    model, twin = pair_of_models
    rng = random.Random(4)
    pair = model.open(some_ids(rng, 40), some_ids(rng, 12))
    for keep, new in ((0, 30), (10, 1), (11, 20), (31, 0), (0, 3), (0, 0), (0, 30)):
        pair.rewrite(keep, some_ids(rng, new))
        check(twin, pair, *evaluate(model, pair))
    model.close(pair)


def test_a_prefix_is_evaluated_once() -> None:
    model, twin = make("qwen2")
    rng = random.Random(5)
    head, context = some_ids(rng, 6), some_ids(rng, 900)
    counted: list[int] = []
    run = model._run
    model._run = lambda module, parts, **kwargs: (  # type: ignore[method-assign]
        counted.append(sum(count for _, count in parts)),
        run(module, parts, **kwargs),
    )[1]
    for turn in range(6):
        query = some_ids(rng, 20)
        pair = model.open(head + context + query, head + query)
        check(twin, pair, *evaluate(model, pair))
        assert pair.num_reused >= (906 + 6 if turn else 6)
        if turn:
            assert sum(counted) <= 40
        counted.clear()
        model.close(pair)


def test_a_conversation_goes_on_where_it_ended() -> None:
    model, twin = make("qwen2")
    rng = random.Random(6)
    pair = model.open(prompt := some_ids(rng, 50), short := some_ids(rng, 20))
    evaluate(model, pair)
    pair.rewrite(0, answer := some_ids(rng, 8))
    evaluate(model, pair)
    model.close(pair)
    again = model.open([*prompt, *answer, *some_ids(rng, 9)], [*short, *answer, *some_ids(rng, 9)])
    check(twin, again, *evaluate(model, again))
    assert again.num_reused == 58 + 28
    replayed = model.open(prompt, short)  # as after a preemption
    replayed.rewrite(0, [*answer, 5])
    check(twin, replayed, *evaluate(model, replayed))
    assert replayed.num_reused == 58 + 28


def test_remembered_rows_are_bounded_and_the_arena_shrinks_after_a_burst() -> None:
    model, twin = make("qwen2")
    rng = random.Random(7)
    context = some_ids(rng, 30)
    for _ in range(3):
        pairs = [model.open([*context, *some_ids(rng, 9)], some_ids(rng, 9)) for _ in range(20)]
        for pair in pairs:
            check(twin, pair, *evaluate(model, pair))
        assert model._arena.num_rows >= 41
        for pair in pairs:
            model.close(pair)
        assert len(model._remembered) == small_model.NUM_REMEMBERED
        assert model._arena.num_rows == small_model.NUM_REMEMBERED + 1
    pair = model.open([*context, *some_ids(rng, 9)], some_ids(rng, 9))
    check(twin, pair, *evaluate(model, pair))
    assert pair.num_reused >= 30


def test_other_contexts_in_between_do_not_drive_one_out() -> None:
    """Rows without context, and further rows of the same context, cost little to evaluate again: they go first."""
    model, twin = make("qwen2")
    rng = random.Random(11)
    contexts = [some_ids(rng, 300) for _ in range(small_model.NUM_REMEMBERED - 1)]
    for i in [0, *range(len(contexts)), *[1] * 10, 0]:
        query = some_ids(rng, 20)
        pair = model.open(contexts[i] + query, query)
        check(twin, pair, *evaluate(model, pair))
        model.close(pair)
    assert pair.num_reused >= 300
    for _ in range(2 * small_model.NUM_REMEMBERED):  # but what is not used any more goes in the end
        pair = model.open(some_ids(rng, 300), some_ids(rng, 20))
        check(twin, pair, *evaluate(model, pair))
        model.close(pair)
    pair = model.open([*contexts[1], *some_ids(rng, 20)], some_ids(rng, 20))
    check(twin, pair, *evaluate(model, pair))
    assert pair.num_reused == 0


def test_a_rewrite_keeps_what_agrees() -> None:
    model, twin = make("qwen2")
    rng = random.Random(12)
    pair = model.open(some_ids(rng, 40), some_ids(rng, 12))
    pair.rewrite(0, first := some_ids(rng, 10))
    check(twin, pair, *evaluate(model, pair))
    lengths = [row.length for row in pair.rows]
    assert (pair.agreement(0, first), pair.agreement(4, first[4:]), pair.agreement(0, [*first, 5])) == (10, 6, 10)
    pair.rewrite(2, [*first[2:7], 4, 4])
    assert [row.length for row in pair.rows] == [length - 3 for length in lengths], "seven of ten stay"
    check(twin, pair, *evaluate(model, pair))
    pair.rewrite(0, [*first[:7], 4, 4])  # the same again: its last id is evaluated again
    assert pair.pending == 1
    check(twin, pair, *evaluate(model, pair))
    model.close(pair)


def test_a_failed_window_changes_nothing() -> None:
    model, twin = make("qwen2")
    rng = random.Random(8)
    good, bad = model.open(some_ids(rng, 20), some_ids(rng, 9)), model.open(some_ids(rng, 20), some_ids(rng, 9))
    evaluate(model, good)
    good.rewrite(0, some_ids(rng, 1))
    lengths = [row.length for row in good.rows]
    layers, model._body.layers = model._body.layers, torch.nn.ModuleList([model._body.layers[0], torch.nn.Identity()])
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.step([good, bad])
    model._body.layers = layers
    assert [row.length for row in good.rows] == lengths
    model.discard(bad)
    check(twin, good, *evaluate(model, good))


def test_rows_that_held_no_numbers_can_be_used_again() -> None:
    model, twin = make("qwen2")
    rng = random.Random(9)
    pair = model.open(some_ids(rng, 20), some_ids(rng, 9))
    evaluate(model, pair)
    with torch.inference_mode():
        for tensor in (*model._arena.keys, *model._arena.values):
            tensor[pair.with_context.index] = float("nan")
    model.discard(pair)
    again = model.open(some_ids(rng, 5), some_ids(rng, 9))
    assert again.with_context.index == pair.with_context.index
    check(twin, again, *evaluate(model, again))


def test_a_prompt_without_room_is_refused_without_numbers_of_the_context(qwen2: tuple[SmallModel, Any]) -> None:
    with pytest.raises(TooLong, match=r"a query of 10 tokens and the private context do not fit .* 4096 positions") as caught:
        qwen2[0].open([5] * 5000, [5] * 10)
    assert "5000" not in str(caught.value)


def test_ids_are_not_shown(qwen2: tuple[SmallModel, Any]) -> None:
    pair = qwen2[0].open([77, 78, 79, 80], [55])
    assert "77" not in repr(pair)
    qwen2[0].close(pair)


def test_other_layers_than_attention_are_unsupported() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(Unsupported):
        SmallModel(mamba)
    kind, config = ARCHITECTURES["llama"]
    config = copy.deepcopy(config)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(Unsupported, match="linear_attention"):
        SmallModel(kind(config).eval())


def test_load_says_what_is_wrong(tmp_path: Any) -> None:
    with pytest.raises(InvalidParameter, match="model is"):
        SmallModel.load(str(tmp_path / "nothing"))
    with pytest.raises(InvalidParameter, match="device is 'abacus'"):
        SmallModel.load(str(tmp_path), device="abacus")


def test_bfloat16(model_dir: Any) -> None:
    exact, model = SmallModel.load(str(model_dir)), SmallModel.load(str(model_dir), dtype="bfloat16")
    assert (exact.dtype, model.dtype) == (torch.float32, torch.bfloat16)
    rng = random.Random(10)
    ids = some_ids(rng, 40), some_ids(rng, 10)
    rounded, expected = evaluate(model, model.open(*ids)), evaluate(exact, exact.open(*ids))
    for found, wanted in zip(rounded, expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 0.5
