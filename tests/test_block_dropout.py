"""Blocks of one mask, against the whole mask and against an independent Philox."""

import math

import pytest
import torch
from block_dropout import DEVICE, block_dimensions, block_dropout, block_dropout_op
from seeded_dropout import seeded_dropout4x
from test_seeded_dropout import philox_words

BLOCKS = [  # shape of the whole, offsets, shape of the block
    ((10, 20), (0, 0), (10, 20)),
    ((10, 20), (3, 0), (4, 20)),
    ((10, 20), (0, 4), (10, 8)),
    ((10, 20), (0, 5), (10, 7)),
    ((10, 21), (2, 20), (8, 1)),
    ((100,), (13,), (50,)),
    ((5, 1, 9), (2, 0, 3), (1, 1, 1)),
    ((4, 5, 6), (1, 0, 2), (2, 5, 3)),
    ((3, 4, 5, 7), (1, 1, 1, 1), (2, 2, 3, 5)),
    ((2, 2, 2, 2, 2, 2), (0, 1, 0, 1, 0, 0), (2, 1, 2, 1, 2, 2)),
    ((3, 3000), (1, 700), (2, 2100)),
    ((3, 4099), (0, 1), (3, 4098)),
    ((), (), ()),
]


def cut(whole, offsets, size):
    ranges = zip(offsets, size, strict=True)
    return whole[tuple(slice(begin, begin + n) for begin, n in ranges)]


@pytest.mark.parametrize(("shape", "offsets", "size"), BLOCKS, ids=str)
def test_a_block_is_cut_from_the_mask_of_the_whole(randn, shape, offsets, size):
    x = randn(*shape)
    for seed in (7, 2**64 - 1):
        whole = seeded_dropout4x(x, 0.3, seed)
        block = block_dropout(cut(x, offsets, size), 0.3, seed, shape, offsets)
        assert block.is_contiguous()
        assert torch.equal(block, cut(whole, offsets, size))


def test_the_mask_is_philox_of_seed_and_place():
    y = block_dropout(torch.ones(3, 5, device=DEVICE), 0.4, 9, (6, 11), (2, 4))
    words = philox_words(9, 0, 17).flatten()[:66].view(6, 11)
    assert torch.equal(y.cpu() != 0, words[2:5, 4:9] >= round(0.4 * 2**32))


@pytest.mark.parametrize(
    "offsets", [(0, 0), (2**20 - 2, 2**25 - 40), (123_456, 12_345_677)]
)
def test_places_of_64_bits(offsets):
    shape = (2**20, 2**25)
    y = block_dropout(torch.ones(2, 40, device=DEVICE), 0.5, 7, shape, offsets)
    for row in range(2):
        place = (offsets[0] + row) * shape[1] + offsets[1]
        words = philox_words(7, place // 4, 11).flatten()[place % 4 :][:40]
        assert torch.equal(y[row].cpu() != 0, words >= 2**31)


def test_any_strides_and_dtypes(randn, layout, dtype):
    x = randn(12, 13, dtype=dtype)
    expected = block_dropout(x, 0.3, 7, (20, 30), (5, 6))
    assert torch.equal(block_dropout(layout(x), 0.3, 7, (20, 30), (5, 6)), expected)
    one = x[:1].expand(12, 13)
    expected = block_dropout(one.contiguous(), 0.3, 7, (20, 30), (5, 6))
    assert torch.equal(block_dropout(one, 0.3, 7, (20, 30), (5, 6)), expected)


def test_dimensions_without_a_gap_are_one():
    x = torch.empty(4, 5, 6)
    assert block_dimensions(x, (4, 5, 6)) == [(120, 1, 1)]
    assert block_dimensions(x, (9, 5, 6)) == [(120, 1, 1)]
    assert block_dimensions(x, (4, 9, 6)) == [(30, 1, 1), (4, 54, 30)]
    assert block_dimensions(x, (4, 5, 9)) == [(6, 1, 1), (20, 9, 6)]


@pytest.mark.parametrize("p", [0, 1])
def test_extreme_p(randn, p):
    x = randn(3, 4)
    x[0, 0] = math.nan
    y = block_dropout(x, p, 7, (6, 4), (1, 0))
    expected = x if p == 0 else torch.zeros_like(x)
    assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("size", [(0, 4), (3, 0)])
def test_empty_blocks(size):
    y = block_dropout(torch.ones(size, device=DEVICE), 0.5, 7, (3, 4), (0, 0))
    assert y.shape == size


def test_gradients_of_first_and_second_order(randn):
    x = randn(3, 5, dtype=torch.float64).requires_grad_()

    def function(x):
        return block_dropout(x, 0.3, 7, (6, 8), (2, 1))

    torch.autograd.gradcheck(function, x, fast_mode=True)
    torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_functional_gradient(randn):
    x = randn(3, 5)
    gradient = torch.func.grad(lambda x: block_dropout(x, 0.3, 7, (6, 8), (2, 1)).sum())
    mask = block_dropout(torch.ones_like(x), 0.3, 7, (6, 8), (2, 1))
    assert torch.equal(gradient(x), mask)


def test_forward_mode_is_an_error(randn):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        x = forward_ad.make_dual(randn(3, 5), randn(3, 5))
        block_dropout(x, 0.3, 7, (6, 8), (2, 1))


def test_compiles_without_a_graph_break(randn, backend):
    def step(x):
        return block_dropout(2 * x, 0.3, 7, (6, 8), (2, 1)) + 1

    x = randn(3, 5).requires_grad_()
    y = torch.compile(step, backend=backend, fullgraph=True)(x)
    assert torch.equal(y, step(x))
    assert torch.equal(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, step(x))))


def test_operator_keeps_its_promises(randn):
    torch.library.opcheck(block_dropout_op, (randn(3, 5), 0.3, 7, [6, 8], [2, 1]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a dense tensor, not nested, got list"),
        ({"x": torch.ones(2, 2).int()}, TypeError, "x must be float16.*got torch.int32"),
        ({"p": "0"}, TypeError, "p must be a number, got str"),
        ({"p": 1.5}, ValueError, r"p must be in \[0, 1\], got 1.5"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"shape": (4,)}, ValueError, "must have 2 numbers, as x, got 1 and 2"),
        ({"offsets": (1, 1, 1)}, ValueError, "must have 2 numbers, as x, got 2 and 3"),
        ({"shape": (2**32, 2**31)}, ValueError, "fewer than 2\\^63 elements"),
        ({"offsets": (-1, 0)}, ValueError, "must lie in the whole tensor"),
        (
            {"offsets": (3, 0)},
            ValueError,
            r"offsets \[3, 0\] and block \[2, 2\] in shape",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(2, 2, device=DEVICE), "p": 0.5, "seed": 0}
    arguments |= {"shape": (4, 4), "offsets": (1, 1)} | change
    if isinstance(arguments["x"], torch.Tensor):
        arguments["x"] = arguments["x"].to(DEVICE)
    with pytest.raises(error, match=message):
        block_dropout(**arguments)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.ones(2, 2**30 + 8, device=DEVICE, dtype=torch.bfloat16)
    shape = (4, 2**30 + 16)
    y = block_dropout(x, 0.5, 7, shape, (2, 8))
    end = block_dropout(x[1:, -100:], 0.5, 7, shape, (3, 2**30 - 84))
    assert torch.equal(y[1:, -100:], end)


@pytest.mark.gpu
def test_a_captured_graph_draws_the_mask_anew(randn):
    x, arguments = randn(64, 96), (0.3, 7, (128, 96), (64, 0))
    expected = block_dropout(2 * x, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block_dropout(x, *arguments)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, expected)
