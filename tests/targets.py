"""Compile the kernels of all lessons for GPUs that need not be in the machine: ``make targets``.

A kernel is compiled as the lesson's own functions would launch it there: with their block sizes,
numbers of warps and types of arguments. Nothing is run. For each kernel the registers of a thread,
the bytes that it spills, and what the GPU could not launch are kept in ``docs/results/targets.json``
and shown on the page *Install and build*.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported

import triton
from target_calls import CALLS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
# Backend, architecture, threads of a warp, and the shared memory that a program may have in KiB.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163),
    "sm_90": ("cuda", 90, 32, 227),
    "sm_100": ("cuda", 100, 32, 227),
    "sm_120": ("cuda", 120, 32, 99),
    "gfx942": ("hip", "gfx942", 64, 64),
    "gfx950": ("hip", "gfx950", 64, 160),
    "gfx1100": ("hip", "gfx1100", 32, 64),
}
THREADS = 1024  # of a program, on all of them


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
        return {
            "registers": int(re.search(r"vgpr_count: +(\d+)", code)[1]),
            "spilled": spilled,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    return {"registers": registers, "spilled": spilled}


def problem(kernel, target):
    """Why a GPU would refuse to launch the kernel, or None."""
    _, _, warp, shared = TARGETS[target]
    threads = kernel.metadata.num_warps * warp
    if threads > THREADS:
        return f"{threads} threads in a program, at most {THREADS} are possible"
    if kernel.metadata.shared > shared * 1024:
        needed = kernel.metadata.shared // 1024
        return (
            f"{needed} KiB of shared memory in a program, at most {shared} are possible"
        )


def sentence(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def compile_lesson(name, target):
    """What becomes of the kernels that the lesson launches on the target.

    For a process of its own: it makes the lesson believe that the CPU is that GPU, and Triton
    compile what it is to launch.
    """
    found, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        known = found.get(self.__name__, {"registers": -1})
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            found[self.__name__] = known | {"problem": sentence(error)}
            return None
        values = [*args, *kwargs.values()]
        wide = any(getattr(value, "dtype", None) == torch.float64 for value in values)
        # float64 has to compile, but nobody chooses a GPU for it.
        use = {"registers": -1} if wide else usage(kernel)
        use = max(known, use, key=lambda use: use["registers"])
        found[self.__name__] = use | {
            "problem": known.get("problem") or problem(kernel, target)
        }
        return kernel

    backend, architecture, warp, shared = TARGETS[target]
    properties = SimpleNamespace(multi_processor_count=100, warp_size=warp)
    if backend == "cuda":
        properties.shared_memory_per_block_optin = shared * 1024
    cpu = torch.device("cpu")
    torch.accelerator.current_accelerator = lambda check_available=False: cpu
    torch.cpu.get_device_name = lambda device=None: target
    torch.cuda.get_device_properties = lambda device=None: properties
    driver.set_active(Driver((backend, architecture, warp)))
    JITFunction.run = compile_only
    try:
        lesson = importlib.import_module(name)
        CALLS[name](lesson)
    except Exception as error:  # so that the other lessons are compiled all the same
        return found | {"its calls": {"problem": sentence(error)}}
    kernels = [k for k in vars(lesson).values() if isinstance(k, JITFunction)]
    missing = {k.__name__ for k in kernels if k.__name__.endswith("_kernel")} - set(found)
    return found | {kernel: {"problem": "no call launches it"} for kernel in missing}


def compile_all(names, targets=TARGETS):
    """For each lesson, kernel and target what ``compile_lesson`` finds."""
    sys.path[:0] = [str(ROOT / "tutorials")]
    jobs = [(name, target) for name in names for target in targets]
    # A process for each job, which has Triton imported already.
    context = multiprocessing.get_context("fork")
    kernels = {name: {} for name in names}
    with context.Pool(maxtasksperchild=1) as pool:
        for (name, target), found in zip(
            jobs, pool.starmap(compile_lesson, jobs, chunksize=1), strict=True
        ):
            for kernel, use in found.items():
                kernels[name].setdefault(kernel, {})[target] = use
    return kernels


def problems(kernels):
    return [
        f"{name}: {kernel} for {target}: {use['problem']}"
        for name, found in kernels.items()
        for kernel, uses in found.items()
        for target, use in uses.items()
        if use["problem"]
    ]


def main():
    path = ROOT / "docs/results/targets.json"
    names = sorted(script.stem for script in (ROOT / "tutorials").glob("*.py"))
    old = json.loads(path.read_text()) if path.exists() else {}
    known = old["lessons"] if old.get("triton") == triton.__version__ else {}
    found = known | compile_all(sys.argv[1:] or names)
    lessons = {name: found[name] for name in names if name in found}
    result = {"triton": triton.__version__, "date": str(date.today()), "lessons": lessons}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(problems(lessons)))
    sys.exit(bool(problems(lessons)))


if __name__ == "__main__":
    main()
