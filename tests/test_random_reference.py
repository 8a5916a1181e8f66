"""What the page on random numbers claims, checked against the installed Triton."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

import torch
import triton
import triton.language as tl
from fused_softmax import DEVICE

STATIC = Path(__file__).parent.parent / "docs/_static"


@triton.jit
def uniform_kernel(u_ptr, word_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(word_ptr + i).to(tl.uint32, bitcast=True)
    tl.store(u_ptr + i, tl.random.uint_to_uniform_float(word))


@triton.jit
def normal_kernel(n_ptr, u_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    n, _ = tl.random.pair_uniform_to_normal(tl.load(u_ptr + i), 0.0)
    tl.store(n_ptr + i, n)


@triton.jit
def draw_kernel(int_ptr, float_ptr, seed, first, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    offset = first + i
    a, _, _, _ = tl.randint4x(seed, offset)
    tl.static_assert(a.dtype == tl.uint32)
    tl.store(int_ptr + i, tl.randint(seed, offset))
    tl.store(int_ptr + BLOCK + i, a)
    tl.store(float_ptr + i, tl.rand(seed, offset))
    u, _, _, _ = tl.rand4x(seed, offset)
    tl.store(float_ptr + BLOCK + i, u)
    tl.store(float_ptr + 2 * BLOCK + i, tl.rand(seed, offset.to(tl.int64)))
    tl.store(float_ptr + 3 * BLOCK + i, tl.randn(seed, offset))


def draw(seed, first=0, n=64):
    integers = torch.empty(2, n, dtype=torch.int64, device=DEVICE)
    floats = torch.empty(4, n, device=DEVICE)
    draw_kernel[(1,)](integers, floats, seed, first, n)
    return integers.cpu(), floats.cpu()


def test_uniform_numbers_reach_zero_and_stay_below_one():
    words = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32, device=DEVICE)
    u = torch.empty(4, device=DEVICE)
    uniform_kernel[(1,)](u, words, 4)
    assert u.tolist() == [0, 0, 1 - 2**-24, 1 - 2**-24]


def test_normal_numbers_reach_no_further_than_5_68():
    n = torch.empty(2, device=DEVICE)
    normal_kernel[(1,)](n, torch.zeros(2, device=DEVICE), 2)
    assert math.isclose(n[0], math.sqrt(-2 * math.log(1e-7)), rel_tol=1e-6)
    assert 5.67 < n[0] < 5.68


def test_single_forms_are_the_first_of_four_and_offsets_of_both_widths_agree():
    (randint, randint4x), (rand, rand4x, rand_int64, _) = draw(123)
    assert torch.equal(randint, randint4x) and torch.equal(rand, rand4x)
    assert torch.equal(rand, rand_int64)


def test_integers_are_unsigned():
    (randint, _), _ = draw(123)
    assert randint.min() >= 0 and randint.max() >= 2**31


def test_the_drawings_show_true_numbers():
    def texts(name):
        return [
            element.text for element in ET.parse(STATIC / name).iter() if element.text
        ]

    _, (rand, *_) = draw(123)
    assert [f"{u:.2f}" for u in rand[:3].tolist()] == [
        text for text in texts("philox.svg") if text.startswith("0.")
    ]
    torch.manual_seed(0)
    x, x_keep = torch.randn(10), torch.rand(10) > 0.5
    numbers = [f"{v:.2f}".replace("-", "\N{MINUS SIGN}") for v in x.tolist()]
    numbers += [str(int(keep)) for keep in x_keep]
    numbers += [
        f"{2 * v:.2f}".replace("-", "\N{MINUS SIGN}") if keep else "0"
        for v, keep in zip(x.tolist(), x_keep, strict=True)
    ]
    shown = [
        text
        for text in texts("dropout_mask.svg")
        if text.lstrip("\N{MINUS SIGN}")[0].isdigit()
    ]
    assert shown == numbers
