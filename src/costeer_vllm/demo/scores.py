"""Score the demo pair without a server: ``python -m costeer_vllm.demo.scores [--rows N] [--json FILE]``.

Seven ways to answer the held-out queries, all greedy. Only ``large_with`` shows the private context to the large model: it is
the bound that steering is measured against, and what a user does not want to do.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from costeer_vllm.demo.export import MODELS
from costeer_vllm.demo.task import Row, held_out, score, with_context
from costeer_vllm.steering import SteeringParams

STEERED_T = (1, 5, 20)
MAX_NEW_TOKENS = 100
BATCH_ROWS = 100


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models and their one tokenizer."""

    large: Any
    small: Any
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Voice:
    """One of the policies that are added up: its model, whether it reads the context, and its weight on the logits."""

    model: Any
    reads_context: bool
    weight: float = 1.0


def load_pair(directory: Path | str = MODELS) -> Pair:
    """The pair below ``directory``, in float32 on the CPU."""
    large, small = (
        AutoModelForCausalLM.from_pretrained(Path(directory) / name, dtype=torch.float32).eval() for name in ("large", "small")
    )
    return Pair(large, small, AutoTokenizer.from_pretrained(Path(directory) / "large", padding_side="left"))


def methods(pair: Pair) -> dict[str, list[Voice]]:
    """Every way to answer, by name, as the policies whose logits it adds up."""
    large, small = pair.large, pair.small
    steered = {
        f"steered_T{T}": [Voice(large, False), Voice(small, True, c), Voice(small, False, -c)]
        for T in STEERED_T
        for c in [SteeringParams(T=T).strength]
    }
    return {
        "small_without": [Voice(small, False)],
        "small_with": [Voice(small, True)],
        "large_without": [Voice(large, False)],
        "large_with": [Voice(large, True)],
        **steered,
    }


def prompts(rows: Sequence[Row], reads_context: bool, tokenizer: Any) -> Any:
    """The rows' prompts as a left-padded batch: input_ids and attention_mask, both [rows, tokens]."""
    chats = [
        [{"role": "user", "content": with_context(row.context, row.messages[-1]["content"])}] if reads_context else row.messages
        for row in rows
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, padding=True, return_tensors="pt")


class Reader:
    """A voice reading a batch of prompts, then one token per row and step."""

    def __init__(self, voice: Voice, rows: Sequence[Row], tokenizer: Any) -> None:
        batch = prompts(rows, voice.reads_context, tokenizer)
        self.voice, self.mask, self.cache = voice, batch.attention_mask, None
        self.logits = self._forward(batch.input_ids, (self.mask.cumsum(-1) - 1).clamp(min=0))  # [rows, vocab]

    def read(self, tokens: torch.Tensor) -> None:
        """Append ``tokens`` [rows]."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=-1)
        self.logits = self._forward(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.voice.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@torch.inference_mode()
def answers(voices: Sequence[Voice], rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """The greedy answer to each row under the weighted sum of the voices' logits."""
    readers = [Reader(voice, rows, tokenizer) for voice in voices]
    tokens = torch.full((len(rows), 0), tokenizer.eos_token_id)  # [rows, step]
    ended = torch.zeros(len(rows), dtype=torch.bool)
    while tokens.shape[1] < MAX_NEW_TOKENS and not ended.all():
        logits = sum(reader.voice.weight * reader.logits for reader in readers)
        assert isinstance(logits, torch.Tensor)
        chosen = logits.argmax(-1).masked_fill(ended, tokenizer.eos_token_id)
        ended |= chosen == tokenizer.eos_token_id
        tokens = torch.cat([tokens, chosen[:, None]], dim=-1)
        for reader in readers:
            reader.read(chosen)
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def scores(pair: Pair, rows: Sequence[Row], done: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, float]]:
    """By method name, the share of profile items and of facts stated, averaged over ``rows``; ``done`` hears each name."""
    table = {}
    for name, voices in methods(pair).items():
        shares = []
        for start in range(0, len(rows), BATCH_ROWS):
            part = rows[start : start + BATCH_ROWS]
            texts = answers(voices, part, pair.tokenizer)
            shares += [score(text, row) for text, row in zip(texts, part, strict=True)]
        profile, facts = (sum(column) / len(rows) for column in zip(*shares, strict=True))
        table[name] = {"profile": profile, "facts": facts}
        done(name)
    return table


def as_table(table: dict[str, dict[str, float]], num_rows: int) -> Table:
    view = Table("method", title=f"Share stated correctly, {num_rows} held-out queries, greedy")
    for column in ("profile", "facts"):
        view.add_column(column, justify="right")
    for name, shares in table.items():
        view.add_row(name, f"{shares['profile']:.3f}", f"{shares['facts']:.3f}")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m costeer_vllm.demo.scores", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200, help="number of held-out queries")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of large/ and small/ (default: the package's)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    console = Console()
    rows = held_out(options.rows)
    with console.status("loading") as status:
        table = scores(load_pair(options.models), rows, lambda name: status.update(f"done: {name}"))
    console.print(as_table(table, len(rows)))
    if options.json:
        options.json.write_text(json.dumps({"rows": len(rows), "scores": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
