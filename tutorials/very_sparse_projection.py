"""
.. _very sparse projection:

From one nonzero entry to the next
==================================

You multiply by a random matrix of which one entry in a thousand is not zero, and your kernel draws
only those: it jumps from each nonzero entry to the next. The kernel of
:ref:`sparse johnson-lindenstrauss` draws every entry, and would spend nearly all its time on
multiplying by zero. If you draw the distances between the nonzero entries instead, far fewer draws
are enough.

You will learn

- how to draw the gap to the next nonzero entry instead of the zeros in between;
- how a kernel computes the positions that it reads with ``tl.cumsum``, and adds with atomics;
- what sparseness costs in accuracy, and how a drawn matrix compares with a stored sparse one.

Needs: PyTorch, and :ref:`sparse johnson-lindenstrauss`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/visited_matrix.svg'
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
# How sparse may it be?
# ---------------------
#
# As in :ref:`sparse johnson-lindenstrauss`, we compute :math:`y = x R` with k components. An entry
# of R is +a or -a with probability d/2 each and otherwise 0, where d is the density and :math:`a =
# 1 / \sqrt{d\,k}`. At any density the squared length of y is on average that of x. But its variance
# grows as d falls:
#
# .. math:: \mathrm{Var} \, \frac{|y|^2}{|x|^2} = \frac{2}{k} + \frac{1/d - 3}{k} \sum_j \frac{x_j^4}{|x|^4}
#
# The last sum is 1 for a *spiky* vector, with all of its length in one feature. It is 1/D for a
# *flat* vector, with D equal features. So sparseness costs accuracy where few features carry most
# of the length, and next to nothing where the length is spread over many. Li, Hastie and Church
# recommend :math:`d = 1 / \sqrt D`, which scikit-learn calls ``"auto"``. For a million features
# that is about one in a thousand.
#
# Now count. With 2^20 features and 4096 components R has 2^32 entries. At a density of 1/1024 only
# 2^22 of them are not zero. Drawing all entries, eight from a call of Philox, takes 2^29 calls.
# Drawing the gaps between the nonzero ones, two from a call, takes 2^21.
#
# From nonzero to nonzero
# -----------------------
#
# The number of zeros before the next nonzero entry is random, too. We call it the *gap*. It is at
# least g with the probability :math:`(1 - d)^g`. So take a number u, uniform between 0 and 1, and
# skip
#
# .. math:: G = \left\lfloor \frac{\ln u}{\ln (1 - d)} \right\rfloor
#
# entries. G is at least g exactly if :math:`u \le (1 - d)^g`, which has the right probability. Try
# it: a gap of 0 should have the probability d, and the mean gap should be 1/d - 1.

import math

if __name__ == "__main__":
    torch.manual_seed(0)
    u = torch.rand(10**6, dtype=torch.float64)
    gaps = (u.log() / math.log1p(-1 / 1024)).floor()
    print(f"gaps of 0: {(gaps == 0).sum():.0f} in a million, expected {10**6 / 1024:.0f}")
    print(f"mean gap: {gaps.mean():.1f}, expected {1024 - 1}")

# %%
# .. image:: /_static/visited_matrix.svg
#    :alt: A column of R, mostly zeros, in two chunks. In each, arrows lead from one nonzero entry to the next. Each of these fetches one feature of all vectors from the transposed x.
#
# An entry can no longer be computed alone: to find the tenth nonzero entry of a column, you add up
# ten gaps. With one such sequence for each column, few programs could work at the same time. So a
# column is cut into *chunks* of 65536 features, each with a sequence of its own. **Gap n of chunk c
# in component i comes from the call of Philox with the counter (⌊n / 2⌋, i, c, 1): from words 0 and
# 1 if n is even, 2 and 3 if it is odd. The lowest bit of the first is the sign. Add 1/2 to the
# number in the other 63 bits and divide by 2^63: this is u.** (With the 1, the same seed gives
# other words than in the last lesson.)
#
# The kernel
# ----------
#
# A program has 16 components, and draws eight gaps of each at a time, until the slowest component
# is at the end of the chunk. ``tl.cumsum`` adds up the gaps, each with 1 for its nonzero entry, and
# these sums are the positions. At each position the program loads one feature of up to 64 vectors,
# so its tile has the axes component, gap and vector. The 64 numbers should be neighbours in memory,
# so the launch transposes x first.
#
# With ``TRANSPOSED`` the product is with the transpose of R, from components to features, which the
# backward pass needs. Then a program *adds* a component's value to each feature for which R has a
# nonzero entry. Several programs may add to the same feature at the same time, so they use
# ``tl.atomic_add``, which makes sure that no addition is lost. The order of the additions is left
# to chance, so this product may differ in its last bits from run to run.


@triton.jit
def visit_kernel(
    y_ptr, x_ptr, n_vectors, n_features, n_components, chunks_per_program,
    per_log: tl.float64, seed, TRANSPOSED: tl.constexpr, COMPONENTS: tl.constexpr,
    GAPS: tl.constexpr, VECTORS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
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
    start, n_chunks = part * chunks_per_program, tl.cdiv(n_features, 65536)
    for chunk in range(start, min(start + chunks_per_program, n_chunks)):
        end = min((chunk + 1) * 65536, n_features)
        reached = tl.zeros((COMPONENTS,), tl.int32) + (chunk * 65536 - 1)
        call = 0
        while tl.min(reached, axis=0) < end - 1:
            calls = (call + tl.arange(0, GAPS // 2)).to(tl.uint32)[None, :] + zero
            c = zero + tl.cast(chunk, tl.uint32)
            w0, w1, w2, w3 = tl.philox(seed, calls, i, c, zero + 1)
            call += GAPS // 2
            high, low = tl.interleave(w0, w2), tl.interleave(w1, w3)
            u = (high >> 1).to(tl.float64) * 2.0**32 + low.to(tl.float64) + 0.5
            u *= 2.0**-63  # between 0 and 1
            # A longer gap leaves the chunk, too, and might not fit into 32 bits.
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


# %%
# Launch it
# ---------
#
# Without ``TRANSPOSED``, each program takes one or several chunks and stores their sum, and these
# sums are added up afterwards. To keep the transposed copy small, vectors of a million features are
# projected 64 at a time.


def launch_visit(x, n_out, seed, density, transposed):
    """The product of ``x`` and the signs of R, or of its transpose."""
    n_vectors, n_in = x.shape
    n_features, n_components = (n_out, n_in) if transposed else (n_in, n_out)
    COMPONENTS, GAPS, VECTORS = 16, 8, 64
    tiles = triton.cdiv(n_components, COMPONENTS) * triton.cdiv(n_vectors, VECTORS)
    n_chunks = triton.cdiv(n_features, 65536)
    chunks_per_program = triton.cdiv(n_chunks, min(triton.cdiv(4096, tiles), n_chunks))
    n_parts = triton.cdiv(n_chunks, chunks_per_program)
    dtype, SUM = torch.float32, tl.float32
    if x.dtype == torch.float64:
        dtype, SUM = torch.float64, tl.float64
    shape = (n_out, n_vectors) if transposed else (n_parts, n_vectors, n_out)
    y = torch.zeros(shape, dtype=dtype, device=x.device)
    per_log = 1 / math.log1p(-density) if density < 1 else 0.0
    with torch.cuda.device_of(x):  # if there are several GPUs
        visit_kernel[(tiles, n_parts)](
            y, x.T.contiguous(), n_vectors, n_features, n_components, chunks_per_program,
            per_log, seed, transposed, COMPONENTS, GAPS, VECTORS, SUM,
        )  # fmt: skip
    return y.T if transposed else y.sum(0)


def visited_product(
    x: torch.Tensor, n_out: int, seed: int, density: float, transposed: bool
) -> torch.Tensor:
    """x R, or x times the transpose of R, from the nonzero entries of R alone."""
    n_vectors, n_in = x.shape
    y = torch.empty(n_vectors, n_out, dtype=x.dtype, device=x.device)
    if n_vectors > 0:
        a = math.sqrt(1 / (density * (n_in if transposed else n_out)))
        at_once = max(2**26 // max(n_in, n_out), 64)
        x = x.resolve_neg()  # apply a negation that PyTorch has put off
        for some, result in zip(x.split(at_once), y.split(at_once), strict=True):
            result.copy_(launch_visit(some, n_out, seed, density, transposed).mul_(a))
    return y


# %%
# Is it right?
# ------------
#
# The projected unit vectors are the matrix itself, so we can count its entries, and compare with
# products of PyTorch. Then we check the variance. A component times :math:`\sqrt k` is a projection
# to one component, so one call gives k samples.

if __name__ == "__main__":
    D, k, d = 300, 96, 1 / 150
    eye = torch.eye(D, device=DEVICE, dtype=torch.float64)
    R = visited_product(eye, k, 7, d, False)
    print(f"{(R > 0).sum()} plus, {(R < 0).sum()} minus; expected {D * k * d / 2:.0f}")
    x, dy = torch.randn_like(eye[:5]), torch.randn_like(R[:5])
    torch.testing.assert_close(visited_product(x, k, 7, d, False), x @ R)
    torch.testing.assert_close(visited_product(dy, D, 7, d, True), dy @ R.T)
    print("products with R and with its transpose agree")

    D, k, d = 64, 800 if INTERPRET else 400_000, 1 / 8
    flat, spiky = torch.full((D,), D**-0.5), torch.eye(D)[5]
    y = visited_product(torch.stack([flat, spiky]).to(DEVICE), k, 3, d, False)
    for name, x, squares in zip(("flat", "spiky"), (flat, spiky), k * y**2, strict=True):
        expected = 2 + (1 / d - 3) * (x**4).sum()
        print(f"{name}: variance {squares.var():.2f}, expected {expected:.2f}")

# %%
# Sparseness makes the spiky vector's result less accurate, but hardly the flat one's.
#
# Handwritten digits
# ------------------
#
# Take real data, 1797 digits of 8 by 8 pixels. How many of a digit's ten nearest neighbours are
# still among the ten nearest after a projection? scikit-learn makes the same kind of matrix, with
# the same density.

if __name__ == "__main__":
    from sklearn.datasets import load_digits
    from sklearn.random_projection import SparseRandomProjection

    digits = load_digits().data
    x = torch.tensor(digits, dtype=torch.float32, device=DEVICE)

    def neighbours(x):
        distances = torch.cdist(x, x).fill_diagonal_(math.inf)
        return distances.topk(10, largest=False).indices

    true = neighbours(x)
    for k in (16, 32):
        stored = SparseRandomProjection(k, density="auto", random_state=0).fit(digits)
        for name, y in (
            ("visited_product", visited_product(x, k, 0, 1 / 8, False)),
            ("scikit-learn", torch.tensor(stored.transform(digits), device=DEVICE)),
        ):
            found = neighbours(y)
            kept = (true[:, :, None] == found[:, None, :]).any(2).double().mean()
            print(f"{k} components, {name}: {kept:.1%} of the neighbours kept")

# %%
# The two lose about as many neighbours. To project the next digit, scikit-learn needs its matrix.
# You need only the seed.
#
# Is it fast?
# -----------
#
# The other way is to store the nonzero entries, row after row, with their columns. This format is
# called CSR. At 1/1024 it takes 2^22 × (2 + 8) bytes, 2 for a value and 8 for its column. We
# multiply it by a transposed view of x, and by a transposed copy. We time this copy, and also the
# copy that our kernel needs. The limit is the time in which a copy moves as many bytes as x has.

import warnings

FEATURES, COMPONENTS, DENSITY = 2**20, 4096, 1 / 1024
COLOURS = {"visited": "#d55e00 -", "CSR": "#0072b2 -", "CSR, x copied": "#cc79a7 -"}
COLOURS |= {"moving x": "#555555 --"}


def stored_csr():
    """The transpose of R, with as many nonzero entries in each row as expected."""
    n, per_row = round(COMPONENTS * FEATURES * DENSITY), round(FEATURES * DENSITY)
    starts = torch.arange(0, n + 1, per_row, device=DEVICE)
    columns = torch.randint(0, FEATURES, (COMPONENTS, per_row), device=DEVICE)
    columns = columns.sort().values.flatten()
    values = torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
    size = COMPONENTS, FEATURES
    with warnings.catch_warnings(action="ignore"):  # PyTorch's CSR is a beta
        return torch.sparse_csr_tensor(starts, columns, values, size=size)


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_vectors"], x_vals=[4**i for i in range(6)], x_log=True, y_log=True,
        line_arg="line", line_vals=list(COLOURS), line_names=list(COLOURS),
        styles=[tuple(style.split()) for style in COLOURS.values()],
        xlabel=f"vectors of 2^20 features, density 1/1024, bfloat16\n{MACHINE}",
        ylabel="ms", plot_name="very-sparse-projection", args={},
    )
)  # fmt: skip
def benchmark(n_vectors, line):
    x = torch.randn(n_vectors, FEATURES, device=DEVICE, dtype=torch.bfloat16)
    matrix = stored_csr()
    run = {
        "visited": lambda: visited_product(x, COMPONENTS, 123, DENSITY, False),
        "CSR": lambda: matrix @ x.T,
        "CSR, x copied": lambda: matrix @ x.T.contiguous(),
        "moving x": lambda: x.view(2, -1)[0].clone(),  # reads one half, writes the other
    }[line]
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    times = benchmark.run(show_plots=True, return_df=True)
    layout = {"floatfmt": (".0f", *4 * [".2f"]), "showindex": False}
    print(tabulate(times, "keys", maxheadercolwidths=14, **layout))
    for n_vectors, visited, *csr, _ in times.values:
        print(f"n_vectors {n_vectors:4.0f}: {visited / min(csr):.2f} of CSR's time")

# %%
# For one and for four vectors the stored CSR is far ahead: each load of the kernel has room for 64
# vectors, and most of it stays empty. The kernel takes less time for 16 vectors than for one: if
# the number of vectors is a multiple of 16, Triton knows that rows are aligned, and a thread loads
# eight neighbours at once. From there on the kernel is ahead. The figure does not show an x that is
# already stored transposed, for which CSR needs no copy. With drawing, you don't have to make, keep
# or send a CSR matrix: others need only the seed.
#
# The products with R and with its transpose need room for a transposed copy of their input and for
# sums in float32. The one with the transpose takes longer, because atomics read and write memory
# where the other product only reads.

if __name__ == "__main__" and not INTERPRET:
    x = torch.randn(64, FEATURES, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randn(64, COMPONENTS, device=DEVICE, dtype=torch.bfloat16)
    for name, run in (
        ("x R", lambda: visited_product(x, COMPONENTS, 123, DENSITY, False)),
        ("y R^T", lambda: visited_product(y, FEATURES, 123, DENSITY, True)),
    ):
        time = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() + run().nbytes
        extra = torch.cuda.max_memory_allocated() - before
        print(f"64 vectors, {name}: {time:.2f} ms, {extra >> 20} MiB beside the result")

# %%
# As a public function
# --------------------
#
# This is the code of :ref:`sparse johnson-lindenstrauss`, with ``visited_product`` in place of
# ``drawn_product``. The density "auto" and ``apply`` are new; ``apply`` saves CPU time.

import numbers

very_sparse_jl_op = torch.library.custom_op(
    "fast_and_right::very_sparse_jl", visited_product, mutates_args=()
)
very_sparse_jl_op.register_fake(lambda x, n_out, *matrix: x.new_empty(len(x), n_out))


class VerySparseJL(torch.autograd.Function):
    @staticmethod
    def forward(x, n_out, seed, density, transposed):
        run = very_sparse_jl_op if torch.compiler.is_compiling() else visited_product
        return run(x, n_out, seed, density, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, *ctx.matrix, ctx.transposed = inputs
        ctx.n_in = x.shape[1]

    @staticmethod
    def backward(ctx, dy):
        dx = VerySparseJL.apply(dy, ctx.n_in, *ctx.matrix, not ctx.transposed)
        return dx, None, None, None, None


quick_apply = super(torch.autograd.Function, VerySparseJL).apply


def apply(*arguments):
    # Function.apply is slow, because it looks up names for the compiler and torch.func.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return VerySparseJL.apply(*arguments)
    return quick_apply(*arguments)


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


def visit(name, x, size, n_out, seed, density, transposed):
    auto = isinstance(density, str) and density == "auto"
    if isinstance(density, str) and not auto:
        raise TypeError(f'density must be a number or "auto", got {density!r}')
    n_out, seed, d = checked(name, x, size, n_out, seed, 1 if auto else density)
    if auto:
        d = 1 / math.sqrt(n_out if transposed else x.shape[1])
    return apply(x, n_out, seed, d, transposed)


def very_sparse_jl(x, n_components, seed, density="auto"):
    """Project vectors with a very sparse random matrix R that is drawn, not stored: x R.

    Like ``sparse_jl``, but the time grows with ``density``, and the matrix is another one.
    ``density`` is from 2^-32 to 1; "auto" is 1 / sqrt(features), after Li, Hastie and Church.
    The result has the same bits in each run; its gradient may differ in the last bits.
    """
    return visit("x", x, "n_components", n_components, seed, density, False)


def very_sparse_jl_transpose(y, n_features, seed, density="auto"):
    """Multiply by the transpose of the matrix of ``very_sparse_jl``: y R^T.

    The last bits of the result may differ from run to run.
    """
    return visit("y", y, "n_features", n_features, seed, density, True)


# %%
# As in :ref:`sparse johnson-lindenstrauss`, a call takes the CPU longer than ``x @ R``, so it is
# better to store small matrices.
#
# Exercises
# ---------
#
# 1. A *count sketch* is sparser still: each feature goes to one component, chosen at random, with a
#    random sign. Write ``count_sketch(x, n_components, seed)``, whose matrix has one entry of +1 or
#    -1 in each row. What is the variance of :math:`|y|^2 / {|x|}^2`?
# 2. Above which density is it faster to draw every entry, for 1, 64 and 1024 vectors? Time
#    ``drawn_product`` of :ref:`sparse johnson-lindenstrauss` against ``visited_product``.
#
# .. note::
#    Try it first.
#
#    1. A call for each feature chooses its component and its sign, and ``atomic_add`` adds the
#       feature to that component. On average the squared length stays the same, so nothing is
#       scaled. The variance is that of a projection with density 1, by the formula above,
#       :math:`\frac{2}{k} \left(1 - \sum_j x_j^4 / {|x|}^4\right)`, though each row has a single
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
#          R = count_sketch(torch.eye(500, device=DEVICE), 20, 5)
#          assert (R.abs().sum(1) == 1).all() and (R.abs().amax(1) == 1).all()
#          # More than five standard deviations: once in a million.
#          assert abs((R > 0).sum() / 500 - 1 / 2) < 5 * math.sqrt(1 / 4 / 500)
#          assert ((R != 0).sum(0) / 500 - 1 / 20).abs().max() < 5 * math.sqrt(19 / 400 / 500)
#
#    2. Drawing every entry takes the same time at any density. The time of visiting grows with the
#       density. Visiting also starts again for every 64 vectors, and drawing only for every 256.
#       For one vector most of each load stays empty. So the density above which drawing is faster
#       should be low for 1 vector, higher for 64, and lower again for 1024.
#
# References
# ----------
#
# - P. Li, T. Hastie and K. Church, `Very sparse random projections <https://doi.org/10.1145/1150402.1150436>`_,
#   2006.
# - scikit-learn's guide to `random projection <https://scikit-learn.org/stable/modules/random_projection.html>`_.
# - M. Charikar, K. Chen and M. Farach-Colton, `Finding frequent items in data streams <https://doi.org/10.1016/S0304-3975(03)00400-6>`_,
#   2004: for the first exercise.
