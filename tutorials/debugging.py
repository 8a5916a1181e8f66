"""
.. _debugging:

When a kernel is wrong
======================

Most wrong kernels raise no error: they return numbers that look right. In this lesson you make the
usual mistakes on purpose, one after another, see how each of them shows, and learn the check that
catches it. At the end they make a list that fits every kernel you will write.

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
# A block that is no power of two
# -------------------------------
#
# The first mistake is the friendliest, because the compiler refuses it. Here is a kernel that
# copies a vector. It has two switches, with which you can break it later.


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
# elements are never written. A result from ``torch.empty`` holds whatever was in that memory
# before, and quite often that is the right result of the run before. So fill the output with NaN
# first, and look for what is left of it. This is called *poisoning*.

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
# The last block reaches beyond the tensor, and without a mask it is written there, over whatever
# lies behind. Nothing complains. The test needs room behind the output, filled with a number that
# you recognize:
#
# .. image:: /_static/wrong_stores.svg
#    :alt: A tensor of 1000 elements in blocks of 256. The fourth block reaches 24 elements beyond the tensor's end, into memory that belongs to another tensor.

if __name__ == "__main__":
    for mask_store in (True, False):
        room = torch.full((2048,), 7.0, device=DEVICE)
        copy_kernel[(4,)](room[:1000], x, 1000, 256, mask_store)
        print(
            f"mask: {mask_store}; overwritten behind the end: {(room[1000:] != 7).sum()}"
        )

# %%
# On a GPU, NVIDIA's ``compute-sanitizer python script.py`` finds accesses that leave an
# allocation. PyTorch hands out parts of large allocations, so set
# ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` for it.
#
# A load without ``other``
# ------------------------
#
# Masked elements of a load have no defined value unless ``other`` says which. That is harmless
# where they are not stored, as above, and wrong in a reduction. This kernel is the softmax of
# :ref:`fused softmax` with another filling, 0 in place of ``-inf``. The rows of a softmax add up
# to 1:


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
            print(
                f"{n_cols} columns filled up with {fill}: rows add up to {y[0].sum():.4f}"
            )

# %%
# 1024 columns fill their block, so nothing is filled up, and the mistake does not show. This is
# why the lessons test on 781 columns, and on 1: a shape that fits the block tests half of the
# kernel.
#
# An offset that wraps
# --------------------
#
# ``tl.program_id`` and ``tl.arange`` are 32-bit integers. Multiply them, and in a tensor of more
# than 2^31 elements the product wraps around and comes out negative:


@triton.jit
def offset_kernel(out_ptr, row, n_cols):
    tl.store(out_ptr, row * n_cols)
    tl.store(out_ptr + 1, tl.cast(row, tl.int64) * n_cols)


if __name__ == "__main__":
    import warnings

    offsets = torch.empty(2, dtype=torch.int64, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # NumPy notices in the interpreter; a GPU does not
        offset_kernel[(1,)](offsets, 40_000, 65_536)
    print("in 32 bits:", offsets[0].item(), " in 64 bits:", offsets[1].item())

# %%
# That is why the lessons write ``tl.program_id(0).to(tl.int64)``. Only a tensor of that size tests
# it, so their tests have one; it takes a GPU with some memory and a fraction of a second.
#
# A race
# ------
#
# Two programs that read, add and store the same element can both read before either stores. Then
# one addition is lost. How many are lost changes from run to run, and in the interpreter none is,
# because there the programs run one after another. So test on a GPU, with many programs, and run
# twice:


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
# ``tl.atomic_add`` reads, adds and stores in one step that nobody can interrupt. Floating-point
# sums that are formed so are complete, but the order of the additions still changes from run to
# run, and with it the last bits. If two runs must agree bit for bit, let one program form each
# sum.
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
# A launch returns before the kernel has run, so a clock around it measures the launch. And a
# tensor that was just used lies in the cache, so a loop over one small tensor measures the cache.
# ``do_bench`` avoids both: it waits for the GPU, and it empties the cache before each run.

if __name__ == "__main__" and not INTERPRET:
    import timeit

    x = torch.ones(2**22, device=DEVICE)
    y = torch.empty_like(x)
    n_bytes = 2 * x.nbytes

    def copy():
        copy_kernel[(2**12,)](y, x, 2**22, 1024, True)

    copy()
    launch = timeit.timeit(copy, number=100) / 100
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # so that the launches take the CPU no time
        for _ in range(100):
            copy()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    loop = start.elapsed_time(end) / 100
    fair = triton.testing.do_bench(copy, return_mode="median")
    print(f"a clock around the launch: {n_bytes / launch / 1e9:6.0f} GB/s")
    print(f"a loop over one tensor:    {n_bytes / loop / 1e6:6.0f} GB/s")
    print(f"do_bench:                  {n_bytes / fair / 1e6:6.0f} GB/s")

# %%
# A figure with the speed of a copy in it protects you, too: a kernel that seems to be much faster
# than a copy of the same bytes is measured wrongly.
#
# Look inside
# -----------
#
# When a test fails and you don't see why, look at the values:
#
# - With ``TRITON_INTERPRET=1`` a kernel is ordinary Python, and ``print(x)`` and ``breakpoint()``
#   work in it. Begin here: it needs no GPU, and it shows whole blocks.
# - On a GPU, ``tl.device_print("x", x)`` prints from every thread of every program, so launch one.
# - ``tl.device_assert(condition, "message")`` stops the kernel where the condition is false, if
#   the environment has ``TRITON_DEBUG=1``.
# - ``compute-sanitizer`` has tools for memory (the default), for races in shared memory (``--tool
#   racecheck``) and for reads of memory that nobody wrote (``--tool initcheck``).
#
# A list for every kernel
# -----------------------
#
# 1. Shapes that fit no block, one element, and no element at all.
# 2. A transposed, a sliced and an expanded input.
# 3. Every dtype that you promise, against float64, with a relative tolerance.
# 4. Infinities, NaN, and rows of nothing but ``-inf``.
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
#    2. Where ``exp`` overflows: in float32 from about 89 on. Infinity divided by infinity is NaN. The
#       fourth line of the list finds it, if it also tries large numbers that are not infinite.
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
