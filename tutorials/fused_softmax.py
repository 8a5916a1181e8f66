"""
.. _fused softmax:

Fused softmax
=============

A softmax needs very little arithmetic. What it costs is trips to memory, and PyTorch's operators
make more of them than they must when you write softmax by hand. In this lesson you write one GPU
kernel that makes a single trip, check it against PyTorch, and measure how close it comes to a
plain copy of the same bytes, which is as fast as memory goes.

You will learn

- how to count the bytes that an operation moves, and to read the count as a limit on its speed;
- how a Triton kernel works on a row of any length with blocks that are powers of two;
- how to check a kernel on an awkward shape, and how to measure it beside its physical limit.

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
# The size of a block is a power of two. That of a row seldom is, so the row is padded: ``mask`` is true for the columns that exist, and a masked load touches only
# those. The others receive ``-inf``, which can't be the maximum and whose exponential is 0, so
# the padding vanishes from the result.


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
# The function around it
# ----------------------
#
# The function that you call prepares the launch. It picks the block, the next power of two at or
# above the number of columns, and the number of *warps*, the groups of 32 threads among which the
# program's elements are divided. With few warps, a thread has many elements to hold in its
# registers; with many, the threads spend more time on combining their results.
#
# ``softmax_kernel[grid](...)`` launches the kernel. The *grid* is a tuple that says how many
# programs to start, here one for each row. The arguments follow as in any call.


def softmax(x):
    """Softmax over the last dimension, in one pass over memory.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., columns) with up to 2^20 columns and any strides, on the GPU (on the
        CPU when Triton interprets); float16, bfloat16, float32 or float64.

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
        If ``x`` has no dimension, is on another device, is wider than 2^20 columns, has
        2^31 rows or more, or requires a gradient, which this kernel does not compute.
    """
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient, which softmax does not compute; pass x.detach()"
        )
    n_cols = x.shape[-1]
    n_rows = math.prod(x.shape[:-1])
    if n_cols > 2**20 or n_rows >= 2**31:
        raise ValueError(
            f"x must have at most 2^20 columns and 2^31 - 1 rows, got {tuple(x.shape)}"
        )

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    # Some views, as z.conj().imag, negate only when they are read.
    rows = x.resolve_neg().reshape(n_rows, n_cols)
    if rows.stride(1) != 1:
        rows = rows.contiguous()  # neighbours in a row must be neighbours in memory
    BLOCK = triton.next_power_of_2(n_cols)
    num_warps = min(max(BLOCK // 1024, 1), 32)  # about 32 elements a thread
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        softmax_kernel[(n_rows,)](
            y, rows, rows.stride(0), n_cols, BLOCK, num_warps=num_warps
        )
    return y


# %%
# Is it right?
# ------------
#
# Choose a shape that a careless kernel gets wrong: 1823 rows and 781 columns, both odd, so that
# no block fits. ``assert_close`` raises an error, and so stops this page from being built, if an
# element differs by more than rounding explains. Its default tolerance would let an absolute error
# of 1e-5 pass, which is large beside elements of about 1/781; here only the relative error counts.

torch.manual_seed(0)
x = torch.randn(1823, 781, device=DEVICE)
y = softmax(x)
reference = torch.softmax(x, dim=-1)
torch.testing.assert_close(y, reference, rtol=1e-5, atol=0)

exact = torch.softmax(x.double(), dim=-1)
print(f"largest error of this kernel:   {(y - exact).abs().max():.1e}")
print(f"largest error of torch.softmax: {(reference - exact).abs().max():.1e}")

# %%
# The errors are against softmax in float64. Both are rounding errors of float32; on a GPU,
# ours includes the approximate exponential. (The interpreter uses NumPy's.)
#
# The last dimension is what counts, whatever stands before it and however the tensor lies in
# memory:

batch = torch.randn(2, 3, 5, 130, device=DEVICE)
torch.testing.assert_close(softmax(batch), torch.softmax(batch, dim=-1))
transposed = torch.randn(100, 33, device=DEVICE).T
torch.testing.assert_close(softmax(transposed), torch.softmax(transposed, dim=-1))

no_choice = torch.full((1, 4), -float("inf"), device=DEVICE)
print("a row of -inf here:    ", softmax(no_choice).tolist())
print("a row of -inf in torch:", torch.softmax(no_choice, dim=-1).tolist())

# %%
# A row of nothing but ``-inf`` has no maximum to subtract: ``-inf - -inf`` is NaN, here as in
# PyTorch. Attention masks that hide every key end up there.
#
# Is it fast?
# -----------
#
# ``perf_report`` runs a function over a range of sizes, once for each line of a figure. The five
# lines take matrices of the same size: this kernel, ``torch.softmax``, the naive version
# compiled in two ways, and a copy. The copy also reads and writes each element once, and computes
# nothing: it is the limit. The scale counts the bytes that *must* move, :math:`2MN` elements, over
# the time taken, so a version that moves more shows up lower.

from tabulate import tabulate


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_cols"],
        x_vals=[128 * i for i in range(2, 100)],
        line_arg="implementation",
        line_vals=["fused", "torch", "compile", "jit", "copy"],
        line_names=[
            "this kernel",
            "torch.softmax",
            "naive, torch.compile",
            "naive, torch.jit.script",
            "copy",
        ],
        styles=[
            ("#d55e00", "-"),
            ("#0072b2", "-"),
            ("#009e73", "-"),
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
    torch.compiler.reset()  # forget other widths, or torch.compile gives up
    run = {
        "fused": softmax,
        "torch": lambda x: torch.softmax(x, dim=-1),
        "compile": torch.compile(naive_softmax, dynamic=False),
        "jit": torch.jit.script(naive_softmax),
        "copy": torch.clone,
    }[implementation]
    milliseconds = triton.testing.do_bench(lambda: run(x), return_mode="median")
    return 2 * x.nbytes / milliseconds / 1e6  # bytes per ms, as GB/s


# %%
# Only a GPU is worth timing: the time that the interpreter takes says nothing about the kernel.

if __name__ == "__main__":
    if not INTERPRET:
        speed = benchmark.run(show_plots=True, return_df=True)
        table = speed[speed.n_cols % 1536 == 0]
        print(tabulate(table, headers="keys", floatfmt=".0f", showindex=False))
    else:
        print("No figure: speed is measured on a GPU only, and this run had none.")

# %%
# What the figure says
# --------------------
#
# Look first at how close the kernel comes to the copy: whatever is missing there is all that a
# better kernel could still gain. Then look at what the unfused operators lose.

if __name__ == "__main__" and not INTERPRET:
    narrow, wide = speed.iloc[0], speed.iloc[-1]
    for row in (narrow, wide):
        n_cols, fused, torch_softmax, compiled, scripted, copy = row
        print(
            f"At {n_cols:.0f} columns this kernel reaches {fused:.0f} GB/s, "
            f"{fused / copy:.0%} of the copy.\nThat is "
            f"{fused / torch_softmax:.2f} times torch.softmax, "
            f"{fused / compiled:.2f} times torch.compile, "
            f"{fused / scripted:.2f} times TorchScript."
        )

# %%
# - TorchScript runs the naive version much as it is written, so its distance from the copy is the
#   price of the extra trips that you counted above.
# - ``torch.compile`` fuses the five operators for you. When it keeps up, that is good news: write
#   a kernel by hand where it does not, or where you want to know why.
# - On the left of the figure the matrix is small. Launching a kernel takes a few millionths of a
#   second whatever it does, and there even the copy is held back by that.
# - Narrow rows leave a program with little to load. Just above a power of two, almost half of the
#   block is padding. And far beyond the figure, a row no longer fits into the registers. One row a
#   program is the simplest division of the work; it is not the best at every width.
#
# Exercises
# ---------
#
# 1. Write ``log_softmax``. Which of the values that the kernel has at hand do you need? Check it
#    against ``torch.log_softmax`` on rows that hold 1e4 and -1e4.
# 2. Time bfloat16 at 256 columns, with as many rows as fill a quarter of your GPU's memory. How far is it from
#    the copy? Let each program load several rows as one two-dimensional block, and time it again.
# 3. Change ``num_warps`` to 1 and to 32, and predict the figure before you look.
#
# References
# ----------
#
# - M. Milakov and N. Gimelshein, `Online normalizer calculation for softmax <https://arxiv.org/abs/1805.02867>`_,
#   2018: how the bytes of a softmax are counted, and how to save a pass over a row.
# - P. Tillet, H. T. Kung and D. Cox, `Triton: an intermediate language and compiler for tiled neural network computations <https://doi.org/10.1145/3315508.3329973>`_,
#   2019: why programs work on blocks.
# - The `documentation of Triton <https://triton-lang.org>`_, whose own tutorials take the same
#   example.
