"""
.. _softmax slices:

Softmax of rows that no program can hold
========================================

You write a softmax for very wide rows. If the GPU's cache can hold a row, you fetch it from memory
once. A row of much more than 64 KiB does not fit into the registers of one program, so several
programs share it: each takes a slice, and writes down what the others need.

You will learn

- how the maximum and the sum of a row are put together from those of its slices;
- how to read data twice but fetch it from memory once, thanks to the GPU's cache;
- how programs can wait for each other, and why they never wait for ever.

Needs: PyTorch, :ref:`fused softmax`, and :ref:`softmax tiles`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/softmax_slices.svg'
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
# Two numbers for each slice
# --------------------------
#
# A program finds :math:`m_i`, the largest element of its slice i, and :math:`s_i`, the slice's sum
# of :math:`e^{x - m_i}`. Once the row's maximum :math:`m` is known, a factor of :math:`e^{m_i - m}`
# turns :math:`s_i` into the sum of :math:`e^{x - m}`:
#
# .. math:: m = \max_i m_i, \qquad s = \sum_i s_i \, e^{m_i - m}, \qquad y_j = e^{x_j - m} / s
#
# So all slices are read to find :math:`m` and :math:`s`, and again to write :math:`y`. That moves
# :math:`3MN` elements instead of :math:`2MN`: at most two thirds of a copy's speed.
#
# Read it again while it is in the cache
# --------------------------------------
#
# *L2*, the GPU's cache, keeps tens of megabytes. If the second read of a slice follows soon after
# the first, the data is still there.
#
# We number the slices of all rows 0, 1, 2, ... Program t reads slice t for the first time and
# writes its two numbers to memory. It also reads an older slice, t - ``lag``, for the second time,
# and writes its part of :math:`y`. If ``lag`` is large enough, the older slice's whole row has been
# read by then. If it is small enough, the older slice is still in the cache.
#
# .. image:: /_static/softmax_slices.svg
#    :alt: A strip of slices. Program t reads slice t from memory, and slice t minus lag again, from the cache, which still holds those in between.
#
# Wait for numbers that are not there yet
# ---------------------------------------
#
# How does a program know whether a number has been written? Before the launch we fill ``stats``,
# the memory for the numbers, with a mark: all bits set, which is -1 as an integer and a NaN as a
# floating-point number. A program loads all numbers of its older slice's row until none is the
# mark. Three details matter:
#
# - A NaN is not equal to itself, so ``stats`` holds integers, and ``.to(..., bitcast=True)`` reads
#   the same bits as another type.
# - ``volatile`` makes every load go past L1, a multiprocessor's own cache, which does not notice
#   what others write.
# - A plain ``tl.store`` writes what other programs are reading. Such a *race* is usually an error. It
#   is safe here, because the GPU writes an aligned word of 4 or 8 bytes as a whole.
#
# Take a ticket
# -------------
#
# Could programs wait for ever? A GPU does not promise in which order programs start. If the last
# ones started first, they could fill the GPU and wait for programs that can't start.
#
# So a program takes a *ticket* when it starts, in place of its ``program_id``: ``tl.atomic_add``
# adds 1 to a counter in memory and returns what was there before, so no two programs get the same
# number t. A row has at most ``lag`` slices, so a program waits only for slices with smaller
# tickets, which belong to programs that have started. These write their numbers before they wait
# themselves, so every wait ends.
#
# The kernel
# ----------
#
# As in :ref:`softmax tiles`, a row consists of whole vectors and edges. The vectors are cut into
# slices; the first slice takes the edges.
#
# Each element takes two exponentials. ``tl.exp`` multiplies by ``LOG2E``, and then needs four
# instructions, three for results below :math:`2^{-126}`. ``tl.exp2`` has one, and makes them 0.

NOT_YET = tl.constexpr(-1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def to_arithmetic(x):
    """Widen to float32: a sum in float16 or bfloat16 would lose too many digits."""
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def slice_at(
    t, exists, n_cols, SLICES: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Positions and mask of a slice's whole vectors. The mask is false unless it exists."""
    t = tl.maximum(t, 0)  # it is negative if there is no older slice
    whole = n_cols // VECTOR * VECTOR
    begin = t // SLICES * whole
    if EDGES:
        start = t // SLICES * n_cols
        begin = (start + VECTOR - 1) // VECTOR * VECTOR
        whole = tl.maximum(n_cols - (begin - start).to(tl.int32), 0) // VECTOR * VECTOR
    cols = (t % SLICES).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    return begin + cols, cols < tl.where(exists, whole, 0)


@triton.jit
def edges_at(t, exists, n_cols, SLICES: tl.constexpr, EDGES: tl.constexpr):
    """Positions and mask of a row's edges. The mask is false unless slice t is its first."""
    VECTOR: tl.constexpr = EDGES // 2
    t = tl.maximum(t, 0)
    start = t // SLICES * n_cols
    head = ((VECTOR - start % VECTOR) % VECTOR).to(tl.int32)
    whole = tl.maximum(n_cols - head, 0) // VECTOR * VECTOR
    cols = tl.arange(0, EDGES)
    cols = tl.where(cols < head, cols, cols + whole)
    end = tl.where(exists, tl.where(t % SLICES == 0, n_cols, 0), 0)
    return start + cols, cols < end


@triton.jit
def slice_publish(ptr, number, exists):
    """Write a number for other programs. If it is the mark, write another NaN."""
    word = number.to(ptr.dtype.element_ty, bitcast=True)
    tl.store(ptr, tl.where(word == NOT_YET, NOT_YET - 1, word), mask=exists)


@triton.jit
def slice_wait(ptr, n_words, BLOCK: tl.constexpr):
    """Load words again and again, until all of them have been written."""
    words = tl.arange(0, BLOCK)
    mask = words < n_words
    found = tl.load(ptr + words, mask=mask, other=0, volatile=True)
    while tl.max((found == NOT_YET).to(tl.int32), axis=0) == 1:
        found = tl.load(ptr + words, mask=mask, other=0, volatile=True)
    return found


@triton.jit
def slice_softmax_kernel(
    y_ptr, x_ptr, stats_ptr, n_slices, lag, n_cols,
    SLICES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    # The first word of stats is the counter, which starts at -1 like all of them, hence the + 1.
    # (The second word is not used.) "relaxed": taking a ticket hands over no other data.
    t = tl.atomic_add(stats_ptr, 1, sem="relaxed").to(tl.int64) + 1
    stats_ptr += 2
    u = t - lag
    # Start all loads before using any. What is read for the first time should stay in the cache
    # (evict_last), and what is read for the second time, or written, may go (evict_first).
    place, mask = slice_at(t, t < n_slices, n_cols, SLICES, BLOCK, VECTOR, EDGES)
    new = tl.load(x_ptr + place, mask, -float("inf"), eviction_policy="evict_last")
    place, mask = slice_at(u, u >= 0, n_cols, SLICES, BLOCK, VECTOR, EDGES)
    x = tl.load(x_ptr + place, mask, -float("inf"), eviction_policy="evict_first")
    if EDGES:
        edges, edge_mask = edges_at(t, t < n_slices, n_cols, SLICES, EDGES)
        new_edge = to_arithmetic(tl.load(x_ptr + edges, edge_mask, -float("inf")))
        edges, edge_mask = edges_at(u, u >= 0, n_cols, SLICES, EDGES)
        edge = to_arithmetic(tl.load(x_ptr + edges, edge_mask, -float("inf")))

    new = to_arithmetic(new)
    new_max = tl.max(new, axis=0)
    if EDGES:
        new_max = tl.maximum(new_max, tl.max(new_edge, axis=0))
    # If a slice holds only -inf, subtracting -inf would give NaN, but the slice's sum is 0.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)
    new_sum = tl.sum(tl.exp2((new - shift) * LOG2E), axis=0)
    if EDGES:
        new_sum += tl.sum(tl.exp(new_edge - shift), axis=0)
    slice_publish(stats_ptr + 2 * t, new_max, t < n_slices)
    slice_publish(stats_ptr + 2 * t + 1, new_sum, t < n_slices)

    if u >= 0:
        words = slice_wait(stats_ptr + 2 * (u // SLICES * SLICES), 2 * SLICES, 2 * WORDS)
        # Maxima and sums alternate.
        maxima, sums = tl.split(tl.reshape(words.to(new.dtype, bitcast=True), (WORDS, 2)))
        maxima = tl.where(tl.arange(0, WORDS) < SLICES, maxima, -float("inf"))
        row_max = tl.max(maxima, axis=0)
        row_sum = tl.sum(sums * tl.exp(maxima - row_max), axis=0)
        y = tl.exp2((x - row_max) * LOG2E) * (1 / row_sum)
        tl.store(y_ptr + place, y, mask, eviction_policy="evict_first")
        if EDGES:
            tl.store(y_ptr + edges, tl.exp(edge - row_max) * (1 / row_sum), edge_mask)


# %%
# A slice has 4096 elements, or 8192 in the backward pass. ``lag`` is the number of slices in a row,
# plus as many as fit into ``lag_bytes``. These sizes suit an H100 and an H200.

LAG_BYTES = 5 * 2**20
WARP = 32 if INTERPRET else triton.runtime.driver.active.get_current_target().warp_size


def launch_slices(kernel, lag_bytes, *inputs):
    out = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)
    if out.numel() == 0:
        return out
    inputs = [x.resolve_neg().contiguous() for x in inputs]
    n_cols, itemsize = out.shape[-1], out.element_size()
    BLOCK, VECTOR = 4096 * len(inputs), 16 // itemsize
    threads = min(32 * itemsize ** len(inputs), 512)  # 64 elements of bfloat16 a thread
    EDGES = 2 * VECTOR if n_cols % VECTOR else 0
    SLICES = triton.cdiv(n_cols, BLOCK)
    n_slices = out.numel() // n_cols * SLICES
    lag = min(SLICES + lag_bytes * n_slices // (len(inputs) * out.nbytes), n_slices)
    # At least one word for each thread, or several would load the same word at different times.
    WORDS = max(triton.next_power_of_2(SLICES), threads)
    word = torch.int64 if itemsize == 8 else torch.int32
    stats = torch.full((2 * n_slices + 2,), -1, dtype=word, device=out.device)
    sizes = n_slices, lag, n_cols, SLICES, WORDS, BLOCK, VECTOR, EDGES
    with torch.cuda.device_of(out):  # the GPU that holds the data
        kernel[(n_slices + lag,)](out, *inputs, stats, *sizes, num_warps=threads // WARP)
    return out


def launch_slice_softmax(x: torch.Tensor, lag_bytes: int = LAG_BYTES) -> torch.Tensor:
    return launch_slices(slice_softmax_kernel, lag_bytes, x)


# %%
# The backward pass
# -----------------
#
# The gradient, :math:`y_j (g_j - \sum_k y_k g_k)`, needs one sum for each row, so a slice has one
# number instead of two.


@triton.jit
def slice_backward_kernel(
    dx_ptr, dy_ptr, y_ptr, stats_ptr, n_slices, lag, n_cols,
    SLICES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    t = tl.atomic_add(stats_ptr, 1, sem="relaxed").to(tl.int64) + 1
    stats_ptr += 2
    u = t - lag
    place, mask = slice_at(t, t < n_slices, n_cols, SLICES, BLOCK, VECTOR, EDGES)
    new_dy = tl.load(dy_ptr + place, mask, 0.0, eviction_policy="evict_last")
    new_y = tl.load(y_ptr + place, mask, 0.0, eviction_policy="evict_last")
    place, mask = slice_at(u, u >= 0, n_cols, SLICES, BLOCK, VECTOR, EDGES)
    dy = tl.load(dy_ptr + place, mask, 0.0, eviction_policy="evict_first")
    y = tl.load(y_ptr + place, mask, 0.0, eviction_policy="evict_first")
    if EDGES:
        edges, edge_mask = edges_at(t, t < n_slices, n_cols, SLICES, EDGES)
        new_edge_dy = to_arithmetic(tl.load(dy_ptr + edges, edge_mask, 0.0))
        new_edge_y = to_arithmetic(tl.load(y_ptr + edges, edge_mask, 0.0))
        edges, edge_mask = edges_at(u, u >= 0, n_cols, SLICES, EDGES)
        edge_dy = to_arithmetic(tl.load(dy_ptr + edges, edge_mask, 0.0))
        edge_y = to_arithmetic(tl.load(y_ptr + edges, edge_mask, 0.0))

    dot = tl.sum(to_arithmetic(new_y) * to_arithmetic(new_dy), axis=0)
    if EDGES:
        dot += tl.sum(new_edge_y * new_edge_dy, axis=0)
    slice_publish(stats_ptr + t, dot, t < n_slices)

    if u >= 0:
        words = slice_wait(stats_ptr + u // SLICES * SLICES, SLICES, WORDS)
        row_dot = tl.sum(words.to(dot.dtype, bitcast=True), axis=0)
        tl.store(dx_ptr + place, y * (dy - row_dot), mask, eviction_policy="evict_first")
        if EDGES:
            tl.store(dx_ptr + edges, edge_y * (edge_dy - row_dot), edge_mask)


def launch_slice_backward(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return launch_slices(slice_backward_kernel, LAG_BYTES, dy, y)


# %%
# Is it right?
# ------------
#
# 20001 columns make five slices, or three in the backward pass. Some slices of the first row are
# all ``-inf``.

if __name__ == "__main__":
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 20_001, device=DEVICE)
    x[0, :9000] = -float("inf")
    expected, pull_back = torch.func.vjp(lambda x: torch.softmax(x, dim=-1), x)
    y = launch_slice_softmax(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(launch_slice_backward(dy, y), *pull_back(dy))
    print(f"{tuple(x.shape)}: both agree with PyTorch; {(y == 0).sum()} elements are 0")

# %%
# How long is the lag?
# --------------------
#
# If the lag is short, programs often wait for numbers. If it is long, the older slice has left the
# cache. So at the right end we expect two thirds of the copy's speed:


def speed_of(run, n_bytes):
    milliseconds = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
    return n_bytes / milliseconds / 1e6


@triton.testing.perf_report(triton.testing.Benchmark(
    x_names=["lag_MiB"], x_vals=[1, 2, 3, 4, 5, 6, 8, 12, 16, 32], x_log=True,
    line_arg="dtype", line_vals=[torch.float32, torch.bfloat16],
    line_names=["float32", "bfloat16"], styles=[("#d55e00", "-"), ("#d55e00", ":")],
    xlabel=f"MiB between the two reads of a slice, 65536 columns\n{MACHINE}",
    ylabel="GB/s", plot_name="softmax-lag", args={},
))  # fmt: skip
def lag_benchmark(lag_MiB, dtype):
    x = torch.randn(2**12, 2**16, device=DEVICE, dtype=dtype)
    return speed_of(lambda: launch_slice_softmax(x, lag_MiB * 2**20), 2 * x.nbytes)


if __name__ == "__main__" and not INTERPRET:
    speed = lag_benchmark.run(show_plots=True, return_df=True)
    print(speed.to_string(index=False, float_format="%.0f"))
    copy = speed_of(torch.randn(2**28, device=DEVICE).clone, 2**31)
    print(f"two thirds of a copy: {2 / 3 * copy:.0f} GB/s")

# %%
# The right end comes down to about two thirds of the copy. The speed falls at a shorter lag than
# the cache's size suggests: the cache also holds what is written.
#
# Is it fast?
# -----------
#
# All matrices have 2^28 elements. The limit is a copy, or backward an addition.

from importlib import import_module

FORWARD = {"softmax": "#d55e00 -", "copy": "#555555 --", "torch.softmax": "#0072b2 -"}
FORWARD |= {"naive, torch.compile": "#009e73 -"}
FORWARD |= {"QuACK": "#cc79a7 -", "Liger": "#cc79a7 :"}
BACKWARD = {"softmax, backward": "#d55e00 -", "x + y": "#555555 --"}
BACKWARD |= {"torch.softmax, backward": "#0072b2 -", "QuACK, backward": "#cc79a7 -"}


@triton.testing.perf_report([
    triton.testing.Benchmark(
        x_names=["n_cols"], x_vals=[30522, 32768, 50257, 65536, 128256, 131072, 262144, 2**20],
        x_log=True, line_arg="line", line_vals=list(lines), line_names=list(lines),
        styles=[tuple(style.split()) for style in lines.values()],
        xlabel=f"columns, 2^28 elements, {dtype}\n{MACHINE}", ylabel="GB/s",
        plot_name=f"{name}-{dtype}", args={"dtype": getattr(torch, dtype)},
    )
    for name, lines in [("softmax-slices", FORWARD), ("softmax-slices-backward", BACKWARD)]
    for dtype in ("float32", "bfloat16")
])  # fmt: skip
def benchmark(n_cols, dtype, line):
    def naive_softmax(x):
        numerator = torch.exp(x - torch.amax(x, dim=-1, keepdim=True))
        return numerator / torch.sum(numerator, dim=-1, keepdim=True)

    x = torch.randn(2**28 // n_cols, n_cols, device=DEVICE, dtype=dtype)
    y, dy = torch.softmax(x, dim=-1), torch.randn_like(x)
    torch.compiler.reset()  # forget other widths, or torch.compile gives up
    compiled = torch.compile(naive_softmax, dynamic=False)
    run = {
        "softmax": lambda: launch_slice_softmax(x),
        "copy": x.clone,
        "torch.softmax": lambda: torch.softmax(x, dim=-1),
        "naive, torch.compile": lambda: compiled(x),
        "softmax, backward": lambda: launch_slice_backward(dy, y),
        "x + y": lambda: x + dy,
        "torch.softmax, backward": lambda: torch._softmax_backward_data(dy, y, -1, dtype),
        "QuACK": lambda: import_module("quack.softmax").softmax_fwd(x),
        "QuACK, backward": lambda: import_module("quack.softmax").softmax_bwd(dy, y),
        "Liger": lambda: import_module("liger_kernel.ops.softmax")._softmax_forward(x),
    }[line]
    if line.startswith(("QuACK", "Liger")):  # may be missing or refuse the width
        try:
            run()
        except Exception:
            return float("nan")
    return speed_of(run, (3 if line in BACKWARD else 2) * x.nbytes)


if __name__ == "__main__" and not INTERPRET:
    tables = benchmark.run(show_plots=True, return_df=True)
    for mark, speed in zip(benchmark.benchmarks, tables, strict=True):
        speed.columns = [name.removesuffix(" (GB/s)") for name in speed]
        print(f"{mark.plot_name}, GB/s:")
        shown = speed.dropna(axis=1, how="all")
        print(shown.to_string(index=False, float_format="%.0f"), end="\n\n")

# %%
# ``torch.softmax`` and ``torch.compile`` read a wide row more than once, and from 65536 columns on
# stay well below the copy. On an H100 the slices come close to the limit, but backward they reach
# about nine tenths in bfloat16, and less at 2^20 columns in both dtypes. On an H200, with faster
# memory, slices reach between three quarters and seven eighths of the limit. Up to 262144 columns,
# QuACK's forward pass, where it runs, is within a tenth of the copy. It gives each row to a
# *cluster* of programs, which can reach each other's shared memory.
#
# As a public function
# --------------------
#
# The operators and the gradient are connected as in :ref:`softmax tiles`.

slice_softmax_op = torch.library.custom_op(
    "fast_and_right::slice_softmax", launch_slice_softmax, mutates_args=()
)
slice_backward_op = torch.library.custom_op(
    "fast_and_right::slice_softmax_backward", launch_slice_backward, mutates_args=()
)
slice_softmax_op.register_fake(lambda x, *lag: x.new_empty(x.shape))
slice_backward_op.register_fake(lambda dy, y: y.new_empty(y.shape))


class SliceSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(x):
        compiling = torch.compiler.is_compiling()
        return (slice_softmax_op if compiling else launch_slice_softmax)(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return slice_backward_op(dy, y)
        if torch.is_grad_enabled():  # second derivatives: PyTorch's operator has them
            return torch._softmax_backward_data(dy, y, -1, y.dtype)
        return launch_slice_backward(dy, y)


quick_apply = super(torch.autograd.Function, SliceSoftmax).apply


def slice_softmax(x):
    """Softmax over the last dimension, of up to 2^30 columns, made for wide rows.

    ``x`` is float16, bfloat16, float32 or float64, and copied first if it is not contiguous.
    Differentiable in reverse mode only, also twice; works under ``torch.compile``. Wrong
    arguments raise TypeError or ValueError.
    """
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] > 2**30:
        raise ValueError(f"x must have 0 to 2^30 columns, got shape {tuple(x.shape)}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    slow = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return (SliceSoftmax.apply if slow else quick_apply)(x)


# %%
# Exercises
# ---------
#
# 1. Use ``tl.program_id(0)`` in place of the ticket, and time it. What do you gain and lose?
#
# .. note::
#    Try it first.
#
#    1. You lose the certainty that the kernel ends: a program may wait for one that can't start.
#       You gain almost no time.
#
#       .. code-block:: diff
#
#          -    t = tl.atomic_add(stats_ptr, 1, sem="relaxed").to(tl.int64) + 1
#          +    t = tl.program_id(0).to(tl.int64)
#
# References
# ----------
#
# - M. Milakov and N. Gimelshein, `Online normalizer calculation for softmax <https://arxiv.org/abs/1805.02867>`_,
#   2018: the formula.
# - D. Merrill and M. Garland, `Single-pass parallel prefix scan with decoupled look-back <https://research.nvidia.com/publication/2016-03_single-pass-parallel-prefix-scan-decoupled-look-back>`_,
#   2016: programs that wait for each other's sums.
# - `QuACK <https://github.com/Dao-AILab/quack>`_ by Dao-AILab.
