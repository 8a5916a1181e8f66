import pytest
import torch
import triton
import triton.language as tl
from fused_lstm import (
    DEVICE,
    launch_steps,
    launch_steps_backward,
    lstm_loop,
    tanh,
)
from torch.nn.functional import dropout, pad


@pytest.mark.parametrize("H", [1, 7, 130])
@pytest.mark.parametrize("G", [1, 4])
def test_steps_agree_with_the_loop(randn, G, H):
    T, B = 4, 3
    lengths = torch.full((B,), T, device=DEVICE)
    sizes = (T, B, 4 * H), (4 * H, H), (B, H), (B, H)
    x, U, h, c = (randn(*size).double().requires_grad_() for size in sizes)
    masks = dropout(x.new_ones(G, B, H), 0.3)
    ones, identity = x.new_ones(G, B, 4 * H), torch.eye(4 * H).to(x)
    y, last = lstm_loop(x, identity, U, 0, h, c, ones, masks)
    dy, dc = torch.randn_like(y), torch.randn_like(last)
    wanted = [y, *torch.autograd.grad([y, last], (x, U, h, c), [dy, dc])]
    with torch.no_grad():
        inputs = x.view(T, B, 4, H), U.view(G, -1, H)
        states, cells, gates = launch_steps(*inputs, h, c, lengths, masks)
        torch.testing.assert_close(cells[-1], last)
        d_cells = torch.zeros_like(cells)
        d_cells[-1] = dc
        gradients = launch_steps_backward(
            pad(dy, (0, 0, 0, 0, 1, 0)), d_cells, gates, inputs[1], states, cells,
            lengths, masks,
        )  # fmt: skip
    for got, expected in zip((states[1:], *gradients), wanted, strict=True):
        torch.testing.assert_close(got.reshape(expected.shape), expected)


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
