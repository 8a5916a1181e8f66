"""What the lesson reads off compiled kernels, against what ptxas says itself."""

import os
import re
import subprocess
import sys

import pytest
import torch
from inside_a_kernel import (
    DEVICE,
    H100,
    MI300,
    compile_for,
    launch_arithmetic,
    softmax_with_warps,
)

PTXAS = """
import json, re, subprocess, sys, tempfile
import triton
from triton.backends.nvidia.compiler import get_ptxas
ptxas = get_ptxas(90)
# As Triton itself calls the ptxas of CUDA 13.
options = ["--regAllocOptLevel=2"] if float(ptxas.version) >= 13 else []
with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
    file.write(sys.stdin.read())
    file.flush()
    print(subprocess.run(
        [ptxas.path, "-v", *options, "--gpu-name=sm_90a", file.name, "-o", "/dev/null"],
        capture_output=True, text=True,
    ).stderr)
"""


def test_registers_and_spills_are_those_that_ptxas_reports(tmp_path):
    """The compiler's PTX, kept in its cache, is assembled again with ptxas's own report."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path)
    try:
        found = compile_for({"BLOCK": 4096}, {"BLOCK": 65536, "num_warps": 32})
    finally:
        del os.environ["TRITON_CACHE_DIR"]
    reported = set()
    for path in tmp_path.rglob("*.ptx"):
        report = subprocess.check_output(
            [sys.executable, "-c", PTXAS], text=True, input=path.read_text()
        )
        stack = re.search(r"(\d+) bytes stack frame", report)[1]
        reported.add((int(re.search(r"Used (\d+) registers", report)[1]), int(stack)))
    assert {(kernel["registers"], kernel["spilled"]) for kernel in found} == reported


def test_a_row_that_needs_all_registers_spills():
    widths = [4096, 32768, 65536, 131072]
    for dtype in ("fp32", "bf16"):
        cases = [{"BLOCK": n, "num_warps": 32, "dtype": dtype} for n in widths]
        spilled = [kernel["spilled"] > 0 for kernel in compile_for(*cases)]
        assert spilled == [False, False, True, True]


@pytest.mark.parametrize(("dtype", "narrow"), [("fp32", "b32"), ("bf16", "b16")])
def test_only_aligned_rows_are_loaded_sixteen_bytes_at_a_time(dtype, narrow):
    cases = [{"dtype": dtype, "aligned": aligned} for aligned in (True, False)]
    wide, single = compile_for(*cases)
    assert wide["PTX"] == ["ld.global.v4.b32"] and wide["SASS"] == ["LDG.E.128"]
    assert single["PTX"] == [f"ld.global.{narrow}"]
    assert single["SASS"] != wide["SASS"]


def test_another_target_gives_another_assembly():
    nvidia, amd = compile_for({"target": H100}, {"target": MI300})
    assert "assembly" not in nvidia and "PTX" not in amd
    assert all(load.endswith("x4") for load in amd["assembly"])


@pytest.mark.parametrize("num_warps", [1, 4, 32])
def test_the_result_does_not_depend_on_the_warps(randn, num_warps):
    x = randn(5, 781)
    torch.testing.assert_close(softmax_with_warps(x, num_warps), torch.softmax(x, 1))


def test_instructions_are_counted_for_each_thread():
    few, many = compile_for(
        {"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 4096, "num_warps": 4}
    )
    assert 8 < few["instructions"] < many["instructions"] < 4 * few["instructions"]


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_arithmetic_of_so_many_steps(randn, steps):
    x = -randn(2049).abs().clamp(max=1)
    expected = x.double()
    for _ in range(steps):
        expected = expected * expected + expected
    torch.testing.assert_close(
        launch_arithmetic(x, steps).double(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.gpu
def test_the_launched_kernel_is_the_one_that_was_compiled():
    from inside_a_kernel import softmax_kernel

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compares with what is compiled for an H100")
    x = torch.randn(4, 4096, device=DEVICE)
    launched = softmax_kernel[(4,)](torch.empty_like(x), x, 4096, 4096, 4096, num_warps=8)
    (found,) = compile_for({"BLOCK": 4096, "num_warps": 8})
    assert (launched.n_regs, launched.n_spills) == (found["registers"], 0)
