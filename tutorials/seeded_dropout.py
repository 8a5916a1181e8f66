"""
.. _seeded dropout:

Dropout with a seed
===================

:ref:`baseline dropout` stores a mask as large as its input. But a mask is only a list of random
decisions, and those can be computed again at any time, by anyone who knows the seed. In this
lesson the mask becomes one integer: nothing is stored, nothing extra is read, and the same seed
gives the same mask on every machine.

You will learn

- how a counter-based random number generator gives each element its own number, with no state;
- how to draw random numbers inside a Triton kernel;
- how to test that a random kernel is right.

You need to know PyTorch. You need no CUDA.
"""

# %%
# Setting the stage
# -----------------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/philox.svg'
import numbers
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
# Random numbers without a state
# ------------------------------
#
# A classic generator, such as PyTorch's on the CPU, keeps a state, and each number that you draw
# moves it forward. The millionth number comes after 999,999 others. That does not suit a GPU, where
# a hundred thousand threads want theirs at the same time.
#
# A *counter-based* generator has no state. It is a function: a seed and an index go in, a random
# number comes out, and the millionth is as quick to get as the first. Triton's is Philox (Salmon
# et al., 2011). It encrypts the index with the seed as the key, in ten rounds of
# multiplying and mixing, after which standard tests find no pattern. Out come four words of 32
# bits. (PyTorch uses it on the GPU, too, and keeps as its state how far it has counted.)
#
# .. image:: /_static/philox.svg
#    :alt: Seed and index enter ten rounds of Philox, four random words come out, one of them becomes a number u between 0 and 1, and u is compared with p to keep or drop.
#
# ``tl.rand(seed, i)`` takes the first word and turns it into a float32 in [0, 1). The page on
# :ref:`random numbers in Triton` has the details: what each function takes and returns, its range,
# and its cost.
#
# The kernel
# ----------
#
# Compare this with the kernel of :ref:`baseline dropout`: the load of the mask has become a call of
# ``tl.rand``. The index of an element is its place in the tensor, so the mask depends on p, the
# seed and the place alone: not on ``BLOCK``, not on the GPU, not on how many programs there are.


@triton.jit
def seeded_dropout_kernel(
    y_ptr, x_ptr, n_elements, p, scale: tl.float64, seed, BLOCK: tl.constexpr
):
    # In 64 bits: in 32, positions from 2^31 on would wrap around to negative ones.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    keep = tl.rand(seed, offsets) >= p
    # A Python float arrives as float32 unless annotated, which is too coarse for float64.
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


# %%
# ``>=`` matters: ``tl.rand`` can return exactly 0, and with ``>`` such an element would be dropped
# even at :math:`p = 0`. As it stands :math:`p = 0` keeps everything, and :math:`p = 1` nothing.


def check_arguments(x, p, seed):
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, got {got}")
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


def seeded_dropout(x, p, seed):
    """Drop elements of ``x`` with probability p, and scale the others by 1 / (1 - p).

    Element i, counted in row-major order whatever the memory layout, is kept when
    ``tl.rand(seed, i) >= p``, in float32. The same seed gives the same mask for every
    dtype, device and layout, and tensors of different sizes share the mask of the
    elements they share.

    Parameters
    ----------
    x : torch.Tensor
        Any shape and strides, on the GPU (on the CPU when Triton interprets); float16,
        bfloat16, float32 or float64.
    p : float
        The probability of dropping an element, in [0, 1]. 0 returns the values of ``x``
        unchanged, 1 returns zeros.
    seed : int
        Any integer of 64 bits, signed or unsigned: from -2^63 to 2^64 - 1. A negative
        seed is the same as that seed plus 2^64.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. A dropped inf or NaN becomes 0.

    Raises
    ------
    TypeError
        If an argument has another type or dtype.
    ValueError
        If ``p`` or ``seed`` is out of range, ``x`` is on another device, or ``x``
        requires a gradient, which only ``seeded_dropout4x`` computes.

    References
    ----------
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    check_arguments(x, p, seed)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient: use seeded_dropout4x, or pass x.detach()"
        )
    p = float(p)
    if x.numel() == 0 or p == 1:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    x = x.resolve_neg().contiguous()  # z.conj().imag negates only when read
    y = torch.empty_like(x)
    BLOCK = 1024
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        seeded_dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            y, x, x.numel(), p, 1 / (1 - p), int(seed), BLOCK
        )
    return y


# %%
# The same seed, the same mask
# ----------------------------
#
# The demonstration goes on where the last lesson's stopped: after its ten normal and ten uniform
# numbers, the next ten normal ones. They are drawn on the CPU, so that this table is the same on
# every machine, with a GPU or without.

from tabulate import tabulate

torch.manual_seed(0)
torch.randn(10), torch.rand(10)
p = 0.5
x = torch.randn(10)
columns = [x] + [seeded_dropout(x.to(DEVICE), p, seed).cpu() for seed in (123, 123, 512)]
headers = ["input", "seed 123", "seed 123", "seed 512"]
print(tabulate(torch.stack(columns, dim=1).tolist(), headers, floatfmt=".4f"))

# %%
# Seed 123 drops the same elements both times; seed 512 drops a different set. Nothing was stored in
# between but the integer 123, and, with p, that is all that a backward pass needs: it runs the same
# kernel with the same seed on the incoming gradient.
#
# Two masks are independent when their seeds differ, so each layer and each step of a training run
# needs a seed of its own. The lesson on :ref:`checkpointed dropout` hands them out.
#
# Is it right?
# ------------
#
# How do you check a random result? First, by what must hold exactly. The mask may not depend on the
# dtype, on how the tensor lies in memory, or on how large it is:

ones = torch.ones(33, 31, device=DEVICE)
mask = seeded_dropout(ones, p, seed=7) != 0
assert torch.equal(mask, seeded_dropout(ones.half(), p, seed=7) != 0)
assert torch.equal(
    mask, seeded_dropout(torch.ones(31, 33, device=DEVICE).T, p, seed=7) != 0
)
assert torch.equal(
    mask.flatten()[:100], seeded_dropout(torch.ones(100, device=DEVICE), p, seed=7) != 0
)
assert not torch.equal(mask, seeded_dropout(ones, p, seed=8) != 0)

# %%
# Second, by what must hold on average. Of n elements, n·(1 - p) should be kept, give or take some
# multiple of the standard deviation, the root of n·p·(1 - p). A sound generator
# strays beyond five of them for fewer than one seed in a million:

n = 10_000
for p in (0.1, 0.5, 0.9):
    kept = (seeded_dropout(torch.ones(n, device=DEVICE), p, seed=2024) != 0).sum().item()
    deviations = (kept - n * (1 - p)) / (n * p * (1 - p)) ** 0.5
    assert abs(deviations) < 5
    print(f"p = {p}: kept {kept} of {n}, {deviations:+.1f} deviations off the mean")

# %%
# The mean alone proves little: keeping every second element would pass at p = 0.5. So the tests of
# this site also compare masks, decision by decision, with another implementation of Philox, and
# Triton's Philox with the known answers that its authors published.
#
# Is it fast?
# -----------
#
# Between forward and backward the mask of :ref:`baseline dropout` held at least a byte for each
# element. This one holds 8 bytes, whatever the size, and the kernel moves what must be moved and
# nothing else: :math:`x` in, :math:`y` out. It ought to be as fast as a copy, and faster than
# ``torch.nn.functional.dropout``, which writes a mask as well. Is it? Measure. The table
# shows picoseconds (millionths of a microsecond) for each of 2^28 elements.

from torch.nn.functional import dropout


def picoseconds(run, n):
    """Time of ``run()``, divided among n elements."""
    return triton.testing.do_bench(run, return_mode="median") / n * 1e9


if INTERPRET:
    print("No tables or figures: speed is measured on a GPU only, and this run had none.")
elif __name__ == "__main__":
    n = 2**28
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n, device=DEVICE, dtype=dtype)
        runs = [x.clone, lambda: dropout(x, 0.5), lambda: seeded_dropout(x, 0.5, 123)]
        rows.append([dtype, *(picoseconds(run, n) for run in runs)])
    headers = ["ps an element", "copy", "F.dropout", "this kernel"]
    print(tabulate(rows, headers, floatfmt=".2f"))

# %%
# If bytes were the whole story, the last column would equal the first. Look at bfloat16, the dtype
# that most networks train in. It halves the bytes, and the copy takes half the time. Does this
# kernel? Is it even as fast as ``F.dropout``, which draws with Philox, too, and moves more?
#
# Count the arithmetic
# --------------------
#
# A round of Philox multiplies twice, keeping all 64 bits of each product, and mixes the halves with
# exclusive-ors, of which a GPU does two in one instruction. In ten rounds that is twenty wide
# multiplications and as many mixing instructions. ``tl.rand`` runs all of them for each element,
# takes one of the four words, and throws three away. Against that stand 8 bytes that move for an
# element of float32, and 4 for one of bfloat16.
#
# Which takes longer? Time each alone. A copy moves bytes and computes nothing. The kernel below
# draws, and moves next to nothing: each program combines its words into a single one and stores
# that, so that the compiler can't leave the work out. (``tl.randint4x`` returns all four words as
# integers; ``tl.xor_sum`` combines those of a block.)


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
        draw = picoseconds(lambda: draw_kernel[grid](out, 123, words, 1024), n)
        n_bytes = 4 * draw / rows[1][1]
        print(
            f"{words} of 4 words used: drawing takes {draw:.2f} ps an element, "
            f"as long as moving {n_bytes:.1f} bytes"
        )

# %%
# A kernel draws and moves at the same time, so it takes about as long as the slower of the two.
# Where drawing takes as long as moving 8 bytes, float32 is at the crossover, and bfloat16, with 4,
# is beyond it: its kernel waits for arithmetic, not for memory. Moving fewer bytes promised speed.
# The second line shows how to keep the promise: use all four words, as ``F.dropout`` does, and an
# element costs about a quarter of the work. Where that is less than moving 4 bytes, both dtypes
# wait for memory again, as they should.
#
# All four words
# --------------
#
# **Element i is kept when word i mod 4 of Philox, with the seed as key and the counter ⌊i / 4⌋, is
# at least p · 2³², rounded to an integer.** This sentence defines the mask. It speaks of p,
# the seed and the index, and of nothing else: not of the block size, the launch, the dtype, the GPU
# or the memory layout.
#
# The words are compared as integers, which saves turning them into floating-point numbers. Rounding
# changes the share of dropped elements by no more than 2⁻³³, about 1.2e-10. To notice that you
# would have to count some 10^19 elements, unless p itself is that close to 0 or 1.
#
# ``tl.interleave(a, b)`` is a0, b0, a1, b1, and so on; nested, it puts the words in the order of
# the elements: the inner calls give w0, w2, w0, w2, ... and w1, w3, w1, w3, ..., and the outer one
# w0, w1, w2, w3, w0, and so on.


@triton.jit
def seeded_dropout4x_kernel(
    y_ptr, x_ptr, n_elements, threshold, scale: tl.float64, seed, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    counters = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = tl.randint4x(seed, counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    keep = words >= tl.cast(threshold, tl.uint32)

    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


# %%
# The backward pass
# -----------------
#
# For a given seed dropout is linear: each element is multiplied by 0 or by 1 / (1 - p), and so is
# its gradient. The backward pass is the forward pass, run on the incoming gradient with the same
# seed, and it needs nothing but p and the seed.
#
# To tell PyTorch so, register the launch as an *operator*. ``custom_op`` makes it opaque, so that
# ``torch.compile`` doesn't try to look inside; ``register_fake`` says what comes out, without
# computing it; ``register_autograd`` says how gradients flow.


@torch.library.custom_op("fast_and_right::seeded_dropout4x", mutates_args=())
def seeded_dropout4x_op(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    threshold = round(p * 2**32)
    if p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if threshold == 2**32 or x.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    y = torch.empty_like(x)
    BLOCK = 1024
    with torch.cuda.device_of(x):
        seeded_dropout4x_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            y, x, x.numel(), threshold, 1 / (1 - p), seed, BLOCK
        )
    return y


@seeded_dropout4x_op.register_fake
def _(x, p, seed):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def keep_p_and_seed(ctx, inputs, output):
    _, ctx.p, ctx.seed = inputs


def backward(ctx, gradient):
    return seeded_dropout4x_op(gradient, ctx.p, ctx.seed), None, None


seeded_dropout4x_op.register_autograd(backward, setup_context=keep_p_and_seed)


def seeded_dropout4x(x, p, seed):
    """Drop elements of ``x`` with probability p, and scale the others by 1 / (1 - p).

    Differentiable in reverse mode, also twice, and usable under ``torch.compile``.
    Element i, counted in row-major order whatever the memory layout, is kept when word
    i mod 4 of Philox4x32 with ten rounds, the seed as key and the counter i // 4, is at
    least p * 2^32, rounded to an integer. (``seeded_dropout`` uses one word, of the
    counter i: its masks differ.)

    Parameters
    ----------
    x : torch.Tensor
        Any shape and strides, on the GPU (on the CPU when Triton interprets); float16,
        bfloat16, float32 or float64.
    p : float
        The probability of dropping an element, in [0, 1], rounded to a multiple of
        2^-32. 0 returns a copy of ``x``, bit for bit; 1 returns zeros.
    seed : int
        Any integer of 64 bits, signed or unsigned: from -2^63 to 2^64 - 1. A negative
        seed is the same as that seed plus 2^64.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. A dropped inf or NaN becomes 0.

    Raises
    ------
    TypeError
        If an argument has another type or dtype.
    ValueError
        If ``p`` or ``seed`` is out of range, or ``x`` is on another device.

    References
    ----------
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    check_arguments(x, p, seed)
    signed = (
        int(seed) - 2**64 if seed >= 2**63 else int(seed)
    )  # an operator's int is int64
    return seeded_dropout4x_op(x, float(p), signed)


# %%
# Is the gradient right? It must be zero where the output is, and 1 / (1 - p) elsewhere. PyTorch has
# two checks of its own. ``gradcheck`` compares the gradient with finite differences in float64;
# ``opcheck`` tests what an operator promises to ``torch.compile`` and autograd.

x = torch.randn(33, 31, device=DEVICE, requires_grad=True)
y = seeded_dropout4x(x, 0.5, seed=7)
y.sum().backward()
assert torch.equal(x.grad, 2.0 * (y != 0))

x = torch.randn(5, 7, device=DEVICE, dtype=torch.float64, requires_grad=True)
torch.autograd.gradcheck(lambda x: seeded_dropout4x(x, 0.5, seed=7), x)
print("passed:", *torch.library.opcheck(seeded_dropout4x_op, (x, 0.5, 7)))

# %%
# What is kept for the backward pass
# ----------------------------------
#
# A training step holds, from forward to backward, whatever the backward pass will need. Here is
# how that grows with the number of dropout layers, by the allocator's own count, for activations of
# 16 MiB in bfloat16.


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["layers"],
        x_vals=list(range(1, 13)),
        line_arg="implementation",
        line_vals=["seeded4x", "torch", "mask"],
        line_names=["seeded_dropout4x", "F.dropout", "int32 mask"],
        styles=[("#d55e00", "-"), ("#0072b2", "-"), ("#cc79a7", "-")],
        xlabel=f"dropout layers\n{MACHINE}",
        ylabel="MiB",
        plot_name="seeded-dropout-memory",
        args={"n_elements": 2**23},
    )
)
def memory_benchmark(n_elements, layers, implementation):
    layer = {
        "seeded4x": lambda y, i: seeded_dropout4x(y, 0.1, seed=i),
        "torch": lambda y, i: dropout(y, 0.1),
        "mask": lambda y, i: y * (torch.rand_like(y) >= 0.1).int() / (1 - 0.1),
    }[implementation]
    x = torch.randn(n_elements, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    y = x
    for i in range(layers):
        y = layer(y, i)
    return (torch.cuda.memory_allocated() - before - y.nbytes) / 2**20


if __name__ == "__main__" and not INTERPRET:
    held = memory_benchmark.run(show_plots=True, return_df=True)
    layers, seeded4x, torch_dropout, mask = held.iloc[-1]
    print(
        f"{layers:.0f} layers hold {seeded4x:.0f} MiB with seeded_dropout4x, "
        f"{torch_dropout:.0f} with F.dropout, {mask:.0f} with an int32 mask."
    )

# %%
# How fast is it now?
# -------------------
#
# The same measurement as at first, as GB/s of :math:`x` and :math:`y`, over all sizes, with both
# kernels and with ``F.dropout`` as ``torch.compile`` makes it.


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_elements"],
            x_vals=[2**i for i in range(10, 29, 2)],
            x_log=True,
            line_arg="implementation",
            line_vals=["seeded4x", "seeded", "torch", "compile", "copy"],
            line_names=[
                "seeded_dropout4x",
                "seeded_dropout",
                "F.dropout",
                "torch.compile",
                "copy",
            ],
            styles=[
                ("#d55e00", "-"),
                ("#d55e00", ":"),
                ("#0072b2", "-"),
                ("#009e73", "-"),
                ("#555555", "--"),
            ],
            xlabel=f"elements, {dtype}\n{MACHINE}",
            ylabel="GB/s",
            plot_name=f"seeded-dropout-{dtype}",
            args={"p": 0.5, "dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)
def benchmark(n_elements, p, dtype, implementation):
    x = torch.randn(n_elements, device=DEVICE, dtype=dtype)
    torch.compiler.reset()  # forget other sizes, or torch.compile gives up
    compiled = torch.compile(dropout, dynamic=False)
    run = {
        "seeded4x": lambda: seeded_dropout4x(x, p, seed=123),
        "seeded": lambda: seeded_dropout(x, p, seed=123),
        "torch": lambda: dropout(x, p),
        "compile": lambda: compiled(x, p),
        "copy": lambda: x.clone(),
    }[implementation]
    return 2 * x.nbytes / picoseconds(run, n_elements) / n_elements * 1e3


if __name__ == "__main__" and not INTERPRET:
    for speed in benchmark.run(show_plots=True, return_df=True):
        rows = speed[1::2]
        print(
            tabulate(rows, "keys", floatfmt=".0f", showindex=False, maxheadercolwidths=14)
        )
        n_elements, seeded4x, seeded, torch_dropout, compiled, copy = speed.iloc[-1]
        print(
            f"\nAt {n_elements:.0f} elements seeded_dropout4x reaches "
            f"{seeded4x / copy:.0%} of the copy.\nThat is "
            f"{seeded4x / seeded:.2f} times seeded_dropout, "
            f"{seeded4x / torch_dropout:.2f} times F.dropout, "
            f"{seeded4x / compiled:.2f} times torch.compile.\n"
        )

# %%
# And the backward pass? It is the same kernel; PyTorch's reads the mask that it stored. The time
# should not depend on p, since every word is drawn whatever it decides:

if __name__ == "__main__" and not INTERPRET:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.1, 0.5, 0.9):
            x = torch.randn(n, device=DEVICE, dtype=dtype)
            stored = torch.rand(n, device=DEVICE) >= p
            native = torch.ops.aten.native_dropout_backward
            runs = [
                lambda: seeded_dropout4x(x, p, 123),
                lambda: native(x, stored, 1 / (1 - p)),
                x.clone,
            ]
            rows.append([dtype, p, *(picoseconds(run, n) for run in runs)])
    headers = [
        "ps an element",
        "p",
        "seeded_dropout4x, either pass",
        "PyTorch's backward",
        "copy",
    ]
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".2f", ".2f", ".2f")))

# %%
# (``torch.compile`` stores no mask here, but draws as ``seeded_dropout`` does, one word of four. So
# in bfloat16 it waits for arithmetic, too.)
#
# On the left of the figures any kernel takes a few microseconds, whatever it does. A line that lies
# below the others there is of an operator that the CPU does not launch soon enough to keep the GPU
# busy. Such a line jumps, between sizes and between runs: sometimes the CPU is in time, sometimes
# not. In a program of small kernels that counts, and an operator in Python takes longer to launch
# than one in C++:

if __name__ == "__main__" and not INTERPRET:
    x = torch.randn(1024, device=DEVICE)
    for name, run in [
        ("seeded_dropout4x", lambda: seeded_dropout4x(x, 0.5, 123)),
        ("seeded_dropout", lambda: seeded_dropout(x, 0.5, 123)),
        ("F.dropout", lambda: dropout(x, 0.5)),
    ]:
        times = timeit.repeat(run, number=1000, repeat=5)
        print(f"{name}: {min(times) * 1e3:.0f} microseconds of the CPU for a call")

# %%
# A GPU that is kept busy hides this time. CUDA graphs hide it as well, but mind that they freeze
# the seed, too: every replay would draw the same mask. Load the seed in the kernel for them.
#
# Why ten rounds? Seven are the fewest with which Philox passes the tests of its paper, and would
# cost less. But once drawing takes less time than moving, fewer rounds make nothing faster, and ten
# is what the published known answers are for.
#
# Exercises
# ---------
#
# 1. Give each row of a matrix a seed of its own, so that a row keeps its mask in whatever batch it
#    appears.
# 2. Pass the strides of ``x`` to the kernel instead of copying it when it is not contiguous. The
#    mask must stay the same.
# 3. Write a kernel that projects vectors with a sparse Johnson-Lindenstrauss transform: multiply
#    by a random matrix of mostly zeros whose entries are drawn from a seed where they are needed,
#    and never stored.
# 4. For p = 0.5 a single bit would decide. Draw a mask of single bits. Which other p could you
#    have, and does anything get faster?
#
# .. note::
#    Try it first.
#
#    1. :ref:`matrix dropout` does it: the kernel loads the seeds of its rows, and the counter
#       counts columns.
#    2. So does the same lesson: the word is chosen by the element's row and column, and the strides
#       serve for its address alone.
#    3. :ref:`sparse johnson-lindenstrauss` is about nothing else.
#    4. One call of Philox then decides on 128 elements. With b bits for each, p can be any multiple
#       of 1 / 2ᵇ. But where drawing already takes less time than moving the bytes, nothing gets
#       faster: look at what the lesson printed for four words, and divide it by 32.
#
#       .. code-block:: python
#
#          @triton.jit
#          def bit_dropout_kernel(y_ptr, x_ptr, n_elements, seed, BLOCK: tl.constexpr):
#              pid = tl.program_id(0).to(tl.int64)
#              counters = pid * (BLOCK // 128) + tl.arange(0, BLOCK // 128)
#              w0, w1, w2, w3 = tl.randint4x(seed, counters)
#              words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
#              bits = words[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]
#              keep = tl.reshape(bits & 1, (BLOCK,)) != 0
#
#              offsets = pid * BLOCK + tl.arange(0, BLOCK)
#              inside = offsets < n_elements
#              x = tl.load(x_ptr + offsets, mask=inside)
#              tl.store(y_ptr + offsets, tl.where(keep, x * 2, 0.0), mask=inside)
#
#
#          def bit_dropout(x, seed):
#              """Dropout of a contiguous tensor with p = 0.5."""
#              y = torch.empty_like(x)
#              bit_dropout_kernel[(triton.cdiv(x.numel(), 1024),)](y, x, x.numel(), seed, 1024)
#              return y
#
# References
# ----------
#
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011: Philox, and the tests that it passes.
# - N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, `Dropout: a simple way to prevent neural networks from overfitting <https://jmlr.org/papers/v15/srivastava14a.html>`_,
#   2014.
# - The `PyTorch guide to custom operators <https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html>`_.
# - D. Achlioptas, `Database-friendly random projections <https://doi.org/10.1016/S0022-0000(03)00025-4>`_,
#   2003, and P. Li, T. Hastie and K. Church, `Very sparse random projections <https://doi.org/10.1145/1150402.1150436>`_,
#   2006: for the third exercise.
