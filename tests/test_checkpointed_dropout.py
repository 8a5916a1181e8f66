import copy
import io
import math
import pickle
from itertools import product

import pytest
import torch
from checkpointed_dropout import (
    BITS,
    DEVICE,
    SOURCES,
    Network,
    SeededDropout,
    check_replay,
    next_step,
    replays,
    seed_for,
    seeded,
    seeded_dropout4x,
)
from seeded_dropout import seeded_dropout4x as the_lesson_before
from torch.nn.functional import dropout

# preserved, not preserved, and the same two compiled
TABLE = {
    "torch's generator: F.dropout": (True, False, True, True),
    "torch.randint, inside": (True, False, True, True),
    "Python's random, inside": (False, False, False, False),
    "a Generator of one's own": (False, False, False, False),
    "a counter in the module": (False, False, False, False),
    "a seed passed in": (True, True, True, True),
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]
)
def test_each_row_of_the_table(name, backend):
    cases = product((None, backend), (True, False))
    found = [replays(SOURCES[name], preserved, way) for way, preserved in cases]
    assert tuple(found) == TABLE[name]


def test_the_table_is_whole():
    assert list(SOURCES) == list(TABLE)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**62])
def test_masks_are_those_of_the_lesson_before(randn, seed):
    x = randn(1100)
    y = seeded_dropout4x(x, 0.3, torch.tensor(seed))
    assert torch.equal(y, the_lesson_before(x, 0.3, seed))


def test_operator_keeps_its_promises(randn):
    for x in (randn(6, 7), randn(6, 7).T, randn(6, 7).requires_grad_()):
        torch.library.opcheck(seeded_dropout4x, (x, 0.5, torch.tensor(7)))


def test_gradient(randn):
    x = randn(4, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: seeded_dropout4x(x, 0.3, torch.tensor(7)), x)
    gradient = randn(5, 4, dtype=torch.float64).T
    (got,) = torch.autograd.grad(seeded_dropout4x(x, 0.3, torch.tensor(7)), x, gradient)
    assert torch.equal(got, seeded_dropout4x(gradient, 0.3, torch.tensor(7)))


@pytest.mark.parametrize(
    ("x", "p", "seed", "error", "message"),
    [
        (
            torch.ones(3, dtype=torch.int32),
            0.5,
            torch.tensor(1),
            TypeError,
            "x must be float16",
        ),
        (torch.ones(3), 1.5, torch.tensor(1), ValueError, "p must be in"),
        (torch.ones(3), math.nan, torch.tensor(1), ValueError, "p must be in"),
        (torch.ones(3), 0.5, torch.tensor([1, 2]), ValueError, "seed must be one int64"),
        (torch.ones(3), 0.5, torch.tensor(1.0), ValueError, "seed must be one int64"),
    ],
)
def test_errors_of_the_operator(x, p, seed, error, message):
    with pytest.raises(error, match=message):
        seeded_dropout4x(x.to(DEVICE), p, seed)


# The check


def test_check_replay_passes_what_replays(randn):
    x = randn(100)
    check_replay(lambda x: dropout(x, 0.5), x)
    check_replay(lambda x: x.sin(), x, preserve_rng_state=False)
    check_replay(lambda x: x / 0, x, preserve_rng_state=False)  # inf is equal to itself
    check_replay(SeededDropout(0.5), x, preserve_rng_state=False)
    check_replay(
        Network(10, 2, seeded).to(DEVICE), randn(3, 10), preserve_rng_state=False
    )


def test_check_replay_catches_what_does_not(randn):
    for function, options in [
        (lambda x: dropout(x, 0.5), {"preserve_rng_state": False}),
        (torch.nn.Sequential(torch.nn.Dropout(0.5)), {"preserve_rng_state": False}),
        (lambda x: SOURCES["a Generator of one's own"](x, None), {}),
        (lambda x: SOURCES["Python's random, inside"](x, None), {}),
    ]:
        with pytest.raises(AssertionError, match="Mismatched elements"):
            check_replay(function, randn(100), **options)


def test_check_replay_leaves_gradients_alone(randn):
    model = torch.nn.Linear(5, 5).to(DEVICE)
    check_replay(model, randn(2, 5))
    assert model.weight.grad is None


def test_check_replay_refuses_what_is_no_tensor(randn):
    with pytest.raises(TypeError, match="function must return a tensor, got tuple"):
        check_replay(lambda x: (x, x), randn(3))


# Seeds


def test_seeds_are_unique():
    edges = [sorted({0, 1, 2, 2**bits - 2, 2**bits - 1}) for bits in BITS.values()]
    seeds = {seed_for(*numbers) for numbers in product(*edges)}
    assert len(seeds) == math.prod(len(edge) for edge in edges)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert sum(BITS.values()) == 64


@pytest.mark.parametrize("position", range(4))
def test_seed_for_refuses_what_does_not_fit(position):
    name, bits = list(BITS.items())[position]
    for value in (-1, 2**bits):
        numbers = [0, 0, 0, 0]
        numbers[position] = value
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 2\^{bits}\)"):
            seed_for(*numbers)
    numbers[position] = 1.0
    with pytest.raises(TypeError, match=f"{name} must be an integer, got float"):
        seed_for(*numbers)


# The module


def test_a_step_draws_one_mask_and_the_next_another(randn):
    module, x = SeededDropout(0.5), randn(1000)
    first = module(x)
    assert torch.equal(module(x), first)
    next_step(module)
    assert not torch.equal(module(x), first)


def test_layers_workers_and_runs_draw_different_masks():
    x = torch.ones(1000, device=DEVICE)
    modules = [SeededDropout(0.5), SeededDropout(0.5, 1), SeededDropout(0.5, 0, 1)]
    modules.append(SeededDropout(0.5, run=1))
    assert len({tuple(module(x).tolist()) for module in modules}) == 4


def test_module_made_on_another_device_keeps_its_seed(randn):
    x = randn(100)
    with torch.device("meta"):
        module = SeededDropout(0.5)
    assert torch.equal(module(x), SeededDropout(0.5)(x))


def test_eval_is_the_identity(randn):
    module, x = SeededDropout(0.5).eval(), randn(10)
    assert module(x) is x


def test_the_step_travels(randn):
    x, module = randn(1000), SeededDropout(0.5, layer=3)
    for _ in range(5):
        next_step(module)
    loaded = SeededDropout(0.5, layer=3)
    loaded.load_state_dict(module.state_dict())
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        next_step(other)
        assert not torch.equal(other(x), module(x))  # a copy's steps are its own


def test_a_worker_that_loads_another_workers_state_keeps_its_own_masks(randn):
    x, module, other = (
        randn(1000),
        SeededDropout(0.5, worker=1),
        SeededDropout(0.5, worker=2),
    )
    next_step(module)
    other.load_state_dict(module.state_dict())
    assert other.get_extra_state() == 1
    assert not torch.equal(other(x), module(x))


def test_state_is_read_by_a_safe_load():
    file = io.BytesIO()
    torch.save(SeededDropout(0.5).state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_the_last_step_is_followed_by_an_error():
    module = SeededDropout(0.5)
    module.set_extra_state(2**32 - 1)
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\^32\)"):
        next_step(module)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": 1.1}, ValueError, r"p must be in \[0, 1\], got 1.1"),
        ({"p": math.nan}, ValueError, "p must be in"),
        ({"p": "0.1"}, TypeError, "p must be a number, got str"),
        ({"p": 0.1, "layer": -1}, ValueError, "layer must be in"),
        ({"p": 0.1, "worker": 2**12}, ValueError, "worker must be in"),
        ({"p": 0.1, "run": 0.5}, TypeError, "run must be an integer"),
    ],
)
def test_errors_of_the_module(arguments, error, message):
    with pytest.raises(error, match=message):
        SeededDropout(**arguments)


def test_compiles_once_for_all_steps(randn):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, x = Network(8, 2, seeded, preserve_rng_state=False).to(DEVICE), randn(3, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(20):
        torch.testing.assert_close(compiled(x), model(x))
        next_step(model)
    assert len(graphs) == 1


def test_gradients_under_checkpoint_and_compile(randn):
    x = randn(4, 8)
    grads = []
    for options in ({}, {"preserve_rng_state": False}):
        torch.manual_seed(3)
        model = Network(8, 3, seeded, **options).to(DEVICE)
        next_step(model)
        model(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for parameter, expected in zip(model.parameters(), grads[0], strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_moving_on_before_the_backward_pass(randn):
    module, x = SeededDropout(0.5), randn(100).requires_grad_()
    y = module(x)
    next_step(module)
    y.backward(x)
    assert torch.equal(x.grad, y.detach())


@pytest.mark.gpu
def test_a_device_that_is_first_used_inside():
    check_replay(lambda x: SeededDropout(0.5)(x.cuda()), torch.ones(256))
    with pytest.raises(AssertionError):
        check_replay(lambda x: dropout(x.cuda(), 0.5), torch.ones(256))
