import pytest
import sequence_backward
import torch
from fused_lstm import launch_steps_backward
from sequence_backward import (
    BACKWARD_TILES,
    DEVICE,
    blocks_for,
    launch_sequence_backward,
    plain_loop,
)
from sequence_lstm import launch_sequence
from test_sequence_lstm import UNITS, Properties, arguments


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


def gradients(given, dh, dc):
    """Those of the lesson, from the gradients of h and c before and after each step."""
    _, weight, *_, lengths, masks = given
    h, c, gates = launch_sequence(*given)
    return launch_sequence_backward(dh, dc, gates, weight, h, c, lengths, masks)


def exact(given, dh, dc):
    """Those of the plain loop, by PyTorch, in float64."""
    *tensors, _, masks = given
    tensors = [t.double() for t in tensors]
    (*_, gates), pull_back = torch.func.vjp(
        lambda *x: plain_loop(*x, masks.double()), *tensors
    )
    return pull_back((dh.double(), dc.double(), torch.zeros_like(gates)))


def test_gradients_are_those_of_the_plain_loop(randn):
    for G in (1, 4):
        for T, B in ((1, 1), (2, 1), (3, 17), (5, 35)):
            given = arguments(randn, T, B, G=G)
            dh, dc = randn(2, T + 1, B, UNITS).double()
            got, wanted = gradients(given, dh, dc), exact(given, dh, dc)
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize(
    ("H", "dtype"), [(UNITS, torch.float32), (2 * UNITS, torch.float64)]
)
def test_agrees_with_a_launch_a_step(randn, dtype, H, G):
    """Also where sequences end, and with gradients of every c."""
    ends = [4, 0, 2, 1, *[3] * 15]
    given = arguments(randn, 4, len(ends), H, G, dtype=dtype, lengths=ends)
    dh, dc = (randn(5, len(ends), H).to(dtype) for _ in range(2))
    _, weight, *_, lengths, masks = given
    h, c, gates = launch_sequence(*given)
    expected = launch_steps_backward(dh, dc, gates, weight, h, c, lengths, masks)
    torch.testing.assert_close(gradients(given, dh, dc), expected)


@pytest.mark.parametrize("p", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(randn, dtype, p):
    given = arguments(randn, 4, 5, dtype=dtype, p=p)
    dh, dc = randn(5, 5, UNITS).to(dtype), torch.zeros(5, 5, UNITS, device=DEVICE)
    for a, b in zip(gradients(given, dh, dc), exact(given, dh, dc), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-1, atol=1e-1)


@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(randn, T, B):
    given = arguments(randn, T, B)
    dh, dc = randn(T + 1, B, UNITS).double(), randn(T + 1, B, UNITS).double()
    d_gates, d_weight, dh0, dc0 = gradients(given, dh, dc)
    assert d_gates.shape == (T, B, 4, UNITS) and not d_weight.any()
    if T == 0:
        assert torch.equal(dh0, dh[0]) and torch.equal(dc0, dc[0])


def test_gradients_of_any_layout(randn):
    given = arguments(randn, 3, 4)
    dh, dc = randn(UNITS, 4, 4).double(), randn(4, 4, UNITS).double()
    expected = gradients(given, dh.permute(2, 1, 0).contiguous(), dc)
    torch.testing.assert_close(gradients(given, dh.permute(2, 1, 0), dc), expected)
    one = dh.new_ones(1, 1, 1).expand(4, 4, UNITS)
    expected = gradients(given, one.contiguous(), dc)
    torch.testing.assert_close(gradients(given, one, dc), expected)


@pytest.mark.parametrize("n_units", [128, 384, 1024, 1152, 2048, 8448])
@pytest.mark.parametrize("n_sequences", [1, 16, 17, 80, 1000])
def test_programs_that_wait_for_each_other_fit(monkeypatch, n_sequences, n_units):
    monkeypatch.setattr(sequence_backward, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = blocks_for(BACKWARD_TILES, n_sequences, n_units, DEVICE)
    tile, units, blocks, at_once, _ = found
    programs = {(t, u): p for t, p, u, *_ in BACKWARD_TILES}[tile, units]
    assert n_units % units == 0
    assert at_once >= 1 and at_once * n_units // units <= programs * 132
    assert tile * blocks >= n_sequences


@pytest.mark.gpu
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "B", "H"),
    [(70, 80, 256), (20, 37, 1024), (20, 80, 1152), (10, 80, 2048), (3, 1000, 640)],
)
def test_many_programs(randn, T, B, H, dtype, G):
    """Every kind of block: right, and the same bits three times."""
    given = arguments(randn, T, B, H, G, dtype=dtype)
    dh, dc = randn(T + 1, B, H).to(dtype), torch.zeros(T + 1, B, H, device=DEVICE)
    results = [gradients(given, dh, dc) for _ in range(3)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    for got, wanted in zip(results[0], exact(given, dh, dc), strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < (1e-4 if dtype == torch.float32 else 5e-2)
