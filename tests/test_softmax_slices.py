import math

import pytest
import softmax_slices
import torch
import triton
import triton.language as tl
from softmax_slices import (
    DEVICE,
    LAG_BYTES,
    launch_slice_backward,
    launch_slice_softmax,
    launch_slices,
    slice_at,
    slice_backward_kernel,
    slice_backward_op,
    slice_softmax,
    slice_softmax_op,
)
from test_softmax_tiles import WRONG, check, check_gradient

# Narrow rows, and both sides of whole slices.
WIDTHS = [1, 2, 3, 8, 33, 1000, 2048, 2049, 4095, 4096, 4097, 8192, 8193]
WIDTHS += [12160, 16384, 16385, 16388, 20000, 20480, 32767, 50257]


def some(n_cols):
    """Rows: fewer wide ones, which take the interpreter long."""
    return 3 if n_cols < 10_000 else 2


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_widths(randn, dtype, n_cols):
    check(randn(some(n_cols), n_cols, dtype=dtype), slice_softmax)


@pytest.mark.parametrize("n_rows", [1, 2, 4])
@pytest.mark.parametrize("lag_bytes", [0, 2**14, 2**30])
def test_result_does_not_depend_on_the_lag(randn, n_rows, lag_bytes):
    x, dy = randn(2, n_rows, 20_001)
    y = launch_slice_softmax(x)
    assert torch.equal(launch_slice_softmax(x, lag_bytes), y)
    dx = launch_slices(slice_backward_kernel, lag_bytes, dy, y)
    assert torch.equal(launch_slice_backward(dy, y), dx)


@triton.jit
def place_kernel(mask_ptr, t, exists, n_cols, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    _, mask, _, _ = slice_at(t, exists != 0, n_cols, SLICES, BLOCK, 2)
    tl.store(mask_ptr + tl.arange(0, BLOCK), mask.to(tl.int32))


@pytest.mark.parametrize(
    ("t", "exists", "count"), [(4, 1, 16), (5, 1, 6), (6, 0, 0), (-1, 0, 0), (-7, 0, 0)]
)
def test_a_slice_that_does_not_exist_touches_nothing(t, exists, count):
    mask = torch.full((16,), -1, dtype=torch.int32, device=DEVICE)
    place_kernel[(1,)](mask, t, exists, 38, SLICES=3, BLOCK=16)
    assert mask.tolist() == [1] * count + [0] * (16 - count)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 5), (2, 1, 3, 7)])
def test_any_number_of_dimensions(randn, shape):
    check(randn(*shape), slice_softmax)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, dtype):
    y = slice_softmax(torch.empty(shape, dtype=dtype, device=DEVICE))
    assert y.shape == shape and y.dtype == dtype


@pytest.mark.parametrize("n_cols", [37, 16_400])
def test_layouts(randn, layout, n_cols):
    check(layout(randn(some(n_cols), n_cols)), slice_softmax)


def test_rows_that_do_not_begin_at_multiples_of_16_bytes(randn, dtype):
    storage = randn(2 * 17_000 + 1, dtype=dtype)
    for first in (0, 1):
        for n_cols in (40, 16_400):
            for stride in (n_cols, 16_999, 17_000):
                x = storage.as_strided((2, n_cols), (stride, 1), first)
                check(x, slice_softmax)


def test_expanded(randn):
    check(randn(1, 20_000).expand(2, 20_000), slice_softmax)
    check(randn(2, 1).expand(2, 20_000), slice_softmax)
    check(randn(20_000, 2, 1).permute(2, 1, 0), slice_softmax)


def test_input_is_left_alone(randn):
    x = randn(3, 20_000)
    before = x.clone()
    slice_softmax(x)
    assert torch.equal(x, before)


def test_large_values(randn):
    check(randn(2, 20_000) * 1e4, slice_softmax)
    check(randn(2, 20_000) * 1e4 + 1e6, slice_softmax)
    check(torch.full((2, 20_000), 3e38, device=DEVICE), slice_softmax)


def test_denormal_results(randn):
    x = randn(2, 20_000) * 10
    x[:, 5000] = 110
    check(x, slice_softmax)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.parametrize("n_cols", [3, 20_001])
def test_special_values(dtype, n_cols):
    inf, nan = math.inf, math.nan
    rows = [[1, -inf, 2], [-inf, -inf, -inf], [1, nan, 2], [1, inf, 2], [-inf, 0, -inf]]
    x = torch.tensor(rows, dtype=dtype, device=DEVICE)
    x = x.repeat_interleave(n_cols // 3, dim=1)  # whole slices of each value
    torch.testing.assert_close(slice_softmax(x), torch.softmax(x, dim=-1), equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bits", ["int32", "int64"])
def test_the_nan_that_means_not_yet_is_no_trap(bits):
    x = torch.full((2, 20_000), -1, dtype=getattr(torch, bits), device=DEVICE)
    x = x.view(torch.float32 if bits == "int32" else torch.float64)
    assert slice_softmax(x).isnan().all()
    assert launch_slice_backward(x, x).isnan().all()


def test_same_bits_twice(randn):
    x = randn(2, 20_001)
    y = slice_softmax(x)
    assert torch.equal(slice_softmax(x), y)
    assert torch.equal(launch_slice_backward(x, y), launch_slice_backward(x, y))


def test_negated_views():
    z = torch.randn(4, 6, dtype=torch.complex64, device=DEVICE)
    torch.testing.assert_close(
        slice_softmax(z.conj().imag), torch.softmax(-z.imag, dim=-1)
    )
    negated = z.conj().imag.as_strided((11,), (1,))
    assert negated.is_neg() and negated.is_contiguous()
    torch.testing.assert_close(slice_softmax(negated), torch.softmax(negated, dim=-1))


# The gradient


@pytest.mark.parametrize("n_cols", [1, 2, 33, 781, 4097, 8193, 16385, 20000, 50257])
def test_gradient(randn, dtype, n_cols):
    x, dy = randn(2, some(n_cols), n_cols, dtype=dtype)
    check_gradient(x.requires_grad_(), dy, slice_softmax)


@pytest.mark.parametrize("n_cols", [17, 16_400])
def test_gradients_of_any_layout(randn, layout, n_cols):
    n_rows = some(n_cols)
    x = layout(randn(n_rows, n_cols)).requires_grad_()
    check_gradient(x, layout(randn(n_rows, n_cols)), slice_softmax)
    check_gradient(x, randn(n_rows, 1).expand(n_rows, n_cols), slice_softmax)


def test_gradients_of_first_and_second_order(randn):
    x = randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(slice_softmax, x, fast_mode=True)
    torch.autograd.gradgradcheck(slice_softmax, x, fast_mode=True)


def test_a_gradient_that_can_be_differentiated_is_the_same(randn, dtype):
    x, dy = randn(3, 9000, dtype=dtype).requires_grad_(), randn(3, 9000, dtype=dtype)
    plain, differentiable = (
        torch.autograd.grad(slice_softmax(x), x, dy, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    assert differentiable.requires_grad and not plain.requires_grad
    torch.testing.assert_close(plain, differentiable.detach())


def test_gradients_of_torch_func(randn):
    x, w = randn(3, 7), randn(3, 7)
    for grad in (
        torch.func.grad,
        lambda f: lambda x: torch.func.vjp(f, x)[1](f(x) * 0 + 1)[0],
    ):
        found, expected = (
            grad(lambda x, f=f: (f(x) * w).sum())(x)
            for f in (slice_softmax, lambda x: torch.softmax(x, dim=-1))
        )
        torch.testing.assert_close(found, expected)

    def second(f):
        first = torch.func.grad(lambda x: (f(x) * w).sum())
        return torch.func.grad(lambda x: first(x).square().sum())(x)

    torch.testing.assert_close(
        second(slice_softmax), second(lambda x: torch.softmax(x, dim=-1))
    )
    with torch.no_grad():
        y, pull_back = torch.func.vjp(slice_softmax, x)
        torch.testing.assert_close(
            pull_back(w)[0], torch._softmax_backward_data(w, y, -1, y.dtype)
        )


def test_forward_mode_is_an_error_and_not_a_zero(randn):
    x = randn(3, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError):
            slice_softmax(dual)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_gradients(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    slice_softmax(x).sum().backward()
    assert x.grad.shape == shape


def test_operators_keep_their_promises(randn, dtype):
    x = randn(6, 7, dtype=dtype)
    for sample in (x, x.T, x[:0]):
        torch.library.opcheck(slice_softmax_op, (sample,))
    torch.library.opcheck(slice_backward_op, (x, x))


def test_compiles_without_a_graph_break(randn, backend):
    def attend(x):
        return 2 * slice_softmax(x / 3)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for shape in ((4, 30), (2, 20_001)):
        x = randn(*shape).requires_grad_()
        y, expected = compiled(x), attend(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
        )


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        *WRONG,
        (torch.tensor(1.0), ValueError, "2\\^30 columns, got shape \\(\\)"),
        (torch.zeros(1).expand(2**30 + 1), ValueError, "2\\^30 columns, got shape"),
    ],
)
def test_errors(x, error, message):
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        x = x.to(DEVICE)
    with pytest.raises(error, match=message):
        slice_softmax(x)


@pytest.mark.gpu
def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="got 'cpu'"):
        slice_softmax(torch.ones(3))


def test_rows_that_lie_far_apart(randn):
    memory = torch.empty(2**31 + 20_000, device=DEVICE, dtype=torch.float16)
    x = memory.as_strided((2, 20_000), (2**31, 1))  # most of it is never touched
    check(x.copy_(randn(2, 20_000)), slice_softmax)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n_cols",
    [2**k + d for k in (13, 15, 16, 17, 18, 20) for d in (-1, 0, 1)] + [128_256, 2**24],
)
def test_wide_rows(randn, dtype, n_cols):
    x = torch.randn(3, n_cols, device=DEVICE, dtype=dtype).requires_grad_()
    check(x.detach(), slice_softmax)
    dy = torch.randn(3, n_cols, device=DEVICE, dtype=dtype)
    check_gradient(x, dy, slice_softmax)


@pytest.mark.gpu
def test_many_narrow_rows():
    for n_cols in (1, 2, 8, 9, 1000):
        x = torch.randn(10_000, n_cols, device=DEVICE, dtype=torch.bfloat16)
        check(x, slice_softmax)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.randn(2**15 + 1, 2**16, device=DEVICE, dtype=torch.float16)
    y = slice_softmax(x)
    last = slice(2**15 - 1, None)
    for rows in (slice(0, 2), last):
        torch.testing.assert_close(y[rows], torch.softmax(x[rows], dim=-1))
    exact = torch._softmax_backward_data(x[last], y[last], -1, x.dtype)
    torch.testing.assert_close(launch_slice_backward(x, y)[last], exact)


@pytest.mark.gpu
def test_two_streams_at_once_and_little_lag():
    """Programs wait for one another here, and those of two launches share the GPU."""

    def forward(x):
        return launch_slice_softmax(x, 2**18)

    def backward(dy, y):
        return launch_slices(slice_backward_kernel, 2**18, dy, y)

    inputs = [
        torch.randn(2**12, 2**16, device=DEVICE),
        torch.randn(2**10, 2**18 + 1, device=DEVICE, dtype=torch.bfloat16),
    ]
    expected = [forward(x) for x in inputs]
    expected += [backward(x, y) for x, y in zip(inputs, expected, strict=True)]
    for x, y in zip(inputs, expected, strict=False):
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(50):
        results = [None] * 4
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] = forward(inputs[i])
                results[i + 2] = backward(inputs[i], expected[i])
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, expected))


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x = torch.randn(64, 2**17, device=DEVICE)
    launch_slice_backward(x, slice_softmax(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = slice_softmax(x)
        dx = launch_slice_backward(x, y)
    for _ in range(3):
        x.copy_(torch.randn(64, 2**17))
        graph.replay()
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
        assert torch.equal(dx, launch_slice_backward(x, y))


@pytest.mark.gpu
def test_memory_beside_the_output():
    x = torch.randn(2**16, 2**15, device=DEVICE)  # whole MiB, as the allocator counts
    slice_softmax(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = slice_softmax(x)
    extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    assert extra <= x.numel() // 4096 * 8 + 1024


def test_the_lag_of_the_benchmark_is_the_one_of_the_lesson():
    lags = softmax_slices.lag_benchmark.benchmarks.x_vals
    assert LAG_BYTES // 2**20 in lags
