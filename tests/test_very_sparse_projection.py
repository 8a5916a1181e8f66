import inspect
import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from sparse_johnson_lindenstrauss import checked as checked_there
from test_sparse_johnson_lindenstrauss import SEEDS, bound, philox
from very_sparse_projection import (
    DEVICE,
    INTERPRET,
    checked,
    very_sparse_jl,
    very_sparse_jl_op,
    very_sparse_jl_transpose,
)

DENSITIES = [1, 0.9, 1 / 3, 1 / 8, 1 / 128, 1 / 150, 0.001]


def visited_signs(n_features, n_components, seed, density):
    """The definition, gap by gap."""
    per_log = 1 / math.log1p(-density) if density < 1 else 0
    signs = np.zeros((n_features, n_components), int)
    for i in range(n_components):
        for c in range(-(-n_features // 65536)):
            end = min(65536 * (c + 1), n_features)
            j, n = 65536 * c - 1, 0
            while True:
                words = philox(seed, (n // 2, i, c, 1), rounds=10)[2 * (n % 2) :]
                u = ((int(words[0]) >> 1) * 2**32 + int(words[1]) + 0.5) / 2**63
                j += 1 + math.floor(min(math.log(u) * per_log, 65536))
                if j >= end:
                    break
                signs[j, i] = -1 if words[0] & np.uint64(1) else 1
                n += 1
    return signs


def matrix(n_features, n_components, seed, density):
    signs = visited_signs(n_features, n_components, seed, density)
    scale = math.sqrt(1 / (density * n_components))
    return torch.from_numpy(signs * scale).to(DEVICE)


def spelled_out(n_features, n_components, seed, density):
    eye = torch.eye(n_components, device=DEVICE, dtype=torch.float64)
    return very_sparse_jl_transpose(eye, n_features, seed, density).T


@pytest.fixture(params=[1 / 150])
def density(request):
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_matrix_is_the_one_that_the_seed_spells_out(density, seed):
    R = spelled_out(300, 5, seed, density)
    torch.testing.assert_close(R, matrix(300, 5, seed, density))


@pytest.mark.parametrize("d", DENSITIES)
def test_matrix_of_any_density(d):
    torch.testing.assert_close(spelled_out(700, 11, 7, d), matrix(700, 11, 7, d))


def test_smallest_and_largest_density():
    assert (spelled_out(500, 9, 3, 1).abs() == 1 / 3).all()
    tiny = spelled_out(500, 9, 3, 2**-32)
    assert tiny.isfinite().all() and (tiny != 0).sum() <= 1


def test_density_by_default():
    eye = torch.eye(64, device=DEVICE)
    assert torch.equal(very_sparse_jl(eye, 9, 3), very_sparse_jl(eye, 9, 3, 1 / 8))
    y = torch.eye(9, device=DEVICE)
    auto = very_sparse_jl_transpose(y, 64, 3)
    assert torch.equal(auto, very_sparse_jl_transpose(y, 64, 3, 1 / 8))
    assert very_sparse_jl(eye[:1, :1], 1, 3).abs() == 1  # a single feature


@pytest.mark.parametrize(
    ("n_vectors", "n_features", "n_components"),
    [(1, 1, 1), (3, 2, 5), (16, 64, 64), (17, 65, 129), (70, 700, 3), (5, 1000, 300)],
)
def test_product(randn, density, dtype, n_vectors, n_features, n_components):
    R = matrix(n_features, n_components, 5, density)
    x = randn(n_vectors, n_features, dtype=dtype)
    y = very_sparse_jl(x, n_components, 5, density)
    assert y.dtype == dtype and y.is_contiguous()
    exact = x.double() @ R
    # Sums of float32, rounded to dtype: a few units of its last place, beside the sizes summed.
    tolerance = 4 * (
        torch.finfo(dtype).eps * exact.abs() + 2**-23 * (x.double().abs() @ R.abs())
    )
    if dtype == torch.float64:
        tolerance = 2**-48 * (x.abs() @ R.abs())
    assert ((y - exact).abs() <= tolerance).all()

    g = randn(n_vectors, n_components, dtype=dtype)
    dx = very_sparse_jl_transpose(g, n_features, 5, density)
    assert dx.dtype == dtype and dx.shape == x.shape and dx.is_contiguous()
    torch.testing.assert_close(dx, (g.double() @ R.T).to(dtype))


@pytest.mark.parametrize("n_features", [65535, 65536, 65537, 131080])
def test_chunks(randn, n_features):
    R = matrix(n_features, 3, 5, 1 / 2000)
    torch.testing.assert_close(spelled_out(n_features, 3, 5, 1 / 2000), R)
    x = randn(2, n_features, dtype=torch.float64)
    torch.testing.assert_close(very_sparse_jl(x, 3, 5, 1 / 2000), x @ R)


def test_two_runs_give_the_same_bits(randn, density):
    x = randn(20, 5000)
    assert torch.equal(
        very_sparse_jl(x, 40, 5, density), very_sparse_jl(x, 40, 5, density)
    )


def test_result_depends_on_the_other_vectors_by_rounding_only(randn, density):
    """Another number of vectors means other tiles."""
    x = randn(300, 600, dtype=torch.bfloat16)
    y = very_sparse_jl(x, 40, 5, density)
    for n in (1, 16, 17, 64, 65, 256):
        torch.testing.assert_close(very_sparse_jl(x[:n], 40, 5, density), y[:n])


def test_components_do_not_depend_on_how_many_there_are(randn, density):
    x = randn(3, 500, dtype=torch.float64)
    y = very_sparse_jl(x, 300, 5, density)
    for k in (1, 7, 64, 299):
        expected = y[:, :k] * math.sqrt(300 / k)
        torch.testing.assert_close(very_sparse_jl(x, k, 5, density), expected)


def test_features_do_not_depend_on_how_many_there_are(randn, density):
    x = randn(3, 500, dtype=torch.float64)
    padded = torch.nn.functional.pad(x, (0, 333))
    expected = very_sparse_jl(x, 30, 5, density)
    torch.testing.assert_close(very_sparse_jl(padded, 30, 5, density), expected)


def test_layouts(randn, density, layout):
    x = randn(33, 47)
    assert torch.equal(
        very_sparse_jl(layout(x), 9, 5, density), very_sparse_jl(x, 9, 5, density)
    )


def test_expanded_and_negated_views(randn, density):
    row = randn(1, 47).expand(5, 47)
    expected = very_sparse_jl(row.clone(), 9, 5, density)
    assert torch.equal(very_sparse_jl(row, 9, 5, density), expected)
    z = torch.complex(randn(5, 47), randn(5, 47)).conj().imag
    assert z.is_neg()
    expected = very_sparse_jl(z.resolve_neg(), 9, 5, density)
    assert torch.equal(very_sparse_jl(z, 9, 5, density), expected)


def test_no_vectors(density):
    x = torch.zeros(0, 30, device=DEVICE, requires_grad=True)
    y = very_sparse_jl(x, 7, 5, density)
    assert y.shape == (0, 7)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 30)


def test_seeds_and_numbers_of_numpy(randn, density):
    x = randn(3, 200)
    y = very_sparse_jl(x, 9, 2**64 - 1, density)
    assert torch.equal(y, very_sparse_jl(x, 9, -1, density))
    assert not torch.equal(y, very_sparse_jl(x, 9, 2**32 - 1, density))
    same = very_sparse_jl(x, np.int32(9), np.int64(-1), np.float64(density))
    assert torch.equal(y, same)


# How random are the entries? Each check fails for one sound generator in a million.


@pytest.mark.parametrize("d", [1 / 150, pytest.param(1 / 8, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("seed", [0, -7])
def test_shares_of_signs_and_zeros(d, seed):
    n_features, n_components = (320, 128) if INTERPRET else (2**13, 2**12)
    x = torch.eye(n_features, device=DEVICE, dtype=torch.float16)
    signs = very_sparse_jl(x, n_components, seed, d).sign()
    # Apart for each place of a feature in its group of 32.
    counts = torch.stack([(signs == s).sum(1).view(-1, 32).sum(0) for s in (1, 0, -1)])
    n = signs.numel() / 32
    expected = n * torch.tensor([d / 2, 1 - d, d / 2])[:, None]
    chi_squared = ((counts.cpu() - expected) ** 2 / expected).sum().item()
    assert chi_squared < chi2.isf(1e-6, 64)


@pytest.mark.parametrize("d", [1 / 150, pytest.param(1 / 8, marks=pytest.mark.gpu)])
def test_neighbouring_entries_agree_by_chance_only(d):
    n_features, n_components = (320, 128) if INTERPRET else (2**13, 2**12)
    x = torch.eye(n_features, device=DEVICE, dtype=torch.float16)
    signs = very_sparse_jl(x, n_components, 3, d).sign()
    other = very_sparse_jl(x, n_components, 4, d).sign()
    pairs = [(signs, other), (signs[:, 1:], signs[:, :-1])]
    pairs += [(signs[s:], signs[:-s]) for s in (1, 2, 3, 4, 8, 16, 32)]
    for a, b in pairs:
        for equal in (1, -1):
            count = ((a * b) == equal).sum().item()
            # Neighbouring comparisons share an entry, which at most doubles their variance.
            assert abs(count - a.numel() * d**2 / 2) < 2 * bound(a.numel(), d**2 / 2)


@pytest.mark.parametrize("d", [1 / 150, pytest.param(1 / 8, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["flat", "spiky", "between"])
def test_mean_and_variance_of_the_squared_length(d, kind):
    """Var(|y|^2 / |x|^2) = (2 + (1/d - 3) sum(x^4) / |x|^4) / k, here for many k = 1 at once."""
    n, n_features = (2000, 96) if INTERPRET else (400_000, 96)
    x = {
        "flat": torch.ones(n_features),
        "spiky": torch.eye(n_features)[5],
        "between": 1 / torch.arange(1.0, n_features + 1),
    }[kind].double()
    x /= x.norm()
    y = very_sparse_jl(x[None].to(DEVICE, torch.float32), n, 11, d)[0].double().cpu()
    squares = n * y**2
    deviation = squares - 1
    s = 1 / d
    variance = 2 + (s - 3) * (x**4).sum().item()
    assert abs(squares.mean() - 1) < 5 * math.sqrt(variance / n) + 1e-6
    error = (deviation**2).mean() - variance
    assert abs(error) < 5.5 * (deviation**2).std() / math.sqrt(n) + 1e-5


# The gradient


def test_gradients_of_first_and_second_order(randn, density):
    x = randn(1, 6, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(
        lambda x: very_sparse_jl(x, 3, 5, density), x, fast_mode=True
    )
    torch.autograd.gradgradcheck(
        lambda x: very_sparse_jl(x, 3, 5, density), x, fast_mode=True
    )
    g = randn(1, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(
        lambda g: very_sparse_jl_transpose(g, 6, 5, density), g, fast_mode=True
    )


def test_the_checks_are_those_of_the_other_lesson():
    assert inspect.getsource(checked) == inspect.getsource(checked_there)


def test_forward_mode_is_an_error_and_not_a_zero(randn):
    x = randn(3, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
            very_sparse_jl(dual, 4, 5)


def test_gradients_of_functions(randn, density):
    x, R = randn(3, 30), matrix(30, 7, 5, density).float()
    gradient = torch.func.grad(
        lambda x: very_sparse_jl(x, 7, 5, density).square().sum() / 2
    )
    torch.testing.assert_close(gradient(x), x @ R @ R.T)
    twice = torch.func.grad(lambda x: gradient(x).square().sum() / 2)
    torch.testing.assert_close(twice(x), x @ R @ R.T @ R @ R.T)


def test_the_result_may_be_changed_in_place(randn, density):
    for n in (1, 40):
        x = randn(n, 30).requires_grad_()
        y = very_sparse_jl(x, 7, 5, density)
        expected = 2 * y.detach()
        assert torch.equal(y.mul_(2), expected)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        expected = 2 * very_sparse_jl_transpose(torch.ones_like(y), 30, 5, density)
        torch.testing.assert_close(dx, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # interpreting
def test_nan_and_infinity_spread(dtype):
    density = 1 / 20
    x = torch.zeros(3, 40, dtype=dtype, device=DEVICE)
    x[1, 3], x[2, 3] = math.nan, math.inf
    y, R = very_sparse_jl(x, 50, 5, density), matrix(40, 50, 5, density)
    assert not y[0].any() and not y[1:, R[3] != 0].isfinite().any()
    assert not y[:, R[3] == 0].any()


def test_incoming_gradients_of_any_layout(randn, density, layout):
    gradient, grads = randn(13, 17), []
    for incoming in (gradient, layout(gradient), randn(1, 1).expand(13, 17)):
        x = randn(13, 30).requires_grad_()
        grads += torch.autograd.grad(very_sparse_jl(x, 17, 5, density), x, incoming)
        expected = very_sparse_jl_transpose(incoming.contiguous(), 30, 5, density)
        torch.testing.assert_close(grads[-1], expected)
    torch.testing.assert_close(grads[0], grads[1])


def test_nothing_is_saved_for_the_backward_pass(randn, density):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        very_sparse_jl(randn(3, 30).requires_grad_(), 7, 5, density)
    assert not saved


def test_operator_keeps_its_promises(randn, dtype, density):
    x = randn(6, 40, dtype=dtype)
    for sample in (x, x.T, x[:0]):
        for transposed in (False, True):
            torch.library.opcheck(very_sparse_jl_op, (sample, 7, 5, density, transposed))


def test_compiles_without_a_graph_break(randn, density, backend):
    def step(x, k, seed):
        return very_sparse_jl(2 * x, k, seed, density) + 1

    torch.compiler.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for shape, k, seed in (((5, 300), 7, 2**63 + 1), ((6, 200), 8, -3), ((7, 100), 9, 4)):
        x = randn(*shape).requires_grad_()
        y, expected = compiled(x, k, seed), step(x, k, seed)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(z.sum(), x)[0] for z in (y, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a dense tensor, not nested, got list"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x must be float16.*got torch.int32"),
        ({"x": torch.ones(3, 4).bool()}, TypeError, "got torch.bool"),
        ({"x": torch.ones(3, 4).cfloat()}, TypeError, "got torch.complex64"),
        (
            {"x": torch.ones(3, 4).to(torch.float8_e5m2)},
            TypeError,
            "got torch.float8_e5m2",
        ),
        ({"x": torch.ones(3, 4).to_sparse()}, TypeError, "x must be a dense tensor"),
        ({"x": torch.ones(3, 4, device="meta")}, ValueError, "device type.*got meta"),
        ({"x": torch.ones(3)}, ValueError, r"x must be a matrix.*got \(3,\)"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x must be a matrix.*got \(3, 0\)"),
        ({"n_components": 2.0}, TypeError, "n_components must be an integer, got 2.0"),
        ({"n_components": 0}, ValueError, "n_components must be from 1 to .*, got 0"),
        ({"n_components": 2**30}, ValueError, "n_components must be from 1 to"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0"),
        ({"seed": 2**64}, ValueError, "seed must be from .*, got 18446744073709551616"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must be from"),
        ({"density": "full"}, TypeError, "density must be a number.*, got 'full'"),
        ({"density": None}, TypeError, "density must be a number, got None"),
        ({"density": 0}, ValueError, "density must be from .* to 1, got 0"),
        ({"density": 1.1}, ValueError, "density must be from .* to 1, got 1.1"),
        ({"density": math.nan}, ValueError, "density must be from .* to 1, got nan"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(3, 4), "n_components": 2, "seed": 0} | change
    if isinstance(arguments["x"], torch.Tensor) and arguments["x"].device.type == "cpu":
        arguments["x"] = arguments["x"].to(DEVICE)
    with pytest.raises(error, match=message):
        very_sparse_jl(**arguments)
    transposed = {"y": arguments.pop("x"), "n_features": arguments.pop("n_components")}
    message = re.sub("^x", "y", message).replace("n_components", "n_features")
    with pytest.raises(error, match=message):
        very_sparse_jl_transpose(**transposed, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1 / 200])
def test_more_than_2_to_the_31_elements(d):
    x = torch.zeros(2**14, 2**17 + 8, device=DEVICE, dtype=torch.bfloat16)
    x[-3:, -9:] = 1
    for view in (x, x.T.contiguous().T):
        y = very_sparse_jl(view, 64, 5, d)
        torch.testing.assert_close(y[-3:], very_sparse_jl(x[-3:], 64, 5, d))
        assert not y[:-3].any()


@pytest.mark.gpu
@pytest.mark.parametrize("d", [1 / 1000, "auto"])
def test_no_matrix_is_stored(d):
    x = torch.randn(64, 2**20, device=DEVICE, dtype=torch.bfloat16)
    y = very_sparse_jl(x, 4096, 5, d)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = very_sparse_jl(x, 4096, 5, d)
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert extra < 0.03 * 2**20 * 4096 * 2


@pytest.mark.gpu
def test_in_a_cuda_graph(density):
    x = torch.randn(64, 3000, device=DEVICE)
    very_sparse_jl(x, 50, 5, density)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = very_sparse_jl(x, 50, 5, density)
    for _ in range(2):
        x.copy_(torch.randn(64, 3000))
        graph.replay()
        assert torch.equal(y, very_sparse_jl(x, 50, 5, density))


@pytest.mark.gpu
def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="got cpu"):
        very_sparse_jl(torch.ones(3, 4), 2, 0)
