"""The reference of the exactness tests: Algorithm 1 with its T iterations, by plain transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from costeer_vllm.demo.algorithm1 import algorithm1
from costeer_vllm.demo.task import EVENTS, QUERIES, with_context
from costeer_vllm.steering import SteeringParams

NUM_PROMPTS, NUM_TOKENS = 64, 64
PARAMS = SteeringParams(T=20)


def queries() -> list[str]:
    """64 different prompts: every event in several phrasings."""
    return [QUERIES[i % len(QUERIES)].format(event=EVENTS[i % len(EVENTS)].name) for i in range(NUM_PROMPTS)]


def generate(pair_folder: Path, num_candidates: int | None = None) -> list[list[int]]:
    """Algorithm 1 with its T iterations in float64, by plain transformers, never stopping at the end-of-sequence id.

    ``num_candidates``: of the base policy, as in edge fusion; None: all, as in cloud fusion.
    """
    torch.set_num_threads(2)
    large, small = (
        AutoModelForCausalLM.from_pretrained(pair_folder / name, dtype=torch.float32).eval() for name in ("large", "small")
    )
    large.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(pair_folder / "large")
    context = sorted((pair_folder / "contexts").glob("*.md"))[0].read_text()

    def ids(content: str) -> Any:
        chat = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    return [
        algorithm1(large, small, ids(query), ids(with_context(context, query)), ids(query), PARAMS, NUM_TOKENS, num_candidates)
        for query in queries()
    ]
