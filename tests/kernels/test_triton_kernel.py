"""The Triton kernels without a GPU: interpreted for what they compute, compiled for what a GPU would run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from costeer_vllm.kernels import triton_kernel

HERE = Path(__file__).parent


def test_interpreted_kernels_keep_the_contract() -> None:
    """Triton reads TRITON_INTERPRET once, when it is imported, so the interpreter gets a process of its own."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "test_steer_inplace.py", "parity.py"]
    run = subprocess.run(command, cwd=HERE, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", run.stdout.splitlines()[-1])}
    assert counts.pop("passed") >= 70, output
    assert "[triton" in output
    assert not counts.keys() & {"skipped", "xfailed", "xpassed", "deselected"}, output


def compiled_ptx(kernel: triton.JITFunction, values_type: str, stride_is_multiple_of_16: bool) -> str:
    """PTX for an H100, from argument types as the launcher would find them."""
    types = {"rows_ptr": "*i64", "offsets_ptr": "*i64", "ids_ptr": "*i64", "values_ptr": f"*{values_type}", "BLOCK": "constexpr"}
    types |= {"logits_ptr": "*fp32", "strength_ptr": "*fp32"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name in kernel.arg_names if name.endswith("_ptr") or stride_is_multiple_of_16]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name != "BLOCK"}
    block = triton_kernel._DENSE_BLOCK if kernel is triton_kernel._steer_dense else triton_kernel._SPARSE_BLOCK
    source = ASTSource(kernel, signature, {"BLOCK": block}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(triton_kernel._OPTIONS)).asm["ptx"]


@pytest.mark.parametrize("values_type", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_compiles_for_cuda(values_type: str, aligned: bool) -> None:
    dense = compiled_ptx(triton_kernel._steer_dense, values_type, aligned)
    sparse = compiled_ptx(triton_kernel._steer_sparse, values_type, aligned)
    for ptx in (dense, sparse):
        assert "fma.rn.f32" not in ptx
        assert "mul.f32" in ptx or "mul.rn.f32" in ptx
    wide = re.findall(r"ld\.global\.v4\.b32", dense), re.findall(r"st\.global\.v4\.b32", dense)
    assert all(wide) if aligned else not any(wide)
