"""
.. _seeded dropout:

Dropout with a seed
===================

You replace dropout's mask, a tensor as large as the input, by a single integer. The mask of
:ref:`baseline dropout` is only a list of random decisions. If a seed determines them, a kernel can
compute them whenever it needs them, so no mask is stored, and the same seed gives the same mask on
every machine. The first kernel that does this turns out to be slower than PyTorch's dropout in
bfloat16. You find out why by counting its arithmetic, and mend it.

You will learn

- how a random number generator without a state gives each element a number of its own;
- how to tell whether a kernel waits for memory or for arithmetic, and what to do about it;
- how to test that a random kernel is right, and how to give it a gradient.

Needs: PyTorch, and :ref:`baseline dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/philox.svg'
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
# Random numbers without a state
# ------------------------------
#
# A classic generator keeps a state, and each number that you draw changes it. To get the millionth
# number you have to draw 999,999 others first. That does not suit a GPU, where a hundred thousand
# threads want their numbers at the same time.
#
# A *counter-based* generator is a function: a seed and an index go in, a random number comes out,
# and the millionth takes no longer than the first. Triton's generator is called Philox. It encrypts
# the index, its *counter*, with the seed as the key, in ten rounds of multiplying and mixing, and
# returns four words of 32 bits. Standard tests cannot tell them from random words.
#
# .. image:: /_static/philox.svg
#    :alt: Seed and index enter ten rounds of Philox, four random words come out, one of them becomes a number u between 0 and 1, and u is compared with p to keep or drop.
#
# ``tl.rand(seed, i)`` takes the first word and turns it into a float32 in [0, 1). The page on
# :ref:`random numbers in Triton` describes all such functions.
#
# Now count the bytes. The kernel of :ref:`baseline dropout` read :math:`x` and a mask, and wrote
# :math:`y`. Without the mask, each element is read once and written once, as in a copy. So by this
# count dropout with a seed takes as long as a copy.
#
# The kernel
# ----------
#
# Compare this kernel with that of :ref:`baseline dropout`: where that one loaded the mask, this one
# calls ``tl.rand``. The index of an element is its position in the tensor. So the mask depends only
# on p, the seed and the position. It does not depend on ``BLOCK``, on the GPU or on the number of
# programs.


@triton.jit
def seeded_dropout_kernel(
    y_ptr, x_ptr, n_elements, p, scale: tl.float64, seed, BLOCK: tl.constexpr
):
    # In 64 bits: in 32, positions from 2^31 on would wrap around to negative numbers.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    keep = tl.rand(seed, offsets) >= p
    # Unless annotated, a Python float arrives as float32, too coarse for float64.
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


# %%
# ``tl.rand`` can return exactly 0, so the comparison is ``>=``.


def launch_seeded_dropout(x, p, seed):
    """Dropout for 0 <= p < 1, one call of Philox for each element."""
    x = x.resolve_neg().contiguous()  # apply a negation that PyTorch has put off
    y = torch.empty_like(x)
    arguments = (y, x, x.numel(), p, 1 / (1 - p), seed, 1024)
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        seeded_dropout_kernel[(triton.cdiv(x.numel(), 1024),)](*arguments)
    return y


# %%
# The same seed, the same mask
# ----------------------------
#
# The input is drawn on the CPU, so this table is the same on every machine.

if __name__ == "__main__":
    from tabulate import tabulate

    torch.manual_seed(0)
    x = torch.randn(10)
    columns = [x]
    for seed in (123, 123, 512):
        columns.append(launch_seeded_dropout(x.to(DEVICE), 0.5, seed).cpu())
    headers = ["input", "seed 123", "seed 123", "seed 512"]
    print(tabulate(torch.stack(columns, dim=1).tolist(), headers, floatfmt=".4f"))

# %%
# Seed 123 drops the same elements both times, and seed 512 drops others. So p and the seed are all
# that a backward pass needs.
#
# Masks with different seeds behave as if they were independent. So give each layer, and each step
# of a training run, a seed of its own; :ref:`checkpointed dropout` shows how.
#
# Is it right?
# ------------
#
# How do you check a random result? First, check what must hold exactly: the mask must not depend on
# the dtype, on how the tensor lies in memory, or on its size. Second, check how many elements are
# kept. With a sound generator, that number is more than five standard deviations from its mean for
# about one seed in a million.

if __name__ == "__main__":

    def mask(x):
        return launch_seeded_dropout(x, 0.5, 7) != 0

    ones = torch.ones(31, 33, device=DEVICE)
    assert torch.equal(mask(ones), mask(ones.half()))
    assert torch.equal(mask(ones), mask(torch.ones(33, 31, device=DEVICE).T))
    assert torch.equal(mask(ones).flatten()[:100], mask(ones.flatten()[:100]))
    for p in (0.1, 0.5, 0.9):
        y = launch_seeded_dropout(torch.ones(10_000, device=DEVICE), p, 2024)
        kept = (y != 0).sum().item()
        deviations = (kept / 10_000 - (1 - p)) / (p * (1 - p) / 10_000) ** 0.5
        assert abs(deviations) < 5
        print(f"p = {p}: kept {kept} of 10000, {deviations:+.1f} standard deviations")

# %%
# The number alone proves little, because a kernel that keeps every second element would pass at
# p = 0.5. So the tests of this site also compare each decision with another implementation of
# Philox, and Triton's Philox with the known answers that its authors published.
#
# Is it fast?
# -----------
#
# The count predicts the speed of a copy. ``torch.nn.functional.dropout`` also writes a mask of one
# byte an element, so for it the count predicts 8/9 of the copy's speed in float32 and 4/5 in
# bfloat16. Measure both, with 2^28 elements.

from torch.nn.functional import dropout


def milliseconds(run):
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    n, copies = 2**28, {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n, device=DEVICE, dtype=dtype)
        copies[dtype] = copy = milliseconds(x.clone)
        ours = copy / milliseconds(lambda: launch_seeded_dropout(x, 0.5, 123))
        torchs = copy / milliseconds(lambda: dropout(x, 0.5))
        print(f"{dtype}: {ours:.2f} of the copy's speed; F.dropout {torchs:.2f}")

# %%
# The count is not confirmed. ``F.dropout`` is slower than its bytes explain. So is our kernel, and
# in bfloat16 it does not even reach half of the copy's speed. There it is slower than
# ``F.dropout``, which also draws with Philox, and moves more bytes.
#
# Counting the arithmetic
# -----------------------
#
# ``tl.rand`` runs ten rounds of Philox for each element, takes one of the four words, and throws
# three away. Meanwhile 8 bytes have to move for an element of float32, and only 4 for one of
# bfloat16. Which takes longer? A copy only moves bytes. The kernel below only computes words. Each
# program stores a single combination of its words, because the compiler would remove words that
# nobody uses. ``tl.randint4x`` returns all four words as integers, and ``tl.xor_sum`` combines
# those of a block.


@triton.jit
def draw_kernel(out_ptr, seed, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offsets = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    words, w1, w2, w3 = tl.randint4x(seed, offsets)
    if WORDS == 4:
        words = words ^ w1 ^ w2 ^ w3
    tl.store(out_ptr + pid, tl.xor_sum(words, axis=0))


if __name__ == "__main__" and not INTERPRET:
    out = torch.empty(n // 1024, device=DEVICE, dtype=torch.int32)
    for words in (1, 4):
        grid = (n // 1024 // words,)
        time = milliseconds(lambda: draw_kernel[grid](out, 123, words, 1024))
        n_bytes = 4 * time / copies[torch.bfloat16]
        print(f"{words} of 4 words: drawing takes as long as moving {n_bytes:.1f} bytes")

# %%
# The GPU draws and moves at the same time, so at best a kernel takes as long as the slower of the
# two. The first line is far above 4 bytes, so in bfloat16 the kernel waits for arithmetic, not for
# memory. In float32 arithmetic takes about as long as the 8 bytes, or longer, depending on the GPU.
#
# The second line shows what to do. If you use all four words, as ``F.dropout`` does, one call of
# Philox serves four elements. Drawing then takes less time than moving 4 bytes, so memory should be
# the limit again, in both dtypes.
#
# All four words
# --------------
#
# **Call Philox with the seed as key and the counter ⌊i / 4⌋. Element i is kept when word i mod 4 is
# at least p · 2³², rounded to an integer.** This defines the mask.
#
# A round of Philox multiplies two words by constants, and uses the upper and the lower 32 bits of
# both products. ``tl.randint4x`` takes an instruction for each half. Our ``philox`` often takes one
# for both, which helps on an H200, whose memory is faster than an H100's.


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


# %%
# The kernel compares the words as unsigned integers, which saves turning them into floating-point
# numbers. It collects the four answers as the last four bits of an integer, and
# ``tl.interleave(a, b)``, which is a0, b0, a1, b1, and so on, hands them out. The two calls give
# ``bits`` shifted by 0, 1, 2, 3, and so on, so each element finds its answer in the last bit. (If
# we interleaved the words, in bfloat16 the compiler would move them between threads.)


@triton.jit
def seeded_dropout4x_kernel(
    y_ptr, x_ptr, n_elements, threshold, scale: tl.float64, seed, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    counters = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox(seed, counters)
    threshold = tl.cast(threshold, tl.uint32)
    bits = tl.where(w0 < threshold, 0, 1) + tl.where(w1 < threshold, 0, 2)
    bits += tl.where(w2 < threshold, 0, 4) + tl.where(w3 < threshold, 0, 8)
    bits = tl.interleave(bits, bits >> 2)
    keep = tl.interleave(bits, bits >> 1) & 1 == 1

    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


# %%
# A threshold of 2³² would not fit into a word, so the launch handles p = 1 itself. Without
# ``num_warps`` a program gets four. One warp is slower for small tensors, but faster in bfloat16 on
# an H200.


def launch_seeded_dropout4x(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    threshold = round(p * 2**32)
    x = x.resolve_neg().contiguous()
    if p == 0:
        return x.clone()
    if threshold == 2**32 or x.numel() == 0:
        return torch.zeros_like(x)
    y = torch.empty_like(x)
    arguments = (y, x, x.numel(), threshold, 1 / (1 - p), seed, 1024)
    with torch.cuda.device_of(x):
        seeded_dropout4x_kernel[(triton.cdiv(x.numel(), 1024),)](*arguments, num_warps=1)
    return y


if __name__ == "__main__":
    y = launch_seeded_dropout4x(torch.ones(10_000, device=DEVICE), 0.3, 123)
    part = launch_seeded_dropout4x(torch.ones(33, 31, device=DEVICE).T, 0.3, 123)
    assert torch.equal(part.flatten(), y[:1023])
    print(f"p = 0.3: kept {(y != 0).sum()} of {len(y)}")

# %%
# How fast is it now?
# -------------------
#
# The figures show GB/s of :math:`x` and :math:`y`, and a copy as the limit. The CPU takes longer to
# launch a small kernel than the GPU to run it, so the calls are captured in a *CUDA graph*, which
# replays many launches with one call.


def captured(run, x):
    """Milliseconds of the GPU. Each call reads its own copy, and do_bench clears L2."""
    parts = [x.clone() for _ in range(min(max(2**26 // x.numel(), 1), 100))]
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for part in parts:
            run(part)
    return milliseconds(graph.replay) / len(parts)


LINES = {"all four words": "#d55e00 -", "one word": "#d55e00 :", "F.dropout": "#0072b2 -"}
LINES |= {"torch.compile": "#009e73 -", "copy": "#555555 --"}


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_elements"], x_log=True, x_vals=[2**i for i in range(10, 27, 2)],
            line_arg="line", line_vals=list(LINES), line_names=list(LINES),
            styles=[tuple(style.split()) for style in LINES.values()],
            xlabel=f"elements, {dtype}, in a captured graph\n{MACHINE}", ylabel="GB/s",
            plot_name=f"seeded-dropout-{dtype}", args={"dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)  # fmt: skip
def benchmark(n_elements, dtype, line):
    x = torch.randn(n_elements, device=DEVICE, dtype=dtype)
    torch.compiler.reset()  # forget other sizes, or torch.compile gives up
    run = {
        "all four words": lambda x: launch_seeded_dropout4x(x, 0.5, 123),
        "one word": lambda x: launch_seeded_dropout(x, 0.5, 123),
        "F.dropout": lambda x: dropout(x, 0.5),
        "torch.compile": torch.compile(lambda x: dropout(x, 0.5), dynamic=False),
        "copy": torch.clone,
    }[line]
    return 2 * x.nbytes / captured(run, x) / 1e6


if __name__ == "__main__" and not INTERPRET:
    layout = {"floatfmt": ".0f", "showindex": False, "maxheadercolwidths": 14}
    tables = benchmark.run(show_plots=True, return_df=True)
    for dtype, speed in zip(("float32", "bfloat16"), tables, strict=True):
        print(f"{dtype}\n\n{tabulate(speed[::2], 'keys', **layout)}\n")

# %%
# The count is confirmed now: on large tensors dropout is about as fast as a copy, on an H100 and on
# an H200, in both dtypes. ``torch.compile`` stores no mask here, but uses one word of four, as our
# first kernel does, and is about as slow in bfloat16.
#
# As a public function
# --------------------
#
# For a given seed dropout is linear: each element is multiplied by 0 or by 1 / (1 - p), and so is
# its gradient. So the backward pass runs the forward pass on the incoming gradient with that seed.
#
# A ``torch.autograd.Function`` tells PyTorch about this gradient. ``setup_context`` keeps what
# ``backward`` needs, two numbers and no tensor. ``backward`` applies the function again, so that
# second derivatives work as well. While ``torch.compile`` compiles, ``forward`` calls a *custom
# operator* instead of the launch: a function that PyTorch knows by name and does not look into.
# ``register_fake`` gives the compiler the result's shape and dtype without computing it.
# :ref:`operators` compares this with other ways.

import numbers

seeded_dropout4x_op = torch.library.custom_op(
    "fast_and_right::seeded_dropout4x", launch_seeded_dropout4x, mutates_args=()
)
seeded_dropout4x_op.register_fake(lambda x, *rest: x.new_empty(x.shape))


class SeededDropout4x(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed):
        compiling = torch.compiler.is_compiling()
        return (seeded_dropout4x_op if compiling else launch_seeded_dropout4x)(x, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, ctx.seed = inputs

    @staticmethod
    def backward(ctx, gradient):
        return apply(gradient, ctx.p, ctx.seed), None, None


quick_apply = super(torch.autograd.Function, SeededDropout4x).apply


def apply(*arguments):
    # Function.apply looks up the arguments' names on every call. That takes longer than all
    # the rest, and only the compiler and torch.func need it.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return SeededDropout4x.apply(*arguments)
    return quick_apply(*arguments)


def check_arguments(x, p, seed):
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")


def seeded_dropout4x(x, p, seed):
    """Drop elements of ``x`` with probability p, and scale the others by 1 / (1 - p).

    ``x`` has any shape and strides, is on the GPU (on the CPU when Triton interprets), and
    is float16, bfloat16, float32 or float64. ``p``, in [0, 1], is rounded to a multiple of
    2^-32; 0 returns a copy, bit for bit, and 1 returns zeros. ``seed`` is an integer of 64
    bits, signed or unsigned; a negative one is the same as itself plus 2^64. The result is
    contiguous, and a dropped inf or NaN is 0 in it. Element i, in row-major order, is kept
    when word i mod 4 of Philox4x32-10, with the key ``seed`` and the counter i // 4,
    is at least p * 2^32, rounded to an integer. Differentiable, also twice, in reverse mode
    only; works under ``torch.compile``. Raises TypeError or ValueError for anything else.
    """
    check_arguments(x, p, seed)
    seed = int(seed)  # a custom operator takes signed integers of 64 bits
    return apply(x, float(p), seed - 2**64 if seed >= 2**63 else seed)


def seeded_dropout(x, p, seed):
    """The same with one word, ``tl.rand(seed, i) >= p``: other masks, and no gradient."""
    check_arguments(x, p, seed)
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent  # set in forward mode only
    if (x.requires_grad and torch.is_grad_enabled()) or tangent is not None:
        raise ValueError("x requires a gradient: use seeded_dropout4x, or detach x")
    p = float(p)
    return launch_seeded_dropout(x, p, int(seed)) if p < 1 else x.new_zeros(x.shape)


# %%
# The gradient must be 0 where the output is 0, and 1 / (1 - p) elsewhere. ``gradcheck`` compares it
# with finite differences. The last line counts the tensors that are kept for the backward pass.

if __name__ == "__main__":
    x = torch.randn(33, 31, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        y = seeded_dropout4x(x, 0.5, seed=7)
    y.sum().backward()
    assert torch.equal(x.grad, 2.0 * (y != 0))

    x = torch.randn(5, 7, device=DEVICE, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: seeded_dropout4x(x, 0.5, seed=7), x)
    print("the gradient is right; tensors kept for the backward pass:", len(saved))

# %%
# A launch from Python costs the CPU more time than ``F.dropout``; :ref:`operators` measures how
# much. A CUDA graph saves most of it. But it captures the seed, too, so every replay draws the same
# mask. :ref:`checkpointed dropout` keeps the seed in the GPU's memory, where it can be changed.
#
# Exercises
# ---------
#
# 1. What goes wrong if you write ``tl.rand(seed, offsets) > p``? How many elements does it take to
#    notice?
# 2. Use ``tl.randint4x`` in place of ``philox``, and time it. What changes?
#
# .. note::
#    Try it first.
#
#    1. At p = 0 nothing should be dropped, but 0 > 0 is false. Two of the 2³² words become exactly
#       0, so about one element in 2³¹ (two billion) is dropped.
#    2. The masks are the same. On an H100 the speed is, too, since memory is the limit. On an H200
#       dropout in bfloat16 falls a little below the copy.
#
#       .. code-block:: diff
#
#          @@ in seeded_dropout4x_kernel
#          -    w0, w1, w2, w3 = philox(seed, counters)
#          +    w0, w1, w2, w3 = tl.randint4x(seed, counters)
#
# References
# ----------
#
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011: Philox, and the tests that it passes.
# - N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, `Dropout: a simple way to prevent neural networks from overfitting <https://jmlr.org/papers/v15/srivastava14a.html>`_,
#   2014.
# - The `PyTorch guide to custom operators <https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html>`_.
