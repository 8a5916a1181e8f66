import math

import numpy as np
import pytest
import torch
from fused_softmax import DEVICE, INTERPRET, naive_softmax, softmax

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
    y = softmax(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    exact = torch.softmax(x.cpu().double(), dim=-1)
    error = (y.cpu().double() - exact).abs()
    # Rounding x - max is magnified by exp: a relative error for every unit of distance.
    distance = (x.cpu().double() - x.cpu().double().amax(-1, keepdim=True)).abs()
    magnified = distance * torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    assert (error <= exact * (TOLERANCE[x.dtype] + magnified) + TINY[x.dtype]).all()


@pytest.mark.parametrize("n_cols", [1, 2, 3, 31, 32, 33, 127, 128, 129, 781, 1024, 4097])
def test_widths(randn, dtype, n_cols):
    check(randn(3, n_cols, dtype=dtype))


@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3, 5), (2, 1, 3, 7)])
def test_any_number_of_dimensions(randn, shape):
    check(randn(*shape))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, dtype):
    y = softmax(torch.empty(shape, dtype=dtype, device=DEVICE))
    assert y.shape == shape and y.dtype == dtype


def test_layouts(randn, layout):
    check(layout(randn(6, 37)))


def test_expanded(randn):
    check(randn(1, 20).expand(4, 20))
    check(randn(4, 1).expand(4, 20))
    check(randn(3, 4, 5).permute(2, 0, 1))


def test_input_is_left_alone(randn):
    x = randn(3, 50)
    before = x.clone()
    softmax(x)
    assert torch.equal(x, before)


def test_large_values(randn):
    check(randn(3, 100) * 1e4)
    check(randn(3, 100) * 1e4 + 1e6)
    check(torch.full((2, 7), 3e38, device=DEVICE))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
def test_special_values(dtype):
    inf, nan = math.inf, math.nan
    x = torch.tensor(
        [[1, -inf, 2], [-inf, -inf, -inf], [1, nan, 2], [1, inf, 2], [-inf, 0, -inf]],
        dtype=dtype,
        device=DEVICE,
    )
    torch.testing.assert_close(softmax(x), torch.softmax(x, dim=-1), equal_nan=True)


def test_same_bits_twice(randn):
    x = randn(5, 1000)
    assert torch.equal(softmax(x), softmax(x))


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


def test_parameters_are_accepted_where_no_gradient_is_asked_for(randn):
    x = torch.nn.Parameter(randn(3, 5))
    with torch.no_grad():
        check(x)
    with torch.inference_mode():
        check(x)


def test_widest_row_that_is_accepted():
    y = softmax(torch.zeros(1, 2**20, device=DEVICE))
    assert torch.equal(y, torch.full_like(y, 2**-20))


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
        (torch.ones(3, requires_grad=True), ValueError, "requires a gradient"),
        (torch.ones(1).expand(2**20 + 1), ValueError, "at most 2\\^20 columns"),
        (torch.ones(1, 1).expand(2**31, 1), ValueError, "2\\^31 - 1 rows"),
    ],
)
def test_errors(x, error, message):
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        x = (
            x.to(DEVICE)
            if x.numel() < 2**20
            else torch.ones_like(x[:1]).to(DEVICE).expand(x.shape)
        )
    with pytest.raises(error, match=message):
        softmax(x)


@pytest.mark.gpu
def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="got 'cpu'"):
        softmax(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "n_cols", [2**k + d for k in (13, 15, 16, 17, 18) for d in (-1, 0, 1)] + [2**20]
)
def test_wide_rows(randn, n_cols):
    check(randn(3, n_cols))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.randn(2**15 + 1, 2**16, device=DEVICE, dtype=torch.float16)
    y = softmax(x)
    for rows in (slice(0, 2), slice(2**15 - 1, None)):
        torch.testing.assert_close(y[rows], torch.softmax(x[rows], dim=-1))
    # Strides beyond 2^31, too.
    torch.testing.assert_close(
        softmax(x[:: 2**15, :100]), torch.softmax(x[:: 2**15, :100], dim=-1)
    )


@pytest.mark.gpu
def test_as_many_rows_as_are_accepted():
    y = softmax(torch.zeros(2**31 - 1, 1, device=DEVICE, dtype=torch.float16))
    assert y.min() == 1 and y.max() == 1
