import math

import fused_softmax
import numpy as np
import pytest
import torch
from fused_softmax import (
    DEVICE,
    INTERPRET,
    naive_softmax,
    row_softmax,
    softmax,
    softmax_backward_op,
    softmax_op,
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


def check(x, function=softmax):
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


# On both sides of every limit: of a tile, of the widest tile, of whole slices.
NARROW = [1, 2, 3, 31, 32, 33, 127, 128, 129, 384, 781, 1000, 1024, 4095, 4096, 4097]
WIDE = [8192, 8193, 12160, 16384, 16385, 16388, 20000, 20480, 32767, 50257]


@pytest.mark.parametrize("n_cols", NARROW)
def test_row_softmax(randn, n_cols):
    check(randn(3, n_cols), row_softmax)


@pytest.mark.parametrize("n_cols", NARROW + WIDE)
def test_widths(randn, dtype, n_cols):
    check(randn(5 if n_cols > 1000 else 70, n_cols, dtype=dtype))


@pytest.mark.parametrize("n_rows", [1, 2, 7])
@pytest.mark.parametrize("lag_bytes", [0, 2**14, 2**30])
def test_result_does_not_depend_on_the_lag(randn, monkeypatch, n_rows, lag_bytes):
    x, dy = randn(2, n_rows, 20_001)
    y = softmax(x)
    dx = softmax_backward_op(dy, y)
    monkeypatch.setattr(fused_softmax, "LAG_BYTES", lag_bytes)
    assert torch.equal(softmax(x), y)
    assert torch.equal(softmax_backward_op(dy, y), dx)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 5), (2, 1, 3, 7)])
def test_any_number_of_dimensions(randn, shape):
    check(randn(*shape))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, dtype):
    y = softmax(torch.empty(shape, dtype=dtype, device=DEVICE))
    assert y.shape == shape and y.dtype == dtype


@pytest.mark.parametrize("n_cols", [37, 16_400])
def test_layouts(randn, layout, n_cols):
    check(layout(randn(6, n_cols)))


def test_rows_that_do_not_begin_at_multiples_of_16_bytes(randn, dtype):
    storage = randn(6 * 17_000 + 1, dtype=dtype)
    for first in (0, 1):
        for n_cols in (40, 16_400):
            for stride in (16_999, 17_000):
                check(storage.as_strided((5, n_cols), (stride, 1), first))


@pytest.mark.parametrize("n_cols", [20, 20_000])
def test_expanded(randn, n_cols):
    check(randn(1, n_cols).expand(4, n_cols))
    check(randn(4, 1).expand(4, n_cols))
    check(randn(n_cols, 2, 2).permute(2, 1, 0))


def test_input_is_left_alone(randn):
    x = randn(3, 50)
    before = x.clone()
    softmax(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n_cols", [100, 20_000])
def test_large_values(randn, n_cols):
    check(randn(3, n_cols) * 1e4)
    check(randn(3, n_cols) * 1e4 + 1e6)
    check(torch.full((2, n_cols), 3e38, device=DEVICE))


def test_denormal_results(randn):
    x = randn(2, 20_000) * 10
    x[:, 5000] = 110
    check(x)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.parametrize("n_cols", [3, 20_001])
def test_special_values(dtype, n_cols):
    inf, nan = math.inf, math.nan
    rows = [[1, -inf, 2], [-inf, -inf, -inf], [1, nan, 2], [1, inf, 2], [-inf, 0, -inf]]
    x = torch.tensor(rows, dtype=dtype, device=DEVICE)
    x = x.repeat_interleave(n_cols // 3, dim=1)  # whole slices of each value
    torch.testing.assert_close(softmax(x), torch.softmax(x, dim=-1), equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bits", ["int32", "int64"])
def test_the_nan_that_means_not_yet_is_no_trap(bits):
    x = torch.full((2, 20_000), -1, dtype=getattr(torch, bits), device=DEVICE)
    x = x.view(torch.float32 if bits == "int32" else torch.float64)
    assert softmax(x).isnan().all()
    assert softmax_backward_op(x, x).isnan().all()


@pytest.mark.parametrize("n_cols", [1000, 20_001])
def test_same_bits_twice(randn, n_cols):
    x = randn(5, n_cols)
    y = softmax(x)
    assert torch.equal(softmax(x), y)
    assert torch.equal(softmax_backward_op(x, y), softmax_backward_op(x, y))


@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 5), (7,)])
def test_naive_softmax(randn, shape):
    x = 1e4 * randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(naive_softmax(x), torch.softmax(x, dim=-1))


def test_negated_views():
    z = torch.randn(4, 6, dtype=torch.complex64, device=DEVICE)
    torch.testing.assert_close(softmax(z.conj().imag), torch.softmax(-z.imag, dim=-1))
    negated = z.conj().imag.as_strided((11,), (1,))
    assert negated.is_neg() and negated.is_contiguous()
    torch.testing.assert_close(softmax(negated), torch.softmax(negated, dim=-1))


# The gradient


def check_gradient(x, dy):
    (dx,) = torch.autograd.grad(softmax(x), x, dy)
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


@pytest.mark.parametrize("n_cols", [1, 2, 3, 33, 128, 781, 4097, 16385, 20000, 50257])
def test_gradient(randn, dtype, n_cols):
    x = randn(5, n_cols, dtype=dtype).requires_grad_()
    check_gradient(x, randn(5, n_cols, dtype=dtype))


@pytest.mark.parametrize("n_cols", [17, 16_400])
def test_gradients_of_any_layout(randn, layout, n_cols):
    x = layout(randn(6, n_cols)).requires_grad_()
    check_gradient(x, layout(randn(6, n_cols)))
    check_gradient(x, randn(6, 1).expand(6, n_cols))


def test_gradients_of_first_and_second_order(randn):
    x = randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(softmax, x)
    torch.autograd.gradgradcheck(softmax, x)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_gradients(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    softmax(x).sum().backward()
    assert x.grad.shape == shape


def test_operators_keep_their_promises(randn, dtype):
    x = randn(6, 7, dtype=dtype)
    for sample in (x, x.T, x[:0], x.clone().requires_grad_()):
        torch.library.opcheck(softmax_op, (sample,))
    torch.library.opcheck(softmax_backward_op, (x.clone().requires_grad_(), x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(randn, backend):
    def attend(x):
        return 2 * softmax(x / 3)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for shape in ((4, 30), (5, 31), (2, 20_001)):
        x = randn(*shape).requires_grad_()
        y, expected = compiled(x), attend(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
        )


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "x must be a dense tensor, got list"),
        (np.ones(3), TypeError, "x must be a dense tensor, got ndarray"),
        (torch.ones(3, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.ones(3, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.ones(3).to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
        (torch.ones(3).to_sparse(), TypeError, "got torch.sparse_coo"),
        (torch.tensor(1.0), ValueError, "at least one dimension"),
        (torch.empty(2, 3, device="meta"), ValueError, "device type"),
        (torch.zeros(1).expand(2**30 + 1), ValueError, "at most 2\\^30 columns"),
    ],
)
def test_errors(x, error, message):
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        x = x.to(DEVICE)
    with pytest.raises(error, match=message):
        softmax(x)


@pytest.mark.gpu
def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="got 'cpu'"):
        softmax(torch.ones(3))


@pytest.mark.parametrize("n_cols", [32, 20_000])
def test_rows_that_lie_far_apart(randn, n_cols):
    memory = torch.empty(2**31 + n_cols, device=DEVICE, dtype=torch.float16)
    x = memory.as_strided((2, n_cols), (2**31, 1))  # most of it is never touched
    check(x.copy_(randn(2, n_cols)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n_cols",
    [2**k + d for k in (13, 15, 16, 17, 18, 20) for d in (-1, 0, 1)] + [128_256, 2**24],
)
def test_wide_rows(randn, dtype, n_cols):
    x = torch.randn(3, n_cols, device=DEVICE, dtype=dtype).requires_grad_()
    check(x.detach())
    check_gradient(x, torch.randn(3, n_cols, device=DEVICE, dtype=dtype))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.randn(2**15 + 1, 2**16, device=DEVICE, dtype=torch.float16)
    y = softmax(x)
    last = slice(2**15 - 1, None)
    for rows in (slice(0, 2), last):
        torch.testing.assert_close(y[rows], torch.softmax(x[rows], dim=-1))
    exact = torch._softmax_backward_data(x[last], y[last], -1, x.dtype)
    torch.testing.assert_close(softmax_backward_op(x, y)[last], exact)
    del y
    narrow = x.view(-1, 256)[:, :100]  # strides beyond 2^31, too
    y = softmax(narrow)
    torch.testing.assert_close(y[-9:], torch.softmax(narrow[-9:], dim=-1))


@pytest.mark.gpu
def test_more_than_2_to_the_31_rows():
    y = softmax(torch.zeros(2**31 + 5, 1, device=DEVICE, dtype=torch.float16))
    assert y.min() == 1 and y.max() == 1


@pytest.mark.gpu
def test_two_streams_at_once_and_little_lag(monkeypatch):
    """Programs wait for one another here, and those of two launches share the GPU."""
    monkeypatch.setattr(fused_softmax, "LAG_BYTES", 2**18)
    inputs = [
        torch.randn(2**12, 2**16, device=DEVICE),
        torch.randn(2**10, 2**18 + 1, device=DEVICE, dtype=torch.bfloat16),
    ]
    expected = [softmax(x) for x in inputs]
    expected += [softmax_backward_op(x, y) for x, y in zip(inputs, expected, strict=True)]
    for x, y in zip(inputs, expected, strict=False):
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(50):
        results = [None] * 4
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] = softmax(inputs[i])
                results[i + 2] = softmax_backward_op(inputs[i], expected[i])
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("n_cols", [300, 2**17])
def test_in_a_cuda_graph(n_cols):
    x = torch.randn(64, n_cols, device=DEVICE)
    softmax_backward_op(x, softmax(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = softmax(x)
        dx = softmax_backward_op(x, y)
    for _ in range(3):
        x.copy_(torch.randn(64, n_cols))
        graph.replay()
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
        assert torch.equal(dx, softmax_backward_op(x, y))


@pytest.mark.gpu
def test_memory_beside_the_output():
    for n_cols in (1000, 2**15):  # whole MiB, in which the allocator hands out
        x = torch.randn(2**16, n_cols, device=DEVICE)
        softmax(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = softmax(x)
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
        assert extra <= (x.numel() // 4096 * 8 + 1024 if n_cols > 16_384 else 512)
