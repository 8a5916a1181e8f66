"""
.. _inside a kernel:

Inside a kernel
===============

You find out what the compiler made of a kernel: how many registers it takes, how it reads memory,
and whether it spills. None of that needs a GPU. Then you measure what a GPU makes of it: which
settings are best, how much arithmetic it can do while it waits for memory, and where the time goes.

You will learn

- how to read registers, spills and load instructions off a compiled kernel, without a GPU;
- how ``num_warps`` changes the compiled kernel, and how to find the best value;
- whether memory or arithmetic limits a kernel, and where the time of a program goes.

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
# Triton turns the Python function into machine code in steps. For NVIDIA's GPUs it writes *PTX*, an
# assembly language for all of them. NVIDIA's assembler ``ptxas``, which comes with Triton, turns that
# into *SASS*, the code of one generation. None of this needs a GPU: you name the target yourself.
#
# .. image:: /_static/compile_steps.svg
#    :alt: Python function, Triton's intermediate code, PTX, SASS. Beside each step: what one can read there. For AMD the last two are LLVM and AMD's assembly.
#
# A launch finds out from its arguments what their types are, and which of them are multiples of 16.
# Here you have to say it. The compiler runs in a process of its own, because in a process with the
# interpreter even ``tl.max`` is interpreted.

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
        {(4,): case["BLOCK"]},  # argument 4 is a constant
        {(i,): [["tt.divisibility", 16]] for i in multiples},  # multiples of 16
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
        found["instructions"] = len(re.findall(r"/\\*[0-9a-f]{4,}\\*/ +(?!NOP)", dump))
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

    usual = {"target": H100, "dtype": "fp32", "BLOCK": 1024, "num_warps": 4}
    usual |= {"aligned": True}
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
# H100 has 65536 registers of 32 bits, so 1024 threads (32 warps) can have 64 each. Predict: a row
# of 32768 float32 numbers takes 32 registers in each thread, which leaves 32 for addresses and
# intermediate results. A row of 65536 takes all 64 for the data alone, so it cannot fit. With a
# GPU, the last column is the speed that your GPU reaches, as a share of a copy's.


def speed(n_cols, num_warps, dtype):
    """Softmax of 2^27 elements, as a share of a copy's speed."""
    x = torch.randn(2**27 // n_cols, n_cols, device=DEVICE, dtype=dtype)
    times = [
        triton.testing.do_bench(run, return_mode="median")
        for run in (x.clone, lambda: softmax_with_warps(x, num_warps))
    ]
    return times[0] / times[1]


if __name__ == "__main__":
    from tabulate import tabulate

    widths = [1024, 32768, 65536, 131072]
    rows = []
    for dtype, torch_dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        cases = [
            {"BLOCK": n, "num_warps": min(n // 512, 32), "dtype": dtype} for n in widths
        ]
        for case, found in zip(cases, compile_for(*cases), strict=True):
            n, warps = case["BLOCK"], case["num_warps"]
            numbers = [found[key] for key in ("registers", "spilled", "shared")]
            share = "" if INTERPRET else f"{speed(n, warps, torch_dtype):.0%}"
            rows.append([dtype, n, warps, *numbers, share])
    headers = ["warps", "registers", "spilled", "shared", "of a copy"]
    print(tabulate(rows, ["dtype", "columns", *headers]))

# %%
# What does not fit is *spilled*: each thread writes the bytes in that column to memory and reads
# them back. The prediction holds, and at 131072 columns most of the row is spilled. bfloat16 takes
# half the bytes in memory, but the kernel widens each element to float32 before it computes, so it
# spills at the same width. In the two reductions each warp passes one number to the others through
# shared memory.
#
# One load or four
# ----------------
#
# A thread can load up to 16 bytes with one instruction, if the address is a multiple of 16. The
# compiler can't see addresses, so it relies on what it is told: the first address is aligned, and
# the width is, or is not, a multiple of 16 elements. If it is not, rows may begin anywhere, and each
# element is loaded alone.

if __name__ == "__main__":
    cases = [{"dtype": d, "aligned": a} for d in ("fp32", "bf16") for a in (True, False)]
    rows = []
    for case, found in zip(cases, compile_for(*cases), strict=True):
        rows.append([case["dtype"], case["aligned"], *found["PTX"], *found["SASS"]])
    print(tabulate(rows, ["dtype", "multiple of 16", "PTX", "SASS"]))

# %%
# ``v4.b32`` are four words of 32 bits, and ``LDG.E.128`` is the same in SASS: a load of 128 bits.
# If the width is not a multiple of 16, bfloat16 needs eight instructions where one would do. That
# is why a width of 5000 is slow in :ref:`fused softmax`, and why :ref:`softmax tiles` passes widths
# in another form.
#
# Other GPUs
# ----------
#
# Here is the same kernel for four GPUs, with 65536 columns and 16 warps. These numbers say nothing
# about speed: nothing has run.

if __name__ == "__main__":
    targets = {"A100": A100, "H100": H100, "B200": B200, "MI300": MI300}
    cases = [{"target": t, "BLOCK": 65536, "num_warps": 16} for t in targets.values()]
    rows = []
    for name, found in zip(targets, compile_for(*cases), strict=True):
        (load,) = found.get("SASS") or found["assembly"]
        rows.append([name, found["registers"], found["spilled"], load])
    print(tabulate(rows, ["GPU", "registers", "spilled", "load"]))

# %%
# The warps of this AMD GPU have 64 threads. So the same 16 warps are twice as many threads, and each
# of them holds half as much.
#
# How many warps?
# ---------------
#
# The lessons give each thread 64 bytes of a row. Try other choices, for rows of 4096 float32 numbers.
# More warps mean fewer elements for each thread, but more threads to combine results from.

if __name__ == "__main__":
    cases = [{"BLOCK": 4096, "num_warps": n} for n in (1, 2, 4, 8, 16, 32)]
    rows = []
    for case, found in zip(cases, compile_for(*cases), strict=True):
        n = case["num_warps"]
        share = "" if INTERPRET else f"{speed(4096, n, torch.float32):.0%}"
        numbers = [found[key] for key in ("registers", "spilled", "shared")]
        rows.append([n, *numbers, share])
    print(tabulate(rows, headers))

# %%
# The speed depends on the GPU. On an H100, all choices up to 16 warps are about as fast as the
# copy, and 32 are slower.
#
# ``triton.autotune`` automates the search. The first time that it meets a new value of the *key*,
# here the width, it runs every configuration and keeps the fastest. The result is lost when the
# process ends, unless you set ``TRITON_CACHE_AUTOTUNING=1``, which keeps it in Triton's folder,
# ``~/.triton/cache``.

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
            f"{first:.1f} s; our rule, {by_hand}, takes {times[1] / times[0]:.2f} times as long"
        )

# %%
# A search is worth its time where you can't predict the best setting, and a nuisance where every new
# shape makes a user wait. The lessons search once, by hand, and write down a rule. The third exercise
# repeats one of these searches.
#
# Memory or arithmetic?
# ---------------------
#
# While a GPU waits for bytes it can compute, so some arithmetic costs no time. How much? This
# kernel does ``STEPS`` multiply-adds on each element that it loads.


@triton.jit
def arithmetic_kernel(y_ptr, x_ptr, n_elements, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n_elements)
    for _ in tl.static_range(STEPS):  # the compiler writes the step out this many times
        x = tl.fma(x, x, x)
    tl.store(y_ptr + offsets, x, mask=offsets < n_elements)


def launch_arithmetic(x, steps):
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 1024),)
    arithmetic_kernel[grid](y, x, x.numel(), steps, 1024)
    return y


# %%
# Draw how many operations it does in a second, over the multiply-adds for each element. Beside it
# draw the limit: a copy or the multiply-adds alone, whichever is slower. (512 of them take so long
# that the copy does not matter.) The limit looks like a roof, and such a figure is called a
# *roofline*.


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["steps"], x_vals=[1, 2, 4, 8, 16, 32, 64, 128, 256], x_log=True,
        line_arg="line", line_vals=["kernel", "limit"], line_names=["this kernel", "limit"],
        styles=[("#d55e00", "-"), ("#555555", "--")], y_log=True,
        xlabel=f"multiply-adds for each element, float32\n{MACHINE}",
        ylabel="TFLOP/s", plot_name="roofline", args={},
    )
)  # fmt: skip
def benchmark(steps, line):
    x = torch.rand(2**27, device=DEVICE) - 1
    runs = [lambda: launch_arithmetic(x, steps)]
    if line == "limit":
        runs = [x.clone, lambda: launch_arithmetic(x, 512)]
    times = [triton.testing.do_bench(run, return_mode="median") for run in runs]
    slower = max(times[0], times[-1] * steps / 512) if line == "limit" else times[0]
    return 2 * steps * x.numel() / slower / 1e9  # a multiply-add is two operations


if __name__ == "__main__":
    if not INTERPRET:
        roof = benchmark.run(show_plots=True, return_df=True)
        slope, level = roof.iloc[0, -1], roof.iloc[-1, -1]
        print(f"the slope meets the level at {level / slope:.0f} multiply-adds")
    cases = [
        {"BLOCK": 4096, "num_warps": 8, "dtype": dtype} for dtype in ("fp32", "bf16")
    ]
    for case, found in zip(cases, compile_for(*cases), strict=True):
        threads = 32 * case["num_warps"]  # each executes all instructions
        each = found["instructions"] * threads / case["BLOCK"]
        print(f"softmax, {case['dtype']}: {each:.0f} instructions for each element")

# %%
# To the left of the bend memory is the limit, and a copy is the right thing to compare with. To the
# right arithmetic is the limit, and moving fewer bytes does not help.
#
# Where does softmax stand? The last lines count its instructions in SASS. A multiply-add is one of
# the fastest instructions, so this is a rough comparison, but it shows where to look. In float32
# softmax is far to the left of the bend. In bfloat16 an element has half the bytes, so the bend is
# at half as many multiply-adds. On a GPU with faster memory and the same multiprocessors, such as
# an H200 beside an H100, it is further to the left again.
#
# Where the time goes
# -------------------
#
# PyTorch's profiler lists the kernels of a program with their times. Divide the bytes that a kernel
# moves by its time, and compare with a copy: that is its share of the limit. The first five rows
# are the operators of the naive softmax, and the fused kernel and the copy follow. (Triton's own
# profiler, Proton, shows the same as a tree: ``proton program.py``, then
# ``proton-viewer -m time/ms proton.hatchet``.)

if __name__ == "__main__" and not INTERPRET:
    from torch.profiler import ProfilerActivity, profile

    def naive_softmax(x):
        z = x - torch.amax(x, dim=-1, keepdim=True)
        numerator = torch.exp(z)
        return numerator / torch.sum(numerator, dim=-1, keepdim=True)

    x = torch.randn(2**15, 4096, device=DEVICE)
    naive_softmax(x), softmax_with_warps(x, 8), x.clone()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        naive_softmax(x), softmax_with_warps(x, 8), x.clone()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_time > 0]
    limit = 2 * x.nbytes / events[-1].device_time
    # amax and sum read the matrix; the others read it and write it.
    trips = [1, 2, 2, 1, 2, 2, 2]
    rows = []
    for event, n in zip(events, trips, strict=True):
        share = n * x.nbytes / event.device_time / limit
        name = event.name.removeprefix("void at::native::").partition("<")[0]
        rows.append([name, event.device_time, n * x.nbytes >> 20, share])
    print(tabulate(rows, ["kernel", "µs", "MiB", "share of the copy"], floatfmt=".2f"))

# %%
# For a closer look at one kernel there is Nsight Compute, which comes with CUDA:
#
# .. code-block:: console
#
#    $ ncu --kernel-name softmax_kernel --launch-count 1 --set full python fused_softmax.py
#
# Read three numbers first. *Memory throughput* is given in per cent of what is possible. If it is
# near 100, only moving fewer bytes helps. If *compute throughput* is the higher one, look for
# arithmetic to save and for loads to widen. If *achieved occupancy* is low, and *theoretical
# occupancy* as well, registers or shared memory leave room for only a few programs at a time.
#
# Exercises
# ---------
#
# 1. Predict at which width the kernel begins to spill with 16 warps instead of 32, then ask the
#    compiler.
# 2. Which load instruction does float16 get, aligned and not? And for an aligned width, what
#    changes with ``BLOCK`` 128 and 4 warps?
# 3. :ref:`softmax tiles` has programs with several rows, and says that a tile of 4096 elements is a
#    good size. On a GPU, find the best size for rows of 256 bfloat16 numbers yourself.
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
#    3. Put the file of that lesson beside yours, and time its launch. Sizes on both sides of the best one
#       should be slower; if the best is at an end, look further.
#
#       .. code-block:: python
#
#          from softmax_tiles import launch_tile_softmax
#
#
#          def times_of_tiles(x, time=triton.testing.do_bench):
#              tiles = [2**i for i in range(8, 16)]
#              return {n: time(lambda n=n: launch_tile_softmax(x, tile=n)) for n in tiles}
#
# References
# ----------
#
# - NVIDIA's documentation of `PTX <https://docs.nvidia.com/cuda/parallel-thread-execution/>`_ and of its `binary utilities <https://docs.nvidia.com/cuda/cuda-binary-utilities/>`_.
# - NVIDIA's documentation of `Nsight Compute <https://docs.nvidia.com/nsight-compute/>`_.
# - Triton's documentation of `autotune <https://triton-lang.org/main/python-api/generated/triton.autotune.html>`_.
# - S. Williams, A. Waterman and D. Patterson, `Roofline: an insightful visual performance model for multicore architectures <https://doi.org/10.1145/1498765.1498785>`_,
#   2009.
