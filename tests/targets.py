"""Compile the kernels of all lessons for GPUs that need not be in the machine: ``make targets``.

A kernel is compiled as the lesson's own functions would launch it there: with their block sizes,
numbers of warps and types of arguments. Nothing is run. Registers and spills are kept in
``docs/results/targets.json`` and shown on the page *Install and build*.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
TARGETS = {
    "NVIDIA sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "AMD gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}


class Driver:
    """Stands for a GPU: says what it is, and runs nothing."""

    def __init__(self, target):
        self.target = GPUTarget(*target)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def usage(kernel):
    """Registers and spilled bytes of a thread."""
    if "amdgcn" in kernel.asm:
        code = kernel.asm["amdgcn"]
        spilled = 4 * int(re.search(r"vgpr_spill_count: +(\d+)", code)[1])
        return {"registers": int(re.search(r"vgpr_count: +(\d+)", code)[1]), "spilled": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    return {"registers": registers, "spilled": spilled}


def compile_lesson(name, target):
    """The kernels that a lesson launches on the target: their names, registers and spills.

    For a process of its own, since it changes what ``triton.jit`` makes of a kernel.
    """
    from target_calls import CALLS

    found, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        known = found.get(self.__name__, {"registers": -1})
        found[self.__name__] = max(known, usage(kernel), key=lambda use: use["registers"])
        return kernel

    def jit(fn=None, **options):
        return JITFunction(fn, **options) if fn else lambda fn: JITFunction(fn, **options)

    # The lesson finds the interpreter chosen, and so takes tensors on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    triton.jit, JITFunction.run = jit, compile_only
    driver.set_active(Driver(TARGETS[target]))
    sys.path.insert(0, str(ROOT / "tutorials"))
    lesson = importlib.import_module(name)
    CALLS[name](lesson)
    return found


def compile_all(name, targets=TARGETS):
    """For each kernel of a lesson and each target, registers and spills."""
    kernels = {}
    for target in targets:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        output = subprocess.check_output(
            [sys.executable, __file__, name, target], text=True, env=environment
        )
        for kernel, use in json.loads(output.splitlines()[-1]).items():
            kernels.setdefault(kernel, {})[target] = use
    return kernels


def main():
    from target_calls import CALLS

    kernels = {}
    for name in CALLS:
        print(name, flush=True)
        kernels |= compile_all(name)
    result = {"triton": triton.__version__, "gpus": list(TARGETS), "kernels": kernels}
    path = ROOT / "docs/results/targets.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    if sys.argv[1:]:
        print(json.dumps(compile_lesson(*sys.argv[1:])))
    else:
        main()
