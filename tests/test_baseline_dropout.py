import math

import pytest
import torch
from baseline_dropout import DEVICE, INTERPRET, dropout

INTEGERS = [
    getattr(torch, name)
    for name in [
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint16",
        "uint32",
        "uint64",
    ]
]


def reference(x, x_keep, p):
    y = torch.where(x_keep.bool(), x.double() / (1 - p), 0.0)
    return y.to(x.dtype)


def keep_mask(*shape):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape, generator=generator) > 0.4).to(DEVICE)


@pytest.mark.parametrize("p", [0, 0.0, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_values(randn, dtype, p):
    x, x_keep = randn(1000, dtype=dtype), keep_mask(1000)
    y = dropout(x, x_keep, p)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(x, x_keep, p), equal_nan=True)


@pytest.mark.parametrize("mask_dtype", INTEGERS, ids=str)
def test_mask_dtypes(randn, mask_dtype):
    x, x_keep = randn(100), keep_mask(100)
    torch.testing.assert_close(
        dropout(x, x_keep.to(mask_dtype), 0.4), reference(x, x_keep, 0.4)
    )


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (3, 0), (1023,), (1024,), (1025,), (2, 3, 5, 7)]
)
def test_shapes(randn, shape):
    x, x_keep = randn(*shape), keep_mask(*shape)
    y = dropout(x, x_keep, 0.4)
    assert y.shape == x.shape and y.is_contiguous()
    torch.testing.assert_close(y, reference(x, x_keep, 0.4))


def test_layouts(randn, layout):
    x, x_keep = randn(13, 17), keep_mask(13, 17)
    expected = reference(x, x_keep, 0.4)
    torch.testing.assert_close(dropout(layout(x), x_keep, 0.4), expected)
    torch.testing.assert_close(dropout(x, layout(x_keep.int()), 0.4), expected)
    row = x[:1].expand(13, 17)
    torch.testing.assert_close(dropout(row, x_keep, 0.4), reference(row, x_keep, 0.4))


def test_dropped_infinities_become_zero(dtype):
    x = torch.tensor(
        [math.inf, -math.inf, math.nan, math.inf], dtype=dtype, device=DEVICE
    )
    x_keep = torch.tensor([0, 0, 0, 1], device=DEVICE)
    assert dropout(x, x_keep, 0.5).tolist() == [0, 0, 0, math.inf]


@pytest.mark.parametrize(
    ("mask_dtype", "values"),
    [
        (torch.int8, [-128, -1, 2]),
        (torch.uint8, [2, 128, 255]),
        (torch.int16, [256, -(2**15), 2]),
        (torch.int32, [2**16, -(2**31), 2]),
        (torch.int64, [2**32, -(2**63), 2]),
    ],
    ids=str,
)
def test_anything_but_zero_keeps(mask_dtype, values):
    x_keep = torch.tensor([0, *values], dtype=mask_dtype, device=DEVICE)
    assert dropout(torch.ones(4, device=DEVICE), x_keep, 0.5).tolist() == [0, 2, 2, 2]


def test_float64_is_scaled_in_float64(randn):
    x = randn(100, dtype=torch.float64)
    y = dropout(x, torch.ones(100, dtype=torch.bool, device=DEVICE), 0.1)
    torch.testing.assert_close(y, x / (1 - 0.1), rtol=2**-51, atol=0)


@pytest.mark.skipif(INTERPRET, reason="the interpreter cuts bfloat16 off")
def test_bfloat16_is_rounded_to_the_nearest(randn):
    x = randn(1000, dtype=torch.bfloat16)
    y = dropout(x, torch.ones(1000, dtype=torch.bool, device=DEVICE), 0.1)
    assert torch.equal(y, (x.float() * torch.tensor(1 / 0.9, device=DEVICE)).bfloat16())


def test_negated_view():
    x = torch.tensor([1 + 2j], device=DEVICE).conj().imag
    assert x.is_neg() and x.is_contiguous()
    assert dropout(x, torch.tensor([True], device=DEVICE), 0.5).item() == -4


def test_parameters_are_accepted_where_no_gradient_is_asked_for(randn):
    x, x_keep = torch.nn.Parameter(randn(9)), keep_mask(9)
    with torch.no_grad():
        torch.testing.assert_close(dropout(x, x_keep, 0.4), reference(x, x_keep, 0.4))


def test_derivatives_are_an_error_and_not_a_zero(randn):
    x, x_keep = randn(9), keep_mask(9)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x,)),
    ):
        with pytest.raises(ValueError, match="requires a gradient"):
            transform(lambda x: dropout(x, x_keep, 0.4))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ValueError, match="requires a gradient"),
    ):
        dropout(torch.autograd.forward_ad.make_dual(x, x), x_keep, 0.4)


def test_p_of_one_gives_zeros(randn):
    x = randn(100)
    x[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    assert not dropout(x, torch.zeros(100, dtype=torch.bool, device=DEVICE), 1).any()
    assert not dropout(x, torch.ones(100, dtype=torch.bool, device=DEVICE), 1.0).any()


def test_the_page_prints_this_table():
    torch.manual_seed(0)
    x = torch.randn(10)
    x_keep = torch.rand(10) > 0.5
    y = dropout(x.to(DEVICE), x_keep.to(DEVICE), 0.5).cpu()
    assert [round(v, 4) for v in y.tolist()] == [
        3.0820, -0.5869, 0, 1.1369, 0, -2.7972, 0.8067, 0, 0, 0
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a dense tensor, not nested, got list"),
        (
            {"x": torch.ones(3, dtype=torch.int32)},
            TypeError,
            "x must be float16.*got torch.int32",
        ),
        ({"x": torch.ones(3, requires_grad=True)}, ValueError, "requires a gradient"),
        ({"x": torch.ones(4)}, ValueError, r"x's shape, \(4,\), got \(3,\)"),
        (
            {"x_keep": [1, 0, 1]},
            TypeError,
            "x_keep must be a dense tensor, not nested, got list",
        ),
        (
            {"x_keep": torch.ones(3, dtype=torch.complex64)},
            TypeError,
            "x_keep must be bool",
        ),
        (
            {"x": torch.ones(3).to_sparse()},
            TypeError,
            "x must be a dense tensor, not nested, got torch.sparse",
        ),
        (
            {"x": torch.ones(1, 3), "x_keep": torch.ones(3, 1) > 0},
            ValueError,
            "x_keep must have",
        ),
        ({"x_keep": torch.ones(3)}, TypeError, "x_keep must be bool or an integer"),
        (
            {"x_keep": torch.ones(1, dtype=torch.bool)},
            ValueError,
            "x_keep must have x's shape",
        ),
        (
            {"x_keep": torch.ones(3, dtype=torch.bool, device="meta")},
            ValueError,
            "one device",
        ),
        ({"p": -0.1}, ValueError, r"p must be in \[0, 1\], got -0.1"),
        ({"p": 1.1}, ValueError, r"p must be in \[0, 1\], got 1.1"),
        ({"p": math.nan}, ValueError, r"p must be in \[0, 1\], got nan"),
        ({"p": "0.5"}, TypeError, "p must be a number, got str"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "x": torch.ones(3),
        "x_keep": torch.ones(3, dtype=torch.bool),
        "p": 0.5,
    } | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error, match=message):
        dropout(**arguments)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 1025
    x = torch.ones(n, device=DEVICE, dtype=torch.float16)
    x_keep = torch.zeros(n, device=DEVICE, dtype=torch.bool)
    x_keep[-1025::2] = True
    y = dropout(x, x_keep, 0.5)
    assert y.sum(dtype=torch.float64) == 2 * 513
    assert torch.equal(y[-1025:], 2 * x_keep[-1025:].half())
