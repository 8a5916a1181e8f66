import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from randomgen import Philox
from seeded_dropout import DEVICE, seeded_dropout

SEEDS = [
    0,
    1,
    16,
    123,
    -1,
    -123,
    2**31,
    2**32 + 5,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
]


def philox_words(seed, first, n):
    """The first word of Philox4x32-10 for each counter from first on, by an independent package."""
    start = (first - 1) % 2**128  # the package counts up before it draws
    generator = Philox(counter=start, key=seed % 2**64, number=4, width=32)
    return torch.from_numpy(generator.random_raw(4 * n)[::4].astype(np.int64))


def uniform(words):
    """What ``tl.rand`` makes of its word: 31 bits, folded, times a little less than 2^-31."""
    signed = torch.where(words >= 2**31, words - 2**32, words)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.float() * torch.tensor(4.6566127342e-10)


def kept(n, p, seed, dtype=torch.float32):
    return (
        seeded_dropout(torch.ones(n, device=DEVICE, dtype=dtype), p, seed) != 0
    ).cpu()


@triton.jit
def philox_kernel(words_ptr, counter_ptr, key, ROUNDS: tl.constexpr):
    c0 = tl.load(counter_ptr + tl.arange(0, 1))
    c1 = tl.load(counter_ptr + 1 + tl.arange(0, 1))
    c2 = tl.load(counter_ptr + 2 + tl.arange(0, 1))
    c3 = tl.load(counter_ptr + 3 + tl.arange(0, 1))
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3, n_rounds=ROUNDS)
    tl.store(words_ptr + tl.arange(0, 1), w0)
    tl.store(words_ptr + 1 + tl.arange(0, 1), w1)
    tl.store(words_ptr + 2 + tl.arange(0, 1), w2)
    tl.store(words_ptr + 3 + tl.arange(0, 1), w3)


# From kat_vectors of Random123, the library of Philox's authors.
@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (10, "00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            10,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
        (7, "00000000 " * 4, "00000000 " * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ],
)
def test_known_answers_of_philox(rounds, counter, key, words):
    counter = [int(word, 16) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    counters = torch.tensor(counter).to(torch.int32).to(DEVICE)
    philox_kernel[(1,)](out, counters, low + (high << 32), rounds)
    assert [f"{word:08x}" for word in out.tolist()] == words.split()


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_philox_of_seed_and_index(seed):
    n = 1500  # more than one program
    u = uniform(philox_words(seed, 0, n))
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(kept(n, p, seed), u >= torch.tensor(p))


def test_negative_seed_is_its_value_modulo_2_to_the_64():
    assert torch.equal(kept(500, 0.5, -1), kept(500, 0.5, 2**64 - 1))
    assert not torch.equal(kept(500, 0.5, -1), kept(500, 0.5, 2**32 - 1))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_values(randn, dtype, p):
    x = randn(1000, dtype=dtype)
    y = seeded_dropout(x, p, 7)
    keep = kept(1000, p, 7).to(DEVICE)
    expected = torch.where(keep, x.double() / (1 - p), 0.0).to(dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)


def test_extreme_p(randn, dtype):
    x = randn(1000, dtype=dtype)
    x[:3] = torch.tensor([math.inf, -math.inf, 0.0])
    for zero in (0, 0.0):
        assert torch.equal(seeded_dropout(x, zero, 3), x)
    x[3] = math.nan
    for one in (1, 1.0):
        assert torch.equal(seeded_dropout(x, one, 3), torch.zeros_like(x))


def test_dropped_infinities_become_zero(dtype):
    keep = kept(200, 0.5, 11)
    for value in (math.inf, -math.inf, math.nan):
        y = seeded_dropout(
            torch.full((200,), value, dtype=dtype, device=DEVICE), 0.5, 11
        ).cpu()
        assert not y[~keep].any() and not y[keep].isfinite().any()


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (3, 0), (1023,), (1024,), (1025,), (2, 3, 5, 7)]
)
def test_shapes(randn, shape):
    x = randn(*shape)
    y = seeded_dropout(x, 0.5, 5)
    assert y.shape == x.shape and y.is_contiguous()
    keep = kept(max(x.numel(), 1), 0.5, 5)[: x.numel()].reshape(shape).to(DEVICE)
    assert torch.equal(y, torch.where(keep, 2 * x, 0.0))


def test_layouts(randn, layout):
    x = randn(13, 17)
    assert torch.equal(seeded_dropout(layout(x), 0.5, 5), seeded_dropout(x, 0.5, 5))
    row = x[:1].expand(13, 17)
    assert torch.equal(seeded_dropout(row, 0.5, 5), seeded_dropout(row.clone(), 0.5, 5))


def test_mask_is_the_same_for_every_dtype(dtype):
    assert torch.equal(kept(500, 0.3, 9, dtype), kept(500, 0.3, 9))


# Bounds of 5 standard deviations: a sound generator breaks one in 1.7 million checks.
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [1, 2, -7, 2**40])
def test_keep_rate(p, seed):
    n = 20_000
    deviation = (kept(n, p, seed).sum() - n * (1 - p)) / math.sqrt(n * p * (1 - p))
    assert abs(deviation) < 5


@pytest.mark.parametrize(
    ("seed", "other"), [(0, 1), (123, 512), (5, 5 + 2**32), (-1, 1)]
)
def test_masks_of_two_seeds_agree_by_chance_only(seed, other):
    n, p = 20_000, 0.5
    agree = (kept(n, p, seed) == kept(n, p, other)).sum()
    assert abs(agree - n / 2) < 5 * math.sqrt(n / 4)


def test_the_page_prints_this_table():
    torch.manual_seed(0)
    torch.randn(10), torch.rand(10)
    x = torch.randn(10).to(DEVICE)
    assert [i for i, y in enumerate(seeded_dropout(x, 0.5, 123).tolist()) if y] == [
        1,
        5,
        8,
        9,
    ]
    assert [i for i, y in enumerate(seeded_dropout(x, 0.5, 512).tolist()) if y] == [
        2,
        3,
        5,
        6,
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        (
            {"x": torch.ones(3, dtype=torch.int32)},
            TypeError,
            "x must be float16.*got torch.int32",
        ),
        ({"x": torch.ones(3, requires_grad=True)}, ValueError, "requires a gradient"),
        ({"x": torch.ones(3, device="meta")}, ValueError, "device type"),
        ({"p": -0.1}, ValueError, r"p must be in \[0, 1\], got -0.1"),
        ({"p": 1.1}, ValueError, r"p must be in \[0, 1\], got 1.1"),
        ({"p": math.nan}, ValueError, r"p must be in \[0, 1\], got nan"),
        ({"p": None}, TypeError, "p must be a number, got NoneType"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ({"seed": torch.tensor(1)}, TypeError, "seed must be an integer, got Tensor"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\), got"),
        ({"seed": -(2**63) - 1}, ValueError, r"seed must be in \[-2\^63, 2\^64\), got"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(3), "p": 0.5, "seed": 0} | change
    if isinstance(arguments["x"], torch.Tensor) and arguments["x"].device.type == "cpu":
        arguments["x"] = arguments["x"].to(DEVICE)
    with pytest.raises(error, match=message):
        seeded_dropout(**arguments)


@pytest.mark.gpu
def test_more_than_2_to_the_32_elements():
    n, p, seed = 2**32 + 1500, 0.5, 123
    y = seeded_dropout(torch.ones(n, device=DEVICE, dtype=torch.float16), p, seed)
    u = uniform(philox_words(seed, 2**32, 1500))
    assert torch.equal(y[2**32 :].cpu() != 0, u >= p)
    assert torch.equal(y[:1500].cpu() != 0, kept(1500, p, seed))


@pytest.mark.gpu
def test_every_offset_past_2_to_the_31_is_its_own():
    n = 2**31 + 2**20
    y = seeded_dropout(torch.ones(n, device=DEVICE, dtype=torch.float16), 0.5, 1)
    agree = (y[: 2**20] == y[2**31 :]).sum().item()
    assert abs(agree - 2**19) < 5 * math.sqrt(2**18)
