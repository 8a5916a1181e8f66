import math

import numpy as np
import pytest
import softmax_tiles
import torch
from softmax_tiles import (
    DEVICE,
    INTERPRET,
    launch_tile_backward,
    launch_tile_softmax,
    tile_backward_op,
    tile_softmax,
    tile_softmax_op,
)

# Relative. Half a unit in the last place of the result (a whole one in the interpreter, which cuts
# bfloat16 off), and a few units of the arithmetic on the way.
TOLERANCE = {
    torch.float16: 2**-11 + 2**-20,
    torch.bfloat16: (2**-7 if INTERPRET else 2**-8) + 2**-20,
    torch.float32: 2**-20,
    torch.float64: 2**-48,
}
# Below these, results are denormal and only their distance counts.
TINY = {
    torch.float16: 2**-24,
    torch.bfloat16: 2**-126,
    torch.float32: 2**-126,
    torch.float64: 2**-1022,
}


def check(x, function=tile_softmax):
    y = function(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    # torch.softmax adds a row up in one go, torch.sum in a tree, which loses less in wide rows.
    distance = x.cpu().double() - x.cpu().double().amax(-1, keepdim=True)
    exact = distance.exp() / distance.exp().sum(-1, keepdim=True)
    error = (y.cpu().double() - exact).abs()
    # Rounding x - max is magnified by exp: a relative error for every unit of distance.
    magnified = (
        distance.abs() * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    )
    assert (error <= exact * (TOLERANCE[x.dtype] + magnified) + TINY[x.dtype]).all()


def check_gradient(x, dy, function=tile_softmax):
    (dx,) = torch.autograd.grad(function(x), x, dy)
    assert dx.shape == x.shape and dx.dtype == x.dtype
    exact_x = x.detach().double().requires_grad_()
    y = torch.softmax(exact_x, dim=-1)
    (exact,) = torch.autograd.grad(y, exact_x, dy.double())
    # What is rounded is y, dy - sum(y dy), and in half precision the y that was kept.
    scale = y.detach() * (
        dy.double().abs() + (y.detach() * dy.double()).abs().sum(-1, True)
    )
    bound = 4 * TOLERANCE[x.dtype] * scale + TINY[x.dtype] * (1 + dy.double().abs())
    assert ((dx.double() - exact).abs() <= bound).all()


# On both sides of the limits of a tile; the last is the widest row of float64.
WIDTHS = [1, 2, 3, 31, 32, 33, 127, 128, 129, 384, 781, 1000, 1024]
WIDTHS += [4095, 4096, 4097, 5000, 8192]


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_widths(randn, dtype, n_cols):
    check(randn(5 if n_cols > 1000 else 70, n_cols, dtype=dtype))


@pytest.mark.parametrize("n_cols", [8193, 12160, 16383, 16384])
def test_the_widest_rows(randn, n_cols):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = randn(3, n_cols, dtype=dtype).requires_grad_()
        check(x.detach())
        check_gradient(x, randn(3, n_cols, dtype=dtype))


@pytest.mark.parametrize("tile", [1, 4096])
@pytest.mark.parametrize("align", [True, False])
def test_one_row_a_program_and_without_alignment(randn, tile, align):
    for n_cols in (5, 40, 256):
        x = randn(9, n_cols, dtype=torch.bfloat16)
        y = launch_tile_softmax(x, tile=tile, align=align)
        assert torch.equal(y, launch_tile_softmax(x))


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 5), (2, 1, 3, 7)])
def test_any_number_of_dimensions(randn, shape):
    check(randn(*shape))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, dtype):
    y = tile_softmax(torch.empty(shape, dtype=dtype, device=DEVICE))
    assert y.shape == shape and y.dtype == dtype


def test_layouts(randn, layout):
    check(layout(randn(6, 37)))


def test_rows_that_do_not_begin_at_multiples_of_16_bytes(randn, dtype):
    storage = randn(6 * 101 + 1, dtype=dtype)
    for first in (0, 1):
        for stride in (99, 100):
            check(storage.as_strided((5, 40), (stride, 1), first))


def test_expanded(randn):
    check(randn(1, 20).expand(4, 20))
    check(randn(4, 1).expand(4, 20))
    check(randn(20, 2, 2).permute(2, 1, 0))


def test_input_is_left_alone(randn):
    x = randn(3, 50)
    before = x.clone()
    tile_softmax(x)
    assert torch.equal(x, before)


def test_large_values(randn):
    check(randn(3, 100) * 1e4)
    check(randn(3, 100) * 1e4 + 1e6)
    check(torch.full((2, 100), 3e38, device=DEVICE))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
def test_special_values(dtype):
    inf, nan = math.inf, math.nan
    rows = [[1, -inf, 2], [-inf, -inf, -inf], [1, nan, 2], [1, inf, 2], [-inf, 0, -inf]]
    x = torch.tensor(rows, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(tile_softmax(x), torch.softmax(x, dim=-1), equal_nan=True)


def test_same_bits_twice(randn):
    x = randn(5, 1000)
    y = tile_softmax(x)
    assert torch.equal(tile_softmax(x), y)
    assert torch.equal(launch_tile_backward(x, y), launch_tile_backward(x, y))


@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 5), (7,)])
def test_naive_softmax(randn, shape):
    x = 1e4 * randn(*shape, dtype=torch.float64)
    y = softmax_tiles.naive_softmax(x)
    torch.testing.assert_close(y, torch.softmax(x, dim=-1))


def test_negated_views():
    z = torch.randn(4, 6, dtype=torch.complex64, device=DEVICE)
    torch.testing.assert_close(
        tile_softmax(z.conj().imag), torch.softmax(-z.imag, dim=-1)
    )
    negated = z.conj().imag.as_strided((11,), (1,))
    assert negated.is_neg() and negated.is_contiguous()
    torch.testing.assert_close(tile_softmax(negated), torch.softmax(negated, dim=-1))
    y = torch.softmax(torch.randn(11, device=DEVICE), dim=-1)
    torch.testing.assert_close(
        launch_tile_backward(negated, y), launch_tile_backward(negated.clone(), y)
    )


# The gradient


@pytest.mark.parametrize("n_cols", [1, 2, 3, 33, 128, 781, 4097, 8192])
def test_gradient(randn, dtype, n_cols):
    x = randn(5, n_cols, dtype=dtype).requires_grad_()
    check_gradient(x, randn(5, n_cols, dtype=dtype))


def test_gradients_of_any_layout(randn, layout):
    x = layout(randn(6, 17)).requires_grad_()
    check_gradient(x, layout(randn(6, 17)))
    check_gradient(x, randn(6, 1).expand(6, 17))


def test_gradients_of_first_and_second_order(randn):
    x = randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(tile_softmax, x, fast_mode=True)
    torch.autograd.gradgradcheck(tile_softmax, x, fast_mode=True)


def test_a_gradient_that_can_be_differentiated_is_the_same(randn, dtype):
    x, dy = randn(4, 33, dtype=dtype).requires_grad_(), randn(4, 33, dtype=dtype)
    plain, differentiable = (
        torch.autograd.grad(tile_softmax(x), x, dy, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    assert differentiable.requires_grad and not plain.requires_grad
    # Both subtract numbers of the size of y and dy that nearly cancel.
    atol = torch.finfo(dtype).eps * tile_softmax(x).max().item() * dy.abs().max().item()
    torch.testing.assert_close(plain, differentiable.detach(), rtol=2**-6, atol=atol)


def test_gradients_of_torch_func(randn):
    x, w = randn(3, 7), randn(3, 7)
    for grad in (
        torch.func.grad,
        lambda f: lambda x: torch.func.vjp(f, x)[1](f(x) * 0 + 1)[0],
    ):
        found, expected = (
            grad(lambda x, f=f: (f(x) * w).sum())(x)
            for f in (tile_softmax, lambda x: torch.softmax(x, dim=-1))
        )
        torch.testing.assert_close(found, expected)

    def second(f):
        first = torch.func.grad(lambda x: (f(x) * w).sum())
        return torch.func.grad(lambda x: first(x).square().sum())(x)

    torch.testing.assert_close(
        second(tile_softmax), second(lambda x: torch.softmax(x, dim=-1))
    )
    with torch.no_grad():
        y, pull_back = torch.func.vjp(tile_softmax, x)
        torch.testing.assert_close(
            pull_back(w)[0], torch._softmax_backward_data(w, y, -1, y.dtype)
        )


def test_forward_mode_is_an_error_and_not_a_zero(randn):
    x = randn(3, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError):
            tile_softmax(dual)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_gradients(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    tile_softmax(x).sum().backward()
    assert x.grad.shape == shape


def test_operators_keep_their_promises(randn, dtype):
    x = randn(6, 7, dtype=dtype)
    for sample in (x, x.T, x[:0]):
        torch.library.opcheck(tile_softmax_op, (sample,))
    torch.library.opcheck(tile_backward_op, (x, x))


def test_compiles_without_a_graph_break(randn, backend):
    def attend(x):
        return 2 * tile_softmax(x / 3)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for shape in ((4, 30), (5, 31)):
        x = randn(*shape).requires_grad_()
        y, expected = compiled(x), attend(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
        )


WRONG = [
    ([1.0, 2.0], TypeError, "x must be a dense tensor, not nested, got list"),
    (np.ones(3), TypeError, "x must be a dense tensor, not nested, got ndarray"),
    (torch.ones(3, dtype=torch.int64), TypeError, "got torch.int64"),
    (torch.ones(3, dtype=torch.bool), TypeError, "got torch.bool"),
    (torch.ones(3, dtype=torch.complex64), TypeError, "got torch.complex64"),
    (torch.ones(3).to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
    (torch.ones(3).to_sparse(), TypeError, "got torch.sparse_coo"),
    (torch.empty(2, 3, device="meta"), ValueError, "device type"),
]
TOO_WIDE = "rows that no program can hold"


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        *WRONG,
        (torch.tensor(1.0), ValueError, "at least one dimension"),
        (torch.zeros(2, 16_385), ValueError, f"at most 16384 columns.*{TOO_WIDE}"),
        (torch.zeros(16_385).half(), ValueError, f"at most 16384 columns.*{TOO_WIDE}"),
        (torch.zeros(8193).double(), ValueError, f"at most 8192 columns.*{TOO_WIDE}"),
    ],
)
def test_errors(x, error, message):
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        x = x.to(DEVICE)
    with pytest.raises(error, match=message):
        tile_softmax(x)


@pytest.mark.gpu
def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="got 'cpu'"):
        tile_softmax(torch.ones(3))


def test_rows_that_lie_far_apart(randn):
    memory = torch.empty(2**31 + 32, device=DEVICE, dtype=torch.float16)
    x = memory.as_strided((2, 32), (2**31, 1))  # most of it is never touched
    check(x.copy_(randn(2, 32)))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.randn(2**19 + 1, 2**12, device=DEVICE, dtype=torch.float16)
    y = tile_softmax(x)
    last = slice(2**19 - 1, None)
    for rows in (slice(0, 2), last):
        torch.testing.assert_close(y[rows], torch.softmax(x[rows], dim=-1))
    exact = torch._softmax_backward_data(x[last], y[last], -1, x.dtype)
    torch.testing.assert_close(launch_tile_backward(x, y)[last], exact)
    del y
    narrow = x.view(-1, 256)[:, :100]  # strides beyond 2^31, too
    y = tile_softmax(narrow)
    torch.testing.assert_close(y[-9:], torch.softmax(narrow[-9:], dim=-1))


@pytest.mark.gpu
def test_more_than_2_to_the_31_rows():
    y = tile_softmax(torch.zeros(2**31 + 5, 1, device=DEVICE, dtype=torch.float16))
    assert y.min() == 1 and y.max() == 1


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x = torch.randn(64, 300, device=DEVICE)
    launch_tile_backward(x, tile_softmax(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tile_softmax(x)
        dx = launch_tile_backward(x, y)
    for _ in range(3):
        x.copy_(torch.randn(64, 300))
        graph.replay()
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
        assert torch.equal(dx, launch_tile_backward(x, y))


@pytest.mark.gpu
def test_memory_beside_the_output():
    x = torch.randn(2**16, 1000, device=DEVICE)
    tile_softmax(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = tile_softmax(x)
    assert torch.cuda.max_memory_allocated() - before - y.nbytes <= 512


@pytest.mark.parametrize("each", [64, 128])
@pytest.mark.parametrize("n_bytes", [1, 64, 8192, 10240, 24576, 65536])
def test_threads_have_no_more_bytes_than_they_should(n_bytes, each):
    threads = softmax_tiles.warps(n_bytes, each) * softmax_tiles.WARP
    assert threads == 512 or threads * each >= n_bytes
    assert threads == softmax_tiles.WARP or threads // 2 * each < n_bytes
