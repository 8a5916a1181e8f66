import copy
import io
import math
import pickle
from functools import partial

import checkpointed_dropout
import pytest
import torch
from checkpointed_dropout import (
    DEVICE,
    SOURCES,
    Block,
    Masks,
    SeededDropout,
    Seeds,
    checkpointed,
    gradients,
    new_pass_inside,
    plain,
    replayed_dropout,
    replayed_dropout_op,
    replays,
    run_network,
    unwrapped,
)
from seeded_dropout import seeded_dropout4x
from test_seeded_dropout import SEEDS
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint


def seed_of(value):
    return torch.tensor(value, device=DEVICE)


# With the state preserved, and without.
TABLE = {
    "torch's generator: F.dropout": (True, False),
    "a Generator of one's own": (False, False),
    "Python's random": (False, False),
    "a counter": (False, False),
    "a seed passed in": (True, True),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_row_of_the_table(name):
    x = torch.ones(256, device=DEVICE)
    found = [
        replays(SOURCES[name], x, seed_of(7), preserve_rng_state=keep)
        for keep in (True, False)
    ]
    assert tuple(found) == TABLE[name]


def test_the_table_is_whole():
    assert list(SOURCES) == list(TABLE)


# The check


def test_what_replays(randn):
    x = randn(100)
    assert replays(lambda x: dropout(x, 0.5), x)
    assert replays(lambda x: x.sin(), x, preserve_rng_state=False)
    for special in (math.inf, -math.inf, math.nan):
        assert replays(lambda x, special=special: x * special, x)


def test_what_does_not_replay(randn):
    for function in (lambda x: dropout(x, 0.5), torch.nn.Dropout(0.5)):
        assert not replays(function, randn(100), preserve_rng_state=False)


def test_the_check_leaves_gradients_alone(randn):
    model = torch.nn.Linear(5, 5).to(DEVICE)
    assert replays(model, randn(2, 5))
    assert model.weight.grad is None


# The function


def philox(counter, key):
    """The four words of Philox4x32-10, in plain Python."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_this_philox_gives_the_published_answer():
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = philox(counter, (0xA4093822, 0x299F31D0))
    assert words == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("number", [0, 1, 16, 4097, 2**32, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**62])
def test_mask_is_philox_of_seed_index_and_number(seed, number):
    n = 4 * 300 + 3
    words = [
        word
        for i in range(n // 4 + 1)
        for word in philox(
            (i, 0, number % 2**32, number >> 32), (seed % 2**32, seed % 2**64 >> 32)
        )
    ]
    y = replayed_dropout(torch.ones(n, device=DEVICE), 0.3, seed_of(seed), number)
    expected = torch.tensor(words[:n]) >= round(0.3 * 2**32)
    assert torch.equal((y != 0).cpu(), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_0_is_that_of_the_lesson_before(randn, seed):
    x = randn(1100)
    signed = seed - 2**64 if seed >= 2**63 else seed
    y = replayed_dropout(x, 0.3, seed_of(signed))
    assert torch.equal(y, seeded_dropout4x(x, 0.3, seed))


@pytest.mark.parametrize("p", [0, 0.3, 1])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (33, 31)])
def test_values_shapes_layouts_and_dtypes(randn, layout, dtype, shape, p):
    x = randn(*shape, dtype=dtype)
    x = layout(x) if x.ndim == 2 else x
    y = replayed_dropout(x, p, seed_of(7))
    assert y.is_contiguous() and y.dtype == dtype
    assert torch.equal(y, seeded_dropout4x(x, p, 7))
    assert y.numel() == 0 or y.data_ptr() != x.data_ptr()


def test_negated_view():
    x = torch.tensor([1 + 2j] * 50, device=DEVICE).conj().imag
    y = replayed_dropout(x, 0.5, seed_of(7))
    assert set(y.tolist()) == {0, -4}


def test_operator_keeps_its_promises(randn):
    for x in (randn(6, 7), randn(6, 7).T):
        torch.library.opcheck(replayed_dropout_op, (x, 0.5, seed_of(7), 5))


def test_gradients(randn):
    x = randn(4, 5, dtype=torch.float64).requires_grad_()

    def function(x):
        return replayed_dropout(x, 0.3, seed_of(7), 5)

    torch.autograd.gradcheck(function, x, fast_mode=True)
    torch.autograd.gradgradcheck(function, x, fast_mode=True)
    gradient = randn(5, 4, dtype=torch.float64).T
    (got,) = torch.autograd.grad(function(x), x, gradient)
    assert torch.equal(got, function(gradient))
    assert torch.equal(torch.func.grad(lambda x: function(x).sum())(x.detach()),
                       function(torch.ones_like(x)))  # fmt: skip


def test_forward_mode_and_vmap_are_errors_and_not_silent(randn):
    x = randn(9)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: replayed_dropout(x, 0.5, seed_of(7)), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="jvp"):
            replayed_dropout(dual, 0.5, seed_of(7))
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        torch.vmap(lambda x: replayed_dropout(x, 0.5, seed_of(7)))(randn(3, 9))


def test_a_seed_that_changes_before_the_backward_pass_is_an_error(randn):
    seed = seed_of(7)
    y = replayed_dropout(randn(9).requires_grad_(), 0.5, seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a dense tensor, not nested, got .*list"),
        (
            {"x": torch.ones(3).to_sparse()},
            TypeError,
            "x must be a dense tensor, not nested, got",
        ),
        ({"x": torch.ones(3).int()}, TypeError, "x must be float16.*got torch.int32"),
        ({"x": torch.ones(3, device="meta")}, ValueError, "x must be on device type"),
        ({"p": 1.5}, ValueError, "p must be from 0 to 1, got 1.5"),
        ({"p": math.nan}, ValueError, "p must be from 0 to 1, got nan"),
        ({"p": "1"}, TypeError, "p must be a number, got str"),
        ({"seed": 7}, TypeError, "seed must be a tensor of one int64, got 7"),
        ({"seed": torch.tensor([1, 2])}, TypeError, "seed must be a tensor of one int64"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed must be a tensor of one int64"),
        ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed must be on"),
        ({"number": -1}, ValueError, "number must be from 0 to"),
        ({"number": 2**63}, ValueError, "number must be from 0 to"),
        ({"number": 1.0}, TypeError, "number must be an integer, got float"),
    ],
)
def test_errors_of_the_function(change, error, message):
    arguments = {"x": torch.ones(3), "p": 0.5, "seed": torch.tensor(1)} | change
    arguments = {
        name: value.to(DEVICE)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
        else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=message):
        replayed_dropout(**arguments)


# Numbers: no two masks of a pass share one, whatever the calls.


def numbers_of(tree, masks):
    """Take numbers as a tree of calls does: None is a dropout, a list a checkpointed function."""
    for branch in tree:
        if branch is None:
            yield masks.next_number()
        else:
            yield from numbers_of(branch, Masks(masks.seed, masks.next_number()))


def test_numbers_are_unique():
    tree = [None, [None, None, [None, [None, [None] * 3]]], [[None], None], None]
    numbers = list(numbers_of(tree, Seeds(0).next_pass()))
    assert len(set(numbers)) == len(numbers) == 11
    assert min(numbers) > 0 and max(numbers) < 2**63
    full = list(numbers_of([None] * 4095, Seeds(0).next_pass()))
    assert len(set(full)) == 4095


def test_too_many_numbers_are_an_error():
    masks = Seeds(0).next_pass()
    for _ in range(4095):
        masks.next_number()
    with pytest.raises(RuntimeError, match="take new masks from"):
        masks.next_number()
    for _ in range(4):
        masks = Masks(masks.seed, Masks(masks.seed, masks.above).next_number())
    assert masks.next_number() < 2**63
    with pytest.raises(RuntimeError, match="no number is left"):
        Masks(masks.seed, masks.next_number()).next_number()


def test_seeds_of_passes_and_streams_differ():
    streams = (0, 1, 2**23 - 1)
    seeds = [Seeds(stream) for stream in streams]
    values = [s.next_pass().seed.item() for s in seeds for _ in range(3)]
    assert len(set(values)) == 9
    assert values[:3] == [1, 2, 3]
    assert max(values) < 2**63


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Seeds(), TypeError, "missing 1 required positional argument"),
        (lambda: Seeds(-1), ValueError, "stream must be from 0 to 8388607, got -1"),
        (lambda: Seeds(2**23), ValueError, "stream must be from 0"),
        (lambda: Seeds(0.5), TypeError, "stream must be an integer, got float"),
        (lambda: SeededDropout(1.1), ValueError, "p must be from 0 to 1, got 1.1"),
        (lambda: SeededDropout(math.nan), ValueError, "p must be from 0 to 1"),
        (lambda: SeededDropout("0.1"), TypeError, "p must be a number, got str"),
    ],
)
def test_errors_of_the_modules(make, error, message):
    with pytest.raises(error, match=message):
        make()


# What used to repeat a mask in silence


def different(*masks):
    return len({tuple((mask != 0).flatten().tolist()) for mask in masks}) == len(masks)


def test_two_layers_draw_different_masks():
    x, masks = torch.ones(1000, device=DEVICE), Seeds(0).next_pass()
    assert different(SeededDropout(0.5)(x, masks), SeededDropout(0.5)(x, masks))


def test_a_layer_that_is_used_twice_draws_different_masks():
    x, masks, module = (
        torch.ones(1000, device=DEVICE),
        Seeds(0).next_pass(),
        SeededDropout(0.5),
    )
    assert different(module(x, masks), module(x, masks))


@pytest.mark.parametrize("way", [plain, checkpointed])
def test_two_batches_of_a_step_draw_different_masks(way):
    module, seeds, x = SeededDropout(0.5), Seeds(0), torch.ones(1000, device=DEVICE)
    assert different(*(way(module, x, masks=seeds.next_pass()) for _ in range(3)))
    same = seeds.next_pass()  # somebody forgot to ask for the next pass
    assert different(*(way(module, x, masks=same) for _ in range(3)))


def test_masks_that_are_left_out_are_an_error(randn):
    with pytest.raises(
        TypeError, match="missing 1 required positional argument: 'masks'"
    ):
        SeededDropout(0.5)(randn(3))
    with pytest.raises(
        TypeError, match=r"masks must come from Seeds\.next_pass, got None"
    ):
        SeededDropout(0.5)(randn(3), None)


def test_eval_is_the_identity(randn):
    module, x = SeededDropout(0.5).eval(), randn(10)
    assert module(x, None) is x
    assert torch.equal(checkpointed(module, x, masks=None), x)


# Replaying


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(8, SeededDropout(0.3)) for _ in range(3))
    return blocks.to(DEVICE)


def nested(function, *inputs, masks):
    def inner(*inputs):
        *inputs, masks = inputs
        return checkpointed(function, *inputs, masks=masks)

    return checkpointed(inner, *inputs, masks=masks)


def nested_plainly(function, *inputs, masks):
    def inner(*inputs):
        *inputs, masks = inputs
        return plain(function, *inputs, masks=masks)

    return plain(inner, *inputs, masks=masks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(blocks, randn, reentrant):
    x = randn(4, 8).requires_grad_()
    way = partial(checkpointed, use_reentrant=reentrant)
    assert torch.equal(gradients(blocks, x, way), gradients(blocks, x, plain))


def test_gradients_of_nested_checkpoints(blocks, randn):
    x = randn(4, 8).requires_grad_()
    expected = gradients(blocks, x, nested_plainly)
    assert torch.equal(gradients(blocks, x, nested), expected)


@pytest.mark.parametrize("way", [plain, checkpointed, nested])
def test_gradients_of_compiled_networks(blocks, randn, way, backend):
    torch.compiler.reset()
    x = randn(4, 8).requires_grad_()
    run = torch.compile(run_network, backend=backend, fullgraph=True)
    expected = gradients(blocks, x, nested_plainly if way is nested else plain)
    torch.testing.assert_close(gradients(blocks, x, way, run), expected)


def test_compiles_once_for_all_passes(blocks, randn):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(run_network, backend=backend, fullgraph=True)
    x, seeds, others = randn(3, 8), Seeds(0), Seeds(0)
    for _ in range(12):
        y = run(blocks, x, seeds.next_pass(), checkpointed)
        expected = run_network(blocks, x, others.next_pass(), plain)
        torch.testing.assert_close(y, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_checkpoint_is_an_error(blocks, randn, reentrant):
    def way(block, x, masks):
        return checkpoint(block, x, masks, use_reentrant=reentrant)

    with pytest.raises(RuntimeError, match="use checkpointed instead"):
        gradients(blocks, randn(4, 8).requires_grad_(), way)


def test_plain_checkpoint_is_an_error_when_compiled(blocks, randn):
    x = randn(4, 8).requires_grad_()
    for fullgraph in (True, False):
        torch.compiler.reset()
        run = torch.compile(run_network, backend="aot_eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError):
            gradients(blocks, x, unwrapped, run)


def test_a_new_pass_inside_is_an_error(blocks, randn):
    x = randn(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="call next_pass outside of checkpoint"):
        gradients(blocks, x, new_pass_inside)


def test_masks_are_an_error_in_the_check(randn):
    masks = Seeds(0).next_pass()
    with pytest.raises(RuntimeError, match="use checkpointed"):
        replays(lambda x: SeededDropout(0.5)(x, masks), randn(9))
    assert replays(lambda x: SeededDropout(0.5)(x, Masks(masks.seed, 1)), randn(9))


# Train, save, resume


def train(blocks, seeds, optimizer, x, n_steps):
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = run_network(blocks, x, seeds.next_pass(), checkpointed).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_run_that_is_resumed_has_the_same_losses(randn):
    x = randn(5, 8)

    def fresh():
        torch.manual_seed(1)
        blocks = torch.nn.ModuleList(Block(8, SeededDropout(0.3)) for _ in range(2))
        blocks, seeds = blocks.to(DEVICE), Seeds(3)
        return blocks, seeds, torch.optim.SGD(blocks.parameters(), lr=0.1, momentum=0.9)

    without_a_break = train(*fresh(), x, 6)
    run, file = fresh(), io.BytesIO()
    losses = train(*run, x, 3)
    torch.save([part.state_dict() for part in run], file)
    run = fresh()
    file.seek(0)
    for part, state in zip(run, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert losses + train(*run, x, 3) == without_a_break


def test_seeds_travel():
    seeds = Seeds(5)
    for _ in range(4):
        seeds.next_pass()
    loaded = Seeds(5)
    loaded.load_state_dict(seeds.state_dict())
    expected = copy.deepcopy(seeds).next_pass().seed
    for other in (loaded, pickle.loads(pickle.dumps(seeds)), seeds.to(DEVICE).half()):
        assert torch.equal(other.next_pass().seed, expected)


def test_a_worker_that_loads_another_workers_state_keeps_its_own_masks():
    seeds, other = Seeds(1), Seeds(2)
    seeds.next_pass()
    other.load_state_dict(seeds.state_dict())
    assert other.passes.item() == 1
    assert other.next_pass().seed != seeds.next_pass().seed


def test_seeds_that_are_made_under_another_device():
    with torch.device("meta"):
        seeds = Seeds(0)
    assert seeds.next_pass().seed.device.type == DEVICE


# On a GPU


@pytest.mark.gpu
def test_a_device_that_is_first_used_inside():
    def function(x, masks):
        return SeededDropout(0.5)(x.cuda(), masks)

    masks = Seeds(0).next_pass()
    x = torch.ones(256, requires_grad=True)
    y = checkpointed(lambda x, masks: function(x, masks).sin() * 2, x, masks=masks)
    y.sum().backward()
    mask = replayed_dropout(torch.ones(256, device=DEVICE), 0.5, masks.seed, 4097)
    torch.testing.assert_close(x.grad, (2 * mask * mask.cos()).cpu())
    assert not replays(lambda x: dropout(x.cuda(), 0.5), torch.ones(256))


@pytest.mark.gpu
def test_each_replay_of_a_captured_step_has_masks_of_its_own(blocks, randn):
    x, seeds, others = randn(4, 8), Seeds(0), Seeds(0)
    parameters = list(blocks.parameters())

    def step(seeds):
        y = run_network(blocks, x, seeds.next_pass(), checkpointed)
        return torch.autograd.grad(y.square().sum(), parameters)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(seeds), step(others)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seeds)
    losses = []
    for _ in range(3):
        graph.replay()
        expected = step(others)
        torch.testing.assert_close(captured, expected)
        losses.append(captured[0].sum().item())
    assert len(set(losses)) == 3
    assert seeds.passes.item() == others.passes.item() == 5


def test_masks_that_every_replay_of_a_graph_would_repeat_are_an_error(randn, monkeypatch):
    """A capture as Python sees it, so that this needs no GPU."""
    masks = Seeds(0).next_pass()
    monkeypatch.setattr(checkpointed_dropout, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call next_pass in the CUDA graph"):
        SeededDropout(0.5)(randn(9), masks)
    assert SeededDropout(0.5)(randn(9), Seeds(0).next_pass()).shape == (9,)


@pytest.mark.gpu
def test_masks_from_before_a_capture_are_an_error(randn):
    x, masks = randn(9), Seeds(0).next_pass()
    SeededDropout(0.5)(x, masks)
    error = pytest.raises(RuntimeError, match="call next_pass in the CUDA graph")
    with error, torch.cuda.graph(torch.cuda.CUDAGraph()):
        SeededDropout(0.5)(x, masks)


@pytest.mark.gpu
def test_more_than_2_to_the_32_elements():
    n, seed = 2**34 + 1024, seed_of(7)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 4.2 * n:
        pytest.skip("needs 72 GiB of GPU memory")
    y = replayed_dropout(torch.ones(n, device=DEVICE, dtype=torch.float16), 0.5, seed, 9)
    for first in (2**32, 2**34):
        counters = [(first // 4 + i) for i in range(100)]
        words = [w for c in counters for w in philox((c % 2**32, c >> 32, 9, 0), (7, 0))]
        expected = torch.tensor(words) >= 2**31
        assert torch.equal((y[first : first + 400] != 0).cpu(), expected)


def test_a_gradient_pulled_back_by_torch_func(randn):
    x, seed = randn(4, 6), seed_of(7)
    _, pull_back = torch.func.vjp(lambda x: replayed_dropout(x, 0.5, seed, 5), x)
    ones = torch.ones_like(x)
    assert torch.equal(pull_back(ones)[0], replayed_dropout(ones, 0.5, seed, 5))
