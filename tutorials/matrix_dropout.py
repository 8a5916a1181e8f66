"""
.. _matrix dropout:

Dropout with a seed per row
===========================

You give each row of a matrix a seed of its own, so that a sample keeps its dropout mask in whatever
batch it appears. With one seed for the whole batch, the mask of a sample depends on where in the
batch it lands: evaluate the sample alone, and it gets another mask. The kernel also reads any
layout, transposed or sliced, without copying it first.

You will learn

- how a kernel works on tiles of a matrix, and which tile suits which layout;
- what a stride is, and what a bad access pattern costs;
- how to make a random result independent of batching, and how to show that it is.

Needs: PyTorch, and :ref:`seeded dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/strides.svg'
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
# Why a seed per row?
# -------------------
#
# Think of a row as a sample, and of its seed as a number made from the sample's number and the
# training step. Then a sample that you evaluate alone has the same result as in its batch. You can
# divide a batch among several GPUs, pad it or sort it by length: every sample keeps its mask.
#
# In :ref:`seeded dropout`, element i is kept or dropped by word i mod 4 of Philox for the counter
# ⌊i / 4⌋. Here i is the *column*, and the seed is the row's. So row r of the result is
# ``seeded_dropout4x(x[r], p, int(seeds[r]))``, bit for bit.
#
# What a stride is
# ----------------
#
# Memory has no rows and columns: it is one long line of elements. For each dimension,
# ``x.stride()`` says how many elements lie from one index to the next. So element (r, c) lies r ·
# stride(0) + c · stride(1) elements after the first. Transposing swaps the two strides and moves no
# element. Taking every second column doubles the second stride. Repeating a row gives the first
# dimension a stride of 0.
#
# .. image:: /_static/strides.svg
#    :alt: One line of twelve elements in memory, read in four ways: as three rows of four with strides 4 and 1, transposed with strides 1 and 4, every second column with strides 4 and 2, and the first row repeated with strides 0 and 1.

if __name__ == "__main__":
    x = torch.arange(12, device=DEVICE).reshape(3, 4)
    for name, view in [
        ("as it is", x),
        ("transposed", x.T),
        ("every second column", x[:, ::2]),
        ("a row repeated", x[0].expand(3, 4)),
    ]:
        same = view.data_ptr() == x.data_ptr()
        print(
            f"{name:20} {tuple(view.shape)}  strides {view.stride()}  same memory: {same}"
        )

# %%
# The kernel
# ----------
#
# A program works on a *tile* of ``ROWS`` times ``COLS`` elements: ``rows[:, None]`` and
# ``cols[None, :]`` broadcast to a two-dimensional block of addresses. A narrow matrix takes tiles
# of many rows, and a wide one many tiles for each row. The tiles are numbered in one sequence,
# because the first axis of a grid may have 2^31 - 1 programs and the others only 65535.
#
# Each program loads the seeds of its rows. ``philox``, from :ref:`seeded dropout`, takes a block of
# seeds just as it takes a single one. The bits are interleaved along the rows.


@triton.jit
def philox(seed, counters):
    """The four words of ``tl.randint4x``, for counters of 64 bits."""
    seed = tl.cast(seed, tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = counters.to(tl.uint32), (counters >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def matrix_dropout_kernel(
    y_ptr, x_ptr, seeds_ptr, n_rows, n_cols, x_row_stride, x_col_stride,
    threshold, scale: tl.float64,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    n_cols *= ALIGN  # explained below
    x_row_stride *= ALIGN
    tiles_in_a_row = tl.cdiv(n_cols, COLS)
    # A matrix can have more than 2^31 elements, so positions are computed in 64 bits.
    pid = tl.program_id(0).to(tl.int64)
    rows = pid // tiles_in_a_row * ROWS + tl.arange(0, ROWS)
    first_col = pid % tiles_in_a_row * COLS

    seeds = tl.load(seeds_ptr + rows, mask=rows < n_rows)
    counters = first_col // 4 + tl.arange(0, COLS // 4)
    w0, w1, w2, w3 = philox(seeds[:, None], counters[None, :])
    threshold = tl.cast(threshold, tl.uint32)
    bits = tl.where(w0 < threshold, 0, 1) + tl.where(w1 < threshold, 0, 2)
    bits += tl.where(w2 < threshold, 0, 4) + tl.where(w3 < threshold, 0, 8)
    bits = tl.interleave(bits, bits >> 2)
    keep = tl.interleave(bits, bits >> 1) & 1 == 1

    cols = first_col + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    x_tile = x_ptr + rows[:, None] * x_row_stride + cols[None, :] * x_col_stride
    y_tile = y_ptr + rows[:, None] * n_cols + cols[None, :]
    x = tl.load(x_tile, mask=inside)
    # Unless annotated, a Python float arrives as float32, too coarse for float64.
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_tile, tl.where(keep, x * scale, 0.0), mask=inside)


# %%
# The shape of a tile
# -------------------
#
# Memory is fetched in pieces of 32 bytes, or 16 elements of bfloat16. If neighbouring threads ask
# for neighbouring elements, a few pieces serve all of them. So a tile should be long in the
# direction in which elements are neighbours in memory.
#
# For a contiguous matrix this is the row, in the input and in the output: the tile is as wide as
# the row, up to 1024 columns, and takes more rows if the row is shorter. A transposed matrix is
# read along its columns, but the result is written along its rows. A tile of 128 by 32 suits both:
# the 128 elements of a column are neighbours in the input, and the 32 of a row in the output. Both
# sizes are powers of two, and ``COLS`` is at least 4.
#
# A thread can move 16 bytes with one instruction, but only at an address that is a multiple of 16.
# Rows of 8 columns begin at such addresses, even in bfloat16, and the compiler has to know it.
# ``ALIGN`` is the largest power of two, at most the elements in 16 bytes, that divides the width
# and the stride of a row. Both are passed divided by it. The kernel multiplies them again, so the
# compiler knows that they are multiples. A warp works on 1024 elements.

import math


def tile_shape(x):
    """ROWS and COLS of a tile, for the layout of ``x``."""
    COLS = max(triton.next_power_of_2(x.shape[1]), 4)
    if x.stride(1) > x.stride(0) > 0:  # neighbours stand in a column
        COLS = min(COLS, 32)
        return 4096 // COLS, COLS
    COLS = min(COLS, 1024)
    return 1024 // COLS, COLS


def launch_tiles(y, x, p, seeds, ROWS, COLS):
    (n_rows, n_cols), (row_stride, col_stride) = x.shape, x.stride()
    n_tiles = triton.cdiv(n_rows, ROWS) * triton.cdiv(n_cols, COLS)
    threshold, scale = round(p * 2**32), 1 / (1 - p)
    ALIGN = math.gcd(n_cols, row_stride, 16 // x.element_size())
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        matrix_dropout_kernel[(n_tiles,)](
            y, x, seeds, n_rows, n_cols // ALIGN, row_stride // ALIGN, col_stride,
            threshold, scale, ROWS, COLS, ALIGN, num_warps=ROWS * COLS // 1024,
        )  # fmt: skip


def launch_matrix_dropout(x: torch.Tensor, p: float, seeds: torch.Tensor) -> torch.Tensor:
    if p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if round(p * 2**32) == 2**32 or x.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x = x.resolve_neg()  # apply a negation that PyTorch has put off
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_tiles(y, x, p, seeds, *tile_shape(x))
    return y


# %%
# The masks follow the rows
# -------------------------
#
# The picture shows eight samples, each in a colour of its own, and leaves blank what is dropped. On
# the right is the same batch after its samples were shuffled together with their seeds.

if __name__ == "__main__":
    import matplotlib.pyplot as plt

    p = 0.5
    seeds = 1000 + torch.arange(8, device=DEVICE)  # a seed for each sample
    x = torch.ones(8, 32, device=DEVICE)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4], device=DEVICE)

    samples = torch.arange(1, 9, device=DEVICE)[:, None]
    batch = (launch_matrix_dropout(x, p, seeds) != 0) * samples
    moved = (launch_matrix_dropout(x[order], p, seeds[order]) != 0) * samples[order]
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.4))
    colours = plt.matplotlib.colors.ListedColormap(["white", *plt.cm.Dark2.colors])
    for axis, picture, title in zip(
        axes, (batch, moved), ("the batch", "shuffled"), strict=True
    ):
        axis.imshow(picture.cpu().numpy(), cmap=colours, vmin=0, vmax=8, aspect="auto")
        axis.set(title=title, xticks=[], yticks=[], ylabel="samples")
        axis.grid(False)
    figure.suptitle("A sample keeps its mask when the batch is shuffled", y=1.1)
    plt.show()

# %%
# Now compare element by element, on 70 rows of 130 columns, which no tile fits exactly. Shuffle
# the batch, cut it in two, pad it with rows and columns, run one sample alone, and read other
# layouts:

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(70, 130, device=DEVICE)
    seeds = torch.randint(-(2**63), 2**63 - 1, (70,)).to(DEVICE)
    run = launch_matrix_dropout
    y = run(x, p, seeds)

    order = torch.randperm(70, device=DEVICE)
    assert torch.equal(run(x[order], p, seeds[order]), y[order])
    halves = [run(x[:30], p, seeds[:30]), run(x[30:], p, seeds[30:])]
    assert torch.equal(torch.cat(halves), y)
    padded = torch.nn.functional.pad(x, (0, 9, 0, 5))
    more_seeds = torch.nn.functional.pad(seeds, (0, 5))
    assert torch.equal(run(padded, p, more_seeds)[:70, :130], y)
    assert torch.equal(run(x[17:18], p, seeds[17:18]), y[17:18])
    print("shuffled, cut, padded, alone: each row keeps its mask")

    for view in (x.T.contiguous().T, torch.cat([x, x], dim=1)[:, :130]):
        assert torch.equal(run(view, p, seeds), y)
    row = x[:1].expand(70, 130)
    assert torch.equal(run(row, p, seeds), run(row.clone(), p, seeds))
    print("transposed, sliced, expanded: the same result")

# %%
# Is it fast?
# -----------
#
# Count the bytes: ``x`` in, ``y`` out, and 8 bytes for each row's seed. A row of 8 columns has 64
# bytes of ``x`` and ``y`` in float32, so with its seed it should reach 64/72 of a copy's speed. In
# bfloat16 it has 32, and should reach 32/40. At 64 columns a seed hardly counts. ``F.dropout``
# moves a byte more for each element, its mask, and should reach 8/9 in float32 and 4/5 in bfloat16.
# The figure shows GB/s of ``x`` and ``y`` alone.


def picoseconds(run, n):
    """Time of ``run()``, divided among n elements."""
    return triton.testing.do_bench(run, warmup=5, rep=40, return_mode="median") / n * 1e9


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_cols"], x_log=True, x_vals=[2**i for i in range(3, 17)],
            line_arg="line", line_vals=["matrix", "transposed", "torch", "copy"],
            line_names=["matrix_dropout", "matrix_dropout, transposed", "F.dropout", "copy"],
            styles=[("#d55e00", "-"), ("#d55e00", ":"), ("#0072b2", "-"), ("#555555", "--")],
            xlabel=f"columns, 2^28 elements, {dtype}\n{MACHINE}", ylabel="GB/s",
            plot_name=f"matrix-dropout-{dtype}",
            args={"n_elements": 2**28, "dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)  # fmt: skip
def benchmark(n_elements, n_cols, dtype, line):
    x = torch.randn(n_elements // n_cols, n_cols, device=DEVICE, dtype=dtype)
    xt = x.view(n_cols, -1).T
    seeds = torch.arange(len(x), device=DEVICE)
    run = {
        "matrix": lambda: launch_matrix_dropout(x, 0.5, seeds),
        "transposed": lambda: launch_matrix_dropout(xt, 0.5, seeds),
        "torch": lambda: torch.nn.functional.dropout(x, 0.5),
        "copy": x.clone,
    }[line]
    return 2 * x.nbytes / picoseconds(run, n_elements) / n_elements * 1e3


if __name__ == "__main__" and not INTERPRET:
    tables = benchmark.run(show_plots=True, return_df=True)
    for dtype, speed in zip(("float32", "bfloat16"), tables, strict=True):
        speed.columns = [name.removesuffix(" (GB/s)") for name in speed]
        print(f"{dtype}, GB/s:")
        print(speed.to_string(index=False, float_format="%.0f"), end="\n\n")

# %%
# Contiguous matrices about agree with the count. On an H200, with faster memory, bfloat16 stays up
# to a seventh below it. Transposed ones stay further below, and so does ``F.dropout``.
#
# What a bad access pattern costs
# -------------------------------
#
# Now give a transposed matrix the tile of a contiguous one: a single row of 1024 elements, each far
# from the next in memory. The result is the same, bit for bit. But each element needs a piece of 32
# bytes of its own, and most of it is thrown away, unless a neighbouring row finds it in the
# cache. The last column of the table is what many functions do: they call ``x.contiguous()`` first.
# That copy also reads or writes elements that are far apart, and then everything is read and
# written once more.

if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    n = 2**28
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4096, n // 4096, device=DEVICE, dtype=dtype).T
        seeds = torch.arange(len(x), device=DEVICE)
        y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
        runs = [
            x.clone,
            lambda: launch_tiles(y, x, 0.5, seeds, *tile_shape(x)),
            lambda: launch_tiles(y, x, 0.5, seeds, 1, 1024),
            lambda: launch_matrix_dropout(x.contiguous(), 0.5, seeds),
        ]
        rows.append([dtype, *(picoseconds(run, n) for run in runs)])
    headers = ["ps an element", "copy", "tile of 128 x 32", "tile of 1 x 1024"]
    headers += ["contiguous() first"]
    print("A transposed matrix of 65536 rows and 4096 columns:\n")
    print(tabulate(rows, headers, floatfmt=".2f"))

# %%
# As a public function
# --------------------
#
# For given seeds dropout is linear, so the backward pass is the same kernel on the incoming
# gradient. Only the seeds are kept for it, 8 bytes for each row. ``save_for_backward`` also raises
# an error if someone changes them in place before the backward pass. :ref:`operators` explains the
# operator, the ``Function`` and ``apply``.

import numbers

matrix_dropout_op = torch.library.custom_op(
    "fast_and_right::matrix_dropout", launch_matrix_dropout, mutates_args=()
)
matrix_dropout_op.register_fake(lambda x, p, seeds: x.new_empty(x.shape))


class MatrixDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seeds):
        compiling = torch.compiler.is_compiling()
        return (matrix_dropout_op if compiling else launch_matrix_dropout)(x, p, seeds)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seeds = inputs
        ctx.save_for_backward(seeds)

    @staticmethod
    def backward(ctx, gradient):
        # Not the apply from below: torch.func may have wrapped the seeds.
        return MatrixDropout.apply(gradient, ctx.p, *ctx.saved_tensors), None, None


quick_apply = super(torch.autograd.Function, MatrixDropout).apply


def apply(*arguments):
    # Function.apply looks up the arguments' names, which costs more than all the rest.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return MatrixDropout.apply(*arguments)
    return quick_apply(*arguments)


def matrix_dropout(x, p, seeds):
    """Drop elements of a matrix with probability p, each row under a seed of its own.

    ``x`` has shape (rows, columns) and any strides, is on the GPU (on the CPU when Triton
    interprets), and is float16, bfloat16, float32 or float64. ``p``, in [0, 1], is rounded to
    a multiple of 2^-32; 0 returns a copy, bit for bit, and 1 returns zeros. ``seeds`` has
    shape (rows,), any integer dtype and any device; a negative seed is the same as itself
    plus 2^64. The result is contiguous, and a dropped inf or NaN is 0 in it. Row r is
    ``seeded_dropout4x(x[r], p, int(seeds[r]))``: element c is kept, and multiplied by
    1 / (1 - p), when word c mod 4 of Philox4x32 with ten rounds, the key seeds[r] and the
    counter c // 4, is at least p * 2^32. Differentiable, also twice, in reverse mode only;
    works under ``torch.compile``. Raises TypeError or ValueError for anything else.
    """
    for name, t in (("x", x), ("seeds", seeds)):
        if not isinstance(t, torch.Tensor) or t.is_nested or t.layout != torch.strided:
            got = getattr(t, "layout", type(t).__name__)
            raise TypeError(f"{name} must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x must have two dimensions, got {x.ndim}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    if not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    dtype = seeds.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"seeds must be integers, got {seeds.dtype}")
    if seeds.shape != x.shape[:1]:
        raise ValueError(
            f"seeds must have shape ({x.shape[0]},), one for each row, "
            f"got {tuple(seeds.shape)}"
        )
    # As int64, a uint64 of 2^63 or more wraps to a negative number: the same 64 bits.
    seeds = seeds.to(x.device, torch.int64).contiguous()
    return apply(x, float(p), seeds)


if __name__ == "__main__":
    from torch.utils.checkpoint import checkpoint

    x, seeds = torch.randn(70, 130, device=DEVICE, requires_grad=True), torch.arange(70)
    mask = matrix_dropout(torch.ones_like(x), p, seeds)
    matrix_dropout(x, p, seeds).sum().backward()
    assert torch.equal(x.grad, mask)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    z = checkpoint(matrix_dropout, x, p, seeds, **options)
    assert torch.equal(*torch.autograd.grad(z.sum(), x), mask)
    compiled = torch.compile(matrix_dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(*torch.autograd.grad(compiled(x, p, seeds).sum(), x), mask)
    print("alone, checkpointed, compiled: the gradient is the mask")

# %%
# Exercises
# ---------
#
# 1. Give each *column* a seed of its own, ``column_dropout(x, p, seeds)``. No new kernel is needed.
#    ``check_column_dropout(column_dropout)`` raises an error if it is wrong.
# 2. A batch of sequences has three dimensions and three strides. Which changes does the kernel
#    need, with one seed for each sequence?


def check_column_dropout(answer):
    x = torch.arange(1.0, 46, device=DEVICE).reshape(9, 5)
    seeds = torch.arange(5, device=DEVICE)
    for p in (0, 0.3, 1):
        y = answer(x, p, seeds)
        for c in range(5):
            right = matrix_dropout(x[:, c][None], p, seeds[c : c + 1])[0]
            if not torch.equal(y[:, c], right):
                raise AssertionError(f"column {c} is wrong at p = {p}")
    print("right")


# %%
# .. note::
#    Try it first.
#
#    1. The columns of ``x`` are the rows of its transpose, and the kernel takes any strides.
#
#       .. code-block:: python
#
#          def column_dropout(x, p, seeds):
#              return matrix_dropout(x.T, p, seeds).T
#
#
#          check_column_dropout(column_dropout)
#
#    2. A row is now a sequence, and a column stands for a step and a feature. The address needs
#       both, with a stride for each. The decisions and the result stay as they are. Pass 1 for
#       ``ALIGN``.
#
#       .. code-block:: diff
#
#          @@ in matrix_dropout_kernel
#          -    y_ptr, x_ptr, seeds_ptr, n_rows, n_cols, x_row_stride, x_col_stride,
#          -    threshold, scale: tl.float64,
#          +    y_ptr, x_ptr, seeds_ptr, n_rows, n_cols, x_row_stride, x_step_stride, x_col_stride,
#          +    n_features, threshold, scale: tl.float64,
#          @@
#          -    x_tile = x_ptr + rows[:, None] * x_row_stride + cols[None, :] * x_col_stride
#          +    places = cols // n_features * x_step_stride + cols % n_features * x_col_stride
#          +    x_tile = x_ptr + rows[:, None] * x_row_stride + places[None, :]
#
# References
# ----------
#
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011.
# - PyTorch's documentation of `tensor views and strides <https://docs.pytorch.org/docs/stable/tensor_view.html>`_.
# - NVIDIA, `CUDA C++ best practices guide: coalesced access to global memory <https://docs.nvidia.com/cuda/cuda-c-best-practices-guide/#coalesced-access-to-global-memory>`_.
