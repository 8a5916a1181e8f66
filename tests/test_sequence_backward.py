import pytest
import sequence_backward
import torch
from fused_lstm import launch_steps_backward
from sequence_backward import (
    BACKWARD_TILES,
    DEVICE,
    LSTMSequence,
    blocks_for,
    launch_sequence,
    launch_sequence_backward,
    plain_loop,
)
from test_sequence_lstm import UNITS, Properties, arguments, masks_of


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


def gradients(given, dh, dc):
    """Those of the lesson, from the gradients of h and c before and after each step."""
    _, weight, h0, _, lengths, p, seed = given
    h, c, gates = launch_sequence(*given)
    saved = gates, weight, h, c, lengths, h0.shape[1], p, seed
    return launch_sequence_backward(dh, dc, *saved)


def test_gradients_are_those_of_the_plain_loop(randn):
    for G in (1, 4):
        for T, B in ((1, 1), (2, 1), (3, 17), (5, 35)):
            given = arguments(randn, T, B, G=G)
            masks = masks_of(given)
            _, pull_back = torch.func.vjp(
                lambda *x, m=masks: plain_loop(*x, m), *given[:4]
            )
            dh = randn(T + 1, B, UNITS).double()
            expected = list(pull_back(dh[1:]))
            expected[2] = expected[2] + dh[0]
            got = gradients(given, dh, torch.zeros_like(dh))
            torch.testing.assert_close(list(got), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("H", [UNITS, 2 * UNITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_a_launch_a_step(randn, dtype, H, G):
    """Also where sequences end, and with gradients of every c."""
    ends = [4, 0, 2, 1, *[3] * 15]
    given = arguments(randn, 4, len(ends), H, G, dtype=dtype, lengths=ends)
    dh, dc = (randn(5, len(ends), H).to(dtype) for _ in range(2))
    _, weight, *_, lengths, p, seed = given
    h, c, gates = launch_sequence(*given)
    expected = launch_steps_backward(dh, dc, gates, weight, h, c, lengths, p, seed)
    torch.testing.assert_close(gradients(given, dh, dc), expected)


@pytest.mark.parametrize("p", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(randn, dtype, p):
    given = arguments(randn, 4, 5, dtype=dtype, p=p)
    dh = randn(5, 5, UNITS)
    dh[0] = 0
    masks, exact = masks_of(given), [t.double() for t in given[:4]]
    _, pull_back = torch.func.vjp(lambda *x: plain_loop(*x, masks), *exact)
    got = gradients(given, dh.to(dtype), torch.zeros_like(dh))
    for a, b in zip(got, pull_back(dh[1:].double()), strict=True):
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


@pytest.mark.parametrize("G", [1, 4])
def test_autograd_runs_the_backward_launch(randn, G):
    *tensors, lengths, p, seed = arguments(randn, 4, 17, G=G)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    h, c, gates = LSTMSequence.apply(*tensors, lengths, p, seed)
    assert not gates.requires_grad
    dh, dc = torch.randn_like(h), torch.randn_like(c)
    got = torch.autograd.grad((h, c), tensors, (dh, dc), create_graph=True)
    expected = gradients((*(t.detach() for t in tensors), lengths, p, seed), dh, dc)
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(got[0].sum(), tensors)


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
    dh[0] = 0
    results = [gradients(given, dh, dc) for _ in range(3)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    masks, exact = masks_of(given), [t.double() for t in given[:4]]
    _, pull_back = torch.func.vjp(lambda *x: plain_loop(*x, masks), *exact)
    for got, wanted in zip(results[0], pull_back(dh[1:].double()), strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < (1e-4 if dtype == torch.float32 else 5e-2)
