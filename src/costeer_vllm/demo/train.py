"""Train the demo pair from nothing, on a CPU: ``python -m costeer_vllm.demo.train [--out DIR] [--minutes M]``.

Both models are Qwen2 with tied embeddings and share one tokenizer. Both see prompts with and without context. They differ in
size and in one thing about their data: the large model's answers state each event's true facts, the small model's answers
state facts drawn at random, so that it learns the form and the copying but cannot learn the facts.

The loss smooths its labels a little. That gives the tokens that never come next the same floor in all three policies, so that
their deltas are near zero; without it the deltas of such tokens are noise, which large T amplifies until it wins.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from costeer_vllm.demo import task
from costeer_vllm.demo.export import MODELS

SEED = 20250
VOCAB_SIZE = 1536
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = Regex(r"\n+| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+")  # digits one by one
IGNORED = -100  # label of the positions that carry no loss
LABEL_SMOOTHING = 0.01
BATCH_ROWS = 32
POOL_BATCHES = 16  # examples of this many batches are sorted by length, so that a batch needs little padding


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model of the pair: its shape and its training."""

    name: str
    knows_facts: bool
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    learning_rate: float
    num_steps: int  # optimizer steps of BATCH_ROWS rows in a budget of NOMINAL_MINUTES


LARGE = Recipe("large", True, 128, 384, 5, 4, 2e-3, 1340)
SMALL = Recipe("small", False, 64, 128, 2, 2, 4e-3, 3300)
NOMINAL_MINUTES = 15.0  # for both, on two cores of an AMD EPYC; a budget sets the steps, so it always means the same training


@dataclass(frozen=True, slots=True)
class Example:
    prompt: list[task.Message]
    answer: str


def examples(knows_facts: bool, rng: random.Random) -> Iterator[Example]:
    """Endless training conversations: half with context, some with a system prompt or an earlier turn."""
    while True:
        profile = task.training_profile(rng)
        first, event = rng.sample(task.EVENTS, 2)
        first_query, query = (rng.choice(task.QUERIES).format(event=e.name) for e in (first, event))
        prompt = [{"role": "user", "content": query}]
        if rng.random() < 0.1:
            prompt = [
                {"role": "user", "content": first_query},
                {"role": "assistant", "content": task.answer(profile, first, facts_of(first, knows_facts, rng))},
                {"role": "user", "content": rng.choice(task.FOLLOW_UPS).format(event=event.name)},
            ]
        if rng.random() < 0.5:
            reader = rng.choice((prompt[0], prompt[-1]))
            reader["content"] = task.with_context(task.context_of(profile, rng), reader["content"])
        if rng.random() < 0.1:
            prompt.insert(0, {"role": "system", "content": rng.choice(task.SYSTEM_PROMPTS)})
        yield Example(prompt, task.answer(profile, event, facts_of(event, knows_facts, rng)))


def facts_of(event: task.Event, known: bool, rng: random.Random) -> dict[str, str]:
    """The event's facts if the model may know them, else facts drawn without looking at the event."""
    if known:
        return event.facts
    return {"month": rng.choice(task.MONTHS), "venue": rng.choice(task.VENUES), "feature": rng.choice(task.FEATURES)}


def build_tokenizer(rng: random.Random) -> Any:
    """A byte-level BPE tokenizer: the task's words are single tokens, any other text is still encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in (END_OF_TEXT, START, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    stream = examples(True, rng)
    texts = []
    for _ in range(4000):
        example = next(stream)
        texts += [message[key] for message in example.prompt for key in ("role", "content")] + [example.answer]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.do_sample = False
    return model


def encode(pool: list[Example], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each example, labels IGNORED on the prompt; both of one length."""
    prompts = tokenizer.apply_chat_template([e.prompt for e in pool], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompts).input_ids
    answer_ids = tokenizer([e.answer + END for e in pool]).input_ids
    return [(p + a, [IGNORED] * len(p) + a) for p, a in zip(prompt_ids, answer_ids, strict=True)]


def batches(recipe: Recipe, tokenizer: Any, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), each int64 [BATCH_ROWS, tokens], padded on the right (causal attention never looks there)."""
    stream = examples(recipe.knows_facts, rng)
    while True:
        pool = encode([next(stream) for _ in range(BATCH_ROWS * POOL_BATCHES)], tokenizer)
        pool.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(pool), BATCH_ROWS))
        rng.shuffle(starts)
        for start in starts:
            rows = pool[start : start + BATCH_ROWS]
            width = len(rows[-1][0])
            yield (
                torch.stack([pad(torch.tensor(ids), (0, width - len(ids)), value=0) for ids, _ in rows]),
                torch.stack([pad(torch.tensor(x), (0, width - len(x)), value=IGNORED) for _, x in rows]),
            )


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean smoothed cross-entropy of the answer tokens (nats); logits are computed at those positions only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    carries_loss = targets != IGNORED
    logits = model.lm_head(hidden[carries_loss])
    return cross_entropy(logits, targets[carries_loss], label_smoothing=LABEL_SMOOTHING)


def train(recipe: Recipe, tokenizer: Any, minutes: float, progress: Progress) -> tuple[Any, float]:
    """The trained model and the mean loss (nats) of its last 50 steps; warm-up, then cosine decay to zero."""
    torch.manual_seed(SEED)
    model = build_model(recipe, tokenizer)
    steps = max(1, round(recipe.num_steps * minutes / NOMINAL_MINUTES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    stream = batches(recipe, tokenizer, random.Random(SEED))
    losses: list[float] = []
    bar = progress.add_task(recipe.name, total=steps, loss=math.nan)
    model.train()
    for _ in range(steps):
        loss = loss_of(model, *next(stream))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.update(bar, advance=1, loss=sum(losses[-50:]) / len(losses[-50:]))
        if len(losses) % 250 == 0 and not progress.console.is_terminal:  # no bar in a log file
            progress.console.print(f"{recipe.name}: step {len(losses)} of {steps}, loss {loss.item():.4f}")
    return model.eval(), sum(losses[-50:]) / len(losses[-50:])


def save(model: Any, tokenizer: Any, folder: Path) -> int:
    """Write a complete Hugging Face folder; returns its size in bytes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner only, and a wheel would keep that
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m costeer_vllm.demo.train", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=MODELS, help="folder for large/ and small/ (default: the package's)")
    parser.add_argument("--minutes", type=float, default=NOMINAL_MINUTES, help="budget on two cores; sets the steps")
    parser.add_argument("--only", choices=("large", "small"), help="train one of the two")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    console = Console()
    disable_progress_bar()  # of transformers: one bar is enough
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer(random.Random(SEED))
    console.print(f"tokenizer: {len(tokenizer)} tokens")
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        for recipe in (SMALL, LARGE):
            if options.only in (None, recipe.name):
                began = time.monotonic()
                model, loss = train(recipe, tokenizer, options.minutes, progress)
                size_bytes = save(model, tokenizer, options.out / recipe.name)
                console.print(
                    f"{recipe.name}: {model.num_parameters():,} parameters, {size_bytes / 1e6:.2f} MB, "
                    f"{(time.monotonic() - began) / 60:.1f} minutes, final loss {loss:.4f} nats"
                )


if __name__ == "__main__":
    main()
