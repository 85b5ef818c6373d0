"""The serial loop generates what Algorithm 1 generates, and its arithmetic for throughput is right."""

import random
import threading
from typing import Any

import pytest
import torch

from costeer_vllm.bench import models
from costeer_vllm.bench.local import Local
from costeer_vllm.bench.machine import Cores
from costeer_vllm.bench.models import Shape
from costeer_vllm.bench.serial import SerialRun, iterate, serial_loop
from costeer_vllm.demo.algorithm1 import algorithm1, personalize
from costeer_vllm.steering import SteeringParams

VOCAB = 1000
SHAPES = Shape(64, 128, 2, 4, 2), Shape(32, 64, 1, 2, 1)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    large, small = (models.build(models.config(shape, VOCAB), "float32") for shape in SHAPES)
    for model in (large, small):  # policies that are far from uniform and depend on all that was read
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.data *= 10
        head = torch.randn(model.lm_head.weight.shape, generator=generator) / 2
        model.lm_head.weight = torch.nn.Parameter(head)
        model.generation_config.eos_token_id = None
    return large, small


@pytest.mark.parametrize("T", [1, 20])
def test_it_generates_what_algorithm_1_generates(pair: tuple[Any, Any], T: int) -> None:
    large, small = pair
    rng = random.Random(T)
    query, context = rng.choices(range(3, VOCAB), k=12), rng.choices(range(3, VOCAB), k=20)
    prompts = query, context + query, query
    params = SteeringParams(T=T)
    run = serial_loop(large, small, *prompts, params, 8)
    assert run.ids == algorithm1(large, small, *prompts, params, 8)
    assert run.ids != serial_loop(large, small, *prompts, SteeringParams(T=0), 8).ids


def test_iterations_are_those_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta = (3 * torch.randn(VOCAB, generator=generator) for _ in range(2))
    base = base.log_softmax(-1)
    kept = base.clone(), delta.clone()
    found = iterate(base, delta, SteeringParams())
    torch.testing.assert_close(found.double(), personalize(base, delta, SteeringParams()), rtol=1e-4, atol=1e-4)
    assert torch.equal(base, kept[0])
    assert torch.equal(delta, kept[1])


def test_throughput_counts_the_prompts_once() -> None:
    run = SerialRun(ids=[1, 2, 3, 4], prompts_s=1.0, large_s=0.2, small_s=0.1, iterations_s=0.1)
    assert run.tokens_per_s(10) == pytest.approx(10 / (1.0 + 10 * 0.1))


@pytest.mark.parametrize("encoding", ["sparse", "lossless"])
def test_the_small_step_is_taken_for_every_stream(pair: tuple[Any, Any], tmp_path: Any, encoding: str) -> None:
    small = models.write_small(tmp_path / "small", SHAPES[1], VOCAB)
    local = Local(small, SHAPES[0], VOCAB, Cores(None, None, ""))
    assert all(value > 0 for value in local.small_step_ms(3, 2, encoding))
    assert len(local.serial(3).ids) == 3


def test_the_small_model_works_beside_others_until_it_is_told_to_stop(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = Local(models.write_small(tmp_path / "small", SHAPES[1], VOCAB), SHAPES[0], VOCAB, Cores(None, None, ""))
    step, steps, many = local._step, [], threading.Event()

    def counted(pairs: list[Any], encoding: str) -> tuple[float, float]:
        steps.append(len(pairs))
        if len(steps) == 3:
            many.set()
        return step(pairs, encoding)

    monkeypatch.setattr(local, "_step", counted)
    with local.at_work(2, 1.0, "sparse"):
        assert many.wait(60)
    num_steps = len(steps)
    assert set(steps) == {2}
    assert all(value > 0 for value in local.small_step_ms(1, 1, "sparse"))  # its rows are free again
    assert len(steps) == num_steps + 1
