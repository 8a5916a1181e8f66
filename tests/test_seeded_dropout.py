import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from randomgen import Philox
from seeded_dropout import (
    DEVICE,
    INTERPRET,
    philox,
    seeded_dropout,
    seeded_dropout4x,
    seeded_dropout4x_op,
)

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
    """The words of Philox4x32-10 for n counters from first on, by an independent package."""
    start = (first - 1) % 2**128  # the package counts up before it draws
    generator = Philox(counter=start, key=seed % 2**64, number=4, width=32)
    return torch.from_numpy(generator.random_raw(4 * n).astype(np.int64)).reshape(n, 4)


def uniform(words):
    """What ``tl.rand`` makes of its word: 31 bits, folded, times a little less than 2^-31."""
    signed = torch.where(words >= 2**31, words - 2**32, words)
    folded = torch.where(signed < 0, -signed - 1, signed)
    return folded.float() * torch.tensor(4.6566127342e-10)


def kept(n, p, seed, dtype=torch.float32, function=seeded_dropout):
    return (function(torch.ones(n, device=DEVICE, dtype=dtype), p, seed) != 0).cpu()


def bound(n, q):
    """Bernstein's: n decisions of probability q stray further from n q once in a million runs."""
    log = math.log(2 / 1e-6)
    return log / 3 + math.sqrt(log**2 / 9 + 2 * log * n * q * (1 - q))


@pytest.fixture(params=[seeded_dropout, seeded_dropout4x], ids=lambda f: f.__name__)
def function(request):
    return request.param


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


@triton.jit
def words_kernel(words_ptr, seed, first):
    i = tl.arange(0, 4)
    words = philox(seed, i.to(tl.int64) + first)
    for k in tl.static_range(4):
        tl.store(words_ptr + 4 * i + k, words[k])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 1, 2**31 - 2, 2**32 - 2, 2**40, 2**62])
def test_words_of_the_lesson_s_philox(seed, first):
    out = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, (seed + 2**63) % 2**64 - 2**63, first)
    assert torch.equal(out.cpu(), philox_words(seed, first, 4))


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_philox_of_seed_and_index(seed):
    n = 1500  # more than one program
    u = uniform(philox_words(seed, 0, n)[:, 0])
    for p in (0.1, 0.5, 0.9):
        assert torch.equal(kept(n, p, seed), u >= torch.tensor(p))


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_of_4x_is_every_word_in_turn(seed):
    n = 4 * 700 + 3
    words = philox_words(seed, 0, 701).flatten()[:n]
    for p in (1e-6, 0.1, 0.5, 0.9, 1 - 1e-6):
        keep = kept(n, p, seed, function=seeded_dropout4x)
        assert torch.equal(keep, words >= round(p * 2**32))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 4095, 4097])
def test_mask_does_not_depend_on_the_size(function, n):
    assert torch.equal(
        kept(n, 0.4, 3, function=function), kept(5000, 0.4, 3, function=function)[:n]
    )


def test_negative_seed_is_its_value_modulo_2_to_the_64(function):
    mask = kept(500, 0.5, -1, function=function)
    assert torch.equal(mask, kept(500, 0.5, 2**64 - 1, function=function))
    assert not torch.equal(mask, kept(500, 0.5, 2**32 - 1, function=function))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_values(randn, dtype, function, p):
    x = randn(1000, dtype=dtype)
    y = function(x, p, 7)
    keep = kept(1000, p, 7, function=function).to(DEVICE)
    expected = torch.where(keep, x.double() / (1 - p), 0.0).to(dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)


def test_extreme_p(randn, dtype, function):
    x = randn(1000, dtype=dtype)
    x[:3] = torch.tensor([math.inf, -math.inf, 0.0])
    for zero in (0, 0.0):
        y = function(x, zero, 3)
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    x[3] = math.nan
    for one in (1, 1.0):
        assert torch.equal(function(x, one, 3), torch.zeros_like(x))


def test_p_is_compared_exactly():
    u = uniform(philox_words(123, 0, 200)[:, 0])
    for threshold in u[:5]:
        after = torch.nextafter(threshold, torch.tensor(1.0))
        for p in (threshold.item(), math.nextafter(threshold.item(), 1), after.item()):
            assert torch.equal(kept(200, p, 123), u >= torch.tensor(p))


def test_threshold_of_4x_is_compared_exactly():
    words = philox_words(123, 0, 50).flatten()
    for threshold in words[:8].tolist():
        for p in (threshold / 2**32, (threshold + 1) / 2**32):
            keep = kept(200, p, 123, function=seeded_dropout4x)
            assert torch.equal(keep, words >= round(p * 2**32))


def test_threshold_of_4x_is_rounded_to_the_nearest():
    word = philox_words(123, 0, 1)[0, 0].item()
    for fraction, keeps in [(-0.6, True), (0.0, True), (0.4, True), (0.6, False)]:
        p = (word + fraction) / 2**32
        assert kept(1, p, 123, function=seeded_dropout4x).item() == keeps


def test_p_just_below_one():
    p = 1 - Fraction(1, 10**30)  # a number, and 1.0 as a float
    for function in (seeded_dropout, seeded_dropout4x):
        assert not function(torch.ones(9, device=DEVICE), p, 3).any()


def test_numbers_of_numpy(function):
    mask = kept(100, 0.5, 123, function=function)
    assert torch.equal(kept(100, np.float32(0.5), np.int64(123), function=function), mask)


def test_float64_is_scaled_in_float64(randn, function):
    x = randn(100, dtype=torch.float64)
    y = function(x, 0.1, 3)
    torch.testing.assert_close(y[y != 0], x[y != 0] / (1 - 0.1), rtol=2**-51, atol=0)


@pytest.mark.skipif(INTERPRET, reason="the interpreter cuts bfloat16 off")
def test_bfloat16_is_rounded_to_the_nearest(randn, function):
    x = randn(1000, dtype=torch.bfloat16)
    y = function(x, 0.1, 3)
    expected = (x.float() * torch.tensor(1 / 0.9, device=DEVICE)).bfloat16()
    assert torch.equal(y[y != 0], expected[y != 0])


def test_negated_view(function):
    x = torch.tensor([1 + 2j], device=DEVICE).conj().imag
    assert x.is_neg() and x.is_contiguous()
    assert function(x, 0, 3).item() == -2
    kept_seed = next(seed for seed in range(20) if kept(1, 0.5, seed, function=function))
    assert function(x, 0.5, kept_seed).item() == -4


def test_parameters_are_accepted_where_no_gradient_is_asked_for(randn, function):
    x = randn(9)
    with torch.no_grad():
        assert torch.equal(function(torch.nn.Parameter(x), 0.5, 3), function(x, 0.5, 3))


def test_p_of_4x_is_rounded_to_a_multiple_of_2_to_the_minus_32(randn):
    x = randn(1000)
    assert torch.equal(seeded_dropout4x(x, 2**-34, 3), x)
    assert not seeded_dropout4x(x, 1 - 2**-34, 3).any()


def test_bits_are_kept_at_p_of_zero():
    bits = torch.tensor(
        [0x7F800001, 0x7FC12345, 1, -(2**31)], dtype=torch.int32, device=DEVICE
    )
    y = seeded_dropout4x(bits.view(torch.float32), 0, 3)
    assert torch.equal(y.view(torch.int32), bits)


def test_dropped_infinities_become_zero(dtype, function):
    keep = kept(200, 0.5, 11, function=function)
    for value in (math.inf, -math.inf, math.nan):
        x = torch.full((200,), value, dtype=dtype, device=DEVICE)
        y = function(x, 0.5, 11).cpu()
        assert not y[~keep].any() and not y[keep].isfinite().any()


@pytest.mark.parametrize(
    "shape", [(), (1,), (0,), (3, 0), (1023,), (1024,), (1025,), (2, 3, 5, 7)]
)
def test_shapes(randn, function, shape):
    x = randn(*shape)
    y = function(x, 0.5, 5)
    assert y.shape == x.shape and y.is_contiguous()
    keep = kept(max(x.numel(), 1), 0.5, 5, function=function)[: x.numel()]
    assert torch.equal(y, torch.where(keep.reshape(shape).to(DEVICE), 2 * x, 0.0))


@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_layouts(randn, function, layout, p):
    x = randn(13, 17)
    y = function(layout(x), p, 5)
    assert y.is_contiguous() and torch.equal(y, function(x, p, 5))
    row = x[:1].expand(13, 17)
    assert torch.equal(function(row, 0.5, 5), function(row.clone(), 0.5, 5))


def test_mask_is_the_same_for_every_dtype(dtype, function):
    mask = kept(500, 0.3, 9, function=function)
    assert torch.equal(kept(500, 0.3, 9, dtype, function), mask)


# How random are the masks? On a GPU over 2^30 elements. Each check fails for one sound generator
# in a million.
N = 2**16 if INTERPRET else 2**30


@lru_cache(maxsize=32 if INTERPRET else 0)  # on a GPU it is quick, and large
def many(p, seed, n=N):
    x = torch.ones(n, device=DEVICE, dtype=torch.float16)
    return seeded_dropout4x(x, p, seed) != 0


@pytest.mark.parametrize("p", [1e-6, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("seed", [0, -7])
def test_keep_rate(p, seed):
    assert abs(many(p, seed).sum().item() - N * (1 - p)) < bound(N, p)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_four_neighbours_show_every_pattern_as_often_as_they_should(p, shift):
    keep = many(p, 2024)[shift : shift + N - 4].reshape(-1, 4)
    pattern = (keep * torch.tensor([1, 2, 4, 8], device=DEVICE, dtype=torch.int8)).sum(1)
    counts = torch.bincount(pattern, minlength=16).cpu().double()
    bits = torch.tensor([bin(i).count("1") for i in range(16)])
    expected = len(keep) * (1 - p) ** bits * p ** (4 - bits)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 60  # 15 degrees of freedom exceed 57.4 once in a million


@pytest.mark.parametrize(("seed", "other"), [(0, 1), (123, 512), (5, 5 + 2**32), (-1, 1)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_two_seeds_agree_by_chance_only(p, seed, other):
    chance = p**2 + (1 - p) ** 2
    agree = (many(p, seed) == many(p, other)).sum().item()
    assert abs(agree - N * chance) < bound(N, chance)


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 1024, 4096])
def test_a_mask_agrees_with_itself_shifted_by_chance_only(shift):
    mask, p = many(0.3, 99), 0.3
    chance = p**2 + (1 - p) ** 2
    agree = (mask[shift:] == mask[:-shift]).sum().item()
    # Neighbouring comparisons share an element, which at most doubles their variance.
    assert abs(agree - (N - shift) * chance) < 2 * bound(N, chance)


# The gradient


def test_gradient_is_the_mask_again(randn, dtype):
    x = randn(33, 31, dtype=dtype).requires_grad_()
    y = seeded_dropout4x(x, 1 / 3, 7)
    gradient = randn(33, 31, dtype=dtype)
    y.backward(gradient)
    assert torch.equal(x.grad, seeded_dropout4x(gradient, 1 / 3, 7))


@pytest.mark.parametrize("p", [0, 0.3, 1])
def test_gradients_of_first_and_second_order(randn, p):
    x = randn(4, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: seeded_dropout4x(x, p, 7), x, fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: seeded_dropout4x(x, p, 7), x, fast_mode=True)


def test_incoming_gradients_of_any_layout(randn, layout):
    gradient = randn(13, 17)
    grads = []
    for incoming in (gradient, layout(gradient)):
        x = torch.ones(13, 17, device=DEVICE, requires_grad=True)
        grads += torch.autograd.grad(seeded_dropout4x(x, 0.5, 7), x, incoming)
    assert torch.equal(*grads)
    x = torch.ones(13, 17, device=DEVICE, requires_grad=True)
    seeded_dropout4x(
        x, 0.5, 7
    ).sum().backward()  # an expanded gradient, with strides of 0
    assert torch.equal(x.grad, seeded_dropout4x(torch.ones_like(x), 0.5, 7).detach())


def test_nothing_is_saved_for_the_backward_pass(randn):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        seeded_dropout4x(randn(100).requires_grad_(), 0.5, 7)
    assert not saved


def test_simple_kernel_refuses_a_gradient():
    with pytest.raises(ValueError, match="requires a gradient: use seeded_dropout4x"):
        seeded_dropout(torch.ones(3, device=DEVICE, requires_grad=True), 0.5, 0)


def test_operator_keeps_its_promises(randn, dtype):
    x = randn(6, 7, dtype=dtype)
    for sample in (x, x.T, x[:0]):
        for p in (0.0, 0.5, 1.0):
            torch.library.opcheck(seeded_dropout4x_op, (sample, p, 7))


def test_gradients_of_torch_func(randn):
    x, v = randn(20), randn(20)

    def loss(x):
        return (seeded_dropout4x(x, 0.3, 7) ** 3).sum()

    mask = seeded_dropout4x(torch.ones_like(x), 0.3, 7)
    expected = 3 * x**2 * mask**3
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    _, pull_back = torch.func.vjp(torch.func.grad(loss), x)
    torch.testing.assert_close(pull_back(v)[0], 6 * x * mask**3 * v)


def test_forward_mode_is_an_error_and_not_zero(randn):
    x = randn(9)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: seeded_dropout4x(x, 0.5, 7), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="jvp"):
            seeded_dropout4x(dual, 0.5, 7)


def test_vmap_is_an_error(randn):
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.vmap(lambda x: seeded_dropout4x(x, 0.5, 7))(randn(3, 9))


def test_compiles_without_a_graph_break(randn, backend):
    def step(x, seed):
        return seeded_dropout4x(2 * x, 0.3, seed) + 1

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    x = randn(50, 3).requires_grad_()
    for seed in (1, 2, -3, 2**63 + 1):
        y, expected = compiled(x, seed), step(x, seed)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, expected)))


def test_the_page_prints_this_table():
    torch.manual_seed(0)
    torch.randn(10), torch.rand(10)
    x = torch.randn(10).to(DEVICE)
    kept_123 = [i for i, y in enumerate(seeded_dropout(x, 0.5, 123).tolist()) if y]
    kept_512 = [i for i, y in enumerate(seeded_dropout(x, 0.5, 512).tolist()) if y]
    assert (kept_123, kept_512) == ([1, 5, 8, 9], [2, 3, 5, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a dense tensor, not nested, got list"),
        (
            {"x": torch.ones(3, dtype=torch.int32)},
            TypeError,
            "x must be float16.*got torch.int32",
        ),
        (
            {"x": torch.ones(3).to_sparse()},
            TypeError,
            "x must be a dense tensor, not nested, got torch.sparse",
        ),
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
def test_errors(function, change, error, message):
    arguments = {"x": torch.ones(3), "p": 0.5, "seed": 0} | change
    if isinstance(arguments["x"], torch.Tensor) and arguments["x"].device.type == "cpu":
        arguments["x"] = arguments["x"].to(DEVICE)
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.gpu
def test_more_than_2_to_the_32_elements():
    n, p, seed = 2**32 + 1500, 0.5, 123
    y = seeded_dropout(torch.ones(n, device=DEVICE, dtype=torch.float16), p, seed)
    u = uniform(philox_words(seed, 2**32, 1500)[:, 0])
    assert torch.equal(y[2**32 :].cpu() != 0, u >= p)
    assert torch.equal(y[:1500].cpu() != 0, kept(1500, p, seed))


@pytest.mark.gpu
def test_more_than_2_to_the_34_elements():
    """Element 2^34 of seeded_dropout4x is the first that needs the counter's second word."""
    n, p, seed = 2**34 + 2**20, 0.5, 123
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 4.2 * n:
        pytest.skip("needs 72 GiB of GPU memory")
    y = seeded_dropout4x(torch.ones(n, device=DEVICE, dtype=torch.float16), p, seed)
    for first in (2**31, 2**32, 2**34):
        words = philox_words(seed, first // 4, 500).flatten()
        assert torch.equal(y[first : first + 2000].cpu() != 0, words >= 2**31)
    for distance in (2**32, 2**34):
        agree = (y[: 2**20] == y[distance : distance + 2**20]).sum().item()
        assert abs(agree - 2**19) < bound(2**20, 0.5)


@pytest.mark.gpu
def test_memory_that_is_held_between_forward_and_backward():
    x = torch.randn(2**20, device=DEVICE, requires_grad=True)
    before = torch.cuda.memory_allocated()
    y = x
    for _ in range(5):
        y = seeded_dropout4x(y, 0.1, 7)
    assert torch.cuda.memory_allocated() - before == y.nbytes


def test_the_function_without_a_gradient_refuses_forward_mode(randn):
    x = randn(5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match="requires a gradient"):
            seeded_dropout(dual, 0.5, 7)
