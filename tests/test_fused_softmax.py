import math

import numpy as np
import pytest
import torch
from fused_softmax import (
    DEVICE,
    INTERPRET,
    launch_row_softmax,
    naive_softmax,
    row_softmax,
    scripted_naive,
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


def check(x):
    y = row_softmax(x)
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


WIDTHS = [1, 2, 3, 31, 32, 33, 127, 128, 129, 781, 1000, 1024, 4095, 4096, 4097, 20_000]


@pytest.mark.parametrize("n_cols", WIDTHS)
def test_widths(randn, dtype, n_cols):
    check(randn(3, n_cols, dtype=dtype))


def test_the_launch_alone_takes_rows_of_any_stride(randn):
    x = randn(5, 90)[:, :77]
    torch.testing.assert_close(launch_row_softmax(x), torch.softmax(x, dim=-1))


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 5), (2, 1, 3, 7)])
def test_any_number_of_dimensions(randn, shape):
    check(randn(*shape))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, dtype):
    y = row_softmax(torch.empty(shape, dtype=dtype, device=DEVICE))
    assert y.shape == shape and y.dtype == dtype


@pytest.mark.parametrize("n_cols", [37, 1_040])
def test_layouts(randn, layout, n_cols):
    check(layout(randn(6, n_cols)))


def test_rows_that_do_not_begin_at_multiples_of_16_bytes(randn, dtype):
    storage = randn(6 * 1_700 + 1, dtype=dtype)
    for first in (0, 1):
        for n_cols in (40, 1_040):
            for stride in (1_699, 1_700):
                check(storage.as_strided((5, n_cols), (stride, 1), first))


@pytest.mark.parametrize("n_cols", [20, 20_000])
def test_expanded(randn, n_cols):
    check(randn(1, n_cols).expand(4, n_cols))
    check(randn(4, 1).expand(4, n_cols))
    check(randn(n_cols, 2, 2).permute(2, 1, 0))


def test_input_is_left_alone(randn):
    x = randn(3, 50)
    before = x.clone()
    row_softmax(x)
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
@pytest.mark.parametrize("n_cols", [3, 2001])
def test_special_values(dtype, n_cols):
    inf, nan = math.inf, math.nan
    rows = [[1, -inf, 2], [-inf, -inf, -inf], [1, nan, 2], [1, inf, 2], [-inf, 0, -inf]]
    x = torch.tensor(rows, dtype=dtype, device=DEVICE)
    x = x.repeat_interleave(n_cols // 3, dim=1)  # whole slices of each value
    torch.testing.assert_close(row_softmax(x), torch.softmax(x, dim=-1), equal_nan=True)


@pytest.mark.parametrize("n_cols", [1000, 20_001])
def test_same_bits_twice(randn, n_cols):
    x = randn(5, n_cols)
    y = row_softmax(x)
    assert torch.equal(row_softmax(x), y)


@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 5), (7,)])
def test_naive_softmax(randn, shape):
    x = 1e4 * randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(naive_softmax(x), torch.softmax(x, dim=-1))


def test_negated_views():
    z = torch.randn(4, 6, dtype=torch.complex64, device=DEVICE)
    torch.testing.assert_close(row_softmax(z.conj().imag), torch.softmax(-z.imag, dim=-1))
    negated = z.conj().imag.as_strided((11,), (1,))
    assert negated.is_neg() and negated.is_contiguous()
    torch.testing.assert_close(row_softmax(negated), torch.softmax(negated, dim=-1))


def test_torchscript_of_the_naive_version_agrees_where_there_is_any(randn):
    x, scripted = randn(4, 33), scripted_naive()
    if scripted is None:
        pytest.skip("this PyTorch has no TorchScript")
    torch.testing.assert_close(scripted(x), torch.softmax(x, dim=-1))


def test_without_torchscript_its_line_is_left_out(monkeypatch, capsys):
    def refuse(function):
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.jit, "script", refuse)
    assert scripted_naive.__wrapped__() is None
    assert "no TorchScript" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "x must be a dense tensor, not nested, got list"),
        (np.ones(3), TypeError, "x must be a dense tensor, not nested, got ndarray"),
        (torch.ones(3, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.ones(3, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.ones(3).to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
        (torch.ones(3).to_sparse(), TypeError, "got torch.sparse_coo"),
        (torch.tensor(1.0), ValueError, "at least one dimension"),
        (torch.empty(2, 3, device="meta"), ValueError, "device type"),
        (torch.zeros(1).expand(2**17 + 1), ValueError, "at most 2\\^17 columns"),
        (torch.ones(3, requires_grad=True), ValueError, "requires a gradient"),
    ],
)
def test_errors(x, error, message):
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        x = x.to(DEVICE)
    with pytest.raises(error, match=message):
        row_softmax(x)


def test_derivatives_are_an_error_and_not_a_zero(randn):
    x = randn(3, 5)
    for transform in (
        lambda: torch.func.grad(lambda x: row_softmax(x).sum())(x),
        lambda: torch.func.jvp(row_softmax, (x,), (x,)),
    ):
        with pytest.raises(ValueError, match="requires a gradient"):
            transform()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ValueError, match="requires a gradient"),
    ):
        row_softmax(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.gpu
def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="got 'cpu'"):
        row_softmax(torch.ones(3))


@pytest.mark.parametrize("n_cols", [32, 20_000])
def test_rows_that_lie_far_apart(randn, n_cols):
    memory = torch.empty(2**31 + n_cols, device=DEVICE, dtype=torch.float16)
    x = memory.as_strided((2, n_cols), (2**31, 1))  # most of it is never touched
    check(x.copy_(randn(2, n_cols)))


@pytest.mark.gpu
@pytest.mark.parametrize("n_cols", [8191, 8192, 16_385, 50_257, 2**16, 2**17])
def test_wide_rows(randn, dtype, n_cols):
    check(torch.randn(3, n_cols, device=DEVICE, dtype=dtype))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.randn(2**15 + 1, 2**16, device=DEVICE, dtype=torch.float16)
    y = row_softmax(x)
    last = slice(2**15 - 1, None)
    for rows in (slice(0, 2), last):
        torch.testing.assert_close(y[rows], torch.softmax(x[rows], dim=-1))
    del y
    narrow = x.view(-1, 256)[:, :100]  # strides beyond 2^31, too
    y = row_softmax(narrow)
    torch.testing.assert_close(y[-9:], torch.softmax(narrow[-9:], dim=-1))


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x = torch.randn(64, 300, device=DEVICE)
    row_softmax(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = row_softmax(x)
    for _ in range(3):
        x.copy_(torch.randn(64, 300))
        graph.replay()
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
