"""The tests of a lesson: a float64 reference, awkward inputs, gradients, every error."""

import pytest
import torch
from squares import DEVICE, square


def test_squares(randn, dtype):
    for shape in ((), (0,), (1,), (1024,), (33, 781)):
        x = randn(*shape, dtype=dtype)
        expected = (x.double() ** 2).to(dtype)
        torch.testing.assert_close(
            square(x), expected, rtol=torch.finfo(dtype).eps, atol=0
        )


def test_any_layout(randn, layout):
    x = layout(randn(34, 56))
    torch.testing.assert_close(square(x), x * x, rtol=0, atol=0)
    x = randn(5, 1).expand(5, 7)
    torch.testing.assert_close(square(x), x * x, rtol=0, atol=0)


def test_not_a_number_and_infinity():
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    torch.testing.assert_close(square(x), x * x, equal_nan=True)


def test_gradients(randn):
    x = randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(square, x)
    assert torch.autograd.gradgradcheck(square, x)
    gradient = torch.func.grad(lambda x: square(x).sum())(x.detach())
    torch.testing.assert_close(gradient, 2 * x.detach())


def test_forward_mode_is_an_error_and_not_a_silent_zero(randn):
    x = randn(5)
    with pytest.raises(RuntimeError):
        torch.func.jvp(square, (x,), (x,))


def test_compiled(randn):
    x = randn(5, 7)
    compiled = torch.compile(square, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), x * x, rtol=0, atol=0)


def test_what_is_wrong_is_named():
    with pytest.raises(TypeError, match=r"x must be .* got torch.int64"):
        square(torch.arange(3, device=DEVICE))
    with pytest.raises(TypeError, match=r"x must be .* got float"):
        square(1.0)
    with pytest.raises(ValueError, match="x must be on device type"):
        square(torch.ones(3, device="meta"))
