import pytest
import torch
import triton
import triton.language as tl
from fused_lstm import (
    DEVICE,
    launch_gate_dropout,
    launch_steps,
    launch_steps_backward,
    lstm_loop,
    tanh,
)
from torch.nn.functional import pad


@pytest.mark.parametrize("H", [1, 7, 130])
@pytest.mark.parametrize("G", [1, 4])
def test_steps_agree_with_the_loop(randn, G, H):
    T, B, p = 4, 3, 0.3
    seed = torch.tensor([7], device=DEVICE)
    lengths = torch.full((B,), T, device=DEVICE)
    sizes = (T, B, 4 * H), (4 * H, H), (B, H), (B, H)
    x, U, h, c = (randn(*size).double().requires_grad_() for size in sizes)
    masks = launch_gate_dropout(x.new_ones(G, 1, B, H), p, seed)[:, 0]
    ones, identity = x.new_ones(G, B, 4 * H), torch.eye(4 * H).to(x)
    y, last = lstm_loop(x, identity, U, 0, h, c, ones, masks)
    dy, dc = torch.randn_like(y), torch.randn_like(last)
    wanted = [y, *torch.autograd.grad([y, last], (x, U, h, c), [dy, dc])]
    with torch.no_grad():
        inputs = x.view(T, B, 4, H), U.view(G, -1, H)
        states, cells, gates = launch_steps(*inputs, h, c, lengths, p, seed)
        torch.testing.assert_close(cells[-1], last)
        d_cells = torch.zeros_like(cells)
        d_cells[-1] = dc
        gradients = launch_steps_backward(
            pad(dy, (0, 0, 0, 0, 1, 0)), d_cells, gates, inputs[1], states, cells,
            lengths, p, seed,
        )  # fmt: skip
    for got, expected in zip((states[1:], *gradients), wanted, strict=True):
        torch.testing.assert_close(got.reshape(expected.shape), expected)


def test_gate_dropout_draws_the_words_it_says():
    pytest.importorskip("randomgen")
    from test_seeded_dropout import philox_words

    for seed in (3, -1):
        y = launch_gate_dropout(
            torch.ones(4, 2, 3, 5, device=DEVICE),
            0.4,
            torch.tensor([seed], device=DEVICE),
        )
        for b in range(3):
            for u in range(5):
                words = philox_words(seed, (b << 32) | u, 1)[0]
                keep = (words >= round(0.4 * 2**32)).tolist()
                assert (y[:, 0, b, u] != 0).tolist() == keep
        assert torch.equal(y[:, 0], y[:, 1])


# Philox4x32-10 of counter 0 under key 0, as its authors published it
KNOWN_WORDS = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8


@pytest.mark.parametrize(("k", "word"), enumerate(KNOWN_WORDS))
def test_known_words_decide(k, word):
    x, seed = torch.ones(4, 1, 1, 1, device=DEVICE), torch.tensor([0], device=DEVICE)
    assert launch_gate_dropout(x, word / 2**32, seed)[k] != 0
    assert launch_gate_dropout(x, (word + 1) / 2**32, seed)[k] == 0


@triton.jit
def tanh_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_right_at_every_scale(dtype):
    x = torch.logspace(-30, 2, 4000, dtype=torch.float64, device=DEVICE).to(dtype)
    x = torch.cat([-x, torch.zeros(1, dtype=dtype, device=DEVICE), x])
    y = torch.empty_like(x)
    tanh_kernel[(triton.cdiv(len(x), 1024),)](y, x, len(x), 1024)
    eps = torch.finfo(dtype).eps
    exact = torch.tanh(x.double())
    assert ((y.double() - exact).abs() <= 4 * eps * exact.abs()).all()
