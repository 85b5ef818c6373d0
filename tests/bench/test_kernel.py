"""The kernel's benchmark as scripts: they tell the truth about the kernel, and want nothing but torch and triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from costeer_vllm.bench import kernel
from costeer_vllm.bench.kernel import Settings, checks, timings

ROOT = Path(__file__).parents[2]
SMALL = Settings(device="cpu", rows=(1, 3), vocab=1000, repetitions=2)


def test_every_kind_is_timed_for_every_number_of_rows() -> None:
    found = list(timings(SMALL))
    kinds = ["dense float32", "dense float16", "dense bfloat16", "sparse 512"]
    assert [(timing.rows, timing.deltas) for timing in found] == [(rows, kind) for rows in (1, 3) for kind in kinds]
    assert all(len(timing.ratios) == 2 and timing.ratio > 0 for timing in found)
    assert found[0].moved_bytes == 12 * SMALL.width


def test_a_right_kernel_passes() -> None:
    assert all(check.good for check in checks(SMALL))


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_the_last_id(
        logits: torch.Tensor, rows: torch.Tensor, strength: torch.Tensor, deltas: object, backend: str
    ) -> None:
        kept = logits[:, -1].clone()
        right(logits, rows, strength, deltas, backend)  # type: ignore[arg-type]
        logits[:, -1] = kept

    right = kernel.steer_inplace
    monkeypatch.setattr(kernel, "steer_inplace", forget_the_last_id)
    assert not all(check.good for check in checks(SMALL))


# torch itself is free to import what it likes, so it comes first.
RUN_WITHOUT = """
import runpy, sys
import torch, triton
for name in ("vllm", "transformers", "msgspec", "zmq", "httpx", "rich", "typer", "fastapi", "websockets", "uvicorn"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_all_that_wants_a_gpu_needs_torch_and_triton_only(tmp_path: Path) -> None:
    """Run as on a machine with a GPU but for the device: Triton's interpreter is in its place."""
    script = ["benchmarks/gpu.py", "--json", str(tmp_path / "gpu.json"), "--device", "cpu", "--backend", "triton"]
    command = [sys.executable, "-c", RUN_WITHOUT, *script, "--rows", "1", "2", "--vocab", "700", "--repetitions", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["checks"]) == 3 * 2 * 5
    assert all(check["good"] for check in found["checks"])
    assert {timing["rows"] for timing in found["timings"]} == {1, 2}
