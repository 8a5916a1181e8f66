import math

import numpy as np
import pytest
import torch
from matrix_dropout import (
    DEVICE,
    INTERPRET,
    check_column_dropout,
    launch_tiles,
    matrix_dropout,
    matrix_dropout_op,
)
from randomgen import Philox
from seeded_dropout import seeded_dropout4x
from torch.utils.checkpoint import checkpoint

SEEDS = [0, 1, 123, -1, -123, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)]


def seeds_for(n_rows, first=0):
    """Seeds of all sizes and signs, the same in every run."""
    generator = torch.Generator().manual_seed(first)
    seeds = torch.randint(-(2**63), 2**63 - 1, (n_rows,), generator=generator)
    seeds[: len(SEEDS)] = torch.tensor(SEEDS)[:n_rows]
    return seeds.to(DEVICE)


def philox_words(seed, n):
    """The words of Philox4x32-10 for counters 0, 1, ..., by an independent package."""
    generator = Philox(counter=2**128 - 1, key=seed % 2**64, number=4, width=32)
    return torch.from_numpy(generator.random_raw(-(-n // 4) * 4).astype(np.int64))[:n]


def row_by_row(x, p, seeds):
    rows = [
        seeded_dropout4x(row, p, seed)
        for row, seed in zip(x, seeds.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros_like(x)


def bound(n, q):
    """Bernstein's: n decisions of probability q stray further from n q once in a million runs."""
    log = math.log(2 / 1e-6)
    return log / 3 + math.sqrt(log**2 / 9 + 2 * log * n * q * (1 - q))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 1 - 1e-6])
def test_mask_is_philox_of_seed_and_column(p):
    n_cols = 2100  # two tiles wide
    seeds = seeds_for(len(SEEDS))
    x = torch.ones(len(SEEDS), n_cols, device=DEVICE)
    keep = (matrix_dropout(x, p, seeds) != 0).cpu()
    for row, seed in zip(keep, SEEDS, strict=True):
        assert torch.equal(row, philox_words(seed, n_cols) >= round(p * 2**32))


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 5), (5, 1), (3, 4), (70, 8), (33, 65), (2, 2049), (600, 3), (2049, 2)],
)
def test_rows_are_those_of_seeded_dropout4x(randn, shape):
    x, seeds = randn(*shape), seeds_for(shape[0])
    expected = row_by_row(x[:40], 0.3, seeds[:40])
    assert torch.equal(matrix_dropout(x, 0.3, seeds)[:40], expected)
    transposed = x.T.contiguous().T
    assert torch.equal(matrix_dropout(transposed, 0.3, seeds)[:40], expected)


@pytest.mark.parametrize("p", [0, 0.0, 2**-34, 1 / 3, 1 - 2**-34, 1])
def test_every_dtype_and_p(randn, dtype, p):
    x, seeds = randn(13, 37, dtype=dtype), seeds_for(13)
    y = matrix_dropout(x, p, seeds)
    assert y.dtype == dtype and torch.equal(y, row_by_row(x, p, seeds))
    if dtype == torch.float64 and 0 < p < 1:
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=2**-51, atol=0)


@pytest.mark.parametrize("tile", [(1, 1024), (4, 256), (16, 64), (256, 4), (128, 32)])
def test_result_does_not_depend_on_the_tile(randn, tile):
    x, seeds = randn(19, 43), seeds_for(19)
    y = torch.full_like(x, math.nan)
    launch_tiles(y, x, 0.3, seeds, *tile)
    assert torch.equal(y, matrix_dropout(x, 0.3, seeds))


def test_masks_follow_the_rows(randn):
    x, seeds = randn(50, 70), seeds_for(50)
    y = matrix_dropout(x, 0.5, seeds)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(matrix_dropout(x[order], 0.5, seeds[order]), y[order])
    parts = [matrix_dropout(x[i : i + 7], 0.5, seeds[i : i + 7]) for i in range(0, 50, 7)]
    assert torch.equal(torch.cat(parts), y)
    wider = torch.cat([x, x], dim=1)
    assert torch.equal(matrix_dropout(wider, 0.5, seeds)[:, :70], y)
    same = matrix_dropout(torch.ones_like(x), 0.5, torch.full_like(seeds, 7))
    assert torch.equal(same, same[:1].expand_as(same))


def test_layouts(randn, layout):
    x, seeds = randn(13, 17), seeds_for(13)
    y = matrix_dropout(x, 0.5, seeds)
    z = matrix_dropout(layout(x), 0.5, seeds)
    assert z.is_contiguous() and torch.equal(z, y)


def test_expanded_and_negated_views(randn):
    seeds = seeds_for(13)
    row, column = randn(1, 17).expand(13, 17), randn(13, 1).expand(13, 17)
    for x in (row, column, randn(1, 1).expand(13, 17)):
        expected = matrix_dropout(
            x.clone(memory_format=torch.contiguous_format), 0.5, seeds
        )
        assert torch.equal(matrix_dropout(x, 0.5, seeds), expected)
    z = torch.complex(randn(13, 17), randn(13, 17)).conj().imag
    assert z.is_neg()
    for p in (0, 0.5):
        expected = matrix_dropout(z.resolve_neg(), p, seeds)
        assert torch.equal(matrix_dropout(z, p, seeds), expected)


def test_gradients_of_torch_func_and_of_forward_mode(randn):
    x, seeds = randn(5, 9), seeds_for(5)
    gradient = torch.func.grad(lambda x: matrix_dropout(x, 0.5, seeds).sum())(x)
    assert torch.equal(gradient, matrix_dropout(torch.ones_like(x), 0.5, seeds))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError),
    ):
        matrix_dropout(torch.autograd.forward_ad.make_dual(x, x), 0.5, seeds)


def test_input_is_left_alone(randn):
    x, seeds = randn(9, 9), seeds_for(9)
    before = x.clone()
    for p in (0, 0.5, 1):
        y = matrix_dropout(x, p, seeds)
        assert y.data_ptr() != x.data_ptr() and torch.equal(x, before)


def test_dropped_infinities_become_zero():
    seeds = seeds_for(5)
    keep = matrix_dropout(torch.ones(5, 40, device=DEVICE), 0.5, seeds) != 0
    for value in (math.inf, -math.inf, math.nan):
        y = matrix_dropout(torch.full((5, 40), value, device=DEVICE), 0.5, seeds)
        assert not y[~keep].any() and not y[keep].isfinite().any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty(randn, shape):
    for p in (0, 0.5, 1):
        assert matrix_dropout(randn(*shape), p, seeds_for(shape[0])).shape == shape


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)
def test_seeds_of_any_integer_dtype_and_device(randn, kind):
    kind = getattr(torch, kind)
    info = torch.iinfo(kind)
    values = [info.min, 0, 1, info.max]
    x = randn(4, 30)
    expected = [seeded_dropout4x(row, 0.5, v) for row, v in zip(x, values, strict=True)]
    for device in ("cpu", DEVICE):
        seeds = torch.tensor(values, dtype=kind).to(device)
        assert torch.equal(matrix_dropout(x, 0.5, seeds), torch.stack(expected))


def test_seeds_of_any_stride(randn):
    x, seeds = randn(4, 30), seeds_for(4)
    spread = torch.stack([seeds, -seeds], dim=1)[:, 0]
    assert torch.equal(matrix_dropout(x, 0.5, spread), matrix_dropout(x, 0.5, seeds))
    one = seeds[1:2].expand(4)
    assert torch.equal(matrix_dropout(x, 0.5, one), matrix_dropout(x, 0.5, one.clone()))


# How random are the masks? Each check fails for one sound generator in a million.


def test_rows_of_neighbouring_seeds_agree_by_chance_only():
    n_rows, n_cols = (257, 512) if INTERPRET else (2**15 + 1, 2**14)
    x = torch.ones(n_rows, n_cols, device=DEVICE, dtype=torch.float16)
    keep = matrix_dropout(x, 0.3, torch.arange(n_rows)) != 0
    n = (n_rows - 1) * n_cols
    agree = (keep[1:] == keep[:-1]).sum().item()
    # Neighbouring comparisons share a row, which at most doubles their variance.
    assert abs(agree - n * 0.58) < 2 * bound(n, 0.58)
    assert abs(keep.sum().item() - x.numel() * 0.7) < bound(x.numel(), 0.7)


# The gradient


def test_gradient_is_the_mask_again(randn, dtype, layout):
    x, seeds = randn(13, 17, dtype=dtype).requires_grad_(), seeds_for(13)
    gradient = randn(13, 17, dtype=dtype)
    y = matrix_dropout(x, 1 / 3, seeds)
    (dx,) = torch.autograd.grad(y, x, layout(gradient))
    assert torch.equal(dx, matrix_dropout(gradient, 1 / 3, seeds))


@pytest.mark.parametrize("p", [0, 0.3, 1])
def test_gradients_of_first_and_second_order(randn, p):
    x, seeds = randn(4, 5, dtype=torch.float64).requires_grad_(), seeds_for(4)
    torch.autograd.gradcheck(lambda x: matrix_dropout(x, p, seeds), x, fast_mode=True)
    torch.autograd.gradgradcheck(lambda x: matrix_dropout(x, p, seeds), x, fast_mode=True)


def test_expanded_gradient(randn):
    x, seeds = randn(13, 17).requires_grad_(), seeds_for(13)
    matrix_dropout(x, 0.5, seeds).sum().backward()
    assert torch.equal(x.grad, matrix_dropout(torch.ones_like(x), 0.5, seeds).detach())


def test_only_the_seeds_are_saved_for_the_backward_pass(randn):
    saved, seeds = [], seeds_for(100)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        matrix_dropout(randn(100, 9).requires_grad_(), 0.5, seeds)
    assert [x.data_ptr() for x in saved] == [seeds.data_ptr()]


def test_seeds_changed_before_the_backward_pass_are_noticed(randn):
    seeds = seeds_for(9)
    y = matrix_dropout(randn(9, 9).requires_grad_(), 0.5, seeds)
    seeds += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_replays_under_checkpointing():
    seeds, gradients = seeds_for(9), []
    for function in (
        lambda x: matrix_dropout(x, 0.5, seeds).sin(),
        lambda x: checkpoint(
            lambda x: matrix_dropout(x, 0.5, seeds).sin(),
            x,
            use_reentrant=False,
            preserve_rng_state=False,
        ),
    ):
        x = torch.ones(9, 9, device=DEVICE, requires_grad=True)
        gradients += torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(*gradients)


def test_operator_keeps_its_promises(randn, dtype):
    x = randn(6, 7, dtype=dtype)
    for sample in (
        x,
        x.T,
        x[:, ::2],
        x[:0],
        x[:1].expand(5, 7),
    ):
        for p in (0.0, 0.5, 1.0):
            arguments = sample, p, seeds_for(len(sample))
            torch.library.opcheck(matrix_dropout_op, arguments)


def test_compiles_without_a_graph_break(randn, backend):
    def step(x, seeds):
        return matrix_dropout(2 * x, 0.3, seeds) + 1

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    x = randn(50, 3).requires_grad_()
    for seeds in (seeds_for(50), seeds_for(50, first=1)):
        y, expected = compiled(x, seeds), step(x, seeds)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(z.sum(), x)[0] for z in (y, expected)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a dense tensor, not nested, got list"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x must be float16.*got torch.int32"),
        ({"x": torch.ones(3, 4).to_sparse()}, TypeError, "x must be a dense tensor"),
        ({"x": torch.ones(3, 4, device="meta")}, ValueError, "device type"),
        ({"x": torch.ones(3)}, ValueError, "x must have two dimensions, got 1"),
        ({"p": -0.1}, ValueError, r"p must be in \[0, 1\], got -0.1"),
        ({"p": math.nan}, ValueError, r"p must be in \[0, 1\], got nan"),
        ({"p": "0.5"}, TypeError, "p must be a number, got str"),
        ({"seeds": 7}, TypeError, "seeds must be a dense tensor, not nested, got int"),
        (
            {"seeds": torch.ones(3)},
            TypeError,
            "seeds must be integers, got torch.float32",
        ),
        (
            {"seeds": torch.ones(3) > 0},
            TypeError,
            "seeds must be integers, got torch.bool",
        ),
        ({"seeds": torch.arange(4)}, ValueError, r"shape \(3,\), one for.*got \(4,\)"),
        ({"seeds": torch.tensor(4)}, ValueError, r"shape \(3,\), one for.*got \(\)"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.ones(3, 4), "p": 0.5, "seeds": torch.arange(3)} | change
    if isinstance(arguments["x"], torch.Tensor) and arguments["x"].device.type == "cpu":
        arguments["x"] = arguments["x"].to(DEVICE)
    with pytest.raises(error, match=message):
        matrix_dropout(**arguments)


# The exercises


def test_answers_are_told_right_from_wrong(capsys):
    check_column_dropout(lambda x, p, seeds: matrix_dropout(x.T, p, seeds).T)
    assert capsys.readouterr().out == "right\n"
    with pytest.raises(AssertionError, match="column 0 is wrong"):
        check_column_dropout(
            lambda x, p, seeds: matrix_dropout(x, p, seeds[:1].expand(9))
        )


def test_second_gradients_and_vjps_of_torch_func(randn):
    x, w, seeds = randn(5, 9), randn(5, 9), seeds_for(5)
    with torch.no_grad():
        y, pull_back = torch.func.vjp(lambda x: matrix_dropout(x, 0.5, seeds), x)
        assert torch.equal(y, matrix_dropout(x, 0.5, seeds))
        assert torch.equal(pull_back(w)[0], matrix_dropout(w, 0.5, seeds))
    first = torch.func.grad(lambda x: matrix_dropout(x, 0.5, seeds).square().sum())
    second = torch.func.grad(lambda x: first(x).sum())(x)
    mask = matrix_dropout(torch.ones_like(x), 0.5, seeds)
    torch.testing.assert_close(second, 2 * mask.square())
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: matrix_dropout(x, 0.5, seeds), (x,), (x,))


@pytest.mark.gpu
def test_more_than_2_to_the_32_elements():
    n_rows, n_cols = 2**16 + 3, 2**16 + 4
    seeds = seeds_for(n_rows)
    y = matrix_dropout(
        torch.ones(n_rows, n_cols, device=DEVICE, dtype=torch.float16), 0.5, seeds
    )
    ones = torch.ones(n_cols, device=DEVICE, dtype=torch.float16)
    for row in (0, 2**15, 2**16, n_rows - 1):
        assert torch.equal(y[row], seeded_dropout4x(ones, 0.5, seeds[row].item()))
    del y
    x = torch.ones(n_cols, n_rows, device=DEVICE, dtype=torch.float16).T
    y = matrix_dropout(x, 0.5, seeds)
    for row in (0, 2**15, 2**16, n_rows - 1):
        assert torch.equal(y[row], seeded_dropout4x(ones, 0.5, seeds[row].item()))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2**32 + 5), (2**29 + 3, 8)])
def test_one_very_long_side(shape):
    x = torch.ones(shape, device=DEVICE, dtype=torch.float16)
    seeds = torch.arange(shape[0], device=DEVICE)
    y = matrix_dropout(x, 0.5, seeds)
    last = seeded_dropout4x(x[-1], 0.5, shape[0] - 1)
    assert torch.equal(y[-1], last)


@pytest.mark.gpu
def test_no_hidden_copy():
    x = torch.randn(4096, 512, device=DEVICE).T
    seeds = torch.arange(512, device=DEVICE)
    matrix_dropout(x, 0.5, seeds)
    for view in (x, x[:, ::2], x[:1].expand(512, 4096)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = matrix_dropout(view, 0.5, seeds)
        assert torch.cuda.max_memory_allocated() - before == y.nbytes


@pytest.mark.gpu
def test_memory_that_is_held_between_forward_and_backward():
    x = torch.randn(2**10, 2**10, device=DEVICE, requires_grad=True)
    seeds = torch.arange(2**10, device=DEVICE)
    before = torch.cuda.memory_allocated()
    y = x
    for _ in range(5):
        y = matrix_dropout(y, 0.1, seeds)
    assert torch.cuda.memory_allocated() - before == y.nbytes


def test_a_gradient_pulled_back_by_torch_func(randn):
    x, seeds = randn(4, 6), seeds_for(4)
    _, pull_back = torch.func.vjp(lambda x: matrix_dropout(x, 0.5, seeds), x)
    ones = torch.ones_like(x)
    assert torch.equal(pull_back(ones)[0], matrix_dropout(ones, 0.5, seeds))
