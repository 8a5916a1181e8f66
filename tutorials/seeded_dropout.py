"""
.. _seeded dropout:

Dropout with a seed
===================

:ref:`baseline dropout` stores a mask as large as its input. But a mask is only a list of random
decisions, and those can be computed again at any time, by anyone who knows the seed. In this
lesson the mask becomes one integer: nothing is stored, nothing extra is read, and the same seed
gives the same result on every machine.

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

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRET else "cuda"
os.environ["TRITON_INTERPRET"] = str(int(INTERPRET))

import triton
import triton.language as tl

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
# Compare this with the kernel of :ref:`baseline dropout`: the load of the mask has become a call
# of ``tl.rand``. The index of an element is its place in the tensor, so the mask depends on the
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
        requires a gradient, which this kernel does not compute.

    References
    ----------
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"x must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
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
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x requires a gradient, which dropout does not compute; pass x.detach()"
        )
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y

    scale = 1 / (1 - float(p)) if p < 1 else 0.0
    BLOCK = 1024
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        seeded_dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            y, x.contiguous(), x.numel(), float(p), scale, int(seed), BLOCK
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
columns = [x] + [
    seeded_dropout(x.to(DEVICE), p, seed).cpu() for seed in (123, 123, 512)
]
headers = ["input", "seed 123", "seed 123", "seed 512"]
print(tabulate(torch.stack(columns, dim=1).tolist(), headers, floatfmt=".4f"))

# %%
# Seed 123 drops the same elements both times; seed 512 drops others. Nothing was stored in between
# but the integer 123, and that is all that a backward pass needs, too: it runs the same kernel
# with the same seed on the incoming gradient.
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
    kept = (
        (seeded_dropout(torch.ones(n, device=DEVICE), p, seed=2024) != 0).sum().item()
    )
    deviations = (kept - n * (1 - p)) / (n * p * (1 - p)) ** 0.5
    assert abs(deviations) < 5
    print(f"p = {p}: kept {kept} of {n}, {deviations:+.1f} deviations off the mean")

# %%
# The mean alone proves little: keeping every second element would pass at p = 0.5. So the tests of
# this site also compare every decision with another implementation of Philox, and that with the
# known answers that its authors published.
#
# What it saves, and what it costs
# --------------------------------
#
# Between forward and backward the mask of :ref:`baseline dropout` held at least a byte for each
# element. This one holds 8 bytes, whatever the size. And the kernel moves what must be moved and
# nothing else: :math:`x` in, :math:`y` out.
#
# So is it as fast as a copy? Measure, beside ``torch.nn.functional.dropout``, which draws its
# random numbers in the kernel as well, but also writes a mask. As in the other lessons, the scale
# counts :math:`x` and :math:`y` only.

from datetime import date

gpu = "no GPU" if INTERPRET else torch.cuda.get_device_name()
MACHINE = (
    f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
)


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_elements"],
            x_vals=[2**i for i in range(12, 28)],
            x_log=True,
            line_arg="implementation",
            line_vals=["seeded", "torch", "copy"],
            line_names=["this kernel", "F.dropout", "copy"],
            styles=[("#d55e00", "-"), ("#0072b2", "-"), ("#555555", "--")],
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
    run = {
        "seeded": lambda: seeded_dropout(x, p, seed=123),
        "torch": lambda: torch.nn.functional.dropout(x, p),
        "copy": lambda: x.clone(),
    }[implementation]
    milliseconds = triton.testing.do_bench(run, return_mode="median")
    return 2 * x.nbytes / milliseconds / 1e6  # bytes per ms, as GB/s


# %%

if __name__ == "__main__":
    if not INTERPRET:
        for dtype, speed in zip(
            ("float32", "bfloat16"),
            benchmark.run(show_plots=True, return_df=True),
            strict=True,
        ):
            print(tabulate(speed[::3], headers="keys", floatfmt=".0f", showindex=False))
            n_elements, seeded, torch_dropout, copy = speed.iloc[-1]
            print(
                f"\nOf the copy's speed at {n_elements:.0f} elements of {dtype}, "
                f"this kernel reaches {seeded / copy:.0%} "
                f"and F.dropout {torch_dropout / copy:.0%}.\n"
            )
    else:
        print("No figure: speed is measured on a GPU only, and this run had none.")

# %%
# If the count of bytes were the whole story, both dtypes would reach the copy. Where this kernel
# falls short, memory is not what holds it back: the arithmetic is. Ten rounds of Philox are some
# hundred instructions for each element, whether the element is 4 bytes or 2, and with half
# the bytes there is half the time to hide them in. Note the waste, too: each call computes four random words,
# and ``tl.rand`` keeps one.
#
# Moving fewer bytes is a promise; only a measurement shows whether it is kept.
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
# 4. Use all four words: let each program call ``tl.rand4x`` with a quarter as many offsets as it
#    has elements.
#    What do the figures become?
#
# References
# ----------
#
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011: Philox, and the tests that it passes.
# - N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, `Dropout: a simple way to prevent neural networks from overfitting <https://jmlr.org/papers/v15/srivastava14a.html>`_,
#   2014.
# - D. Achlioptas, `Database-friendly random projections <https://doi.org/10.1016/S0022-0000(03)00025-4>`_,
#   2003, and P. Li, T. Hastie and K. Church, `Very sparse random projections <https://doi.org/10.1145/1150402.1150436>`_,
#   2006: for the third exercise.
