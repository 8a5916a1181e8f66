"""
.. _fused softmax:

Fused softmax
=============

A softmax needs very little arithmetic. What it costs is trips to memory, and PyTorch's operators
make more of them than they must when you write softmax by hand. In this lesson you write one GPU
kernel that makes a single trip, check it against PyTorch, and measure how close it comes to a plain
copy of the same bytes, which is about as fast as memory goes. Then you let the measurements lead
you to a softmax that stays near that speed at most widths, from narrow rows to rows of a million
columns, forward and backward.

The lesson has two halves. The first, through *Is it fast?*, is all that the next lessons ask of you;
the second, from *Where it loses*, is about what a simple kernel leaves undone, and can wait.

You will learn

- how to count the bytes that an operation moves, and to read the count as a limit on its speed;
- how a Triton kernel works on a row of any length with blocks that are powers of two;
- how to check a kernel on an awkward shape, and how to measure it beside its physical limit;
- how programs can share a row that none of them could hold.

You need to know PyTorch. You need no CUDA.
"""

# %%
# Setting the stage
# -----------------
#
# Every lesson starts with these lines. Triton compiles a kernel for the GPU in your machine. If
# there is none, ``TRITON_INTERPRET=1`` has Triton's *interpreter* run the same kernel on the CPU,
# with NumPy, one piece at a time. That is slow, but it computes the same up to rounding, so
# everything here except the measurement works on any laptop with Linux. Triton reads the variable
# while it is imported, so it has to be set first. You can set it yourself, too: in the interpreter
# a kernel is ordinary Python, and you may ``print`` in it.
#
# The line that is printed says what ran this page.

# sphinx_gallery_thumbnail_path = '_static/softmax_traffic.svg'
import math
import os
import sys
import timeit
from datetime import date

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRET else "cuda"
if INTERPRET and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise ImportError("restart Python: Triton was imported before TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

gpu = "no GPU" if INTERPRET else torch.cuda.get_device_name()
MACHINE = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
print(MACHINE)

# %%
# Counting the bytes
# ------------------
#
# Softmax turns each row of a matrix into positive numbers that add up to one:
#
# .. math:: y_{j} = \frac{e^{x_{j} - m}}{\sum_{k} e^{x_{k} - m}}, \qquad m = \max_{k} x_{k}
#
# Subtracting the row's maximum :math:`m` changes nothing on paper, because it scales the numerator
# and the denominator by the same factor. On a computer it keeps the largest exponent at 0, so that
# nothing overflows: in float32, ``exp(89)`` is already infinite.
#
# Here is softmax as five PyTorch operators. Each operator is a kernel of its own: it reads its
# inputs from the GPU's memory and writes its result back there. The comments count elements for a
# matrix of M rows and N columns.


def naive_softmax(x):
    """Softmax over the last dimension of ``x``, one PyTorch operator at a time."""
    x_max = torch.amax(x, dim=-1, keepdim=True)  # reads MN, writes M
    z = x - x_max  # reads MN + M, writes MN
    numerator = torch.exp(z)  # reads MN, writes MN
    denominator = torch.sum(numerator, dim=-1, keepdim=True)  # reads MN, writes M
    return numerator / denominator  # reads MN + M, writes MN
    # In total: reads 5MN + 2M, writes 3MN + 2M.


# %%
# The result needs each element to be read once and written once: :math:`MN` in, :math:`MN` out.
# The five operators move :math:`8MN + 4M`, about four times as much. The arithmetic in between
# costs next to nothing, so a kernel that keeps a row on the chip from its first read to its last
# write should be about four times as fast. Joining operators in this way is called *fusion*.
#
# .. image:: /_static/softmax_traffic.svg
#    :alt: Left: five operators, each with arrows to and from the GPU's memory, eight MN in all. Right: one fused kernel with one arrow in and one arrow out, two MN in all.
#
# The kernel
# ----------
#
# A GPU is a hundred or so small processors, its *multiprocessors*, in front of one large memory.
# Each runs many *threads* at a time, and a thread keeps its values in *registers*, which cost next
# to nothing to reach. Memory is far away.
#
# You write a Triton kernel for one *program*. The launch starts many programs, the
# multiprocessors run them side by side, and each finds out which one it is from
# ``tl.program_id``. Here each program owns one row. How its elements are divided among threads is
# Triton's business.
#
# A tensor that you pass to a kernel arrives as a *pointer*, the address of its first element, and
# a pointer plus a number is the address that many elements further on. ``tl.arange(0, BLOCK)`` is
# the block of numbers 0, 1, ..., ``BLOCK - 1``. So ``x_ptr + row * x_row_stride + cols`` is a block
# of addresses, those of one row, and ``tl.load`` fetches what they hold.
#
# The size of a block is a power of two. That of a row seldom is, so the row is padded: ``mask`` is
# true for the columns that exist, and a masked load touches only those. The others receive
# ``-inf``, which can't be the maximum and whose exponential is 0, so the padding vanishes from the
# result.


@triton.jit
def softmax_kernel(y_ptr, x_ptr, x_row_stride, n_cols, BLOCK: tl.constexpr):
    # A large tensor has more than 2^31 elements, so positions are computed in 64 bits.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=-float("inf"))
    # float16 and bfloat16 are too coarse to add up in.
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    numerator = tl.exp(x - tl.max(x, axis=0))
    denominator = tl.sum(numerator, axis=0)
    tl.store(y_ptr + row * n_cols + cols, numerator / denominator, mask=mask)


# %%
# Compare it with the naive version: the same five steps, but ``x``, ``numerator`` and
# ``denominator`` are values on the chip, in registers. Only ``tl.load`` and ``tl.store`` go to
# memory.
#
# Two things deserve a second look.
#
# - ``tl.exp`` is fast because it is approximate. For float32 it is the GPU's own instruction for
#   powers of two, applied to ``x`` times log2(e): the last few bits may differ from a
#   carefully rounded ``exp``. The check below shows how little of that reaches the result.
# - ``BLOCK`` is a ``tl.constexpr``: the compiler knows its value, and compiles the kernel once for
#   every value that you use.
#
# Launch it
# ---------
#
# The launch needs a block, the next power of two at or above the number of columns, and the number
# of *warps*, the groups of 32 threads among which the program's elements are divided. With few
# warps, a thread has many elements to hold in its registers; with many, the threads spend more time
# on combining their results. 64 bytes for each thread is a good start.
#
# ``softmax_kernel[grid](...)`` launches the kernel. The *grid* is a tuple that says how many
# programs to start, here one for each row. The arguments follow as in any call.


def warps(n_bytes):
    """As many warps as give each thread 64 bytes, from 1 to the 32 that a program may have."""
    return min(max(n_bytes // (32 * 64), 1), 32)


def row_softmax(x):
    """Softmax of the rows of a contiguous matrix ``x``, each by a program of its own."""
    y = torch.empty_like(x)
    BLOCK = triton.next_power_of_2(x.shape[1])
    softmax_kernel[(len(x),)](
        y, x, x.stride(0), x.shape[1], BLOCK, num_warps=warps(BLOCK * x.element_size())
    )
    return y


# %%
# Is it right?
# ------------
#
# Choose a shape that a careless kernel gets wrong: 183 rows and 781 columns, both odd, so that
# no block fits. ``assert_close`` raises an error, and so stops this page from being built, if an
# element differs by more than rounding explains. Its default tolerance would let an absolute error
# of 1e-5 pass, which is large beside elements of about 1/781; here only the relative error counts.

torch.manual_seed(0)
x = torch.randn(183, 781, device=DEVICE)
y = row_softmax(x)
reference = torch.softmax(x, dim=-1)
torch.testing.assert_close(y, reference, rtol=1e-5, atol=0)

exact = torch.softmax(x.double(), dim=-1)
print(f"largest error of this kernel:   {(y - exact).abs().max():.1e}")
print(f"largest error of torch.softmax: {(reference - exact).abs().max():.1e}")

# %%
# The errors are against softmax in float64. Both are rounding errors of float32; on a GPU,
# ours includes the approximate exponential. (The interpreter uses NumPy's.)
#
# Is it fast?
# -----------
#
# ``perf_report`` runs a function over a range of sizes, once for each line of a figure. The four
# lines take matrices of the same size: this kernel, ``torch.softmax``, the naive version as
# TorchScript, PyTorch's older compiler, runs it, and a copy. The copy also reads and writes each
# element once, and computes nothing: it is the limit. The scale counts the bytes that *must* move,
# :math:`2MN` elements, over the time taken, so a version that moves more shows up lower.

from tabulate import tabulate


def speed_of(run, n_bytes):
    """GB/s of ``run()`` if it moved ``n_bytes``."""
    milliseconds = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return n_bytes / milliseconds / 1e6


def show(table):
    print(tabulate(table, "keys", floatfmt=".0f", showindex=False, maxheadercolwidths=14))


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_cols"],
        x_vals=[128 * i for i in range(2, 100)],
        line_arg="implementation",
        line_vals=["fused", "torch", "jit", "copy"],
        line_names=["this kernel", "torch.softmax", "naive, torch.jit.script", "copy"],
        styles=[
            ("#d55e00", "-"),
            ("#0072b2", "-"),
            ("#cc79a7", "-"),
            ("#555555", "--"),
        ],
        xlabel=f"columns of 4096 rows, float32\n{MACHINE}",
        ylabel="GB/s",
        plot_name="softmax",
        args={"n_rows": 4096},
    )
)
def benchmark(n_rows, n_cols, implementation):
    x = torch.randn(n_rows, n_cols, device=DEVICE)
    run = {
        "fused": row_softmax,
        "torch": lambda x: torch.softmax(x, dim=-1),
        "jit": torch.jit.script(naive_softmax),
        "copy": torch.clone,
    }[implementation]
    return speed_of(lambda: run(x), 2 * x.nbytes)


# %%
# Only a GPU is worth timing: the time that the interpreter takes says nothing about the kernel.

if __name__ == "__main__":
    if not INTERPRET:
        speed = benchmark.run(show_plots=True, return_df=True)
        show(speed[speed.n_cols % 1536 == 0])
        n_cols, fused, torch_softmax, scripted, copy = speed.iloc[-1]
        print(
            f"\nAt {n_cols:.0f} columns this kernel reaches {fused / copy:.0%} of the copy: "
            f"{fused / torch_softmax:.2f} times torch.softmax,\n"
            f"{fused / scripted:.2f} times the naive version."
        )
    else:
        print("No figures: speed is measured on a GPU only, and this run had none.")

# %%
# The distance of TorchScript from the copy is the price of the extra trips that you counted above.
# Whatever is missing between the kernel and the copy is about all that a better kernel could still
# gain. (About: the copy, too, is only a kernel, and a line may lie a little above it.)
# On the left of the figure the matrix is small. Launching a kernel takes a few millionths of a
# second whatever it does, and there even the copy is held back by that.
#
# Where it loses
# --------------
#
# So are we done? The figure shows one dtype and a narrow range of widths. Look further: half the
# bytes for each element, rows from 256 to 131072 columns, always 2^28 elements, so that no launch
# is short. The scale is now the share of the copy's speed.


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_cols"],
        x_vals=[256, 512, 1024, 2048, 4096, 5000, 8192, 16384, 32768, 65536, 131072],
        x_log=True,
        line_arg="dtype",
        line_vals=[torch.float32, torch.bfloat16],
        line_names=["float32", "bfloat16"],
        styles=[("#d55e00", "-"), ("#d55e00", ":")],
        xlabel=f"columns, one row a program\n{MACHINE}",
        ylabel="% of a copy",
        plot_name="softmax-row",
        args={"n_elements": 2**28},
    )
)
def row_benchmark(n_elements, n_cols, dtype):
    x = torch.randn(n_elements // n_cols, n_cols, device=DEVICE, dtype=dtype)
    copy = speed_of(lambda: x.clone(), 2 * x.nbytes)
    return 100 * speed_of(lambda: row_softmax(x), 2 * x.nbytes) / copy


if __name__ == "__main__" and not INTERPRET:
    share = row_benchmark.run(show_plots=True, return_df=True)
    show(share)

# %%
# Three things go wrong.
#
# - **Narrow rows.** A row of 256 columns in bfloat16 is 512 bytes. A program that loads so little
#   spends its short life on starting, on combining what its threads found, and on ending.
# - **5000 columns in bfloat16.** A thread moves 16 bytes at once if the compiler knows that they
#   begin at a multiple of 16. Triton checks each integer that you pass and compiles a kernel of its
#   own for multiples of 16. 5000 is none, so every element is loaded alone.
# - **Wide rows.** A multiprocessor has 256 KiB of registers. A row that does not fit spills over
#   into memory, and is moved again and again.
#
# Several rows a tile
# -------------------
#
# The first two need small changes. A program may take a *tile* of several rows: ``rows`` becomes a
# column of numbers and ``cols`` a row, and their sum is a two-dimensional block of addresses, by
# the same broadcasting as in PyTorch. The reductions run along axis 1.
#
# For the second, find the largest power of two, up to 16 bytes, that divides the width and the
# stride: ``ALIGN`` elements. Pass both divided by it. The kernel multiplies them again,
# and from a product with ``ALIGN`` the compiler sees that each row begins at a multiple.


@triton.jit
def to_arithmetic(x):
    """float16 and bfloat16 are too coarse to add up in."""
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def softmax_tile_kernel(
    y_ptr, x_ptr, n_rows, x_row_stride, n_cols,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    x_row_stride *= ALIGN
    n_cols *= ALIGN
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < n_cols
    # The last tile may reach beyond the last row: it reads that row again, and stores it once.
    x_ptrs = x_ptr + tl.minimum(rows, n_rows - 1) * x_row_stride + cols
    x = to_arithmetic(tl.load(x_ptrs, mask=mask, other=-float("inf")))
    numerator = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    denominator = tl.sum(numerator, axis=1, keep_dims=True)
    y_ptrs = y_ptr + rows * n_cols + cols
    tl.store(y_ptrs, numerator / denominator, mask=mask & (rows < n_rows))


# %%
# A function that one kernel calls, as ``to_arithmetic``, is marked with ``triton.jit``, too, and
# becomes part of the kernel.
#
# Slices of a row
# ---------------
#
# A row that no program can hold is cut into *slices*, and each program takes one. Softmax needs the
# row's maximum and sum, though, and a program knows only its own slice: :math:`m_i`, the largest of
# its elements, and :math:`s_i`, the sum of their :math:`e^{x - m_i}`. That is enough. A sum that
# was formed with one maximum is turned into a sum with another by a factor (Milakov and Gimelshein,
# 2018):
#
# .. math:: m = \max_i m_i, \qquad s = \sum_i s_i \, e^{m_i - m}, \qquad y_j = e^{x_j - m} / s
#
# But a slice can be finished only when all slices of its row have been read. Reading everything
# once for the sums and once more for the result takes three trips instead of two: about two thirds
# of the copy's speed.
#
# Unless the second read is not a trip. Between the multiprocessors and the memory lies a cache,
# *L2*, of tens of megabytes, which keeps what was used last. So read a slice for the second time
# soon after the first. In the launch below, program t does two things: it reads slice t and writes
# its two numbers down, and it finishes slice t - ``lag``, which an earlier program has read. By
# then the row's other slices have been read as well, and this slice is still in the cache.
#
# .. image:: /_static/softmax_slices.svg
#    :alt: A strip of slices in the order of reading. Program t reads slice t from memory and finishes slice t minus lag, which is read again, from the cache. The slices in between were read once and are still in the cache.
#
# Two questions remain. *What if the numbers that a program needs aren't there yet?* Then it waits.
# Every word of ``stats`` starts as ``NOT_YET``, all bits set, which as a floating-point number is
# one of the many NaNs. A program reads its row's numbers again until no word is ``NOT_YET``. So
# each number is its own flag, and no order of writing has to be enforced. (A result that happens to
# be that NaN is replaced by another.) ``bitcast`` reads the same bits as another type, ``volatile``
# keeps the compiler from reusing what an earlier load brought, and ``relaxed`` says that no other
# load or store has to wait for this one.
#
# *Can they all wait for each other, for ever?* They could if programs waited for programs that
# cannot start until someone ends. So each takes a *ticket* as it starts: ``atomic_add`` returns the
# next number, and no two programs get the same. A program waits only for slices with smaller
# tickets, and those were taken by programs that have started already. Of all programs that are
# running, the one with the smallest ticket waits for nobody. It ends, then the next can: whatever
# else runs on the GPU, and in whatever order programs are started, all of them finish.

NOT_YET = tl.constexpr(-1)


@triton.jit
def load_slice(
    ptr, t, exists, row_stride, n_cols, OTHER: tl.constexpr, POLICY: tl.constexpr,
    SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cols = t % SLICES * BLOCK + tl.arange(0, BLOCK)
    ptrs = ptr + (t // SLICES).to(tl.int64) * row_stride + cols
    mask = (cols < n_cols) & exists
    return to_arithmetic(tl.load(ptrs, mask=mask, other=OTHER, eviction_policy=POLICY))


@triton.jit
def publish(ptr, number, exists):
    word = number.to(ptr.dtype.element_ty, bitcast=True)
    tl.store(ptr, tl.where(word == NOT_YET, NOT_YET - 1, word), mask=exists)


@triton.jit
def wait_for(ptr, n_words, BLOCK: tl.constexpr):
    # BLOCK is at least the number of threads: each word is read by one of them alone, so
    # that they cannot disagree about it.
    words = tl.arange(0, BLOCK)
    found = tl.load(ptr + words, mask=words < n_words, other=0, volatile=True)
    while tl.min((found != NOT_YET).to(tl.int32), axis=0) == 0:
        found = tl.load(ptr + words, mask=words < n_words, other=0, volatile=True)
    return found


@triton.jit
def softmax_slice_kernel(
    y_ptr, x_ptr, stats_ptr, n_slices, lag, x_row_stride, n_cols,
    SLICES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    x_row_stride *= ALIGN
    n_cols *= ALIGN
    t = tl.atomic_add(stats_ptr + 2 * n_slices, 1, sem="relaxed").to(tl.int32) + 1
    u = t - lag
    new = load_slice(
        x_ptr, t, t < n_slices, x_row_stride, n_cols, -float("inf"), "evict_last",
        SLICES, BLOCK,
    )  # fmt: skip
    x = load_slice(
        x_ptr, u, u >= 0, x_row_stride, n_cols, -float("inf"), "evict_first",
        SLICES, BLOCK,
    )  # fmt: skip

    new_max = tl.max(new, axis=0)
    # In a slice of nothing but -inf, -inf - -inf would be NaN, but its sum is 0.
    new_sum = tl.sum(
        tl.exp(new - tl.where(new_max == -float("inf"), 0.0, new_max)), axis=0
    )
    publish(stats_ptr + 2 * t, new_max, t < n_slices)
    publish(stats_ptr + 2 * t + 1, new_sum, t < n_slices)

    if u >= 0:
        words = wait_for(stats_ptr + 2 * (u // SLICES) * SLICES, 2 * SLICES, 2 * WORDS)
        pairs = tl.reshape(words.to(x.dtype, bitcast=True), (WORDS, 2))
        maxima, sums = tl.split(pairs)
        maxima = tl.where(tl.arange(0, WORDS) < SLICES, maxima, -float("inf"))
        row_max = tl.max(maxima, axis=0)
        row_sum = tl.sum(sums * tl.exp(maxima - row_max), axis=0)
        y = tl.exp(x - row_max) * (1 / row_sum)
        cols = u % SLICES * BLOCK + tl.arange(0, BLOCK)
        y_ptrs = y_ptr + (u // SLICES).to(tl.int64) * n_cols + cols
        tl.store(y_ptrs, y, mask=cols < n_cols, eviction_policy="evict_first")


# %%
# ``eviction_policy`` is a hint to the cache: what is read for the first time should stay, and what
# is read for the last time, or written, may go.
#
# In the interpreter programs run one after the other, and a program that waited for a later one
# would wait for ever. Here it waits for earlier ones only, and they are done. The same kernel runs
# in both.
#
# The backward pass
# -----------------
#
# Training needs the gradient. With :math:`g` for the gradient that comes in, one for each element
# of :math:`y`, the one that goes out is
#
# .. math:: \frac{\partial L}{\partial x_j} = y_j \Bigl(g_j - \sum_k y_k g_k\Bigr)
#
# It needs :math:`y`, but not :math:`x`: two reads and one write for each element. The rest you
# know. There is one number to a row instead of two, the sum.


@triton.jit
def backward_tile_kernel(
    dx_ptr, dy_ptr, y_ptr, n_rows, row_stride, n_cols,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    n_cols *= ALIGN
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    offsets = rows * n_cols + cols
    dy = to_arithmetic(tl.load(dy_ptr + offsets, mask=mask, other=0.0))
    y = to_arithmetic(tl.load(y_ptr + offsets, mask=mask, other=0.0))
    dot = tl.sum(y * dy, axis=1, keep_dims=True)
    tl.store(dx_ptr + offsets, y * (dy - dot), mask=mask)


@triton.jit
def backward_slice_kernel(
    dx_ptr, dy_ptr, y_ptr, stats_ptr, n_slices, lag, row_stride, n_cols,
    SLICES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    n_cols *= ALIGN
    t = tl.atomic_add(stats_ptr + 2 * n_slices, 1, sem="relaxed").to(tl.int32) + 1
    u = t - lag
    new_dy = load_slice(
        dy_ptr, t, t < n_slices, n_cols, n_cols, 0.0, "evict_last", SLICES, BLOCK
    )
    new_y = load_slice(
        y_ptr, t, t < n_slices, n_cols, n_cols, 0.0, "evict_last", SLICES, BLOCK
    )
    dy = load_slice(dy_ptr, u, u >= 0, n_cols, n_cols, 0.0, "evict_first", SLICES, BLOCK)
    y = load_slice(y_ptr, u, u >= 0, n_cols, n_cols, 0.0, "evict_first", SLICES, BLOCK)

    publish(stats_ptr + t, tl.sum(new_y * new_dy, axis=0), t < n_slices)

    if u >= 0:
        words = wait_for(stats_ptr + u // SLICES * SLICES, SLICES, WORDS)
        dot = tl.sum(words.to(y.dtype, bitcast=True), axis=0)
        cols = u % SLICES * BLOCK + tl.arange(0, BLOCK)
        dx_ptrs = dx_ptr + (u // SLICES).to(tl.int64) * n_cols + cols
        tl.store(
            dx_ptrs, y * (dy - dot), mask=cols < n_cols, eviction_policy="evict_first"
        )


# %%
# Which kernel when
# -----------------
#
# A row of up to 64 KiB, in the dtype that is computed with, leaves registers for the computation:
# it goes into a tile. A wider one is cut. Two sizes remain, and both are found by measuring.
#
# - A tile has 4096 elements, or one row if that is more; a slice has 4096, and 8192 in the backward
#   pass. Larger ones leave fewer programs that can run at the same time; smaller ones spend more on
#   starting, waiting and ending.
# - ``LAG_BYTES`` are read between the two reads of a slice. Too few, and programs wait for numbers
#   that are still being computed; too many, and the slice has left the cache. You will see that
#   below.
#
# Where ``ALIGN`` is 1, every element is loaded by itself, and slices half as long are faster.

TILE = 4096
LAG_BYTES = 5 * 2**20


def launch(tile_kernel, slice_kernel, out, *inputs):
    """Run one of the two kernels from matrices ``inputs`` to a contiguous matrix ``out``."""
    n_rows, n_cols = out.shape
    row_stride = inputs[0].stride(0)
    itemsize = out.element_size()
    ALIGN = math.gcd(n_cols, row_stride, 16 // itemsize)
    sizes = (row_stride // ALIGN, n_cols // ALIGN)
    thread_size = max(itemsize, 4 // ALIGN)
    if n_cols * max(itemsize, 4) <= 64 * 1024:
        BLOCK = triton.next_power_of_2(n_cols)
        ROWS = max(TILE // BLOCK, 1)
        grid = (triton.cdiv(n_rows, ROWS),)
        tile_kernel[grid](
            out, *inputs, n_rows, *sizes, ROWS, BLOCK, ALIGN,
            num_warps=warps(ROWS * BLOCK * thread_size),
        )  # fmt: skip
        return

    BLOCK = TILE * len(inputs) // (2 if ALIGN == 1 else 1)
    SLICES = triton.cdiv(n_cols, BLOCK)
    n_slices = n_rows * SLICES
    lag = min(SLICES + LAG_BYTES // (BLOCK * itemsize * len(inputs)), n_slices)
    num_warps = warps(BLOCK * thread_size)
    WORDS = max(triton.next_power_of_2(SLICES), 32 * num_warps)
    word = torch.int64 if itemsize == 8 else torch.int32
    stats = torch.full((2 * n_slices + 1,), -1, dtype=word, device=out.device)
    slice_kernel[(n_slices + lag,)](
        out, *inputs, stats, n_slices, lag, *sizes, SLICES, WORDS, BLOCK, ALIGN,
        num_warps=num_warps,
    )  # fmt: skip


# %%
# The last word of ``stats`` counts the tickets. It starts at -1, too, hence the ``+ 1`` in the
# kernels.
#
# To make the function differentiable, register both passes as *operators* of PyTorch. ``custom_op``
# makes a launch opaque, so that ``torch.compile`` doesn't try to look inside; ``register_fake``
# says what comes out, without computing it; ``register_autograd`` says how gradients flow. The
# gradient that arrives may lie in memory in any way, so it is made contiguous first.


@torch.library.custom_op("fast_and_right::softmax", mutates_args=())
def softmax_op(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        n_cols = x.shape[-1]
        rows = x.reshape(-1, n_cols)
        # Neighbours in a row must be neighbours in memory, and strides are 32-bit integers.
        if rows.stride(1) != 1 or rows.stride(0) >= 2**31:
            rows = rows.contiguous()
        with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
            launch(softmax_tile_kernel, softmax_slice_kernel, y.view(-1, n_cols), rows)
    return y


@torch.library.custom_op("fast_and_right::softmax_backward", mutates_args=())
def softmax_backward_op(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel() > 0:
        matrices = [t.contiguous().view(-1, y.shape[-1]) for t in (dx, dy, y)]
        with torch.cuda.device_of(y):
            launch(backward_tile_kernel, backward_slice_kernel, *matrices)
    return dx


@softmax_op.register_fake
def _(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@softmax_backward_op.register_fake
def _(dy, y):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def keep_y(ctx, inputs, output):
    ctx.save_for_backward(output)


def keep_dy_and_y(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, dy):
    (y,) = ctx.saved_tensors
    return softmax_backward_op(dy, y)


def backward_of_backward(ctx, g):
    dy, y = ctx.saved_tensors
    dot, g_dot = ((y * z).sum(-1, keepdim=True) for z in (dy, g))
    return softmax_backward_op(g, y), g * (dy - dot) - g_dot * dy


softmax_op.register_autograd(backward, setup_context=keep_y)
softmax_backward_op.register_autograd(backward_of_backward, setup_context=keep_dy_and_y)


def softmax(x):
    """Softmax over the last dimension.

    Differentiable in reverse mode, also twice (forward-mode derivatives come out as 0, as
    of any custom operator), and usable under ``torch.compile``. Two
    calls give the same bits.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., columns), any strides, on the GPU (on the CPU when Triton
        interprets); float16, bfloat16, float32 or float64.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. Sums are formed in float32
        (float64 for float64). As with ``torch.softmax``, a row that holds a NaN or
        +inf, or nothing but -inf, becomes NaN.

    Raises
    ------
    TypeError
        If ``x`` is no tensor of one of these dtypes.
    ValueError
        If ``x`` has no dimension, more than 2^30 columns, or is on another device.

    Notes
    -----
    Beside the output, rows of more than 64 KiB (counting 2-byte elements as 4 bytes)
    need 8 bytes for every 4096 elements while the kernel runs; twice that for float64,
    and for rows that are not aligned.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    if x.shape[-1] > 2**30:
        raise ValueError(f"x must have at most 2^30 columns, got {x.shape[-1]}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    return softmax_op(x)


# %%
# Is all of it right?
# -------------------
#
# Every path wants an awkward shape: a last tile with fewer rows, and a row whose last slice is
# short. The last dimension is what counts, whatever stands before it and however the tensor lies in
# memory.

for shape in ((183, 781), (2, 3, 5, 130), (3, 20_001)):
    x = torch.randn(shape, device=DEVICE)
    torch.testing.assert_close(softmax(x), torch.softmax(x, dim=-1), rtol=1e-5, atol=0)
transposed = torch.randn(100, 33, device=DEVICE).T
torch.testing.assert_close(softmax(transposed), torch.softmax(transposed, dim=-1))

no_choice = torch.full((1, 4), -float("inf"), device=DEVICE)
print("a row of -inf here:    ", softmax(no_choice).tolist())
print("a row of -inf in torch:", torch.softmax(no_choice, dim=-1).tolist())

# %%
# A row of nothing but ``-inf`` has no maximum to subtract: ``-inf - -inf`` is NaN, here as in
# PyTorch. Attention masks that hide every key end up there.
#
# For the gradient PyTorch has two checks of its own. ``gradcheck`` compares it with finite
# differences in float64; ``opcheck`` tests what an operator promises to ``torch.compile`` and
# autograd.

x = torch.randn(3, 7, device=DEVICE, dtype=torch.float64, requires_grad=True)
torch.autograd.gradcheck(softmax, x)
print("passed:", *torch.library.opcheck(softmax_op, (x,)))

wide = torch.randn(2, 20_001, device=DEVICE, requires_grad=True)
g = torch.randn(2, 20_001, device=DEVICE)
(ours,) = torch.autograd.grad(softmax(wide), wide, g)
(theirs,) = torch.autograd.grad(torch.softmax(wide, dim=-1), wide, g)
torch.testing.assert_close(ours, theirs)

# %%
# How long is the lag?
# --------------------
#
# Before you look: what should happen on the left, where the second read follows at once, and on
# the right, where tens of megabytes lie between?


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["lag_MiB"],
        x_vals=[1, 2, 3, 4, 5, 6, 8, 12, 16, 32],
        x_log=True,
        line_arg="dtype",
        line_vals=[torch.float32, torch.bfloat16],
        line_names=["float32", "bfloat16"],
        styles=[("#d55e00", "-"), ("#d55e00", ":")],
        xlabel=f"MiB between the two reads of a slice, 65536 columns\n{MACHINE}",
        ylabel="GB/s",
        plot_name="softmax-lag",
        args={"n_elements": 2**28},
    )
)
def lag_benchmark(n_elements, lag_MiB, dtype):
    global LAG_BYTES
    before, LAG_BYTES = LAG_BYTES, lag_MiB * 2**20
    x = torch.randn(n_elements // 65536, 65536, device=DEVICE, dtype=dtype)
    speed = speed_of(lambda: softmax(x), 2 * x.nbytes)
    LAG_BYTES = before
    return speed


if __name__ == "__main__" and not INTERPRET:
    lags = lag_benchmark.run(show_plots=True, return_df=True)
    show(lags)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"\nL2 cache of this GPU: {cache / 2**20:.0f} MiB")

# %%
# The cache also holds what is written and what other programs read, so a slice is gone long before
# as many bytes have been read as the cache has.
#
# How fast is it now?
# -------------------
#
# The whole range, with ``torch.softmax`` and the naive version as ``torch.compile`` fuses it. Odd
# widths are among them: 50257 is the vocabulary of GPT-2.

WIDTHS = [256, 384, 512, 1000, 1024, 2048, 4096, 5000, 8192, 12160, 16384, 32768, 50257]
WIDTHS += [65536, 128256, 131072, 262144, 2**20]


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_cols"],
            x_vals=WIDTHS,
            x_log=True,
            line_arg="implementation",
            line_vals=["softmax", "torch", "compile", "copy"],
            line_names=["softmax", "torch.softmax", "naive, torch.compile", "copy"],
            styles=[
                ("#d55e00", "-"),
                ("#0072b2", "-"),
                ("#009e73", "-"),
                ("#555555", "--"),
            ],
            xlabel=f"columns, 2^28 elements, {dtype}\n{MACHINE}",
            ylabel="GB/s",
            plot_name=f"softmax-widths-{dtype}",
            args={"n_elements": 2**28, "dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)
def width_benchmark(n_elements, n_cols, dtype, implementation):
    x = torch.randn(n_elements // n_cols, n_cols, device=DEVICE, dtype=dtype)
    torch.compiler.reset()  # forget other widths, or torch.compile gives up
    run = {
        "softmax": softmax,
        "torch": lambda x: torch.softmax(x, dim=-1),
        "compile": torch.compile(naive_softmax, dynamic=False),
        "copy": torch.clone,
    }[implementation]
    return speed_of(lambda: run(x), 2 * x.nbytes)


def worst_share(table, implementation, limit):
    share = table.iloc[:, implementation] / table.iloc[:, limit]
    worst = share.idxmin()
    return f"{share[worst]:.0%} at {table.n_cols[worst]:.0f} columns"


if __name__ == "__main__" and not INTERPRET:
    for speed in width_benchmark.run(show_plots=True, return_df=True):
        show(speed)
        print(
            f"\nLeast share of the copy: softmax {worst_share(speed, 1, 4)},\n"
            f"torch.softmax {worst_share(speed, 2, 4)}, "
            f"torch.compile {worst_share(speed, 3, 4)}.\n"
        )

# %%
# Where ``torch.compile`` keeps up, that is good news: write a kernel by hand where it does not, or
# where you want to know why. Where a line of PyTorch's jumps, another of its kernels takes over.
#
# The lowest point is the odd width. There each row begins somewhere else between two multiples
# of 16 bytes, and every element is loaded by itself. What takes the time then is not the bytes but
# the instructions, of which bfloat16 needs twice as many for the same bytes. The fourth exercise is
# about that.
#
# The backward pass beside PyTorch's. Its limit is an addition, which also reads two tensors and
# writes one:


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_cols"],
            x_vals=WIDTHS,
            x_log=True,
            line_arg="implementation",
            line_vals=["softmax", "torch", "add"],
            line_names=["softmax, backward", "torch.softmax, backward", "x + y"],
            styles=[("#d55e00", "-"), ("#0072b2", "-"), ("#555555", "--")],
            xlabel=f"columns, 2^28 elements, {dtype}\n{MACHINE}",
            ylabel="GB/s",
            plot_name=f"softmax-backward-{dtype}",
            args={"n_elements": 2**28, "dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)
def backward_benchmark(n_elements, n_cols, dtype, implementation):
    x, dy = torch.randn(2, n_elements // n_cols, n_cols, device=DEVICE, dtype=dtype)
    y = torch.softmax(x, dim=-1)
    run = {
        "softmax": lambda: softmax_backward_op(dy, y),
        "torch": lambda: torch.ops.aten._softmax_backward_data(dy, y, -1, dtype),
        "add": lambda: x + dy,
    }[implementation]
    return speed_of(run, 3 * x.nbytes)


if __name__ == "__main__" and not INTERPRET:
    for speed in backward_benchmark.run(show_plots=True, return_df=True):
        show(speed)
        print(f"\nLeast share of the addition: softmax {worst_share(speed, 1, 3)}.\n")

# %%
# In float32 the widest rows cost something, too. A slice waits until its whole row has been read, so
# a row comes on top of ``LAG_BYTES``, and with two inputs it is twice as long: slices begin to leave
# the cache before they are read again.
#
# All of this is the GPU's time. The CPU has to launch the kernel, and in a program of many small
# kernels that counts, too. The last of these is the launch alone, without the checks and without
# what makes it an operator of PyTorch:

if __name__ == "__main__" and not INTERPRET:
    x = torch.randn(64, 256, device=DEVICE)
    y = torch.empty_like(x)
    for name, run in [
        ("torch.softmax", lambda: torch.softmax(x, dim=-1)),
        ("softmax", lambda: softmax(x)),
        ("one launch", lambda: launch(softmax_tile_kernel, softmax_slice_kernel, y, x)),
    ]:
        times = timeit.repeat(run, number=1000, repeat=5)
        print(f"{name}: {min(times) * 1e3:.0f} microseconds of the CPU for a call")

# %%
# Exercises
# ---------
#
# 1. Write ``log_softmax``. Which of the values that the kernels have at hand do you need? Check it
#    against ``torch.log_softmax`` on rows that hold 1e4 and -1e4.
# 2. Give each thread 16 bytes, and 256, and predict both figures before you look.
# 3. Let a program take ``tl.program_id(0)`` for its ticket, and time it. What have you gained, and
#    which sentence above is no longer true?
# 4. Make odd widths fast. In ``softmax_slice_kernel`` let the slices begin at multiples of 16 bytes
#    in memory instead of at the row's first element, so that only the two ends of a row need
#    special care.
#
# .. note::
#    Try it first.
#
#    1. The maximum and the sum, which all forward kernels have: the logarithm of y is x - m - log(s).
#       Taking the logarithm of the finished softmax would not do: at -1e4 it is 0, whose logarithm
#       is -inf. The other forward kernels change in the same way, and the gradient becomes
#       g - exp(y) times the sum of g.
#
#       .. code-block:: python
#
#          @triton.jit
#          def log_softmax_kernel(y_ptr, x_ptr, x_row_stride, n_cols, BLOCK: tl.constexpr):
#              row = tl.program_id(0).to(tl.int64)
#              cols = tl.arange(0, BLOCK)
#              mask = cols < n_cols
#              x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=-float("inf"))
#              x = to_arithmetic(x)
#              x -= tl.max(x, axis=0)
#              y = x - tl.log(tl.sum(tl.exp(x), axis=0))
#              tl.store(y_ptr + row * n_cols + cols, y, mask=mask)
#
#
#          def log_softmax(x):
#              y = torch.empty_like(x)
#              BLOCK = triton.next_power_of_2(x.shape[1])
#              log_softmax_kernel[(len(x),)](y, x, x.stride(0), x.shape[1], BLOCK)
#              return y
#
#
#          x = torch.randn(5, 781, device=DEVICE)
#          x[:, 0], x[1:, 1] = -1e4, 1e4
#          torch.testing.assert_close(log_softmax(x), torch.log_softmax(x, dim=-1))
#
#    2. With 16 bytes a program has four times the warps, but never more than 32: in the first
#       figure its widest rows had 32 before, and stay as they are. The others spend more on
#       combining. With 256 bytes a warp is the least, so the narrowest rows stay as they are;
#       elsewhere fewer threads each hold more in registers, and have fewer loads under way at a
#       time. Expect neither to come closer to the copy, and look where they fall behind.
#    3. You gain an atomic operation a program, which is next to nothing beside reading a slice.
#       What you lose is the promise: "those were taken by programs that have started already". GPUs
#       do start programs in the order of their numbers, as far as anyone has seen, but nobody
#       promises it. If the last were started first and filled the GPU, all of them would wait for
#       ever.
#
#       .. code-block:: diff
#
#          -    t = tl.atomic_add(stats_ptr + 2 * n_slices, 1, sem="relaxed").to(tl.int32) + 1
#          +    t = tl.program_id(0)
#
#    4. Let a row's first slice begin up to 15 bytes before the row, at the last multiple of 16 in
#       memory. ``multiple_of`` tells the compiler so. A mask that ends anywhere would still force
#       it to load elements singly, so slices that lie within the row do without one. Output and
#       input have to begin equally far behind a multiple of 16, or else the input is copied first.
#       The backward kernel loads with the same function, so it has to store with the same, too.
#
#       .. code-block:: diff
#
#          @@ in load_slice
#          -    cols = t % SLICES * BLOCK + tl.arange(0, BLOCK)
#          -    ptrs = ptr + (t // SLICES).to(tl.int64) * row_stride + cols
#          -    mask = (cols < n_cols) & exists
#          -    return to_arithmetic(tl.load(ptrs, mask=mask, other=OTHER, eviction_policy=POLICY))
#          +    ptrs, first = aligned(ptr, t, row_stride, SLICES, BLOCK)
#          +    if exists & (first >= 0) & (first + BLOCK <= n_cols):
#          +        x = tl.load(ptrs, eviction_policy=POLICY)
#          +    else:
#          +        cols = first + tl.arange(0, BLOCK)
#          +        mask = (cols >= 0) & (cols < n_cols) & exists
#          +        x = tl.load(ptrs, mask=mask, other=OTHER, eviction_policy=POLICY)
#          +    return to_arithmetic(x)
#          +
#          +
#          +@triton.jit
#          +def aligned(ptr, t, row_stride, SLICES: tl.constexpr, BLOCK: tl.constexpr):
#          +    """Addresses of slice t, and the column where it begins: below 0 if before its row."""
#          +    GROUP: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
#          +    start = (t // SLICES).to(tl.int64) * row_stride
#          +    before = start % GROUP
#          +    first = t % SLICES * BLOCK
#          +    ptrs = ptr + tl.multiple_of(start - before, GROUP) + first + tl.arange(0, BLOCK)
#          +    return ptrs, first - before.to(tl.int32)
#          +
#          +
#          +@triton.jit
#          +def store_slice(ptr, t, y, n_cols, SLICES: tl.constexpr, BLOCK: tl.constexpr):
#          +    ptrs, first = aligned(ptr, t, n_cols, SLICES, BLOCK)
#          +    if (first >= 0) & (first + BLOCK <= n_cols):
#          +        tl.store(ptrs, y, eviction_policy="evict_first")
#          +    else:
#          +        cols = first + tl.arange(0, BLOCK)
#          +        mask = (cols >= 0) & (cols < n_cols)
#          +        tl.store(ptrs, y, mask=mask, eviction_policy="evict_first")
#          @@ in softmax_slice_kernel
#          -        cols = u % SLICES * BLOCK + tl.arange(0, BLOCK)
#          -        y_ptrs = y_ptr + (u // SLICES).to(tl.int64) * n_cols + cols
#          -        tl.store(y_ptrs, y, mask=cols < n_cols, eviction_policy="evict_first")
#          +        store_slice(y_ptr, u, y, n_cols, SLICES, BLOCK)
#          @@ in backward_slice_kernel
#          -        cols = u % SLICES * BLOCK + tl.arange(0, BLOCK)
#          -        dx_ptrs = dx_ptr + (u // SLICES).to(tl.int64) * n_cols + cols
#          -        tl.store(
#          -            dx_ptrs, y * (dy - dot), mask=cols < n_cols, eviction_policy="evict_first"
#          -        )
#          +        store_slice(dx_ptr, u, y * (dy - dot), n_cols, SLICES, BLOCK)
#          @@ in launch
#          -    SLICES = triton.cdiv(n_cols, BLOCK)
#          +    SLICES = triton.cdiv(n_cols + 16 // itemsize - 1, BLOCK)
#          @@ in softmax_op
#          -        if rows.stride(1) != 1 or rows.stride(0) >= 2**31:
#          +        apart = (rows.stride(0) - n_cols) % (16 // x.element_size())
#          +        if rows.stride(1) != 1 or rows.stride(0) >= 2**31 or apart:
#
# References
# ----------
#
# - M. Milakov and N. Gimelshein, `Online normalizer calculation for softmax <https://arxiv.org/abs/1805.02867>`_,
#   2018: how the bytes of a softmax are counted, and how to save a pass over a row.
# - P. Tillet, H. T. Kung and D. Cox, `Triton: an intermediate language and compiler for tiled neural network computations <https://doi.org/10.1145/3315508.3329973>`_,
#   2019: why programs work on blocks.
# - D. Merrill and M. Garland, `Single-pass parallel prefix scan with decoupled look-back <https://research.nvidia.com/publication/2016-03_single-pass-parallel-prefix-scan-decoupled-look-back>`_,
#   2016: programs that wait for earlier ones, and why that ends well.
# - The `documentation of Triton <https://triton-lang.org>`_, whose own tutorials take the same
#   example.
