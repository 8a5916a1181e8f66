"""
.. _block dropout:

One mask on any number of GPUs
==============================

If you train the same model on one GPU and on four, ordinary dropout gives two different runs. Each
GPU draws from a generator of its own, so the mask, and with it every loss, depends on how the
tensor was divided. Then you can't repeat a run on another machine, and you can't tell whether a
difference comes from a bug or from another mask. In this lesson each GPU draws exactly its part of
*one* mask, without asking the others.

You will learn

- why masks depend on the number of GPUs, and how to make them independent of it;
- how a kernel finds the place of each of its elements in a tensor that no GPU holds as a whole;
- how to check that the parts fit together, even for a tensor that no machine could hold.

Needs: PyTorch, :ref:`seeded dropout` and :ref:`operators`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/sharded_places.svg'
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
# The problem
# -----------
#
# A large model is divided among GPUs. Each GPU has a process of its own, a *rank*, which holds a
# part of a tensor, its *block*, and computes with it. How does it draw the dropout mask of its
# block? Three ways are in use, and you will build the fourth.
#
# - Every rank has the same seed. Then all ranks draw the same numbers, so the blocks' masks are
#   copies of each other.
# - Every rank has a seed of its own. Megatron-LM, a library for large language models, takes the
#   seed plus 2718 plus the rank. These masks behave as if they were independent, but if the tensor
#   is divided in another way, the masks change.
# - PyTorch's ``DTensor``, a tensor that is divided among ranks, lets each rank begin at another
#   point of one stream of random numbers. These masks, too, depend on how the tensor is divided (an
#   open issue, see the references).
# - The mask is a function of the seed and of each element's *place* in the whole tensor.
#
# This function draws the masks of the first two ways:


def generator_mask(seed, width):
    return torch.rand(16, width, generator=torch.Generator().manual_seed(seed)) >= 0.5


# %%
# The last way needs a generator without a state, and :ref:`seeded dropout` has one. **Number the
# elements of the whole tensor in row-major order. Philox, with the seed as key and ⌊i / 4⌋ as
# counter, gives four words. Element i is kept when word i mod 4 is at least p · 2³², rounded.**
# This definition does not mention ranks. A rank only has to know the place i of each of its
# elements.
#
# .. image:: /_static/sharded_places.svg
#    :alt: A matrix of 4 by 8 elements, numbered row by row from 0 to 31. One rank holds columns 4 to 7 of rows 0 and 1: places 4 to 7 and 12 to 15. Each group of four places shares one call of Philox.
#
# The kernel
# ----------
#
# A rank's block is a range of each dimension of the tensor: it begins at ``offsets`` and has the
# shape of ``x``. A *row* holds the elements that differ only in the last index. Within a row the
# places count up one by one, so only the first place of each row has to be computed. That takes one
# division per row for each dimension between the first and the last, and none for the elements.
# (Places and addresses have 64 bits, and a GPU needs many instructions for such a division.)
# ``sizes``, ``places`` and ``strides`` say, for each dimension but the last, its size in the block,
# and how far apart neighbours are in the whole tensor and in memory.
#
# Four places share a call of Philox. A thread loads ``GROUP`` neighbours at a time, 16 bytes (32 in
# float64): in bfloat16 there are eight, which take two calls. If a row begins in the middle of four
# places, so do its groups, and each takes one call more. The thread collects the decisions as bits
# of one integer, and shifts out those of places before the group. Each ``tl.interleave`` then
# doubles the number of elements: one copy of the bits stays as it is, the other is shifted. At the
# end, each element's decision is its lowest bit. If the launch finds that all rows begin at a
# multiple of four, it sets ``ALIGNED``, and the kernel leaves out the last call and the shift.


@triton.jit
def block_dropout_kernel(
    y_ptr, x_ptr, n_rows, n_cols, first, sizes, places, strides,
    threshold, scale: tl.float64, seed,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid, n_col_blocks = tl.program_id(0), tl.cdiv(n_cols, COLS)
    rows = (pid // n_col_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first_col = (pid % n_col_blocks).to(tl.int64) * COLS
    cols = first_col + tl.arange(0, COLS)[None, :]

    # From the number of a row to the place of its first element, and to its address.
    place = tl.zeros((ROWS, 1), tl.int64) + first
    address = tl.zeros((ROWS, 1), tl.int64)
    rest = rows
    for d in tl.static_range(len(sizes)):  # from the last dimension to the first
        coordinate = rest % sizes[d] if d + 1 < len(sizes) else rest
        rest = rest // sizes[d]
        place += coordinate * places[d]
        address += coordinate * strides[d]

    # One bit for each word, of which each element takes its own.
    groups = tl.arange(0, COLS // GROUP)[None, :]
    counters = (place + first_col) // 4 + groups * (GROUP // 4)
    bits = tl.zeros((ROWS, COLS // GROUP), tl.int32)
    for call in tl.static_range(GROUP // 4 if ALIGNED else GROUP // 4 + 1):
        words = tl.randint4x(seed, counters + call)
        for i in tl.static_range(4):
            keep = words[i] >= tl.cast(threshold, tl.uint32)
            bits |= keep.to(tl.int32) << (4 * call + i)
    if not ALIGNED:
        bits >>= (place % 4).to(tl.int32)
    if GROUP == 8:
        bits = tl.interleave(bits, bits >> 4)
    bits = tl.interleave(bits, bits >> 2)
    keep = tl.interleave(bits, bits >> 1) & 1 == 1

    inside = (rows < n_rows) & (cols < n_cols)
    x = tl.load(x_ptr + address + cols, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + rows * n_cols + cols, tl.where(keep, x * scale, 0.0), mask=inside)


# %%
# (``(place + first_col) // 4`` is ``place // 4 + first_col // 4``, because ``first_col`` is a
# multiple of 4. So the shift by ``place % 4`` suits all groups of a row.)
#
# The launch lists the dimensions, each with its size and both distances. If one dimension continues
# another without a gap, both in the whole tensor and in memory, the two are joined. So a block of
# whole rows of a matrix becomes a single long row, and no division is needed.


def block_dimensions(x, shape):
    """Size, distance in the whole tensor and in memory of each dimension, from last to first."""
    dimensions, place = [], 1
    whole_sizes = zip(x.shape[::-1], x.stride()[::-1], shape[::-1], strict=True)
    for size, stride, whole in whole_sizes:
        if dimensions:
            inner_size, inner_place, inner_stride = dimensions[-1]
            next_one = inner_size * inner_place, inner_size * inner_stride
            gapless = (place, stride) == next_one
        if dimensions and gapless:
            dimensions[-1] = (inner_size * size, inner_place, inner_stride)
        elif size > 1 or not dimensions:
            dimensions.append((size, place, stride))
        place *= whole
    return dimensions


def launch_block_dropout(
    x: torch.Tensor, p: float, seed: int, shape: list[int], offsets: list[int]
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    threshold = round(p * 2**32)
    if x.numel() == 0 or threshold == 2**32:
        return y.zero_()
    if p == 0:
        return y.copy_(x)
    first, place = 0, 1
    for offset, whole in zip(offsets[::-1], shape[::-1], strict=True):
        first, place = first + offset * place, place * whole
    if x.ndim == 0 or x.stride(-1) != 1:
        x = x.contiguous()
    (n_cols, _, _), *outer = block_dimensions(x, shape) or [(1, 1, 1)]
    n_rows = x.numel() // n_cols
    sizes, places, strides = zip(*outer, strict=True) if outer else ((1,), (0,), (0,))
    ALIGNED = all(place % 4 == 0 for place in (first, *places))
    GROUP = max(16 // x.element_size(), 4)  # a thread loads 16 bytes, or 4 places
    BLOCK = 2048 // x.element_size()
    COLS = min(max(triton.next_power_of_2(n_cols), GROUP), BLOCK)
    ROWS = BLOCK // COLS
    with torch.cuda.device_of(x):
        block_dropout_kernel[(triton.cdiv(n_rows, ROWS) * triton.cdiv(n_cols, COLS),)](
            y, x, n_rows, n_cols, first, sizes, places, strides,
            threshold, 1 / (1 - p), seed, ALIGNED, ROWS, COLS, GROUP, num_warps=1,
        )  # fmt: skip
    return y


# %%
# Three ways, drawn
# -----------------
#
# Here are three of the four ways, for a matrix of 16 x 32 whose columns are divided among 1, 2 and
# 4 ranks. The seed is 7, and one process draws for each rank in turn. Blue is kept, grey is
# dropped, and black lines separate the ranks. (The next lesson tries ``DTensor``.)


def columns(n_ranks, n_cols=32):
    """The first column of each rank's block, and the number of its columns."""
    return [(rank * n_cols // n_ranks, n_cols // n_ranks) for rank in range(n_ranks)]


def place_mask(first, width):
    ones = torch.ones(16, width, device=DEVICE)
    return launch_block_dropout(ones, 0.5, 7, [16, 32], [0, first]).cpu() != 0


WAYS_TO_SEED = {
    "the same seed": lambda rank, first, width: generator_mask(7, width),
    "seed + 2718 + rank": lambda rank, _, width: generator_mask(2725 + rank, width),
    "seed and place": lambda rank, first, width: place_mask(first, width),
}

if __name__ == "__main__":
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(9, 5.4), layout="constrained")
    colours = plt.matplotlib.colors.ListedColormap(["#dddddd", "#0072b2"])
    for row, (way, draw) in zip(axes, WAYS_TO_SEED.items(), strict=True):
        row[0].set_ylabel(way)
        masks = []
        for axis, n_ranks in zip(row, (1, 2, 4), strict=True):
            blocks = [draw(rank, *block) for rank, block in enumerate(columns(n_ranks))]
            masks.append(torch.cat(blocks, dim=1))
            axis.imshow(masks[-1], cmap=colours, vmin=0, vmax=1)
            axis.set(xticks=[first - 0.5 for first, _ in columns(n_ranks)], yticks=[])
            axis.set(xticklabels=[], title=f"ranks: {n_ranks}" if axis in axes[0] else "")
            axis.grid(True, axis="x", color="black", alpha=1)
        same = [torch.equal(masks[0], mask) for mask in masks[1:]]
        print(f"{way}: the mask of 1 rank is that of 2: {same[0]}, of 4: {same[1]}")
    figure.suptitle("Only seed and place give 1, 2 and 4 ranks the same mask")
    plt.show()

# %%
# Is it right?
# ------------
#
# Only the last way draws the same mask for all numbers of ranks. Now we cut blocks at awkward
# places out of a tensor of three dimensions. Each has to equal the same piece of the whole result,
# bit for bit. Then comes a block of a tensor of 2^45 elements. The whole tensor would fit on no
# GPU. The right part of the block, drawn alone, has to be the same again.

if __name__ == "__main__":
    shape = [6, 7, 13]
    x = torch.randn(shape, device=DEVICE)
    whole = launch_block_dropout(x, 0.3, 7, shape, [0, 0, 0])
    blocks = (0, 0, 0, 6, 7, 5), (2, 3, 1, 3, 4, 12), (5, 0, 12, 1, 7, 1)
    for a, b, c, *size in blocks:
        piece = (slice(a, a + size[0]), slice(b, b + size[1]), slice(c, c + size[2]))
        y = launch_block_dropout(x[piece], 0.3, 7, shape, [a, b, c])
        assert torch.equal(y, whole[piece])
    print(f"{len(blocks)} blocks agree with the whole, bit for bit")

    huge = [2**20, 2**25]
    ones = torch.ones(2, 2000, device=DEVICE)
    row, column = 2**20 - 2, 2**25 - 2000  # the block in the last corner
    both = launch_block_dropout(ones, 0.5, 7, huge, [row, column])
    right = launch_block_dropout(ones[:, 999:], 0.5, 7, huge, [row, column + 999])
    assert torch.equal(both[:, 999:], right)
    fate = "kept" if both[-1, -1] else "dropped"
    print(f"the last of {huge[0] * huge[1]} elements is {fate}")

# %%
# Is it fast?
# -----------
#
# The kernel moves as many bytes as a copy. We measure blocks of 8192 columns, as one rank of eight
# would hold them: an eighth of a matrix's rows, which is gapless, or an eighth of its columns.


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_elements"], x_vals=[2**i for i in range(18, 29, 2)], x_log=True,
            line_arg="block", line_vals=["rows", "columns", "odd", "torch", "copy"],
            line_names=["rows", "columns", "odd columns", "F.dropout", "copy"],
            styles=[("#d55e00", "-"), ("#d55e00", "--"), ("#d55e00", ":"),
                    ("#0072b2", "-"), ("#555555", "--")],
            xlabel=f"elements of the block, {dtype}\n{MACHINE}", ylabel="GB/s",
            plot_name=f"block-dropout-{dtype}", args={"dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)  # fmt: skip
def benchmark(n_elements, dtype, block):
    n_rows = n_elements // 8192
    x = torch.randn(n_rows, 8192, device=DEVICE, dtype=dtype)
    shape, offsets = {
        "rows": ([8 * n_rows, 8192], [n_rows, 0]),
        "columns": ([n_rows, 65536], [0, 8192]),
        "odd": ([n_rows, 65537], [0, 8193]),
    }.get(block, (None, None))
    run = {
        "torch": lambda: torch.nn.functional.dropout(x, 0.5),
        "copy": lambda: x.clone(),
    }.get(block, lambda: launch_block_dropout(x, 0.5, 7, shape, offsets))
    return 2 * x.nbytes / triton.testing.do_bench(run, return_mode="median") / 1e6


# %%
# The odd columns are those of a matrix with 65537 columns. Their rows can begin at any of the four
# places that share a call, because 65537 is not a multiple of four.

if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    layout = {"floatfmt": ".0f", "showindex": False, "maxheadercolwidths": 14}
    tables = benchmark.run(show_plots=True, return_df=True)
    for dtype, speed in zip(("float32", "bfloat16"), tables, strict=True):
        print(tabulate(speed, "keys", **layout))
        n_elements, *blocks, torch_dropout, copy = speed.iloc[-1]
        shares = ", ".join(f"{share / copy:.0%}" for share in blocks)
        print(f"{dtype}, last line: {shares} of the copy's speed for the three blocks\n")

# %%
# Large blocks of rows or columns are about as fast as the copy, except in bfloat16 on an H200,
# which has the arithmetic of an H100 and faster memory: there they reach about seven eighths of the
# copy's speed. Odd columns need more arithmetic: eight elements of bfloat16 take three calls of
# Philox instead of two, and four elements of float32 take two instead of one. The loss is largest
# in bfloat16, but large blocks are still faster than ``F.dropout``, or as fast on an H200. On the
# left all lines are low, because there starting and ending a kernel takes longer than the work.
#
# As a public function
# --------------------
#
# ``block_dropout`` checks its arguments and has a gradient (see :ref:`operators`): it draws the
# same mask again and applies it to the incoming gradient. The next lesson, :ref:`sharded dropout`,
# takes the shape and the offsets from a ``DTensor``.

import math
import numbers

block_dropout_op = torch.library.custom_op(
    "fast_and_right::block_dropout", launch_block_dropout, mutates_args=()
)
block_dropout_op.register_fake(lambda x, *arguments: x.new_empty(x.shape))


class BlockDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed, shape, offsets):
        run = block_dropout_op if torch.compiler.is_compiling() else launch_block_dropout
        return run(x, p, seed, shape, offsets)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, ctx.seed, ctx.shape, ctx.offsets = inputs

    @staticmethod
    def backward(ctx, gradient):
        arguments = ctx.p, ctx.seed, ctx.shape, ctx.offsets
        return BlockDropout.apply(gradient, *arguments), None, None, None, None


# Function.apply is slow, because it looks up names for the compiler and torch.func.
quick_apply = super(torch.autograd.Function, BlockDropout).apply


def block_dropout(x, p, seed, shape, offsets):
    """Dropout of a block: the mask is that of the whole tensor, cut to the block.

    The whole tensor is never needed. Its mask is that of ``seeded_dropout4x``, bit for bit.
    Differentiable in reverse mode, also twice; usable under ``torch.compile``.

    Parameters
    ----------
    x : torch.Tensor
        The block, of any strides, on the GPU (on the CPU when Triton interprets);
        float16, bfloat16, float32 or float64.
    p : float
        The probability of dropping, in [0, 1], rounded to a multiple of 2^-32.
    seed : int
        Any integer of 64 bits, from -2^63 to 2^64 - 1; the same on all ranks.
    shape, offsets : sequences of int
        The shape of the whole tensor, of fewer than 2^63 elements, and where in it the
        block begins; a number for each dimension of ``x``.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. A dropped inf or NaN becomes 0.

    Raises
    ------
    TypeError, ValueError
        If an argument has another type or range, or the block does not lie in the shape.
    """
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    if not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")
    shape, offsets = [int(n) for n in shape], [int(n) for n in offsets]
    if not len(shape) == len(offsets) == x.ndim:
        got = f"{len(shape)} and {len(offsets)}"
        raise ValueError(f"shape and offsets must have {x.ndim} numbers, as x, got {got}")
    if math.prod(shape) >= 2**63:
        raise ValueError(f"shape must have fewer than 2^63 elements, got {shape}")
    for begin, size, whole in zip(offsets, x.shape, shape, strict=True):
        if begin < 0 or begin + size > whole:
            raise ValueError(
                f"the block must lie in the whole tensor, got offsets {offsets} "
                f"and block {list(x.shape)} in shape {shape}"
            )
    signed = int(seed) - 2**64 if seed >= 2**63 else int(seed)
    slow = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    apply = BlockDropout.apply if slow else quick_apply
    return apply(x, float(p), signed, shape, offsets)


# %%
# Exercises
# ---------
#
# 1. A CUDA graph, which captures launches once and replays them with one call, also captures the
#    seed, so every replay would draw the same mask. Change the kernel and its launch so that
#    ``seed`` is a tensor of one number, which may change between two replays.
# 2. A block of one row and a block of one column have the same number of elements. Which of them
#    takes more calls of Philox, and how many times as many?
#
# .. note::
#    Try it first.
#
#    1. The kernel gets the seed's address and loads the seed itself.
#
#       .. code-block:: diff
#
#          -    threshold, scale: tl.float64, seed,
#          +    threshold, scale: tl.float64, seed_ptr,
#          @@
#          -        words = tl.randint4x(seed, counters + call)
#          +        words = tl.randint4x(tl.load(seed_ptr), counters + call)
#          @@
#          -    x: torch.Tensor, p: float, seed: int, shape: list[int], offsets: list[int]
#          +    x: torch.Tensor, p: float, seed: torch.Tensor, shape: list[int], offsets: list[int]
#
#    2. The column takes ``GROUP`` times as many if both are aligned: eight times in bfloat16, four
#       times in float32. In a row, ``GROUP`` neighbours share their calls. In a column, every
#       element has a row of its own, so it makes all the calls of a group, and uses only one word
#       of them.
#
# References
# ----------
#
# - M. Shoeybi et al., `Megatron-LM: training multi-billion parameter language models using model parallelism <https://arxiv.org/abs/1909.08053>`_,
#   2019: how layers are divided among GPUs.
# - PyTorch's documentation of `DTensor <https://docs.pytorch.org/docs/stable/distributed.tensor.html>`_.
# - `Dropout of a DTensor depends on the number of GPUs <https://github.com/pytorch/pytorch/issues/168058>`_, an issue of PyTorch.
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011.
