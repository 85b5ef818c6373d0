"""The two folders load, share a vocabulary, and are the same at every call."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from costeer_vllm.bench import models
from costeer_vllm.bench.models import Shape
from costeer_vllm.edge.prompts import check_template

VOCAB = 1000
LARGE, SMALL = Shape(64, 128, 2, 4, 2), Shape(32, 64, 1, 2, 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_large(tmp_path_factory.mktemp("models") / "large", LARGE, VOCAB)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_small(tmp_path_factory.mktemp("models") / "small", SMALL, VOCAB)


def test_the_large_folder_has_no_weights(large: Path) -> None:
    assert not list(large.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(large)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, 64, 2)
    assert config.architectures == ["LlamaForCausalLM"]


def test_the_small_folder_is_a_model(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, VOCAB)


def test_weights_are_the_same_at_every_call_and_leave_the_random_state_alone(small: Path) -> None:
    state = torch.random.get_rng_state()
    again = models.build(models.config(SMALL, VOCAB), "float32")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(again.state_dict(), AutoModelForCausalLM.from_pretrained(small).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["large", "small"])
def test_the_tokenizer_has_one_id_per_word(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB))
    words = models.text(random.Random(0), 64, VOCAB)
    ids = tokenizer(words).input_ids
    assert len(ids) == 64
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == words
    check_template(tokenizer, None)


def test_both_sides_of_the_product_see_one_vocabulary(large: Path, small: Path) -> None:
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (large, small)]
    assert vocabularies[0] == vocabularies[1]


def test_prompts_differ() -> None:
    rng = random.Random(0)
    assert models.text(rng, 64, VOCAB) != models.text(rng, 64, VOCAB)
