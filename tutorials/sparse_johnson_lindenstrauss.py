"""
.. _sparse johnson-lindenstrauss:

A random projection that is never stored
========================================

You write a matrix product whose right-hand side is never in memory: the kernel draws each tile of
the random matrix where it multiplies by it. It squeezes vectors of a million numbers into four
thousand and hardly changes the distances between them. If the matrix is stored and the vectors are
few, most of the time goes into reading the matrix. But :ref:`seeded dropout` showed that random
numbers can be computed where they are needed.

You will learn

- how a loop around ``tl.dot`` multiplies two matrices, tile by tile;
- how a kernel draws a tile of random entries instead of loading it, eight from a call of Philox;
- when drawing a matrix is faster than reading it.

Needs: PyTorch, and :ref:`seeded dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/computed_matrix.svg'
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
# What a random projection promises
# ---------------------------------
#
# Take n points in a space of any dimension. Johnson and Lindenstrauss proved in 1984 that a random
# linear map to k dimensions very probably keeps *all* distances between them, up to a small
# relative error, if k is a large enough multiple of :math:`\ln n`.
#
# The map is a product :math:`y = x R`. The matrix R has a row for each feature and a column for
# each of the k *components*. An entry is +a with probability d/2, -a with probability d/2, and
# otherwise 0, where d is the *density* and :math:`a = 1 / \sqrt{d\,k}`. Then the squared length of
# y is on average that of x. We take a density of 1/3, which Achlioptas showed in 2003 to be as
# accurate as a matrix of normal numbers.
#
# Now count. With a million features (2^20) and 4096 components, R has 2^32 entries of two bytes
# each in bfloat16. All of them have to be read for a product, even if you project a single vector.
# Next to R, the 2^26 numbers of 64 vectors hardly count. A kernel that draws R reads only x.
#
# .. image:: /_static/computed_matrix.svg
#    :alt: Seed, feature and component enter Philox; sixteen of its 128 bits make one entry: a sign, and fifteen bits to compare with the density. A drawn tile is multiplied by a tile of x.
#
# A matrix product
# ----------------
#
# First, both matrices are in memory. Each program computes a tile of the result, ``OUT`` components
# of ``VECTORS`` vectors. It walks along the features in steps of ``IN``. In each step it loads a
# tile of x and one of R, and ``tl.dot(r, x, y)`` adds their product to ``y``. For 16-bit numbers it
# uses the *tensor cores*, units of the GPU that only multiply small matrices. To keep it short, the
# kernel takes only matrices whose sizes are multiples of the tile sizes.


@triton.jit
def product_kernel(
    y_ptr, x_ptr, r_ptr, n_in, n_out,
    OUT: tl.constexpr, IN: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(0) * OUT + tl.arange(0, OUT)[:, None]
    vectors = tl.program_id(1).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)[None, :]
    y = tl.zeros((OUT, VECTORS), tl.float32)
    for first in range(0, n_in, IN):
        ins = (first + tl.arange(0, IN)).to(tl.int64)
        x = tl.load(x_ptr + vectors * n_in + ins[:, None])
        r = tl.load(r_ptr + ins[None, :] * n_out + outs)
        y = tl.dot(r, x, y, input_precision="ieee")  # in full precision for float32
    tl.store(y_ptr + vectors * n_out + outs, y)


if __name__ == "__main__":
    torch.manual_seed(0)
    x, R = torch.randn(32, 512, device=DEVICE), torch.randn(512, 64, device=DEVICE)
    y = torch.empty(32, 64, device=DEVICE)
    product_kernel[(2, 1)](y, x, R, 512, 64, OUT=32, IN=64, VECTORS=32)
    torch.testing.assert_close(y, x @ R, rtol=1e-4, atol=1e-4)
    print("the loop agrees with x @ R")

# %%
# Each row of the tile ``r`` is a component, so this computes :math:`y^T = R^T x^T`. We put R on the
# left because tensor cores can take the left-hand tile from registers, where a drawn tile is.
#
# An entry from three numbers
# ---------------------------
#
# To replace the load of ``r``, entry (j, i) of R must be a function of the seed, the feature j and
# the component i alone. Philox is such a function: its key is the seed, and its counter has room
# for j and i. But in :ref:`seeded dropout` a call of Philox for each element took longer than
# moving 4 bytes, and an entry has only 2. So an entry gets 16 bits, and the 128 bits of a call make
# eight entries. The top bit of an entry is its sign. The entry is nonzero if the other 15 bits are
# less than t, the density times 2^15.
#
# For a density of 1/3 this t is not an integer. So each call rounds it up or down at random, and
# the probability of rounding up is the fraction of t. The exclusive or of the call's four words
# decides, because the 16 bits of each entry are independent of it.
#
# Which entry gets which bits is our choice. Tensor cores expect certain entries in certain threads.
# In the order below, each thread draws its own. **Feature j of component i finds its bits in the
# call with the counter (c, i), where c = 4 ⌊j / 32⌋ + ⌊(j mod 8) / 2⌋, in word ⌊j / 8⌋ mod 4: in
# its lower half if j is even, in its upper half if j is odd.**
#
# Draw a tile
# -----------
#
# One operation on a word can work on both of its entries, as long as nothing carries over from the
# lower half to the upper one. ``0x7FFF + t`` minus the 15 bits is between 0 and 0xFFFF, and its top
# bit is 1 exactly if the bits are less than t. We move that bit down by one and put the sign in
# front. The result is +2 (0x4000), -2 (0xC000) or a zero of either sign. The finished product is
# halved.


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
    # The key, the four words of the counter, and the number of rounds.
    w0, w1, w2, w3 = tl.philox(seed, c, i, zero, zero, n_rounds=7)

    round_up = (w0 ^ w1 ^ w2 ^ w3) < tl.cast(fraction, tl.uint32)
    t = tl.cast(t, tl.uint32) + tl.where(round_up, 0x10001, 0).to(tl.uint32)
    words_02 = tl.join(two_entries(w0, t), two_entries(w2, t))
    words_13 = tl.join(two_entries(w1, t), two_entries(w3, t))
    pairs = tl.join(words_02, words_13)
    tile = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))

    # The axes are now component, call, two bits of the word, half. But a feature is
    # 32 * (call // 4) + 8 * word + 2 * (call % 4) + half: split the call, and permute.
    tile = tl.reshape(tile, (C, N // 4, 4, 2, 2, 2))
    tile = tl.permute(tile, (0, 1, 3, 4, 2, 5))
    return tl.reshape(tile, (C, 8 * N)).to(tl.bfloat16, bitcast=True)


# %%
# ``tl.join(a, b)`` puts two tiles side by side along a new last axis; ``reshape`` and ``permute``
# bring the features into order. Philox runs for seven rounds, the fewest with which it passes the
# tests of its paper, because drawing is most of the work here.
#
# The same loop, with the tile drawn
# ----------------------------------
#
# Compare this loop with the first: where that one loaded R, this one calls ``entries``. The other
# changes make it more general: it has a mask, takes any strides of ``x``, adds up in the dtype
# ``SUM``, and with ``TRANSPOSED`` multiplies by the transpose of R, for the backward pass.


@triton.jit
def project_kernel(
    y_ptr, x_ptr, n_vectors, n_in, n_out, in_per_program, x_row_stride, x_col_stride,
    t, fraction, seed, TRANSPOSED: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, VECTORS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_out, OUT)
    out = tl.program_id(0) % n_tiles * OUT
    vectors = (tl.program_id(0) // n_tiles).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    part = tl.program_id(1)
    outs = out + tl.arange(0, OUT)
    y = tl.zeros((OUT, VECTORS), SUM)
    start = part * in_per_program
    for first in range(start, min(start + in_per_program, n_in), IN):
        ins = first + tl.arange(0, IN)
        x_tile = x_ptr + ins.to(tl.int64)[:, None] * x_col_stride
        x_tile += vectors[None, :] * x_row_stride
        inside = (ins < n_in)[:, None] & (vectors < n_vectors)[None, :]
        x = tl.load(x_tile, mask=inside, other=0.0)  # arrives while r is drawn
        if TRANSPOSED:  # from components to features
            calls = out // 8 + tl.arange(0, OUT // 8)
            r = tl.trans(entries(calls, ins, t, fraction, seed))
        else:  # from features to components
            calls = first // 8 + tl.arange(0, IN // 8)
            r = entries(calls, outs, t, fraction, seed)
        y = tl.dot(r.to(x.dtype), x, y, input_precision="ieee", out_dtype=SUM)
    y_tile = y_ptr + (part * n_vectors + vectors)[None, :] * n_out + outs[:, None]
    tl.store(y_tile, y, mask=(outs < n_out)[:, None] & (vectors < n_vectors)[None, :])


# %%
# 4096 components make 32 tiles of 128, too few for a GPU with a hundred multiprocessors. So several
# programs share the features of a tile, and each stores the sum over its ``part``. These sums are
# added afterwards, always in the same order.


def launch_project(x, n_out, seed, density, transposed):
    """Twice the product of ``x`` and the signs of R, or of its transpose."""
    n_vectors, n_in = x.shape
    VECTORS, OUT, IN = min(max(triton.next_power_of_2(n_vectors), 16), 256), 128, 64
    dtype, SUM, num_warps = torch.float32, tl.float32, 4 if VECTORS <= 64 else 8
    if x.dtype == torch.float64:
        dtype, SUM, num_warps = torch.float64, tl.float64, 8
        VECTORS, OUT = min(VECTORS, 64), 64
    elif VECTORS == 16 and not transposed:
        OUT = 256
    OUT = min(OUT, max(triton.next_power_of_2(n_out), 64))
    tiles = triton.cdiv(n_out, OUT) * triton.cdiv(n_vectors, VECTORS)
    n_parts = min(triton.cdiv(1024, tiles), triton.cdiv(n_in, IN))
    in_per_program = triton.cdiv(triton.cdiv(n_in, n_parts), IN) * IN
    n_parts = triton.cdiv(n_in, in_per_program)
    t, fraction = divmod(round(density * 2**47), 2**32)
    parts = torch.empty(n_parts, n_vectors, n_out, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):  # if there are several GPUs
        project_kernel[(tiles, n_parts)](
            parts, x, n_vectors, n_in, n_out, in_per_program, *x.stride(),
            (0x7FFF + t) * 0x10001, fraction, seed, transposed, OUT, IN, VECTORS, SUM,
            num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    return parts.sum(0) if n_parts > 1 else parts.squeeze_(0)


# %%
# The result can be wrong without ``num_stages=1``. By default Triton lets the steps of a loop
# overlap: while the tensor cores still multiply, the next step begins. Here it draws entries, into
# registers that the tensor cores may still be reading. On Hopper GPUs (H100, H200) Triton 3.6 does
# not always wait for them (`triton#9433 <https://github.com/triton-lang/triton/issues/9433>`_).
# Small products were right, and large ones sometimes had a few wrong entries. With
# ``num_stages=1`` a step ends before the next begins.
#
# Float32 from three bfloat16
# ---------------------------
#
# Tensor cores multiply 16-bit numbers. A float32 has 24 significant bits and a bfloat16 has 8, with
# the same range of exponents. So we split a float32 into three bfloat16 and project three times as
# many vectors. The three add up to it exactly, down to a size of about 2^-110. Smaller
# numbers lose their last bits.

import math


def in_three(x):
    """Three times as many vectors of bfloat16; the sum over the three is ``x``."""
    three = []
    for _ in range(3):
        three.append((x.view(torch.int32) & ~0xFFFF).view(torch.float32))
        x = x - three[-1]
    return torch.cat(three).bfloat16()


def drawn_product(
    x: torch.Tensor, n_out: int, seed: int, density: float, transposed: bool
) -> torch.Tensor:
    """x R, or x times the transpose of R, for a matrix R that is drawn entry by entry."""
    (n_vectors, n_in), dtype = x.shape, x.dtype
    if n_vectors == 0:
        return x.new_empty(0, n_out)
    x = x.resolve_neg()  # apply a negation that PyTorch has put off
    if INTERPRET and dtype == torch.bfloat16:
        x = x.float()  # the interpreter's tl.dot takes bfloat16 for integers
    if dtype == torch.float32 and not INTERPRET:
        y = launch_project(in_three(x), n_out, seed, density, transposed)
        y = y.view(3, n_vectors, n_out).sum(0)
    else:
        y = launch_project(x, n_out, seed, density, transposed)
    a = math.sqrt(1 / (density * (n_in if transposed else n_out)))
    return y.mul_(a / 2).to(dtype)


# %%
# Is it right?
# ------------
#
# The projected unit vectors are the matrix itself, so we can compare with products of PyTorch. The
# last check divides squared distances after the projection by those before. The standard deviation
# of these ratios should be about :math:`\sqrt{2 / k}`.

if __name__ == "__main__":
    D, k, d = 300, 96, 1 / 3
    eye = torch.eye(D, device=DEVICE, dtype=torch.float64)
    R = drawn_product(eye, k, 7, d, False)
    x, dy = torch.randn_like(eye[:5]), torch.randn_like(R[:5])
    torch.testing.assert_close(drawn_product(x, k, 7, d, False), x @ R)
    torch.testing.assert_close(drawn_product(dy, D, 7, d, True), dy @ R.T)
    print(f"products agree; {(R != 0).double().mean():.1%} of R are not 0")

    points = torch.randn(40, 1024, device=DEVICE)
    before = torch.nn.functional.pdist(points)
    for k in (16, 64, 256):
        after = torch.nn.functional.pdist(drawn_product(points, k, 1, d, False))
        spread = (after / before).square().std()
        print(f"k = {k:3}: deviation {spread:.3f}, expected {math.sqrt(2 / k):.3f}")

# %%
# Is it fast?
# -----------
#
# A stored matrix has to be read once, even for a single vector. So its product takes at least as
# long as a copy that moves as many bytes. Making the matrix is not counted.

FEATURES, COMPONENTS = 2**20, 4096
COLOURS = {"drawn": "#d55e00 -", "stored": "#0072b2 -", "moving the matrix": "#555555 --"}


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_vectors"], x_vals=[4**i for i in range(6)], x_log=True, y_log=True,
        line_arg="line", line_vals=list(COLOURS), line_names=list(COLOURS),
        styles=[tuple(style.split()) for style in COLOURS.values()],
        xlabel=f"vectors of 2^20 features, density 1/3, bfloat16\n{MACHINE}", ylabel="ms",
        plot_name="sparse-johnson-lindenstrauss", args={},
    )
)  # fmt: skip
def benchmark(n_vectors, line):
    x = torch.randn(n_vectors, FEATURES, device=DEVICE, dtype=torch.bfloat16)
    columns = COMPONENTS // 2 if line == "moving the matrix" else COMPONENTS
    R = torch.randn(FEATURES, columns, device=DEVICE, dtype=torch.bfloat16)
    run = {
        "drawn": lambda: drawn_product(x, COMPONENTS, 123, 1 / 3, False),
        "stored": lambda: x @ R,
        "moving the matrix": lambda: R.clone(),  # reads one half, writes the other
    }[line]
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    times = benchmark.run(show_plots=True, return_df=True)
    layout = {"floatfmt": (".0f", *4 * [".2f"]), "showindex": False}
    print(tabulate(times, "keys", maxheadercolwidths=14, **layout))

# %%
# For few vectors, drawing the matrix is faster than reading it. On an H200 the gain is small,
# because its memory is faster. The lines cross between 64 and 256 vectors on an H100, and between
# 16 and 64 on an H200. Beyond that a stored matrix is faster, if you have room for it: all vectors
# share one reading. Our kernel draws R anew for every 256 vectors, because a program has no
# registers for more.
#
# As a public function
# --------------------
#
# The gradient of x is the gradient that arrives times the transpose of R. So ``backward`` applies
# the same function with the transposed matrix, and can itself be differentiated. :ref:`operators`
# explains the rest.

import numbers

sparse_jl_op = torch.library.custom_op(
    "fast_and_right::sparse_jl", drawn_product, mutates_args=()
)
sparse_jl_op.register_fake(lambda x, n_out, *matrix: x.new_empty(len(x), n_out))


class SparseJL(torch.autograd.Function):
    @staticmethod
    def forward(x, n_out, seed, density, transposed):
        run = sparse_jl_op if torch.compiler.is_compiling() else drawn_product
        return run(x, n_out, seed, density, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, *ctx.matrix, ctx.transposed = inputs
        ctx.n_in = x.shape[1]

    @staticmethod
    def backward(ctx, dy):
        dx = SparseJL.apply(dy, ctx.n_in, *ctx.matrix, not ctx.transposed)
        return dx, None, None, None, None


def checked(name, x, size, n_out, seed, density):
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"{name} must be a dense tensor, not nested, got {got}")
    if not x.is_floating_point() or x.itemsize == 1:
        wanted = "float16, bfloat16, float32 or float64"
        raise TypeError(f"{name} must be {wanted}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"{name} must be on device type {DEVICE!r}, got {x.device}")
    if x.ndim != 2 or not 0 < x.shape[1] < 2**30:
        got = tuple(x.shape)
        raise ValueError(f"{name} must be a matrix of 1 to 2^30 - 1 columns, got {got}")
    for argument, value, wanted, kind, low, high in (
        (size, n_out, "an integer", numbers.Integral, 1, 2**30 - 1),
        ("seed", seed, "an integer", numbers.Integral, -(2**63), 2**64 - 1),
        ("density", density, "a number", numbers.Real, 2**-32, 1),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{argument} must be {wanted}, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{argument} must be from {low} to {high}, got {value}")
    seed = int(seed) - 2**64 if seed >= 2**63 else int(seed)  # operators take int64
    return int(n_out), seed, float(density)


def sparse_jl(x, n_components, seed, density=1 / 3):
    """Project vectors with a sparse random matrix R that is drawn, not stored: x R.

    ``x``: (vectors, features), any strides; float16, bfloat16, float32 or float64; on the
    GPU (the CPU when Triton interprets). An entry of R is +a or -a with probability density
    / 2 each, else 0; a^2 = 1 / (density * n_components). Which of these it is depends on
    ``seed`` (64 bits), its row, its column and the density alone. The result has the dtype
    of ``x``, and the same bits in each run. Differentiable any number of times, in reverse
    mode.
    """
    matrix = checked("x", x, "n_components", n_components, seed, density)
    return SparseJL.apply(x, *matrix, False)


def sparse_jl_transpose(y, n_features, seed, density=1 / 3):
    """Multiply by the transpose of the matrix of ``sparse_jl``: y R^T."""
    matrix = checked("y", y, "n_features", n_features, seed, density)
    return SparseJL.apply(y, *matrix, True)


# %%
# What does a call cost the CPU? The last line has no checks and no autograd.

if __name__ == "__main__" and not INTERPRET:
    import timeit

    x, R = torch.ones(2, 1024, 1024, device=DEVICE, dtype=torch.bfloat16)
    calls = "x @ R", "sparse_jl(x, 1024, 7)", "drawn_product(x, 1024, 7, 1 / 3, False)"
    for call in calls:
        times = timeit.repeat(call, globals=globals(), number=1000, repeat=5)
        print(f"{call}: {min(times) * 1e3:.0f} microseconds of the CPU for a call")

# %%
# ``x @ R`` is one call into C++. Ours chooses launch settings, launches the kernel, and calls
# PyTorch for sums, scale and dtype. So it is better to store small matrices.
#
# Exercises
# ---------
#
# 1. With density 1 an entry is a sign, for which one bit is enough. Write
#    ``sign_projection(x, n_components, seed)``, which makes 128 entries from a call of Philox. How
#    much faster do you expect it to be?
# 2. Work out the variance of :math:`|y|^2 / {|x|}^2` for any density. Measure it for a vector whose
#    features are all equal, and for one with a single nonzero feature.
#
# .. note::
#    Try it first.
#
#    1. It needs a sixteenth of the calls, because a call makes 128 signs in place of eight entries.
#       Don't expect a sixteenth of the time: each bit has to be taken out of its word, and the
#       product takes as long as before.
#
#       .. code-block:: python
#
#          @triton.jit
#          def sign_kernel(
#              y_ptr, x_ptr, n_vectors, n_features, n_components, scale, seed,
#              OUT: tl.constexpr, VECTORS: tl.constexpr,
#          ):
#              outs = tl.program_id(0) * OUT + tl.arange(0, OUT)
#              vectors = tl.program_id(1) * VECTORS + tl.arange(0, VECTORS)
#              zero = tl.zeros((OUT,), tl.uint32)
#              y = tl.zeros((OUT, VECTORS), tl.float32)
#              for i in range(0, n_features, 128):
#                  call = zero + tl.cast(i // 128, tl.uint32)
#                  w0, w1, w2, w3 = tl.philox(
#                      seed, call, outs.to(tl.uint32), zero, zero, n_rounds=7
#                  )
#                  words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
#                  words = tl.reshape(words, (OUT, 4, 1))
#                  bits = words >> tl.arange(0, 32).to(tl.uint32)[None, None, :]
#                  signs = tl.reshape(1 - 2 * (bits & 1).to(tl.int32), (OUT, 128))
#
#                  ins = i + tl.arange(0, 128)
#                  places = vectors.to(tl.int64)[None, :] * n_features + ins[:, None]
#                  inside = (ins < n_features)[:, None] & (vectors < n_vectors)[None, :]
#                  x = tl.load(x_ptr + places, mask=inside, other=0.0)
#                  y = tl.dot(signs.to(x.dtype), x, y, input_precision="ieee")
#              places = vectors.to(tl.int64)[None, :] * n_components + outs[:, None]
#              inside = (outs < n_components)[:, None] & (vectors < n_vectors)[None, :]
#              tl.store(y_ptr + places, y * scale, mask=inside)
#
#
#          def sign_projection(x, n_components, seed):
#              x = x.contiguous()
#              y = torch.empty(len(x), n_components, dtype=x.dtype, device=x.device)
#              sign_kernel[triton.cdiv(n_components, 64), triton.cdiv(len(x), 16)](
#                  y, x, *x.shape, n_components, n_components**-0.5, seed, 64, 16, num_stages=1
#              )
#              return y
#
#
#          # Entries of both signs, independent of their neighbours?
#          signs = sign_projection(torch.eye(300, device=DEVICE), 80, 5) * math.sqrt(80)
#          assert torch.allclose(signs.abs(), torch.ones_like(signs))
#          for products in (signs, signs[1:] * signs[:-1], signs[:, 1:] * signs[:, :-1]):
#              # More than five standard deviations: once in a million.
#              assert abs(products.mean()) < 5 / math.sqrt(products.numel())
#
#    2. The entries are independent, and their odd powers have mean 0. With :math:`s = 1 / d` that
#       leaves
#
#       .. math:: \mathrm{Var} \, \frac{|y|^2}{|x|^2} = \frac{2}{k} + \frac{s - 3}{k} \sum_j \frac{x_j^4}{|x|^4}
#
#       and for s = 3 this is :math:`2 / k`, as for a dense matrix of normal numbers. A component
#       times :math:`\sqrt k` is a projection to one component, so one call gives k samples.
#
#       .. code-block:: python
#
#          k, D = 5000, 64
#          flat = torch.full((D,), 1 / math.sqrt(D), device=DEVICE)
#          spiky = torch.nn.functional.one_hot(torch.tensor(5), D).to(flat)
#          found = []
#          for d in (1, 1 / 3, 1 / 8):
#              squares = k * sparse_jl(torch.stack([flat, spiky]), k, 3, d) ** 2
#              for x, values in zip((flat, spiky), squares):
#                  found.append((values.var().item(), 2 + (1 / d - 3) * (x**4).sum().item()))
#                  print(f"d = {d:.3f}: variance {found[-1][0]:.2f}, expected {found[-1][1]:.2f}")
#
# References
# ----------
#
# - W. B. Johnson and J. Lindenstrauss, *Extensions of Lipschitz mappings into a Hilbert space*, 1984; and a short
#   proof: S. Dasgupta and A. Gupta, `An elementary proof of a theorem of Johnson and Lindenstrauss <https://doi.org/10.1002/rsa.10073>`_,
#   2003.
# - D. Achlioptas, `Database-friendly random projections <https://doi.org/10.1016/S0022-0000(03)00025-4>`_,
#   2003.
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011.
