"""How ``vllm serve`` is started for steering, with what a machine without a GPU needs."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from costeer_vllm.errors import InvalidParameter, Unsupported

PROCESSOR_OPTIONS = ("--logits-processors", "--logits-processor", "--logits_processors")


def serve_command(model: str, options: Sequence[str]) -> list[str]:
    """The command line for the large model; sets what vLLM's CPU build needs in the environment unless it is set already.

    Raises:
        InvalidParameter: if the options name logits processors themselves.
        Unsupported: if vLLM is not installed.
    """
    for option in options:
        if option.partition("=")[0] in PROCESSOR_OPTIONS:
            raise InvalidParameter("option", option, "left out: costeer serve sets it; use vllm serve to combine processors")
    command = [vllm_executable(), "serve", model, *options]
    if not has_cuda():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if not any(option.startswith("--gpu-memory-utilization") for option in options):
            command += ["--gpu-memory-utilization", "0.3"]  # on CPUs it bounds main memory; the default 0.92 is refused at start
    return [*command, "--logits-processors=costeer"]


def vllm_executable() -> str:
    """The ``vllm`` command beside this interpreter, else the one on PATH."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise Unsupported("costeer: vLLM is not installed here: pip install '.[server]', or without a GPU: make demo")
    return found


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is visible, without importing torch."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
