"""Two models with random weights and real shapes, and a tokenizer of one word per id that both share.

Speed does not depend on what the weights are, so nothing need be downloaded. What random weights do change: the small model's
policies are nearly uniform, which to the codec of sparse deltas is its most expensive case.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "<eos>", "<turn>")  # ids 0, 1 and 2; the word w0 has id 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<turn> {{ message['content'] }} {% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
)
MAX_POSITIONS = 2048
PROMPT_WORDS, CONTEXT_WORDS = 64, 128  # of a query and of the private context


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder but for its vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.hidden}"


@dataclass(frozen=True, slots=True)
class PairShape:
    """A large and a small model whose steps are far apart."""

    large: Shape
    small: Shape


ON_CPU = PairShape(Shape(896, 4864, 24, 14, 2), Shape(64, 256, 2, 4, 2))  # large: Qwen2.5-0.5B
ON_GPU = PairShape(Shape(3584, 18944, 28, 28, 4), Shape(896, 4864, 24, 14, 2))  # Qwen2.5-7B and Qwen2.5-0.5B


def write_large(folder: Path, shape: Shape, vocab: int) -> Path:
    """A folder that ``vllm serve --load-format dummy`` takes: configuration and tokenizer, no weights."""
    config(shape, vocab).save_pretrained(folder)
    tokenizer(vocab).save_pretrained(folder)
    return folder


def write_small(folder: Path, shape: Shape, vocab: int) -> Path:
    """A complete model folder: configuration, tokenizer and random weights, the same at every call."""
    build(config(shape, vocab), "float32").save_pretrained(folder)
    tokenizer(vocab).save_pretrained(folder)
    return folder


def config(shape: Shape, vocab: int) -> Any:
    """A shape as a Llama with one matrix for embedding and logits. (As a Qwen2, its tokenizer would be replaced on loading.)"""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<eos>"),
    )


def build(configuration: Any, dtype: str, device: str = "cpu") -> Any:
    """A model with random weights in evaluation mode, the same at every call; no global random state is touched."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configuration, dtype=getattr(torch, dtype)).eval()


def tokenizer(vocab: int) -> Any:
    """Words ``w0 w1 ...`` separated by spaces, one id each, with a chat template; ``vocab`` ids in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate((*SPECIAL, *(f"w{i}" for i in range(vocab - len(SPECIAL)))))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", additional_special_tokens=["<turn>"]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def text(rng: random.Random, num_words: int, vocab: int) -> str:
    """Words drawn at random: a prompt that no cache has seen."""
    return " ".join(f"w{rng.randrange(vocab - len(SPECIAL))}" for _ in range(num_words))
