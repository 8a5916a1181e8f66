"""
.. _debugging:

When a kernel is wrong
======================

Most wrong kernels raise no error: they return numbers that look right. In this lesson you make the
usual mistakes on purpose, one after another. You see how each of them shows, and find a check that
catches it. The checks make a list that fits every kernel you will write.

You will learn

- which mistakes the compiler catches, and which only a test can catch;
- how to choose shapes and contents so that a wrong kernel fails its test;
- how to look inside a kernel while it runs.

Needs: PyTorch, and :ref:`fused softmax`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/wrong_stores.svg'
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
# A block that is not a power of two
# ----------------------------------
#
# The first mistake is the friendliest, because the compiler refuses it. Here is a kernel that
# copies a vector, launched with a block of 1000. Its last argument is a switch with which you will
# break it later.


@triton.jit
def copy_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr, MASK_STORE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    if MASK_STORE:
        tl.store(y_ptr + offsets, x, mask=offsets < n)
    else:
        tl.store(y_ptr + offsets, x)


if __name__ == "__main__":
    x, y = torch.ones(1000, device=DEVICE), torch.zeros(1024, device=DEVICE)
    try:
        copy_kernel[(1,)](y, x, 1000, 1000, True)
    except Exception as error:
        print(str(error.__cause__ or error).splitlines()[-1])

# %%
# A grid that is too small
# ------------------------
#
# 1000 elements in blocks of 256 need four programs, and ``1000 // 256`` is three. The last
# elements are never written. A tensor from ``torch.empty`` holds whatever was in its memory before,
# and quite often that is the right result of an earlier run. So fill the output with NaN first, and
# count what is left of it. This is called *poisoning*.

if __name__ == "__main__":
    x = torch.ones(1000, device=DEVICE)
    for programs in (1000 // 256, triton.cdiv(1000, 256)):
        y = torch.full((1000,), float("nan"), device=DEVICE)
        copy_kernel[(programs,)](y, x, 1000, 256, True)
        print(f"{programs} programs leave {y.isnan().sum()} elements unwritten")

# %%
# A store without a mask
# ----------------------
#
# The last block reaches beyond the tensor. Without a mask the kernel writes there, over whatever
# lies behind, and nothing complains. The test needs room behind the output, filled with a number
# that you recognize:
#
# .. image:: /_static/wrong_stores.svg
#    :alt: A tensor of 1000 elements in blocks of 256. The fourth block reaches 24 elements beyond the tensor's end, into memory that belongs to another tensor.

if __name__ == "__main__":
    for mask_store in (True, False):
        room = torch.full((2048,), 7.0, device=DEVICE)
        copy_kernel[(4,)](room[:1000], x, 1000, 256, mask_store)
        behind = (room[1000:] != 7).sum()
        print(f"mask: {mask_store}; overwritten behind the end: {behind}")

# %%
# NVIDIA's *compute sanitizer* finds such accesses without a test of yours, if they leave the memory
# that was allocated; the end of this lesson runs it.
#
# A load without ``other``
# ------------------------
#
# Where the mask of a load is false, the value is undefined unless you pass ``other``. That is harmless
# if these elements are not stored, as above, but wrong in a reduction. This kernel is the softmax of
# :ref:`fused softmax`, and ``FILL`` is its ``other``. It is right with ``-inf``. The 0 stands for what
# a load without ``other`` often brings. The rows of a softmax must add up to 1:


@triton.jit
def padded_softmax_kernel(y_ptr, x_ptr, n_cols, FILL: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=FILL)
    numerator = tl.exp(x - tl.max(x, axis=0))
    y = numerator / tl.sum(numerator, axis=0)
    tl.store(y_ptr + row * n_cols + cols, y, mask=cols < n_cols)


if __name__ == "__main__":
    for n_cols in (1024, 781):
        x = torch.ones(3, n_cols, device=DEVICE)
        for fill in (-float("inf"), 0.0):
            y = torch.empty_like(x)
            padded_softmax_kernel[(3,)](y, x, n_cols, fill, 1024)
            print(f"{n_cols} columns, other={fill}: rows add up to {y[0].sum():.4f}")

# %%
# 1024 columns fill their block, so ``other`` is never used, and the mistake does not show. This is
# why the lessons test on 781 columns, and on 1. A shape that fits the block tests only half of the
# kernel.
#
# An offset that wraps
# --------------------
#
# ``tl.program_id`` and ``tl.arange`` are 32-bit integers. In a tensor of more than 2^31 elements,
# the product of a row's number and a row's length wraps around. Here it comes out negative:


@triton.jit
def offset_kernel(out_ptr, row, n_cols):
    tl.store(out_ptr, row * n_cols)
    tl.store(out_ptr + 1, tl.cast(row, tl.int64) * n_cols)


if __name__ == "__main__":
    import warnings

    offsets = torch.empty(2, dtype=torch.int64, device=DEVICE)
    with warnings.catch_warnings():  # in the interpreter NumPy notices; a GPU does not
        warnings.simplefilter("ignore")
        offset_kernel[(1,)](offsets, 40_000, 65_536)
    print("in 32 bits:", offsets[0].item(), " in 64 bits:", offsets[1].item())

# %%
# That is why the other lessons write ``tl.program_id(0).to(tl.int64)``. Only a tensor of that size
# shows the mistake, so their tests have one. It needs a few gigabytes of a GPU's memory, and little
# time.
#
# A race
# ------
#
# If two programs add to the same element, both may read it before either of them stores. Then one
# addition is lost. How many are lost changes from run to run. In the interpreter none is, because
# there the programs run one after another. So test on a GPU, with many programs, and run twice:


@triton.jit
def count_kernel(out_ptr, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(out_ptr, 1)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + 1)


if __name__ == "__main__":
    n_programs = 100 if INTERPRET else 100_000
    for atomic in (False, False, True):
        out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        count_kernel[(n_programs,)](out, atomic)
        print(f"atomic: {atomic}; counted {out.item()} of {n_programs} programs")

# %%
# ``tl.atomic_add`` reads, adds and stores in one step that no other program can interrupt. So nothing
# is lost. But the order of the additions still changes from run to run, and with it the last bits of
# a floating-point sum. If two runs must agree bit for bit, let one program form each sum.
#
# A tolerance that hides the error
# --------------------------------
#
# ``torch.testing.assert_close`` accepts an absolute error of 1e-5 in float32. That is generous if
# the results are small. The elements of a softmax over 100,000 columns are about 1e-5, so a result
# of zeros passes:

if __name__ == "__main__":
    expected = torch.softmax(torch.zeros(100_000, device=DEVICE), dim=0)
    wrong = torch.zeros_like(expected)
    torch.testing.assert_close(wrong, expected)
    print("with the default tolerance, zeros pass for a softmax")
    try:
        torch.testing.assert_close(wrong, expected, rtol=1e-5, atol=0)
    except AssertionError as error:
        print("with a relative one:", str(error).splitlines()[2])

# %%
# Set ``atol=0`` where results may be small, and compare with a reference in float64, so that the
# difference is your kernel's error alone.
#
# A benchmark that measures something else
# ----------------------------------------
#
# A launch returns before the kernel has run, so a clock around it measures the launch. And a tensor
# that was just used lies in the cache, so a loop over one tensor measures the cache. ``do_bench``
# avoids both: it waits for the GPU, and it empties the cache before each run. Here are all three, for
# the copy kernel from above:


def clock_around(run):
    """Seconds that the CPU takes for a launch."""
    import timeit

    run()
    return timeit.timeit(run, number=20) / 20


def loop_over(run):
    """Seconds of a run, of 20 on the same tensors, which a CUDA graph launches at once."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.accelerator.synchronize()
    return start.elapsed_time(end) / 20 / 1000


def fair(run):
    """Seconds of a run, from ``do_bench``."""
    return triton.testing.do_bench(run, return_mode="median") / 1000


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_elements"], x_vals=[2**i for i in range(14, 29, 2)], x_log=True, y_log=True,
        line_arg="time", line_vals=[fair, loop_over, clock_around],
        line_names=["do_bench", "a loop over one tensor", "a clock around the launch"],
        styles=[("#555555", "--"), ("#cc79a7", "-"), ("#cc79a7", ":")],
        xlabel=f"elements, float32\n{MACHINE}", ylabel="GB/s",
        plot_name="ways-to-time", args={},
    )
)  # fmt: skip
def benchmark(n_elements, time):
    x = torch.ones(n_elements, device=DEVICE)
    y = torch.empty_like(x)
    grid = (triton.cdiv(n_elements, 1024),)
    seconds = time(lambda: copy_kernel[grid](y, x, n_elements, 1024, True))
    return 2 * x.nbytes / seconds / 1e9


if __name__ == "__main__" and not INTERPRET:
    speed = benchmark.run(show_plots=True, return_df=True)
    print(speed[::3].astype(int).to_string(index=False))

# %%
# The clock's line rises and rises, because a launch takes the same time however much there is to
# copy. The loop is right for large tensors, but too fast for those that fit into the cache. Only
# ``do_bench`` says how fast the kernel is when its data come from memory. A copy in each figure, timed
# in the same way, protects you: if a kernel seems much faster than a copy of the same bytes, the
# measurement is wrong.
#
# Look inside
# -----------
#
# When a test fails and you don't see why, look at the values. Begin in the interpreter. It needs no
# GPU, and a kernel is ordinary Python there: ``print`` shows a whole block, and ``breakpoint()``
# stops in the middle of a kernel. Here a script has both. We type two commands into Python's
# debugger: ``p`` prints an expression, and ``c`` continues.

SCRIPT = """
import torch, triton
import triton.language as tl

@triton.jit
def look_kernel(x_ptr, n_cols, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n_cols, other=0.0)
    LOOK
    tl.store(x_ptr + cols, x, mask=cols < n_cols)

x = torch.arange(1.0, 5.0, device="DEVICE")
for n_cols in (4, 3):
    look_kernel[(1,)](x[:n_cols].clone(), n_cols, 4)
    torch.accelerator.synchronize() if x.is_cuda else None
"""


def run_script(script, *tool, typed="", **environment):
    """What a script prints, run in a process of its own, which may fail."""
    import subprocess
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "script.py")
        path.write_text(script)
        result = subprocess.run(
            [*tool, sys.executable, str(path)], env=os.environ | environment,
            input=typed, capture_output=True, text=True,
        )  # fmt: skip
    return result.stdout + result.stderr


def look(lines, device):
    """The script with these lines in its kernel."""
    return SCRIPT.replace("LOOK", "\n    ".join(lines)).replace("DEVICE", device)


if __name__ == "__main__":
    script = look(['print("x is", x)', "breakpoint()"], "cpu")
    output = run_script(script, typed="p x + cols\nc\n" * 2, TRITON_INTERPRET="1")
    print(*(line for line in output.splitlines() if "[" in line), sep="\n")

# %%
# In the second launch, ``x`` ends with the 0 that ``other`` put there.
#
# On a GPU, ``tl.device_print`` prints from every thread of every program, so launch a single
# program. And ``tl.device_assert`` stops a kernel where a condition is false, if the environment
# has ``TRITON_DEBUG=1``; otherwise it costs nothing. After a failed assertion the process can't use
# the GPU any more. (The interpreter prints, but ignores the assertion.)

if __name__ == "__main__" and not INTERPRET:
    import re

    lines = ['tl.device_print("x", x)', 'tl.device_assert(x > 0, "x is not positive")']
    output = run_script(look(lines, DEVICE), TRITON_INTERPRET="0", TRITON_DEBUG="1")
    print(*sorted(set(re.findall("pid.*", output)))[:4], sep="\n")
    print(*sorted(set(re.findall("Assertion .* failed", output))), sep="\n")

# %%
# The compute sanitizer comes with CUDA. It watches your program as it is, and finds accesses
# outside of allocated memory. PyTorch hands out parts of large allocations, so switch that off with
# ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``. Here is the store without a mask once more.
# (``--tool racecheck`` finds races in shared memory, and ``--tool initcheck`` finds loads of memory
# that nobody wrote.)

if __name__ == "__main__" and not INTERPRET:
    import shutil

    sanitizer = shutil.which(
        "compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin"
    )
    if sanitizer:
        script = look(["tl.store(x_ptr + cols, x)"], DEVICE)
        environment = {"TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        output = run_script(script, sanitizer, **environment)
        print(*re.findall("Invalid .*|ERROR SUMMARY.*", output)[-2:], sep="\n")
    else:
        print("The compute sanitizer is not installed on this machine.")

# %%
# A list for every kernel
# -----------------------
#
# 1. Shapes that fit no block, one element, and no element at all.
# 2. A transposed, a sliced and an expanded input, for the strides.
# 3. Every dtype that you promise, against float64, with a relative tolerance.
# 4. Large numbers, infinities, NaN, and rows of nothing but ``-inf``.
# 5. The output poisoned before, and the memory behind it unchanged after.
# 6. More than 2^31 elements.
# 7. Two runs that agree bit for bit, if you promise it.
#
# Exercises
# ---------
#
# 1. Write ``writes_only(launch, n)``: it runs ``launch(y)`` on a tensor ``y`` of n elements, and
#    returns whether all of ``y`` was written and nothing behind it was.
# 2. Replace ``tl.max(x, axis=0)`` in ``padded_softmax_kernel`` by 0. On which input does the
#    result become NaN, and which of the checks above would have found it?
#
# .. note::
#    Try it first.
#
#    1. Poison the tensor and the room behind it with different values.
#
#       .. code-block:: python
#
#          def writes_only(launch, n):
#              room = torch.full((2 * n + 4096,), 7.0, device=DEVICE)
#              room[:n] = float("nan")
#              launch(room[:n])
#              return bool((~room[:n].isnan()).all() and (room[n:] == 7).all())
#
#    2. Where ``exp`` overflows: in float32 from about 89 on. Infinity divided by infinity is NaN.
#       The fourth line of the list finds it, with large numbers.
#
#       .. code-block:: python
#
#          @triton.jit
#          def unshifted_kernel(y_ptr, x_ptr, n_cols, BLOCK: tl.constexpr):
#              row, cols = tl.program_id(0), tl.arange(0, BLOCK)
#              x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=-float("inf"))
#              numerator = tl.exp(x)
#              y = numerator / tl.sum(numerator, axis=0)
#              tl.store(y_ptr + row * n_cols + cols, y, mask=cols < n_cols)
#
# References
# ----------
#
# - NVIDIA's documentation of the `compute sanitizer <https://docs.nvidia.com/compute-sanitizer/>`_.
# - Triton's guide to `debugging <https://triton-lang.org/main/programming-guide/chapter-3/debugging.html>`_.
