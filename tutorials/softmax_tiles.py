"""
.. _softmax tiles:

Softmax in tiles, and its gradient
==================================

You make the softmax of narrow rows fast, and you add the gradient. In :ref:`fused softmax` each
program has one row. If rows are short, that is too little work, and at some widths elements are
loaded one by one. Here you mend both, for rows of up to 64 KiB in float32.

You will learn

- how a program works on a two-dimensional block, and how its addresses are made by broadcasting;
- when a GPU can move 16 bytes with one instruction, and what Triton has to know for that;
- how to write the backward pass of softmax.

Needs: PyTorch, and :ref:`fused softmax`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/tile_addresses.svg'
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
# A block of addresses
# --------------------
#
# We give each program a *tile* of several rows. In the kernel, ``rows`` numbers the rows and has
# the shape (ROWS, 1), and ``cols`` numbers the columns and has the shape (1, BLOCK). We multiply
# ``rows`` by the stride, the distance in memory from one row to the next, and add ``cols``. The sum
# is a two-dimensional block of addresses, by broadcasting.
#
# .. image:: /_static/tile_addresses.svg
#    :alt: A column of four row starts plus a row of column numbers gives a block of four by eight addresses. Below, eight threads that read neighbouring elements need one piece of memory; eight that read elements far apart need eight.
#
# The lower half shows why ``cols`` should be neighbours in memory. The 32 threads of a warp load
# together, and memory comes in sectors of 32 bytes. If neighbouring threads load neighbouring
# elements, every byte is used: the loads are *coalesced*. Elements far apart need a sector each,
# most of which is thrown away.
#
# Why Triton has to know where rows begin
# ---------------------------------------
#
# A thread can load 16 bytes with one instruction, but only from a multiple of 16. So the compiler
# uses this instruction only if it is certain of the address. If a tensor begins at a multiple of 16
# bytes, or an integer argument is a multiple of 16, Triton compiles a version of the kernel that
# relies on this. But the second row of 5000 columns in bfloat16 begins 10000 bytes further on.
# 10000 is a multiple of 16, but the argument 5000 is not. So the compiler can't be certain, and
# loads each element by itself. With 5001 columns, most rows really begin between two multiples.
#
# ``VECTOR`` is the number of elements that move together, as many as 16 bytes hold. The *whole
# vectors* of a row are its elements from the first multiple of 16 bytes up to the last one. The
# *edges* are the elements before and after them, fewer than ``2 * VECTOR``, which are loaded one by
# one. ``whole_vectors`` divides by ``VECTOR``, a ``tl.constexpr``, and multiplies again. So the
# compiler is certain that the results are multiples of it.
#
# ``EDGES`` is the size of the block for the edges. Tiles without edges have 0, and a ``VECTOR``
# that divides the width and the gap.
#
# The kernel
# ----------
#
# The maximum and the sum run along axis 1, and ``keep_dims`` leaves a column, as PyTorch's
# ``keepdim`` does. A function that a kernel calls is marked with ``triton.jit``, too. The stride is
# ``n_cols`` in the output. It can be larger in the input, as when you cut columns off a matrix, and
# ``gap`` is the difference. The launch divides it by ``VECTOR``, so the compiler knows its
# alignment.


@triton.jit
def to_arithmetic(x):
    """Widen to float32: a sum in float16 or bfloat16 would lose too many digits."""
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def whole_vectors(rows, n_cols, VECTOR: tl.constexpr, EDGES: tl.constexpr):
    """Where each row's whole vectors begin in the output, and how long they are."""
    whole = n_cols // VECTOR * VECTOR
    begin = rows * whole
    if EDGES:
        start = rows * n_cols
        begin = (start + VECTOR - 1) // VECTOR * VECTOR
        whole = tl.maximum(n_cols - (begin - start).to(tl.int32), 0) // VECTOR * VECTOR
    return begin, whole


@triton.jit
def edges_at(row, n_cols, EDGES: tl.constexpr):
    """Positions and mask of the elements before and after the whole vectors of a row."""
    VECTOR: tl.constexpr = EDGES // 2
    start = row * n_cols
    head = ((VECTOR - start % VECTOR) % VECTOR).to(tl.int32)
    whole = tl.maximum(n_cols - head, 0) // VECTOR * VECTOR
    cols = tl.arange(0, EDGES)[None, :]
    cols = tl.where(cols < head, cols, cols + whole)  # skip the whole vectors
    return start + cols, cols < n_cols


@triton.jit
def tile_softmax_kernel(
    y_ptr, x_ptr, n_rows, n_cols, gap,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    VECTOR: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    rows = pid * ROWS + tl.arange(0, ROWS)[:, None]
    # The last tile may reach beyond the last row: it reads that row again, but stores it once.
    row = tl.minimum(rows, n_rows - 1)
    begin, whole = whole_vectors(row, n_cols, VECTOR, EDGES)
    cols = tl.arange(0, BLOCK)[None, :]
    x_ptr += row * gap * VECTOR
    x_tile, y_tile = x_ptr + begin + cols, y_ptr + begin + cols
    pieces, largest = (), tl.full((ROWS, BLOCK), -float("inf"), tl.float32)
    for i in tl.static_range(PIECES):
        mask = cols < whole - i * BLOCK
        x = to_arithmetic(tl.load(x_tile + i * BLOCK, mask, other=-float("inf")))
        pieces += (x,)
        largest = tl.maximum(largest, x)
    if EDGES:  # of the only row; load them before waiting for the maximum
        edges, edge_mask = edges_at(row, n_cols, EDGES)
        edge = to_arithmetic(tl.load(x_ptr + edges, edge_mask, other=-float("inf")))
    largest = tl.max(largest, axis=1, keep_dims=True)
    if EDGES:
        largest = tl.maximum(largest, tl.max(edge, axis=1, keep_dims=True))
    numerators, total = (), tl.zeros((ROWS, BLOCK), largest.dtype)
    for i in tl.static_range(PIECES):
        numerator = tl.exp(pieces[i] - largest)
        numerators += (numerator,)
        total += numerator
    denominator = tl.sum(total, axis=1, keep_dims=True)
    if EDGES:
        edge = tl.exp(edge - largest)
        denominator += tl.sum(edge, axis=1, keep_dims=True)
    factor = 1 / denominator
    if EDGES:
        tl.store(y_ptr + edges, edge * factor, edge_mask)
    for i in tl.static_range(PIECES):
        mask = (cols < whole - i * BLOCK) & (rows < n_rows)
        tl.store(y_tile + i * BLOCK, numerators[i] * factor, mask)


# %%
# Launch it
# ---------
#
# A tile of short rows has 1024 elements. On an H200 larger ones are slower, and on an H100 no size
# is clearly faster. A longer row is cut into *pieces* of 1024 columns. As one block, a row of 5000
# columns would take 8192 elements, a power of two, two fifths of them for nothing. Five pieces have
# only 5120. In the kernel, ``pieces`` is a tuple, and the compiler unrolls each loop over
# ``tl.static_range``, so all pieces stay in registers.
#
# A transposed matrix is copied, because neighbours in its rows are not neighbours in memory.

import math

TILE = 1024
# The number of threads in a warp: 32, or 64 on some of AMD's GPUs.
WARP = 32 if INTERPRET else triton.runtime.driver.active.get_current_target().warp_size


def warps(n_bytes, each):
    """As many warps as give each thread ``each`` bytes, but at most 512 threads."""
    return min(triton.next_power_of_2(triton.cdiv(n_bytes, WARP * each)), 512 // WARP)


def launch_tiles(kernel, tensors, n_rows, n_cols, *gap, tile=TILE, align=True):
    """Run a kernel on tiles. ``gap``, if given, is the input's stride minus ``n_cols``."""
    itemsize, extra = tensors[0].element_size(), sum(gap)
    BLOCK, PIECES = triton.next_power_of_2(n_cols), 1
    ROWS = max(tile // BLOCK, 1)
    if BLOCK > tile > 1:
        BLOCK, PIECES = tile, triton.cdiv(n_cols, tile)
    VECTOR, EDGES = 16 // itemsize if align else 1, 0
    if ROWS == 1 and n_cols % VECTOR and extra % VECTOR == 0:
        EDGES = 2 * VECTOR
    else:
        VECTOR = math.gcd(n_cols, extra, VECTOR)
    # Threads that load only 2 bytes at a time get half as many elements.
    n_bytes = ROWS * BLOCK * PIECES * max(itemsize, 4 // VECTOR)
    num_warps = warps(n_bytes, each=128 if PIECES > 1 else 64)
    sizes = n_rows, n_cols, *(g // VECTOR for g in gap), ROWS, BLOCK, PIECES
    grid = (triton.cdiv(n_rows, ROWS),)
    with torch.cuda.device_of(tensors[0]):  # the GPU that holds the data
        kernel[grid](*tensors, *sizes, VECTOR, EDGES, num_warps=num_warps)


def launch_tile_softmax(
    x: torch.Tensor, tile: int = TILE, align: bool = True
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        rows = x.resolve_neg().reshape(-1, x.shape[-1])  # apply a pending negation
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        n_rows, n_cols = rows.shape
        sizes = n_rows, n_cols, rows.stride(0) - n_cols
        launch_tiles(tile_softmax_kernel, (y, rows), *sizes, tile=tile, align=align)
    return y


# %%
# Is it right?
# ------------
#
# 250 columns make tiles of four rows, and 183 rows don't fill the last one. Rows of 5001 columns
# have edges. The third input is transposed.

if __name__ == "__main__":
    torch.manual_seed(0)
    for x in (torch.randn(183, 250), torch.randn(2, 3, 5001), torch.randn(100, 33).T):
        y = launch_tile_softmax(x.to(DEVICE)).cpu()
        torch.testing.assert_close(y, torch.softmax(x, dim=-1), rtol=1e-5, atol=0)
        print(f"{tuple(x.shape)}: {x.numel()} elements agree with torch.softmax")

# %%
# The backward pass
# -----------------
#
# Autograd gives us :math:`g`, the gradient of the loss :math:`L` with respect to :math:`y`. Each
# element of :math:`x` changes its own element of :math:`y` through the numerator, and all elements
# of its row through the denominator. Together:
#
# .. math:: \frac{\partial L}{\partial x_j} = y_j \Bigl(g_j - \sum_k y_k g_k\Bigr)
#
# This formula needs :math:`y` but not :math:`x`, so only the output is kept. The backward pass
# reads :math:`2MN` elements and writes :math:`MN`, as many as adding two matrices. So an addition
# is the limit.


@triton.jit
def tile_backward_kernel(
    dx_ptr, dy_ptr, y_ptr, n_rows, n_cols,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    VECTOR: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid * ROWS + tl.arange(0, ROWS)[:, None]
    begin, whole = whole_vectors(row, n_cols, VECTOR, EDGES)
    whole = tl.where(row < n_rows, whole, 0)
    cols = tl.arange(0, BLOCK)[None, :]
    dys, ys = (), ()
    for i in tl.static_range(PIECES):
        mask, place = cols < whole - i * BLOCK, begin + cols + i * BLOCK
        dys += (to_arithmetic(tl.load(dy_ptr + place, mask, other=0.0)),)
        ys += (to_arithmetic(tl.load(y_ptr + place, mask, other=0.0)),)
    if EDGES:
        edges, edge_mask = edges_at(row, n_cols, EDGES)
        edge_dy = to_arithmetic(tl.load(dy_ptr + edges, edge_mask, other=0.0))
        edge_y = to_arithmetic(tl.load(y_ptr + edges, edge_mask, other=0.0))
    dots = ys[0] * dys[0]
    for i in tl.static_range(1, PIECES):
        dots += ys[i] * dys[i]
    dot = tl.sum(dots, axis=1, keep_dims=True)
    if EDGES:
        dot += tl.sum(edge_y * edge_dy, axis=1, keep_dims=True)
        tl.store(dx_ptr + edges, edge_y * (edge_dy - dot), edge_mask)
    for i in tl.static_range(PIECES):
        mask, place = cols < whole - i * BLOCK, begin + cols + i * BLOCK
        tl.store(dx_ptr + place, ys[i] * (dys[i] - dot), mask)


def launch_tile_backward(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel() > 0:
        # A gradient can have any strides: after y.sum() they are 0.
        dy, y = (t.resolve_neg().contiguous() for t in (dy, y))
        n_cols = y.shape[-1]
        launch_tiles(tile_backward_kernel, (dx, dy, y), y.numel() // n_cols, n_cols)
    return dx


if __name__ == "__main__":
    x, dy = torch.randn(2, 183, 250, device=DEVICE)
    y, pull_back = torch.func.vjp(lambda x: torch.softmax(x, dim=-1), x)
    torch.testing.assert_close(launch_tile_backward(dy, y), *pull_back(dy))
    print(f"{tuple(x.shape)}: the gradient agrees")

# %%
# Is it fast?
# -----------
#
# All matrices have 2^28 elements. "One row a program" is this kernel without tiles, pieces and
# whole vectors. The limit is a copy, or an addition in the backward pass. Liger and QuACK, two
# libraries of kernels, are shown if they are installed. (QuACK refuses 12161 columns.)

from importlib import import_module


def naive_softmax(x):
    """Softmax over the last dimension of ``x``, one PyTorch operator at a time."""
    numerator = torch.exp(x - torch.amax(x, dim=-1, keepdim=True))
    return numerator / torch.sum(numerator, dim=-1, keepdim=True)


def speed_of(run, n_bytes, peer):
    if peer:  # a library that may be missing or refuse the width
        try:
            run()
        except Exception:
            return float("nan")
    milliseconds = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return n_bytes / milliseconds / 1e6


def figures(plot_name, lines):
    """A benchmark over all widths for each dtype."""
    return [
        triton.testing.Benchmark(
            x_names=["n_cols"], x_log=True,
            x_vals=[256, 512, 1000, 1024, 2048, 4096, 5000, 8192, 12160, 12161, 16384],
            line_arg="line", line_vals=list(lines), line_names=list(lines),
            styles=[tuple(style.split()) for style in lines.values()],
            xlabel=f"columns, 2^28 elements, {dtype}\n{MACHINE}", ylabel="GB/s",
            plot_name=f"{plot_name}-{dtype}", args={"dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


FORWARD = {"softmax": "#d55e00 -", "one row a program": "#d55e00 :"}
FORWARD |= {"torch.softmax": "#0072b2 -", "naive, torch.compile": "#009e73 -"}
FORWARD |= {"Liger": "#cc79a7 :", "QuACK": "#cc79a7 -", "copy": "#555555 --"}
BACKWARD = {"softmax, backward": "#d55e00 -", "torch.softmax, backward": "#0072b2 -"}
BACKWARD |= {"QuACK, backward": "#cc79a7 -", "x + y": "#555555 --"}


@triton.testing.perf_report(figures("softmax-tiles", FORWARD))
def benchmark(n_cols, dtype, line):
    x = torch.randn(2**28 // n_cols, n_cols, device=DEVICE, dtype=dtype)
    torch.compiler.reset()  # forget other widths, or torch.compile gives up
    compiled = torch.compile(naive_softmax, dynamic=False)
    run = {
        "softmax": lambda: launch_tile_softmax(x),
        "one row a program": lambda: launch_tile_softmax(x, tile=1, align=False),
        "torch.softmax": lambda: torch.softmax(x, dim=-1),
        "naive, torch.compile": lambda: compiled(x),
        "Liger": lambda: import_module("liger_kernel.ops.softmax")._softmax_forward(x),
        "QuACK": lambda: import_module("quack.softmax").softmax_fwd(x),
        "copy": x.clone,
    }[line]
    return speed_of(run, 2 * x.nbytes, line in ("Liger", "QuACK"))


@triton.testing.perf_report(figures("softmax-tiles-backward", BACKWARD))
def backward_benchmark(n_cols, dtype, line):
    x = torch.randn(2**28 // n_cols, n_cols, device=DEVICE, dtype=dtype)
    y, dy = torch.softmax(x, dim=-1), torch.randn_like(x)
    run = {
        "softmax, backward": lambda: launch_tile_backward(dy, y),
        "torch.softmax, backward": lambda: torch._softmax_backward_data(dy, y, -1, dtype),
        "QuACK, backward": lambda: import_module("quack.softmax").softmax_bwd(dy, y),
        "x + y": lambda: x + dy,
    }[line]
    return speed_of(run, 3 * x.nbytes, line.startswith("QuACK"))


if __name__ == "__main__" and not INTERPRET:
    for mark in (benchmark, backward_benchmark):
        tables = mark.run(show_plots=True, return_df=True)
        for plot, speed in zip(mark.benchmarks, tables, strict=True):
            speed.columns = [name.removesuffix(" (GB/s)") for name in speed]
            shown = speed.dropna(axis=1, how="all")
            print(f"{plot.plot_name}, GB/s:")
            print(shown.to_string(index=False, float_format="%.0f"))
            share = speed.iloc[:, 1] / speed.iloc[:, -1]
            print(f"tiles reach at least {share.min():.0%} of the limit\n")

# %%
# In bfloat16, one row a program is slow on the narrowest rows, where several rows a program help,
# and at 5000 and 12161 columns, where whole vectors and pieces help. In float32 on an H100, one row
# a program is already about as fast as the copy. With tiles every width is close to the limit,
# forward and backward. On wide rows ``torch.softmax`` is slower, and in bfloat16 ``torch.compile``
# is, too. PyTorch's backward pass reaches at most about half of its limit.
#
# As a public function
# --------------------
#
# Both launches become operators for ``torch.compile``, and a ``torch.autograd.Function`` connects
# them; :ref:`seeded dropout` explains how.

tile_softmax_op = torch.library.custom_op(
    "fast_and_right::tile_softmax", launch_tile_softmax, mutates_args=()
)
tile_backward_op = torch.library.custom_op(
    "fast_and_right::tile_softmax_backward", launch_tile_backward, mutates_args=()
)
tile_softmax_op.register_fake(lambda x, *options: x.new_empty(x.shape))
tile_backward_op.register_fake(lambda dy, y: y.new_empty(y.shape))


class TileSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(x):
        compiling = torch.compiler.is_compiling()
        return (tile_softmax_op if compiling else launch_tile_softmax)(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return tile_backward_op(dy, y)
        if torch.is_grad_enabled():  # second derivatives: PyTorch's operator has them
            return torch._softmax_backward_data(dy, y, -1, y.dtype)
        return launch_tile_backward(dy, y)


# Function.apply first looks up the arguments' names, which is slow. This is the method below it.
quick_apply = super(torch.autograd.Function, TileSoftmax).apply


def tile_softmax(x):
    """Softmax over the last dimension, for rows of up to 64 KiB in registers.

    ``x`` has any shape (..., columns), with at most 16384 columns in float16, bfloat16 and
    float32, and 8192 in float64. The result is contiguous, and computed in float32 (float64
    for float64). As with ``torch.softmax``, a row that holds a NaN or +inf, or nothing but
    -inf, becomes NaN. Differentiable in reverse mode only, also twice; works under
    ``torch.compile``. Wrong arguments raise TypeError or ValueError.
    """
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    limit = 8192 if x.dtype == torch.float64 else 16384
    if x.shape[-1] > limit:
        raise ValueError(
            f"x must have at most {limit} columns, got {x.shape[-1]}; for wider rows see "
            "the lesson 'Softmax of rows that no program can hold'"
        )
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    slow = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return (TileSoftmax.apply if slow else quick_apply)(x)


# %%
# Wider rows don't fit into the registers of a program: :ref:`softmax slices` is about them.
#
# Exercises
# ---------
#
# 1. Set ``TILE = 4096``, and predict what the figure for bfloat16 shows at 5000 columns before you
#    look.
#
# .. note::
#    Try it first.
#
#    1. Two pieces of 4096 columns have 8192 elements again. On an H100 nothing is lost, since memory
#       is the limit either way. On an H200, whose memory is faster, arithmetic is the limit then, and
#       5000 columns take a seventh longer.
#
# References
# ----------
#
# - `QuACK <https://github.com/Dao-AILab/quack>`_ by Dao-AILab.
