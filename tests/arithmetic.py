"""Count what the kernels of the recorded benchmarks compute: ``PYTHONPATH=docs/_ext python tests/arithmetic.py``.

Each benchmark in GB/s is run as it stands in its lesson, but its kernel is compiled for an H100
instead of launched. The instructions of all threads, over the bytes that the lesson counts, are
kept in ``docs/results/instructions.json``, and the page *Benchmarks* draws the record over them.
No GPU is needed. A loop counts once; these kernels have none but one that waits.
"""

import contextlib
import importlib
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from datetime import date
from types import SimpleNamespace

import targets  # makes Triton compile
import torch
import triton
from benchmarks import schema
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGET = "sm_90"


def instructions(kernel):
    """Of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        code = subprocess.check_output(
            [tool, "-sass", file.name], text=True, stderr=subprocess.DEVNULL
        )
    return len(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?!NOP)", code))


def pretend():
    """Make lessons believe that the CPU is the GPU; what they launch is compiled and counted."""
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        threads = 32 * kernel.metadata.num_warps * math.prod(grid)
        found.append(instructions(kernel) * threads)
        return kernel

    def empty(*shape, **options):
        return torch.empty(*shape, **options)

    @contextlib.contextmanager
    def capture(graph):  # what is launched before does not count
        found.clear()
        yield

    properties = SimpleNamespace(multi_processor_count=132, warp_size=32)
    cpu, (backend, architecture, warp, _) = torch.device("cpu"), targets.TARGETS[TARGET]
    torch.accelerator.current_accelerator = lambda check_available=False: cpu
    torch.cpu.get_device_name = lambda device=None: TARGET
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.randn, torch.randn_like = empty, torch.empty_like
    torch.softmax = lambda x, dim: torch.empty_like(x)
    driver.set_active(targets.Driver((backend, architecture, warp)))
    JITFunction.run = compile_only
    torch.cuda.CUDAGraph = lambda: SimpleNamespace(replay=lambda: None)
    torch.cuda.graph = capture
    # As if everything took a millisecond: then GB/s say how many bytes were counted.
    triton.testing.do_bench = lambda run, **options: (run(), 1.0)[1]
    return found


def count(name):
    """Instructions for each byte, of each benchmark of a lesson."""
    found, result = pretend(), {}
    lesson = importlib.import_module(name)
    for mark in vars(lesson).values():
        if not isinstance(mark, triton.testing.Mark):
            continue
        figures = mark.benchmarks
        for figure in figures if isinstance(figures, list) else [figures]:
            styles = dict(zip(figure.line_names, figure.styles, strict=True))
            lines = schema.roles(styles)
            roles = [line.role for line in lines.values()]
            if figure.ylabel != "GB/s" or not {"kernel", "limit"} <= set(roles):
                continue
            x = figure.x_vals[-1]
            # The number of elements does not matter where it is all that differs.
            x = min(x, 2**20) if figure.x_names == ["n_elements"] else x
            values = {figure.line_arg: figure.line_vals[roles.index("kernel")]}
            found.clear()
            speed = mark.fn(**values, **figure.args, **dict.fromkeys(figure.x_names, x))
            result[f"{name}.{figure.plot_name}"] = round(sum(found) / (speed * 1e6), 2)
    return result


def main():
    sys.path[:0] = [str(targets.ROOT / "tutorials")]
    scripts = sorted(script.stem for script in (targets.ROOT / "tutorials").glob("*.py"))
    context = multiprocessing.get_context("fork")
    found = {}
    with context.Pool(1, maxtasksperchild=1) as pool:
        for counted in pool.imap(count, scripts, chunksize=1):
            found |= counted
    path = targets.ROOT / "docs/results/instructions.json"
    about = {"target": TARGET, "triton": triton.__version__, "date": str(date.today())}
    about |= {"instructions for each byte": found}
    path.write_text(json.dumps(about, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
