"""
.. _sparse johnson-lindenstrauss:

A random projection that is never stored
========================================

A vector of a million numbers can be squeezed into four thousand such that distances barely change:
multiply it by a random matrix. The matrix would fill 8.6 GB, and most of the time would go into
reading it. But each of its entries is a random decision, and :ref:`seeded dropout` showed that
those can be computed wherever they are needed. In this lesson you write a matrix product whose
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
# Take n points in a space of any dimension, and an error :math:`\varepsilon` that you can live
# with. Johnson and Lindenstrauss proved in 1984 that a number of dimensions in proportion to
# :math:`\ln n / \varepsilon^2` is enough. With Achlioptas's constants, a random linear map to
#
# .. math:: k \ge \frac{(4 + 2 \beta) \ln n}{\varepsilon^2 / 2 - \varepsilon^3 / 3}
#
# dimensions keeps *all* squared distances between them to within a factor of
# :math:`1 \pm \varepsilon`, with a probability of at least :math:`1 - n^{-\beta}`. The dimension that
# you start from does not appear: a million features or a billion, k is the same.
#
# The map is a multiplication by a matrix R of random entries, one row for each feature and one
# column for each of the k *components*. Most of the entries may be zero: let each be +a with
# probability d/2, -a with probability d/2, and else 0, where d is the *density* of the matrix and
#
# .. math:: a = \sqrt{\frac{1}{d\,k}}
#
# Then the squared length of :math:`y = xR` is that of x on average, whatever the density. Its
# variance is known exactly. With :math:`s = 1 / d`,
#
# .. math:: \mathrm{Var} \frac{|y|^2}{|x|^2} = \frac{2}{k} + \frac{s - 3}{k} \sum_j \frac{x_j^4}{|x|^4}
#
# For d = 1/3 the second term vanishes, and sparse is as good as dense: that is Achlioptas's choice.
# A smaller d costs accuracy where a few features carry most of a vector's length, and next to
# nothing where the length is spread over many. Li, Hastie and Church go down to
# :math:`d = 1 / \sqrt{\text{features}}`, which scikit-learn calls ``"auto"``: one in a thousand,
# for a million features.
#
# An entry from three numbers
# ---------------------------
#
# Entry (j, i) must be a function of the seed, the feature j and the component i, and of nothing
# else. Philox is one: the seed is the key, and a counter has four words, room for j and i side by
# side. But a matrix of a million by four thousand has 4.3 billion entries. Multiply that by what a
# word costs, which :ref:`seeded dropout` measures, and you are beyond the time in which the stored
# matrix is read. So an entry gets sixteen bits, and eight entries share a call.
#
# .. image:: /_static/computed_matrix.svg
#    :alt: Seed, feature and component enter Philox; of the 128 bits that come out, sixteen make one entry. The top bit is the sign, the other fifteen are compared with the density. A tile of entries is multiplied with a tile of x, and no matrix is in memory.
#
# **The eight halves of the four words of Philox, for the seed as the key and the counter (c, i),
# make eight entries of component i. Feature j finds its own in the call c = 4 ⌊j / 32⌋ + ⌊(j mod 8)
# / 2⌋, in word ⌊j / 8⌋ mod 4, in the lower half if j is even and in the upper half if it is odd.
# The top bit of the half is the sign. The entry is not zero when the other fifteen bits are less
# than t.**
#
# Why this order? Units for matrix products want a thread to hold certain elements of a tile. In
# this order it holds what it has drawn itself, and no entry has to move. Any other order gives as
# good a matrix, but takes longer.
#
# And t is the density times 2^15, which has a flaw: 1/3 of 2^15 is no integer. Rounded to one, the
# density would be off by up to 2^-16, which is little beside 1/3 and a lot beside 1/1000. So each
# call rounds up or down at random, up as often as the fraction says. No further number has to be
# drawn for it: the exclusive-or of the four words is a random number of 32 bits that none of the
# eight halves alone tells anything about. Each entry then is nonzero with the probability that you
# asked for, to within 2^-48.
#
# The kernel in small pieces
# --------------------------
#
# A word holds two entries, and one operation on the word works on both, if nothing carries over
# from the lower half to the upper one. ``0x7FFF + t`` minus fifteen bits is from 0 to 0xFFFF, and
# has its top bit set exactly when the bits are less than t. Move that top bit down by one, put the
# sign in front of it, and you have 0x4000 or 0xC000, which read as bfloat16 are +2 and -2; the
# factor of two goes into the scale at the end.


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
# ``tl.join(a, b)`` puts two tiles side by side along a new last axis, so four words become two axes
# of length 2, and ``reshape`` and ``permute`` bring features into order. All of this only renames
# what threads hold.
#
# Why ``n_rounds=7``? In :ref:`seeded dropout` ten rounds cost nothing, because memory was what took
# the time. Here drawing is the work. Seven are the fewest with which, in its paper, Philox passes
# BigCrush, the strictest of the usual batteries of tests.
#
# The product
# -----------
#
# A matrix product is computed in tiles. ``tl.dot`` multiplies two of them on the *tensor cores*,
# units of the GPU that do nothing else, and a loop adds up along the features. The usual kernel
# loads both tiles. This one loads a tile of ``x`` and computes the other:


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
        x_tile = x_ptr + ins.to(tl.int64)[:, None] * x_col_stride
        x_tile += vectors[None, :] * x_row_stride
        inside = (ins < n_in)[:, None] & (vectors < n_vectors)[None, :]
        x = tl.load(x_tile, mask=inside, other=0.0)  # arrives while r is drawn
        if TRANSPOSED:  # from components to features
            calls = out // 8 + tl.arange(0, OUT // 8)
            r = tl.trans(entries(calls, ins, t, fraction, seed))
        else:  # from features to components
            calls = i // 8 + tl.arange(0, IN // 8)
            r = entries(calls, outs, t, fraction, seed)
        y = tl.dot(r.to(x.dtype), x, y, input_precision="ieee", out_dtype=SUM)
    y_tile = y_ptr + (part * n_vectors + vectors)[None, :] * n_out + outs[:, None]
    tl.store(y_tile, y, mask=(outs < n_out)[:, None] & (vectors < n_vectors)[None, :])


# %%
# Four thousand components make 32 tiles of 128, too few for a GPU of a hundred multiprocessors. So
# the features are divided among several programs, ``part`` by ``part``, and each stores a sum of
# its own. These partial sums are added up afterwards, always in the same order, so that two runs
# agree to the last bit. How many parts there are depends on the shape alone, not on the GPU.
#
# ``TRANSPOSED`` turns the same kernel round: from components to features. That is the product with
# the transpose of R, and it is what the backward pass needs, because the gradient of :math:`y = xR`
# is :math:`\partial x = \partial y \, R^T`. And as that is linear, too, the gradient of the
# gradient is the first product again.


def drawn_product(x, n_out, seed, density, transposed):
    """The product of ``x`` with the signs of R, or of its transpose."""
    n_vectors, n_in = x.shape
    if x.dtype == torch.float32 and not INTERPRET:
        three = drawn_product(in_three(x), n_out, seed, density, transposed)
        return three.view(3, n_vectors, n_out).sum(0)
    wide = x.dtype == torch.float64
    VECTORS = min(max(triton.next_power_of_2(n_vectors), 16), 64 if wide else 256)
    OUT = 256 if VECTORS == 16 and not transposed else 128
    num_warps = 4 if VECTORS <= 64 else 8
    if wide:
        OUT, num_warps = 64, 8
    OUT = min(OUT, max(triton.next_power_of_2(n_out), 64))
    IN = 64
    tiles = triton.cdiv(n_out, OUT) * triton.cdiv(n_vectors, VECTORS)
    n_parts = min(triton.cdiv(1024, tiles), triton.cdiv(n_in, IN))
    in_per_program = triton.cdiv(triton.cdiv(n_in, n_parts), IN) * IN
    n_parts = triton.cdiv(n_in, in_per_program)
    threshold, fraction = divmod(round(density * 2**47), 2**32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = torch.empty(n_parts, n_vectors, n_out, dtype=dtype, device=x.device)
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
        tl.float64 if dtype == torch.float64 else tl.float32,
        num_warps=num_warps,
        num_stages=1,  # no step may overlap the next: see below
    )
    y = parts.sum(0) if n_parts > 1 else parts[0]
    return y.div_(2)  # the entries were drawn as -2, 0 and 2


# %%
# ``num_stages=1`` looks like a detail, and the result is wrong without it. By default Triton lets the steps of a
# loop overlap: it starts the tensor cores and goes on to the next step, which here draws
# entries, into registers that the tensor cores may still be reading. The compiler should wait. Triton 3.6
# does not always (`triton#9433 <https://github.com/triton-lang/triton/issues/9433>`_), and now and then a few
# entries of a float16 product were garbage, or a whole product of 256 vectors was off by a quarter. Tests on small
# matrices passed. What found it were many entries, counted, and many vectors, compared with float64.
#
# What overlapping would hide is hidden otherwise: ``x`` is loaded before the entries are drawn, and
# several small programs share a multiprocessor, so that one draws while another waits.
#
# Tensor cores are fastest with numbers of 16 bits or fewer. A float32 has 24 significant bits and a bfloat16 has 8,
# with the same range of exponents, so a float32 is the sum of three bfloat16, exactly. As the
# entries of R lose nothing in bfloat16, three projections add up to the one of float32. (A product
# in float64 takes much longer.)


def in_three(x):
    """Three times as many vectors of bfloat16; the sum over the three is ``x``, exactly."""
    three = []
    for _ in range(3):
        high = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
        three.append(high.bfloat16())
        x = x - high
    return torch.cat(three)


# %%
# One in a thousand
# -----------------
#
# At the density "auto", 1023 of 1024 entries of a million-by-four-thousand matrix are zero, and the
# kernel above draws them all, to multiply by nothing. Can you go from one entry that is not zero
# straight to the next?
#
# Yes: the number of zeros in between is random, too. At least g zeros follow with the probability
# :math:`(1 - d)^g`. So take a number u, uniform between 0 and 1, and skip
#
# .. math:: g = \left\lfloor \frac{\ln u}{\ln (1 - d)} \right\rfloor
#
# entries: :math:`g` is that large exactly when :math:`u \le (1 - d)^g`. The next is not zero. One
# draw for each entry that counts, and none for those that don't.
#
# What is lost is that an entry knows its value without looking at others: to find the tenth, you
# have to add up nine gaps. So start anew often enough that thousands of programs have something to
# do. **For densities up to 1/128, component i has its own sequence of gaps in each chunk of 65536
# features. Gap n of chunk c comes from the counter (⌊n / 2⌋, i, c, 1): its words 0 and 1 if n is
# even, 2 and 3 if it is odd, make a number of 64 bits. The lowest bit of the first word is the
# sign, the other 63 bits, with a half added and divided by 2^63, are u.** (The 1 keeps these words
# apart from those of the first kernel, whose counters end in zeros.)
#
# ``tl.cumsum`` adds up gaps, which gives positions, and the tensor cores have no part in it: each
# position fetches its feature of 64 vectors, and those should be neighbours in memory. So ``x`` is
# transposed first, for not more than 64 vectors of a million features at a time.
#
# With ``TRANSPOSED``, the fetching becomes adding: the component's value goes to each feature that
# it is connected with. Several components meet there, hence ``atomic_add``, which lets one after
# the other do so, in no certain order: this gradient may differ in its last bits from run to run.


@triton.jit
def visit_kernel(
    y_ptr,
    x_ptr,
    n_vectors,
    n_features,
    n_components,
    chunks_per_program,
    per_log: tl.float64,
    seed,
    TRANSPOSED: tl.constexpr,
    COMPONENTS: tl.constexpr,
    GAPS: tl.constexpr,
    VECTORS: tl.constexpr,
    SUM: tl.constexpr,
):
    n_tiles = tl.cdiv(n_components, COMPONENTS)
    components = tl.program_id(0) % n_tiles * COMPONENTS + tl.arange(0, COMPONENTS)
    vectors = (tl.program_id(0) // n_tiles).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    part = tl.program_id(1)
    mine = (components < n_components)[:, None] & (vectors < n_vectors)[None, :]
    y = tl.zeros((COMPONENTS, VECTORS), SUM)
    if TRANSPOSED:
        x_tile = components.to(tl.int64)[:, None] * n_vectors + vectors[None, :]
        y = tl.load(x_ptr + x_tile, mask=mine, other=0.0).to(SUM)
    zero = tl.zeros((COMPONENTS, GAPS // 2), tl.uint32)
    i = components.to(tl.uint32)[:, None] + zero
    start = part * chunks_per_program
    for chunk in range(
        start, min(start + chunks_per_program, tl.cdiv(n_features, 65536))
    ):
        end = min((chunk + 1) * 65536, n_features)
        reached = tl.zeros((COMPONENTS,), tl.int32) + (chunk * 65536 - 1)
        call = 0
        while tl.min(reached, axis=0) < end - 1:
            n = (call + tl.arange(0, GAPS // 2)).to(tl.uint32)[None, :] + zero
            w0, w1, w2, w3 = tl.philox(
                seed, n, i, zero + tl.cast(chunk, tl.uint32), zero + 1
            )
            call += GAPS // 2
            high, low = tl.interleave(w0, w2), tl.interleave(w1, w3)
            u = (
                (high >> 1).to(tl.float64) * 2.0**32 + low.to(tl.float64) + 0.5
            ) * 2.0**-63
            gaps = tl.minimum(tl.log(u) * per_log, 65536.0).to(tl.int32)
            features = reached[:, None] + tl.cumsum(gaps + 1, axis=1)
            reached = tl.max(features, axis=1)

            signs = (1 - 2 * (high & 1).to(tl.int32)).to(SUM)[:, :, None]
            inside = (features < end)[:, :, None] & mine[:, None, :]
            tile = features.to(tl.int64)[:, :, None] * n_vectors + vectors[None, None, :]
            if TRANSPOSED:
                tl.atomic_add(y_ptr + tile, signs * y[:, None, :], mask=inside)
            else:
                x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(SUM)
                y += tl.sum(signs * x, axis=1)
    if not TRANSPOSED:
        y_tile = (part * n_vectors + vectors)[None, :] * n_components
        tl.store(y_ptr + y_tile + components[:, None], y, mask=mine)


def visited_product(x, n_out, seed, density, transposed):
    """As ``drawn_product``, from the entries alone that are not zero."""
    n_vectors, n_in = x.shape
    n_features, n_components = (n_out, n_in) if transposed else (n_in, n_out)
    COMPONENTS, GAPS, VECTORS = 16, 8, 64
    tiles = triton.cdiv(n_components, COMPONENTS) * triton.cdiv(n_vectors, VECTORS)
    n_chunks = triton.cdiv(n_features, 65536)
    chunks_per_program = triton.cdiv(n_chunks, min(triton.cdiv(4096, tiles), n_chunks))
    n_parts = triton.cdiv(n_chunks, chunks_per_program)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (n_out, n_vectors) if transposed else (n_parts, n_vectors, n_out)
    y = torch.zeros(shape, dtype=dtype, device=x.device)
    visit_kernel[(tiles, n_parts)](
        y,
        x.T.contiguous(),
        n_vectors,
        n_features,
        n_components,
        chunks_per_program,
        1 / math.log1p(-density),
        seed,
        transposed,
        COMPONENTS,
        GAPS,
        VECTORS,
        tl.float64 if dtype == torch.float64 else tl.float32,
    )
    return y.T if transposed else y.sum(0)


# %%
# The operator chooses between the two by the density, gives the entries their size, and tells
# PyTorch how gradients flow.


@torch.library.custom_op("fast_and_right::sparse_jl", mutates_args=())
def sparse_jl_op(
    x: torch.Tensor, n_out: int, seed: int, density: float, transposed: bool
) -> torch.Tensor:
    n_vectors, n_in = x.shape
    y = torch.zeros(n_vectors, n_out, dtype=x.dtype, device=x.device)
    product, n_at_once = drawn_product, max(n_vectors, 1)
    if density <= 1 / 128:
        product, n_at_once = visited_product, max(2**26 // max(n_in, n_out), 64)
    if INTERPRET and x.dtype == torch.bfloat16:
        x = x.float()  # the interpreter's tl.dot takes bfloat16 for integers
    scale = math.sqrt(1 / (density * (n_in if transposed else n_out)))
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        for rows, some in zip(y.split(n_at_once), x.split(n_at_once), strict=True):
            if rows.numel():
                part = product(some, n_out, seed, density, transposed)
                rows.copy_(part.mul_(scale).to(y.dtype))
    return y


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


def check_arguments(name, x, size, n_out, seed, density, n_features):
    """The density as a number, if all arguments are as they should be."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"{name} must be a dense tensor, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}"
        )
    if x.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got {x.ndim}")
    if x.device.type != DEVICE:
        raise ValueError(
            f"{name} must be on device type {DEVICE!r}, got {x.device.type!r}"
        )
    for integer, value in ((size, n_out), ("seed", seed)):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{integer} must be an integer, got {type(value).__name__}")
    for integer, value in ((size, n_out), (f"{name}.shape[1]", x.shape[1])):
        if not 0 < value < 2**30:
            raise ValueError(f"{integer} must be in [1, 2^30), got {value}")
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
        any matrix product, an inf or NaN spreads to all components that it reaches.

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
    density = check_arguments(
        "x", x, "n_components", n_components, seed, density, n_features
    )
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
    density = check_arguments("y", y, "n_features", n_features, seed, density, n_features)
    return sparse_jl_op(y, int(n_features), signed(seed), density, True)


# %%
# Distances before and after
# --------------------------
#
# Forty random points with 1024 features have 780 distances. Project them to more and more
# components, and divide each squared distance after by the one before. The formula for the variance
# says how far the ratios should spread; for d = 1/3 it is :math:`2 / k` whatever the points.

import matplotlib.pyplot as plt

torch.manual_seed(0)
points = torch.randn(40, 1024, device=DEVICE)
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
# Projecting the unit vectors gives the matrix itself. Look at it, once drawn entry by entry and
# once with gaps: its shares of signs and zeros; whether its product is the projection, and the
# product with its transpose the gradient; and whether layout and number of components leave it
# alone.

D, k = 300, 96
for d in (0.1, 1 / 150):
    R = sparse_jl(torch.eye(D, device=DEVICE, dtype=torch.float64), k, seed=7, density=d)
    a = math.sqrt(1 / (d * k))
    torch.testing.assert_close(R.abs().unique().tolist(), [0.0, a])
    for name, entry, p in (("plus", a, d / 2), ("zero", 0, 1 - d), ("minus", -a, d / 2)):
        count = (R - entry).abs().lt(a / 2).sum().item()
        deviations = (count - D * k * p) / math.sqrt(D * k * p * (1 - p))
        assert abs(deviations) < 5
        print(
            f"{name:5}: {count:5} of {D * k}, {deviations:+.1f} deviations off the mean"
        )

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

small = torch.randn(2, 9, device=DEVICE, dtype=torch.float64, requires_grad=True)
torch.autograd.gradcheck(lambda x: sparse_jl(x, 6, seed=7, density=0.3), small)
print("passed:", *torch.library.opcheck(sparse_jl_op, (small, 6, 7, 0.3, False)))

# %%
# Then the variance. Two vectors make the extremes: in a *flat* one all features are equal, in a
# *spiky* one a single feature has all the length. Each component of a projection to k of them is,
# times :math:`\sqrt k`, a projection to one component, independent of the others, so one call gives
# thousands of samples.

k, D = 5000, 64
flat = torch.full((D,), 1 / math.sqrt(D), device=DEVICE)
spiky = torch.nn.functional.one_hot(torch.tensor(5), D).float().to(DEVICE)
for d in (1 / 3, 1 / 8):
    y = sparse_jl(torch.stack([flat, spiky]), k, seed=3, density=d)
    for name, x, squares in zip(("flat", "spiky"), (flat, spiky), k * y**2, strict=True):
        predicted = 2 + (1 / d - 3) * (x**4).sum().item()
        print(
            f"d = {d:.3f}, {name}: variance {squares.var():.2f}, predicted {predicted:.2f}"
        )

# %%
# The spiky vector pays for sparseness, as the formula says, and the flat one does not. The tests of
# this site hold these numbers to stated bounds, and compare the matrix, entry by entry, with one
# that NumPy and another implementation of Philox spell out.
#
# Handwritten digits
# ------------------
#
# Now real data: scikit-learn comes with 1797 handwritten digits of 8 by 8 pixels. Which share of a
# digit's ten nearest neighbours are still among the ten nearest after a projection, and how many of
# its nearest neighbours show the same digit? Each number is a mean over three seeds.

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
        for seed in range(3):
            found = neighbours(project(k, seed))
            kept += [(true[:, :, None] == found[:, None, :]).any(2).float().mean().item()]
            same += [(labels[found[:, 0]] == labels).float().mean().item()]
        rows.append([name, k, sum(kept) / 3, sum(same) / 3])
headers = ["", "components", "neighbours kept", "same digit"]
print(tabulate(rows, headers, floatfmt=("", "", ".1%", ".1%")))

# %%
# The two make the same kind of matrix, and so the same kind of error. With 64 features there is
# little to squeeze: the lemma is about thousands of features and more, and matrices that hurt. What
# differs is what has to be kept to project the next digit in the same way.

projection = SparseRandomProjection(32, random_state=0).fit(digits)
matrix = projection.components_
n_bytes = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
print(
    f"scikit-learn keeps {n_bytes} bytes for a matrix of 64 by 32; sparse_jl a seed, 8 bytes."
)

# %%
# Is it fast?
# -----------
#
# A million features, 4096 components, bfloat16. The matrix would have 2^32 entries and 8.6 GB.
# However few vectors you multiply with it, a stored matrix has to be read once, and that is the
# limit of the stored product: the dashed line is the time in which a copy moves as many bytes. (A
# product only reads, and can be a little faster than a copy, which writes as well.) The other way
# to store a sparse matrix is to keep only what is not zero, row after row, in the format CSR, as
# scikit-learn does: at "auto" that is one entry in 1024.

import warnings

FEATURES, COMPONENTS = 2**20, 4096


def milliseconds(run):
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def stored(k):
    return torch.randn(FEATURES, k, device=DEVICE, dtype=torch.bfloat16)


def stored_csr():
    per_row = FEATURES // 1024
    starts = torch.arange(0, COMPONENTS * per_row + 1, per_row, device=DEVICE)
    columns = (
        torch.randint(0, FEATURES, (COMPONENTS, per_row), device=DEVICE).sort().values
    )
    values = torch.randn(COMPONENTS * per_row, device=DEVICE, dtype=torch.bfloat16)
    size = COMPONENTS, FEATURES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that its support of CSR is a beta
        return torch.sparse_csr_tensor(starts, columns.flatten(), values, size=size)


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_vectors"],
        x_vals=[4**i for i in range(6)],
        x_log=True,
        y_log=True,
        line_arg="implementation",
        line_vals=["third", "auto", "stored", "csr", "copy"],
        line_names=[
            "sparse_jl, density 1/3",
            'sparse_jl, "auto"',
            "stored matrix",
            'stored as CSR, "auto"',
            "moving the matrix",
        ],
        styles=[
            ("#d55e00", "-"),
            ("#d55e00", ":"),
            ("#0072b2", "-"),
            ("#cc79a7", "-"),
            ("#555555", "--"),
        ],
        xlabel=f"vectors of 2^20 features, bfloat16\n{MACHINE}",
        ylabel="ms",
        plot_name="sparse-johnson-lindenstrauss",
        args={},
    )
)
def benchmark(n_vectors, implementation):
    x = torch.randn(n_vectors, FEATURES, device=DEVICE, dtype=torch.bfloat16)
    if implementation == "stored":
        matrix = stored(COMPONENTS)
        return milliseconds(lambda: x @ matrix)
    if (
        implementation == "copy"
    ):  # which reads half of the bytes and writes the other half
        half = stored(COMPONENTS // 2)
        return milliseconds(half.clone)
    if implementation == "csr":
        matrix, columns = stored_csr(), x.T.contiguous()
        return milliseconds(lambda: matrix @ columns)
    density = {"third": 1 / 3, "auto": "auto"}[implementation]
    return milliseconds(lambda: sparse_jl(x, COMPONENTS, 123, density))


if INTERPRET:
    print("No figure: speed is measured on a GPU only, and this run had none.")
elif __name__ == "__main__":
    times = benchmark.run(show_plots=True, return_df=True)
    print(tabulate(times, "keys", floatfmt=".2f", showindex=False, maxheadercolwidths=14))
    print("\nThe time, as a share of the stored matrix's:")
    for n_vectors, third, auto, matrix, csr, _ in times.values:
        print(
            f"{n_vectors:.0f} vectors: density 1/3 {third / matrix:.2f}, "
            f'"auto" {auto / matrix:.2f}, which is {auto / csr:.2f} of CSR\'s'
        )

# %%
# For few vectors computing the matrix beats reading it. The more vectors share a tile of R, the
# less reading counts, and the stored product is bound by the tensor cores alone, while drawing goes
# on: a kernel can keep sums for 256 vectors only, and the next 256 draw the matrix again. That is
# where a stored matrix pays, if you have the room for it. At "auto" so little of the matrix is left
# that CSR needs little room, and mostly wins: drawing it anew then saves the making and keeping of
# it, but seldom time. And with 16 vectors "auto" takes less time than with one: when their number is
# a multiple of 16 a thread loads eight neighbours at once, otherwise one at a time.
#
# And the room? Here is what each takes beyond input and result, by the allocator's own count: the
# partial sums, and at "auto" the transposed copy of ``x``. The transpose product costs no matrix
# either, but its result is large, and is held in float32 before it is rounded. At "auto" it takes
# longer than the product, because it adds to memory where the other only reads.

if __name__ == "__main__" and not INTERPRET:
    x = torch.randn(64, FEATURES, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randn(64, COMPONENTS, device=DEVICE, dtype=torch.bfloat16)
    rows = []
    for density in (1 / 3, "auto"):
        for name, run in (
            ("x R", lambda: sparse_jl(x, COMPONENTS, 123, density)),
            ("y R^T", lambda: sparse_jl_transpose(y, FEATURES, 123, density)),
        ):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            extra = torch.cuda.max_memory_allocated() - before - result.nbytes
            del result
            rows.append([name, density, milliseconds(run), extra / 2**20])
    print("64 vectors; a stored matrix takes 8192 MiB:\n")
    headers = ["product", "density", "ms", "MiB beyond the result"]
    print(tabulate(rows, headers, floatfmt=("", ".3f", ".2f", ".0f")))

# %%
# Exercises
# ---------
#
# Each of the first two has a function that checks your answer: it raises an error that says what is
# wrong, or says that it is right.
#
# 1. With density 1 an entry is a sign, and one bit would do. Write
#    ``sign_projection(x, n_components, seed)`` that makes 128 entries from a call of Philox. How
#    much faster does it get? ``check_sign_projection(sign_projection)`` checks it.
# 2. A *count sketch* is sparser still: each feature goes to one component, chosen at random, with a
#    random sign. Write ``count_sketch(x, n_components, seed)``, whose matrix has one entry of +1 or
#    -1 in each row. ``check_count_sketch(count_sketch)`` checks it. What is its variance?
# 3. The two kernels meet at a density of 1/128. Where is the best place for your GPU, and for 1, 64
#    and 1024 vectors?


def matrix_of(answer, n_features, n_components, seed):
    R = answer(torch.eye(n_features, device=DEVICE), n_components, seed)
    x = torch.randn(3, n_features, device=DEVICE)
    if not torch.allclose(answer(x, n_components, seed), x @ R, atol=1e-3):
        raise AssertionError("it does not multiply by a matrix that the seed decides")
    if torch.equal(
        R, answer(torch.eye(n_features, device=DEVICE), n_components, seed + 1)
    ):
        raise AssertionError("another seed makes the same matrix")
    return R


def check_share(name, share, expected, n):
    """A share of n decisions strays by five deviations once in a million."""
    if abs(share - expected) > 5 * math.sqrt(expected * (1 - expected) / n):
        raise AssertionError(f"{name}: {share:.4f}, where {expected:.4f} is expected")


def check_sign_projection(answer):
    signs = matrix_of(answer, 300, 80, seed=5) * math.sqrt(80)
    if not torch.allclose(signs.abs(), torch.ones_like(signs)):
        raise AssertionError("entries must be plus and minus 1 / sqrt(n_components)")
    check_share("plus signs", (signs > 0).float().mean().item(), 0.5, signs.numel())
    for name, a, b in (
        ("features", signs[1:], signs[:-1]),
        ("components", *signs.T.split(40)),
    ):
        share = (a * b > 0).float().mean().item()
        check_share(f"equal signs of two {name}", share, 0.5, a.numel())
    print("right")


def check_count_sketch(answer):
    R = matrix_of(answer, 2000, 20, seed=5)
    if not (R.abs().sum(1) == 1).all() or not (R.abs().amax(1) == 1).all():
        raise AssertionError("each row must have one entry of +1 or -1, and zeros")
    check_share("plus signs", (R > 0).sum().item() / 2000, 0.5, 2000)
    for i in range(20):
        check_share(
            f"features in component {i}", R[:, i].abs().mean().item(), 1 / 20, 2000
        )
    print("right")


# %%
# .. note::
#    Try it first.
#
#    1. A sixteenth of the calls, for the bits of a call are 128 signs. Don't expect a sixteenth of
#       the time: each bit has to be taken out of its word, and the product takes as long as before.
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
#          check_sign_projection(sign_projection)
#
#    2. A call for each feature decides on both, and ``atomic_add`` takes the feature to its
#       component. No length is lost, so nothing is scaled. The squared length has exactly the
#       variance of a projection with density 1, by the formula above,
#       :math:`\frac{2}{k} \left(1 - \sum_j x_j^4 / |x|^4\right)`, though each row has a single
#       entry.
#
#       .. code-block:: python
#
#          @triton.jit
#          def count_sketch_kernel(
#              y_ptr, x_ptr, n_vectors, n_features, n_components, seed,
#              VECTORS: tl.constexpr, BLOCK: tl.constexpr,
#          ):
#              vector = (tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)).to(tl.int64)[:, None]
#              feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
#              inside = (vector < n_vectors) & (feature < n_features)
#              words = tl.randint4x(seed, feature)
#              component = (words[0].to(tl.int64) * n_components) >> 32
#              x = tl.load(x_ptr + vector * n_features + feature, mask=inside, other=0.0)
#              x = tl.where((words[1] & 1) == 0, x, -x)
#              tl.atomic_add(y_ptr + vector * n_components + component, x, mask=inside)
#
#
#          def count_sketch(x, n_components, seed):
#              x = x.contiguous()
#              y = torch.zeros(len(x), n_components, dtype=x.dtype, device=x.device)
#              count_sketch_kernel[triton.cdiv(len(x), 16), triton.cdiv(x.shape[1], 256)](
#                  y, x, *x.shape, n_components, seed, 16, 256
#              )
#              return y
#
#
#          check_count_sketch(count_sketch)
#
#    3. Time ``drawn_product`` and ``visited_product`` with ``milliseconds``. The first takes the
#       same time at any density; the second's grows with the density, and once more for every 64
#       vectors, while the first holds sums for 256. With few vectors the loads of the second are
#       short, so expect the place to move to denser matrices at first, and to sparser ones as the
#       vectors get more than 16. But the two draw different matrices: who moves it changes the
#       results at the densities in between.
#
# References
# ----------
#
# - W. B. Johnson and J. Lindenstrauss, *Extensions of Lipschitz mappings into a Hilbert space*, 1984; and a short
#   proof: S. Dasgupta and A. Gupta, `An elementary proof of a theorem of Johnson and Lindenstrauss <https://doi.org/10.1002/rsa.10073>`_,
#   2003.
# - D. Achlioptas, `Database-friendly random projections <https://doi.org/10.1016/S0022-0000(03)00025-4>`_,
#   2003, and P. Li, T. Hastie and K. Church, `Very sparse random projections <https://doi.org/10.1145/1150402.1150436>`_,
#   2006.
# - scikit-learn's guide to `random projection <https://scikit-learn.org/stable/modules/random_projection.html>`_.
# - J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw, `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_,
#   2011.
# - M. Charikar, K. Chen and M. Farach-Colton, `Finding frequent items in data streams <https://doi.org/10.1016/S0304-3975(03)00400-6>`_,
#   2004: for the second exercise.
