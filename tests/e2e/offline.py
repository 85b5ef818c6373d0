"""Run ``LLM(...)`` in this process against a hub, in configurations that ``vllm serve`` does not choose on a CPU.

    python -m tests.e2e.offline FOLDER WORKERS OPTIONS ANSWER        (COSTEER_HUB set; WORKERS by comma; OPTIONS is JSON)

Every other query is fused at the edge; two at a time go to each worker in turn. Writes JSON to the file ANSWER: the token ids of
every query, and how often a request was preempted.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.scheduler import Scheduler

from costeer_vllm.demo.algorithm1 import SteeringParams
from costeer_vllm.protocol.messages import Query, Turn
from costeer_vllm.request import SteeringRequest, to_extra_args


def force_async_scheduling() -> None:
    """The CPU platform switches async scheduling off; here it is switched on again, for the order of calls it brings."""
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def count_preemptions() -> list[str]:
    preempted: list[str] = []
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    Scheduler._preempt_request = preempt
    return preempted


def steered(worker: str, query: str, number: int, T: int, num_tokens: int, ignore_eos: bool) -> SamplingParams:
    request = SteeringRequest(
        request=f"offline-{number}",
        worker=worker,
        query=Query(messages=[Turn("user", query)]),
        strength=SteeringParams(T=T).strength,
        fusion="edge" if number % 2 else "cloud",
        deadline_ms=60_000.0,
    )
    extra_args = {"costeer": to_extra_args(request)}
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=ignore_eos, extra_args=extra_args)


def main(folder: str, workers: list[str], options: dict[str, Any], answer_file: Path) -> None:
    if options.pop("async_scheduling", False):
        force_async_scheduling()
    queries = options.pop("queries")
    T, num_tokens, ignore_eos = options.pop("T"), options.pop("num_tokens"), options.pop("ignore_eos", True)
    preempted = count_preemptions()
    llm = LLM(
        f"{folder}/large",
        logits_processors=["costeer"],
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        gpu_memory_utilization=0.3,
        **options,
    )
    params = [steered(workers[i // 2 % len(workers)], query, i, T, num_tokens, ignore_eos) for i, query in enumerate(queries)]
    answers = llm.chat([[{"role": "user", "content": query}] for query in queries], params, use_tqdm=False)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    # Not to stdout: vLLM's processes write there as well, into the same line if they like.
    answer_file.write_text(json.dumps({"tokens": tokens, "preemptions": len(preempted)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), json.loads(sys.argv[3]), Path(sys.argv[4]))
