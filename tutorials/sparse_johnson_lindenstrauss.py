"""
.. _sparse johnson-lindenstrauss:

A random projection that is never stored
========================================

A vector of a million numbers can be squeezed into four thousand such that distances barely change:
multiply it by a random matrix. The matrix would fill 8.6 GB, and most of the time would go into
reading it. But each of its entries is a random decision, and :ref:`seeded dropout` showed that those
can be computed wherever they are needed. In this lesson you write a matrix product whose
right-hand side does not exist.

You will learn

- what the Johnson-Lindenstrauss lemma promises, and how sparse the random matrix may be;
- how a kernel multiplies by a matrix that it computes, on the GPU's units for matrix products;
- how to draw eight random decisions from one call of the generator, and keep them exact.

You need to know PyTorch. You need no CUDA.
"""

# %%
# Setting the stage
# -----------------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/computed_matrix.svg'
import math
import numbers
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
# What the lemma promises
# -----------------------
#
# Take n points in a space of any dimension, and an error :math:`\varepsilon` that you can live with. Johnson
# and Lindenstrauss proved in 1984 that a random linear map to
#
# .. math:: k \ge \frac{4 \ln n}{\varepsilon^2 / 2 - \varepsilon^3 / 3}
#
# dimensions very likely keeps *all* squared distances between them to within a factor of :math:`1 \pm \varepsilon`.
# The dimension that you start from does not appear: a million features or a billion, k is the same.
#
# The map is a multiplication by a matrix R of random entries, one row for each feature and one column
# for each of the k *components*. Most of the entries may be zero. With
#
# .. math::
#    R_{ji} = \sqrt{\frac{1}{d\,k}} \cdot
#    \begin{cases} +1 & \text{with probability } d/2 \\ 0 & \text{with probability } 1 - d \\ -1 & \text{with probability } d/2 \end{cases}
#
# the squared length of :math:`y = xR` is that of x on average, whatever the *density* d. Its variance is known
# exactly. With :math:`s = 1 / d`,
#
# .. math:: \mathrm{Var} \frac{|y|^2}{|x|^2} = \frac{1}{k} \left( 2 + (s - 3) \sum_j \frac{x_j^4}{|x|^4} \right)
#
# For d = 1/3 the second term vanishes, and sparse is as good as dense: that is Achlioptas's choice. A
# smaller d costs accuracy where a few features carry most of a vector's length, and next to
# nothing where the length is spread over many. Li, Hastie and Church go down to
# :math:`d = 1 / \sqrt{\text{features}}`, which scikit-learn calls ``"auto"``: one in a thousand, for a million features.
#
# An entry from three numbers
# ---------------------------
#
# Entry (j, i) must be a function of the seed, the feature j and the component i, and of
# nothing else. Philox is one: the seed is the key, and a counter has four words, room for j and i side by side.
# But a matrix of a million by four thousand has 4.3 billion entries. One call for each, or one word
# for each as in dropout, would take longer than reading the stored matrix. So an entry gets sixteen bits, and
# eight entries share a call.
#
# .. image:: /_static/computed_matrix.svg
#    :alt: Seed, feature and component enter Philox; of the 128 bits that come out, sixteen make one entry. The top bit is the sign, the other fifteen are compared with the density. A tile of entries is multiplied with a tile of x, and no matrix is in memory.
#
# **The eight halves of the four words of Philox, for the seed as the key and the counter (c, i), make
# eight entries of component i. Feature j finds its own in the call c = 4 ⌊j / 32⌋ + ⌊(j mod 8) / 2⌋, in word ⌊j / 8⌋ mod 4,
# in the lower half if j is even and in the upper half if it is odd. The top bit of the half is the sign. The entry is
# not zero when the other fifteen bits are less than t.**
#
# Why this order? Units for matrix products want a thread to hold certain elements of a tile. In this
# order it holds what it has drawn itself, and no entry has to move. Any other order gives
# as good a matrix, but takes longer.
#
# And t is the density times 2^15, which has a flaw: 1/3 of 2^15 is no integer. Rounded to one, the density would be
# off by up to 2^-16, which is little beside 1/3 and a lot beside 1/1000. So each call rounds
# up or down at random, up as often as the fraction says. No further number has to be drawn for it: the
# exclusive-or of the four words is a random number of 32 bits that none of the eight halves alone
# tells anything about. Each entry then is nonzero with the probability that you asked for, to
# within 2^-48.
#
# The kernel in small pieces
# --------------------------
#
# A word holds two entries, and one operation on the word works on both, if nothing
# carries over from the lower half to the upper one. ``0x7FFF + t`` minus fifteen bits is from 0 to 0xFFFF, and has its top bit set
# exactly when the bits are less than t. Move that top bit down by one, put the sign in front of it, and you have 0x4000 or
# 0xC000, which read as bfloat16 are +2 and -2; the factor of two goes into the scale at the end.


@triton.jit
def two_entries(word, t):
    """Two entries, each +2, 0 or -2 in bfloat16, from a word and 0x7FFF + t in both halves."""
    nonzero = t - (word & 0x7FFF7FFF)
    return word & 0x80008000 | (nonzero >> 1) & 0x40004000


@triton.jit
def entries(calls, components, t, fraction, seed):
    """The entries of 8 * len(calls) features, as a tile of components by features."""
    C: tl.constexpr = components.shape[0]
    N: tl.constexpr = calls.shape[0]
    zero = tl.zeros((C, N), tl.uint32)
    c = calls.to(tl.uint32)[None, :] + zero
    i = components.to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(seed, c, i, zero, zero, n_rounds=7)

    round_up = (w0 ^ w1 ^ w2 ^ w3) < tl.cast(fraction, tl.uint32)
    t = tl.cast(t, tl.uint32) + tl.where(round_up, 0x10001, 0).to(tl.uint32)
    even = tl.join(two_entries(w0, t), two_entries(w2, t))
    odd = tl.join(two_entries(w1, t), two_entries(w3, t))
    pairs = tl.join(even, odd)
    tile = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))

    # The axes are now component, call, two bits of the word, half. Put them in order.
    tile = tl.reshape(tile, (C, N // 4, 4, 2, 2, 2))
    tile = tl.permute(tile, (0, 1, 3, 4, 2, 5))
    return tl.reshape(tile, (C, 8 * N)).to(tl.bfloat16, bitcast=True)


# %%
# ``tl.join(a, b)`` puts two tiles side by side along a new last axis, so four words become two axes of
# length 2, and ``reshape`` and ``permute`` bring features into order. All of this only renames what
# threads hold.
#
# Why ``n_rounds=7``? In :ref:`seeded dropout` ten rounds cost nothing, because memory was what took the time.
# Here drawing is the work. Seven are the fewest with which Philox passes the BigCrush tests of its paper.
#
# The product
# -----------
#
# A matrix product is computed in tiles. ``tl.dot`` multiplies two of them on the *tensor cores*, units of the GPU that
# do nothing else, and a loop adds up along the features. The usual kernel loads both tiles. This one loads
# a tile of ``x`` and computes the other:


@triton.jit
def project_kernel(
    y_ptr,
    x_ptr,
    n_vectors,
    n_in,
    n_out,
    in_per_program,
    x_row_stride,
    x_col_stride,
    t,
    fraction,
    seed,
    TRANSPOSED: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    VECTORS: tl.constexpr,
    SUM: tl.constexpr,
):
    n_tiles = tl.cdiv(n_out, OUT)
    out = tl.program_id(0) % n_tiles * OUT
    vectors = (tl.program_id(0) // n_tiles).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    part = tl.program_id(1)
    outs = out + tl.arange(0, OUT)
    y = tl.zeros((OUT, VECTORS), SUM)
    start = part * in_per_program
    for i in range(start, min(start + in_per_program, n_in), IN):
        ins = i + tl.arange(0, IN)
        if TRANSPOSED:  # from components to features
            calls = out // 8 + tl.arange(0, OUT // 8)
            r = tl.trans(entries(calls, ins, t, fraction, seed))
        else:  # from features to components
            calls = i // 8 + tl.arange(0, IN // 8)
            r = entries(calls, outs, t, fraction, seed)
        x_tile = x_ptr + ins.to(tl.int64)[:, None] * x_col_stride
        x_tile += vectors[None, :] * x_row_stride
        inside = (ins < n_in)[:, None] & (vectors < n_vectors)[None, :]
        x = tl.load(x_tile, mask=inside, other=0.0)
        y = tl.dot(r.to(x.dtype), x, y, input_precision="ieee", out_dtype=SUM)
    y_tile = y_ptr + (part * n_vectors + vectors)[None, :] * n_out + outs[:, None]
    tl.store(y_tile, y, mask=(outs < n_out)[:, None] & (vectors < n_vectors)[None, :])


# %%
# Four thousand components make 32 tiles of 128, too few for a GPU of a hundred multiprocessors. So the
# features are divided among several programs, ``part`` by ``part``, and each stores a sum of its own. These partial sums are added up
# afterwards, always in the same order, so that two runs agree to the last bit. How many parts there are depends
# on the shape alone, not on the GPU.
#
# ``TRANSPOSED`` turns the same kernel round: from components to features. That is the product with the
# transpose of R, and it is what the backward pass needs, because the gradient of :math:`y = xR` is
# :math:`\partial x = \partial y \, R^T`. And as that is linear, too, the gradient of the gradient is the first product again.


@torch.library.custom_op("fast_and_right::sparse_jl", mutates_args=())
def sparse_jl_op(
    x: torch.Tensor, n_out: int, seed: int, density: float, transposed: bool
) -> torch.Tensor:
    n_vectors, n_in = x.shape
    if 0 in (n_vectors, n_in):
        return torch.zeros(n_vectors, n_out, dtype=x.dtype, device=x.device)
    SUM = torch.promote_types(x.dtype, torch.float32)
    dtype = x.dtype
    if INTERPRET and dtype == torch.bfloat16:
        x = x.float()  # the interpreter's tl.dot takes bfloat16 for integers

    VECTORS = min(max(triton.next_power_of_2(n_vectors), 16), 64)
    OUT, IN = 128, 64
    tiles = triton.cdiv(n_out, OUT) * triton.cdiv(n_vectors, VECTORS)
    n_parts = min(triton.cdiv(512, tiles), triton.cdiv(n_in, IN))
    in_per_program = triton.cdiv(triton.cdiv(n_in, n_parts), IN) * IN
    n_parts = triton.cdiv(n_in, in_per_program)

    threshold, fraction = divmod(round(density * 2**47), 2**32)
    parts = torch.empty(n_parts, n_vectors, n_out, dtype=SUM, device=x.device)
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        project_kernel[(tiles, n_parts)](
            parts,
            x,
            n_vectors,
            n_in,
            n_out,
            in_per_program,
            *x.stride(),
            (0x7FFF + threshold) * 0x10001,
            fraction,
            seed,
            transposed,
            OUT,
            IN,
            VECTORS,
            tl.float64 if SUM == torch.float64 else tl.float32,
        )
    n_components = n_in if transposed else n_out
    scale = math.sqrt(1 / (density * n_components)) / 2  # entries were drawn as ±2
    return (parts.sum(0) * scale).to(dtype)


@sparse_jl_op.register_fake
def _(x, n_out, seed, density, transposed):
    return torch.empty(len(x), n_out, dtype=x.dtype, device=x.device)


def keep_arguments(ctx, inputs, output):
    x, _, *ctx.arguments, ctx.transposed = inputs
    ctx.n_in = x.shape[1]


def backward(ctx, gradient):
    dx = sparse_jl_op(gradient, ctx.n_in, *ctx.arguments, not ctx.transposed)
    return dx, None, None, None, None


sparse_jl_op.register_autograd(backward, setup_context=keep_arguments)


def check_arguments(x, size, n_out, seed, density, n_features):
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"x must have two dimensions, got {x.ndim}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    for name, value in ((size, n_out), ("seed", seed)):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    for name, value in ((size, n_out), ("the size of x", x.shape[1])):
        if not 0 < value < 2**30:
            raise ValueError(f"{name} must be in [1, 2^30), got {value}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")
    if isinstance(density, str) and density == "auto":
        return 1 / math.sqrt(n_features)
    if not isinstance(density, numbers.Real):
        raise TypeError(f'density must be a number or "auto", got {density!r}')
    if not 2**-32 <= density <= 1:
        raise ValueError(f"density must be in [2^-32, 1], got {density}")
    return float(density)


def signed(seed):
    """As an operator's int, which is int64."""
    return int(seed) - 2**64 if seed >= 2**63 else int(seed)


def sparse_jl(x, n_components, seed, density="auto"):
    """Project vectors with a sparse random matrix R that is drawn, not stored: x R.

    R has shape (features, n_components). Its entries are +a and -a with probability
    density / 2 each and 0 otherwise, where a^2 = 1 / (density * n_components). They
    depend on the seed, their row and their column alone, but for the scale a: the first
    components of a larger projection are those of a smaller one, scaled. Differentiable
    in reverse mode, any number of times, and usable under ``torch.compile``.

    Parameters
    ----------
    x : torch.Tensor
        Shape (vectors, features) with any strides, on the GPU (on the CPU when Triton
        interprets); float16, bfloat16, float32 or float64.
    n_components : int
        The dimension to project to, from 1 to 2^30 - 1.
    seed : int
        Any integer of 64 bits, signed or unsigned: from -2^63 to 2^64 - 1. A negative
        seed is the same as that seed plus 2^64.
    density : float or "auto"
        The probability that an entry is not zero, from 2^-32 to 1, kept to within
        2^-48. "auto" is 1 / sqrt(features), after Li, Hastie and Church; 1/3 is
        Achlioptas's choice.

    Returns
    -------
    torch.Tensor
        Shape (vectors, n_components), contiguous, with the dtype of ``x``. Sums are
        formed in float32 (float64 for float64), in the same order in every run. As in
        any matrix product, one inf or NaN makes its whole vector inf or NaN.

    Raises
    ------
    TypeError
        If an argument has another type or dtype.
    ValueError
        If ``x`` is no matrix or on another device, or a number is out of range.

    References
    ----------
    Achlioptas, "Database-friendly random projections", 2003. Li, Hastie and Church,
    "Very sparse random projections", 2006.
    """
    n_features = x.shape[1] if isinstance(x, torch.Tensor) and x.ndim == 2 else None
    density = check_arguments(x, "n_components", n_components, seed, density, n_features)
    return sparse_jl_op(x, int(n_components), signed(seed), density, False)


def sparse_jl_transpose(y, n_features, seed, density="auto"):
    """Multiply by the transpose of the matrix of ``sparse_jl``: y R^T.

    Parameters
    ----------
    y : torch.Tensor
        Shape (vectors, n_components); else as ``x`` of ``sparse_jl``.
    n_features : int
        The number of features to go back to, from 1 to 2^30 - 1.
    seed, density
        As of ``sparse_jl``. "auto" is 1 / sqrt(n_features).

    Returns
    -------
    torch.Tensor
        Shape (vectors, n_features), contiguous, with the dtype of ``y``.

    Raises
    ------
    TypeError, ValueError
        As ``sparse_jl``.
    """
    density = check_arguments(y, "n_features", n_features, seed, density, n_features)
    return sparse_jl_op(y, int(n_features), signed(seed), density, True)


# %%
# Distances before and after
# --------------------------
#
# Forty random points with 2048 features have 780 distances. Project them to more and more components, and
# divide each squared distance after by the one before. The formula for the variance says how far the
# ratios should spread; for d = 1/3 it is :math:`2 / k` whatever the points.

import matplotlib.pyplot as plt

torch.manual_seed(0)
points = torch.randn(40, 2048, device=DEVICE)
before = torch.nn.functional.pdist(points)
figure, axis = plt.subplots()
for k, colour in ((16, "#cc79a7"), (64, "#0072b2"), (256, "#d55e00")):
    after = torch.nn.functional.pdist(sparse_jl(points, k, seed=1, density=1 / 3))
    ratios = (after / before).square().cpu()
    axis.hist(ratios.numpy(), bins=40, alpha=0.6, color=colour, label=f"k = {k}")
    print(f"k = {k:3}: spread {ratios.std():.3f}, predicted {math.sqrt(2 / k):.3f}")
axis.set(xlabel="squared distance after / before", ylabel="pairs of points")
axis.legend()
plt.show()

# %%
# Is it right?
# ------------
#
# Projecting the unit vectors gives the matrix itself. Look at it: its shares of signs and zeros; that its product is
# the projection, and the product with its transpose is the gradient; and that it is the same for every dtype, layout
# and number of components.

D, k, d = 1000, 96, 0.1
R = sparse_jl(torch.eye(D, device=DEVICE, dtype=torch.float64), k, seed=7, density=d)
a = math.sqrt(1 / (d * k))
torch.testing.assert_close(R.abs().unique().tolist(), [0.0, a])
for name, entry, p in (("plus", a, d / 2), ("zero", 0, 1 - d), ("minus", -a, d / 2)):
    count = (R - entry).abs().lt(a / 2).sum().item()
    deviations = (count - D * k * p) / math.sqrt(D * k * p * (1 - p))
    assert abs(deviations) < 5
    print(f"{name:5}: {count} of {D * k}, {deviations:+.1f} deviations off the mean")

x = torch.randn(5, D, device=DEVICE, dtype=torch.float64, requires_grad=True)
y = sparse_jl(x, k, seed=7, density=d)
torch.testing.assert_close(y, x @ R)
gradient = torch.randn_like(y)
(dx,) = torch.autograd.grad(y, x, gradient)
torch.testing.assert_close(dx, gradient @ R.T)
torch.testing.assert_close(dx, sparse_jl_transpose(gradient, D, seed=7, density=d))
assert torch.equal(sparse_jl(x.T.contiguous().T, k, seed=7, density=d), y)
few = sparse_jl(x, 10, seed=7, density=d)
torch.testing.assert_close(few, y[:, :10] * math.sqrt(k / 10))

small = torch.randn(2, 40, device=DEVICE, dtype=torch.float64, requires_grad=True)
torch.autograd.gradcheck(lambda x: sparse_jl(x, 6, seed=7, density=0.3), small)
print(torch.library.opcheck(sparse_jl_op, (small, 6, 7, 0.3, False)))

# %%
# Then the variance. Two vectors make the extremes: in a *flat* one all features are equal, in a *spiky*
# one a single feature has all the length. Each component of a projection to k of them is, times :math:`\sqrt k`, a projection
# to one component, independent of the others, so one call gives thousands of samples.

k, D = 20000, 64
flat = torch.full((D,), 1 / math.sqrt(D), device=DEVICE)
spiky = torch.nn.functional.one_hot(torch.tensor(5), D).float().to(DEVICE)
for d in (1 / 3, 1 / 8):
    y = sparse_jl(torch.stack([flat, spiky]), k, seed=3, density=d)
    for name, x, squares in zip(("flat", "spiky"), (flat, spiky), k * y**2, strict=True):
        predicted = 2 + (1 / d - 3) * (x**4).sum().item()
        print(f"d = {d:.3f}, {name}: variance {squares.var():.2f}, predicted {predicted:.2f}")

# %%
# The spiky vector pays for sparseness, as the formula says, and the flat one does not. The tests of this
# site hold these numbers to stated bounds, and compare the matrix, entry by entry, with one that NumPy and another
# implementation of Philox spell out.
#
# Handwritten digits
# ------------------
#
# Now real data: scikit-learn comes with 1797 handwritten digits of 8 by 8 pixels. Which share of a digit's ten
# nearest neighbours are still among the ten nearest after a projection, and how many of its nearest neighbours show the same
# digit? Each number is a mean over five seeds.

from sklearn.datasets import load_digits
from sklearn.random_projection import SparseRandomProjection
from tabulate import tabulate

digits, labels = load_digits(return_X_y=True)
x = torch.tensor(digits, dtype=torch.float32, device=DEVICE)
labels = torch.tensor(labels, device=DEVICE)


def neighbours(x):
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    return distances.topk(10, largest=False).indices


def scikit_learn(k, seed):
    projection = SparseRandomProjection(k, density="auto", random_state=seed)
    return torch.tensor(projection.fit_transform(digits), device=DEVICE)


true = neighbours(x)
rows = [["the pixels themselves", 64, 1.0, (labels[true[:, 0]] == labels).float().mean()]]
for k in (16, 32):
    for name, project in (
        ("sparse_jl", lambda k, seed: sparse_jl(x, k, seed)),
        ("scikit-learn", scikit_learn),
    ):
        kept, same = [], []
        for seed in range(5):
            found = neighbours(project(k, seed))
            kept += [(true[:, :, None] == found[:, None, :]).any(2).float().mean().item()]
            same += [(labels[found[:, 0]] == labels).float().mean().item()]
        rows.append([name, k, sum(kept) / 5, sum(same) / 5])
headers = ["", "components", "neighbours kept", "same digit"]
print(tabulate(rows, headers, floatfmt=("", "", ".1%", ".1%")))

# %%
# The two make the same kind of matrix, and so the same kind of error. With 64 features there is little to
# squeeze: the lemma is about thousands of features and more, and matrices that hurt.
# What differs is what has to be kept to project the next digit in the same way.

projection = SparseRandomProjection(32, random_state=0).fit(digits)
matrix = projection.components_
n_bytes = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
print(f"scikit-learn keeps {n_bytes} bytes for a matrix of 64 by 32; sparse_jl a seed, 8 bytes.")
