"""
.. _inside a kernel:

Inside a kernel
===============

The compiler tells you in advance how many registers a kernel takes, how it reads memory, and
whether it spills, if you know where to ask. In this lesson you compile one kernel for GPUs that
need not be in your machine, read what became of it, and let measurements choose its settings.

You will learn

- how to read registers, spills and load instructions off a compiled kernel, without a GPU;
- how ``num_warps`` changes the compiled kernel, and how to find the best value;
- how to find out where the time of a program goes.

Needs: PyTorch, and :ref:`fused softmax`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/compile_steps.svg'
import os
import sys
from datetime import date

import torch

GPU = torch.accelerator.current_accelerator(check_available=True)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or GPU is None
DEVICE = "cpu" if INTERPRET else GPU.type
if INTERPRET and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise ImportError("restart Python: Triton was imported before TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

gpu = "no GPU" if INTERPRET else torch.get_device_module(DEVICE).get_device_name()
MACHINE = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
if __name__ == "__main__":
    print(MACHINE)
    if INTERPRET:
        print("Triton's interpreter runs the kernels: speed is measured on a GPU only.")

# %%
# The kernel
# ----------
#
# This is the kernel of :ref:`fused softmax`, one row a program. A few lines below it launch it
# with as many warps as you like.


@triton.jit
def softmax_kernel(y_ptr, x_ptr, x_row_stride, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=-float("inf"))
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    numerator = tl.exp(x - tl.max(x, axis=0))
    denominator = tl.sum(numerator, axis=0)
    tl.store(y_ptr + row * n_cols + cols, numerator / denominator, mask=mask)


def softmax_with_warps(x, num_warps):
    """Softmax of the rows of a contiguous matrix."""
    y = torch.empty_like(x)
    BLOCK = triton.next_power_of_2(x.shape[1])
    sizes = (x.stride(0), x.shape[1], BLOCK)
    softmax_kernel[(len(x),)](y, x, *sizes, num_warps=num_warps)
    return y


# %%
# Compile it for a GPU that you don't have
# ----------------------------------------
#
# Triton turns the Python function into machine code in steps. On the way to an NVIDIA GPU it
# writes *PTX*, an assembly language for all of them, and NVIDIA's assembler ``ptxas``, which comes
# with Triton, turns that into *SASS*, the code of one generation. None of this needs a GPU: you
# name the target yourself.
#
# .. image:: /_static/compile_steps.svg
#    :alt: Python function, Triton's intermediate code, PTX, SASS. Beside each step: what one can read there. For AMD the last two are LLVM and AMD's assembly.
#
# What a launch finds out from its arguments you have to say as well: their types, and which of
# them are multiples of 16. The compiler runs in a process of its own here, because in the
# interpreter's process even ``tl.max`` is interpreted.

COMPILER = """
import json, re, subprocess, sys, tempfile

import kernel, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for case in json.load(sys.stdin):
    dtype = case["dtype"]
    types = [f"*{dtype}", f"*{dtype}", "i32", "i32", "constexpr"]
    multiples = [0, 1, 2, 3] if case["aligned"] else [0, 1]  # PyTorch aligns its tensors
    source = ASTSource(
        kernel.softmax_kernel,
        dict(zip(["y_ptr", "x_ptr", "x_row_stride", "n_cols", "BLOCK"], types)),
        {(4,): case["BLOCK"]},
        {(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    options = {"num_warps": case["num_warps"]}
    compiled = triton.compile(source, target=GPUTarget(*case["target"]), options=options)
    found = {"shared": compiled.metadata.shared}
    if case["target"][0] == "cuda":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            dump = subprocess.run(
                [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True
            ).stdout
        registers, spilled = re.search(r"REG:(\\d+) STACK:(\\d+)", dump).groups()
        code = {"PTX": compiled.asm["ptx"], "SASS": dump}
        loads = {"PTX": r"ld\\.global\\S*", "SASS": r"LDG\\S*"}
    else:
        code = {"assembly": compiled.asm["amdgcn"]}
        registers = re.search(r"vgpr_count: +(\\d+)", code["assembly"])[1]
        spilled = 4 * int(re.search(r"vgpr_spill_count: +(\\d+)", code["assembly"])[1])
        loads = {"assembly": r"(?:global|buffer)_load\\S*"}
    found |= {"registers": int(registers), "spilled": int(spilled)}
    found |= {name: sorted(set(re.findall(loads[name], code[name]))) for name in code}
    print(json.dumps(found))
"""
H100, A100, B200 = ("cuda", 90, 32), ("cuda", 80, 32), ("cuda", 100, 32)
MI300 = ("hip", "gfx942", 64)  # the last number is the size of a warp: 64 on this AMD GPU


def compile_for(*cases):
    """What the compiler makes of ``softmax_kernel``: a dictionary for each case.

    A case is a dictionary of what differs from a row of 1024 float32 on an H100:
    target, dtype ("fp32", "bf16", "fp16"), BLOCK, num_warps, and whether the width and
    the stride are multiples of 16 elements (aligned).
    """
    import inspect
    import json
    import subprocess
    import tempfile
    from pathlib import Path

    usual = {
        "target": H100,
        "dtype": "fp32",
        "BLOCK": 1024,
        "num_warps": 4,
        "aligned": True,
    }
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        source = inspect.getsource(softmax_kernel.fn)
        header = "import triton\nimport triton.language as tl\n\n\n"
        Path(folder, "kernel.py").write_text(header + source)
        Path(folder, "compiler.py").write_text(COMPILER)
        output = subprocess.check_output(
            [sys.executable, "compiler.py"], cwd=folder, env=environment, text=True,
            input=json.dumps([usual | case for case in cases]),
        )  # fmt: skip
    return [json.loads(line) for line in output.splitlines()]


# %%
# Registers, and when they run out
# --------------------------------
#
# A program keeps its row in registers, divided evenly among its threads. A multiprocessor of an
# H100 has 65536 registers of 32 bits, so 32 warps of 32 threads can have 64 each. Predict: a row
# of 32768 float32 numbers takes 32 registers a thread, which leaves as many again for addresses
# and intermediate results. A row of 65536 takes all 64 for the data alone, so it cannot fit.

if __name__ == "__main__":
    from tabulate import tabulate

    widths = [1024, 4096, 16384, 32768, 65536, 131072]
    rows = []
    for dtype in ("fp32", "bf16"):
        cases = [
            {"BLOCK": n, "num_warps": min(n // 512, 32), "dtype": dtype} for n in widths
        ]
        for case, found in zip(cases, compile_for(*cases), strict=True):
            numbers = [found[key] for key in ("registers", "spilled", "shared")]
            rows.append([dtype, *list(case.values())[:2], *numbers])
    headers = ["dtype", "columns", "warps", "registers", "bytes spilled", "bytes shared"]
    print(tabulate(rows, headers))

# %%
# What does not fit is *spilled*: every thread writes it to memory and reads it back, for every
# row. The prediction holds, and at 131072 columns most of the row lives in memory. bfloat16 takes
# half the bytes in memory, but the kernel widens each element to float32 before it computes, so it
# spills at the same width. Shared memory holds only what the warps tell each other in the two
# reductions: one number for each warp.
#
# One load or four
# ----------------
#
# A thread can load up to 16 bytes with one instruction, if the address is a multiple of 16. The
# compiler cannot see addresses, so it relies on what it is told: the first address is aligned, and
# so is each row's, if the width is a multiple of 16 elements. Otherwise it has to load each
# element alone.

if __name__ == "__main__":
    cases = [{"dtype": d, "aligned": a} for d in ("fp32", "bf16") for a in (True, False)]
    rows = []
    for case, found in zip(cases, compile_for(*cases), strict=True):
        rows.append([case["dtype"], case["aligned"], *found["PTX"], *found["SASS"]])
    print(tabulate(rows, ["dtype", "multiple of 16", "PTX", "SASS"]))

# %%
# ``v4.b32`` are four words of 32 bits, and ``LDG.E.128`` is the same in the GPU's own code: a load
# of 128 bits. Without the promise, bfloat16 needs eight instructions where one would do. That is
# why a width of 5000 or 50257 is slow in :ref:`fused softmax`, and why :ref:`softmax tiles` passes
# widths in a form that keeps the promise where it can.
#
# Other GPUs
# ----------
#
# The same kernel for four generations. A number here says nothing about speed: compiling is not
# running.

if __name__ == "__main__":
    targets = {"A100": A100, "H100": H100, "B200": B200, "MI300": MI300}
    cases = [
        {"target": target, "BLOCK": n, "num_warps": 16}
        for target in targets.values()
        for n in (16384, 65536)
    ]
    rows = []
    for case, found in zip(cases, compile_for(*cases), strict=True):
        (name,) = (name for name, target in targets.items() if target == case["target"])
        (load,) = found.get("SASS") or found["assembly"]
        rows.append([name, case["BLOCK"], found["registers"], found["spilled"], load])
    print(tabulate(rows, ["GPU", "columns", "registers", "bytes spilled", "load"]))

# %%
# AMD's warps have 64 threads. So the same 16 warps are twice as many threads, and each holds half
# as much.
#
# How many warps?
# ---------------
#
# The lessons give each thread 64 bytes of a row. On a GPU, try all choices, and see beside the
# time what each does to the registers. (A launch returns the compiled kernel, which knows its
# ``n_regs`` and ``n_spills``.) More warps mean fewer elements for each thread, but more threads to
# combine results from.

if __name__ == "__main__" and not INTERPRET:
    x = torch.randn(2**15, 4096, device=DEVICE)
    y = torch.empty_like(x)
    copy = triton.testing.do_bench(x.clone, return_mode="median")
    rows = []
    for num_warps in (1, 2, 4, 8, 16, 32):
        kernel = softmax_kernel[(len(x),)](y, x, 4096, 4096, 4096, num_warps=num_warps)
        time = triton.testing.do_bench(
            lambda: softmax_with_warps(x, num_warps), return_mode="median"
        )
        rows.append([num_warps, kernel.n_regs, kernel.n_spills, f"{copy / time:.0%}"])
    print(tabulate(rows, ["warps", "registers", "spills", "of a copy's speed"]))

# %%
# ``triton.autotune`` automates the search. The first time that it meets a new value of the *key*,
# here the width, it runs every configuration and keeps the fastest. What it found is lost when the
# process ends, unless you set ``TRITON_CACHE_AUTOTUNING=1``.

if __name__ == "__main__" and not INTERPRET:
    import time as clock

    configurations = [triton.Config({}, num_warps=n) for n in (1, 2, 4, 8, 16, 32)]
    tuned = triton.autotune(configurations, key=["n_cols"])(softmax_kernel)
    for n_cols in (256, 4096, 16384):
        x = torch.randn(2**27 // n_cols, n_cols, device=DEVICE)
        y, start = torch.empty_like(x), clock.perf_counter()

        def run(x=x, y=y, n_cols=n_cols):
            BLOCK = triton.next_power_of_2(n_cols)
            return tuned[(len(x),)](y, x, n_cols, n_cols, BLOCK)

        run()
        torch.cuda.synchronize()
        first = clock.perf_counter() - start
        by_hand = min(max(4 * n_cols // (32 * 64), 1), 32)
        times = [
            triton.testing.do_bench(f, return_mode="median")
            for f in (run, lambda: softmax_with_warps(x, by_hand))
        ]
        print(
            f"{n_cols} columns: autotune chose {tuned.best_config.num_warps} warps in "
            f"{first:.1f} s; {by_hand} by hand take {times[1] / times[0]:.2f} times as long"
        )

# %%
# A search is worth its time where you cannot predict the best setting, and a nuisance where every
# new shape makes a user wait. The lessons search once, by hand, and write down a rule.
#
# Where the time goes
# -------------------
#
# PyTorch's profiler lists the kernels of a program with their times. Divide the bytes that a
# kernel must move by its time, and compare with a copy: that is its share of the limit. The first
# five rows are the five operators of the naive softmax, then come the fused kernel and the copy.

if __name__ == "__main__" and not INTERPRET:
    from torch.profiler import ProfilerActivity, profile

    def naive_softmax(x):
        z = x - torch.amax(x, dim=-1, keepdim=True)
        numerator = torch.exp(z)
        return numerator / torch.sum(numerator, dim=-1, keepdim=True)

    x = torch.randn(2**15, 4096, device=DEVICE)
    naive_softmax(x), softmax_with_warps(x, 8), x.clone()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        naive_softmax(x), softmax_with_warps(x, 8), x.clone()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_time > 0]
    limit = 2 * x.nbytes / events[-1].device_time
    # amax and sum read the matrix; the others read it and write it.
    trips = [1, 2, 2, 1, 2, 2, 2]
    rows = [
        [event.name[:50], event.device_time, n * x.nbytes / event.device_time / limit]
        for event, n in zip(events, trips, strict=True)
    ]
    print(tabulate(rows, ["kernel", "microseconds", "share of the copy"], floatfmt=".2f"))

# %%
# For a closer look at one kernel there is Nsight Compute, which comes with CUDA:
#
# .. code-block:: console
#
#    $ ncu --kernel-name softmax_kernel --launch-count 1 --set full python fused_softmax.py
#
# Read three numbers first. *Memory throughput* is given in per cent of what is possible; near the
# top, only moving fewer bytes helps. If *compute throughput* is the higher one, look for
# arithmetic or for narrow loads. If *achieved occupancy* is low and the theoretical one is, too,
# then registers or shared memory leave room for only a few programs at a time.
#
# Exercises
# ---------
#
# 1. Predict at which width the kernel begins to spill with 16 warps instead of 32, then ask the
#    compiler.
# 2. Which load instruction does float16 get, aligned and not? And for an aligned width, what
#    changes with ``BLOCK`` 128 and 4 warps?
#
# .. note::
#    Try it first.
#
#    1. Half the threads hold twice as much each, and each may have twice the registers (128, since
#       16 warps share 65536). So the limit is where it was, at a row of 65536 elements.
#
#       .. code-block:: python
#
#          widths = [2**i for i in range(12, 18)]
#          spilled = [
#              found["spilled"]
#              for found in compile_for(*({"BLOCK": n, "num_warps": 16} for n in widths))
#          ]
#          first = next(n for n, bytes in zip(widths, spilled) if bytes > 0)
#
#    2. The same as bfloat16: the instruction knows only the number of bits. With 128 elements for
#       128 threads, each has a single one to load, so the load is narrow again.
#
#       .. code-block:: python
#
#          cases = [
#              {"dtype": "fp16"},
#              {"dtype": "fp16", "aligned": False},
#              {"dtype": "fp16", "BLOCK": 128},
#          ]
#          loads = [found["PTX"] for found in compile_for(*cases)]
#
# References
# ----------
#
# - NVIDIA's documentation of `PTX <https://docs.nvidia.com/cuda/parallel-thread-execution/>`_ and of its `binary utilities <https://docs.nvidia.com/cuda/cuda-binary-utilities/>`_.
# - NVIDIA's documentation of `Nsight Compute <https://docs.nvidia.com/nsight-compute/>`_.
# - Triton's documentation of `autotune <https://triton-lang.org/main/python-api/generated/triton.autotune.html>`_.
