"""Dropout of tensors that are divided among ranks: simulated ones, and processes."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from seeded_dropout import seeded_dropout4x
from sharded_dropout import (
    DEVICE,
    INTERPRET,
    BlockDropout,
    block_of,
    sharded_dropout,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint


@pytest.fixture
def as_rank():
    """A mesh as one of its ranks sees it; nothing that is sent arrives."""
    hook = sys.excepthook  # each process group wraps it

    def enter(rank, *sizes):
        if dist.is_initialized():
            dist.destroy_process_group()
        world_size = torch.Size(sizes).numel()
        dist.init_process_group(
            "fake", store=FakeStore(), rank=rank, world_size=world_size
        )
        return init_device_mesh(DEVICE, sizes)

    yield enter
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.excepthook = hook


def local_block(x, mesh, placements):
    """What this rank holds, found by cutting dimension after dimension of the mesh."""
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            chunks = x.chunk(mesh.size(dimension), dim=placement.dim)
            place = mesh.get_local_rank(dimension)
            empty = x.narrow(placement.dim, 0, 0)
            x = chunks[place] if place < len(chunks) else empty
    return x


@pytest.mark.parametrize(
    ("sizes", "placements"),
    [
        ((4,), [Shard(0)]),
        ((4,), [Shard(1)]),
        ((4,), [Shard(2)]),
        ((3,), [Shard(1)]),
        ((9,), [Shard(0)]),  # some are empty
        ((4,), [Replicate()]),
        ((2, 2), [Shard(0), Shard(2)]),
        ((2, 2), [Replicate(), Shard(1)]),
        ((2, 3), [Shard(0), Shard(0)]),
    ],
    ids=str,
)
def test_every_rank_draws_its_part_of_one_mask(as_rank, randn, sizes, placements):
    x = randn(6, 5, 7)
    whole = seeded_dropout4x(x, 0.3, 11)
    for rank in range(torch.Size(sizes).numel()):
        mesh = as_rank(rank, *sizes)
        local = local_block(x, mesh, placements)
        sharded = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
        )
        y = sharded_dropout(sharded, 0.3, 11)
        assert y.placements == sharded.placements and y.shape == x.shape
        assert torch.equal(y.to_local(), local_block(whole, mesh, placements))


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2)], ids=str)
def test_fsdp_over_tensor_parallelism(as_rank, randn, sizes):
    x = randn(12, 5)
    whole = seeded_dropout4x(x, 0.3, 11)
    data, tensor = sizes
    for rank in range(data * tensor):
        mesh = as_rank(rank, *sizes)
        row, column = mesh.get_coordinate()
        # Tensor parallelism divides first, and FSDP what it left.
        mine, expected = (t.chunk(tensor)[column].chunk(data)[row] for t in (x, whole))
        placements = [_StridedShard(0, split_factor=tensor), Shard(0)]
        x_here = DTensor.from_local(
            mine, mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
        )
        assert torch.equal(sharded_dropout(x_here, 0.3, 11).to_local(), expected)


def test_strided_shards_that_are_no_block_are_refused():
    def block(*placements, n=12):
        return block_of((n, 5), (2, 3), (0, 0), placements)

    assert block(_StridedShard(0, split_factor=3), Shard(0)) == ((0, 0), (2, 5))
    for placements in (
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Shard(0), _StridedShard(0, split_factor=2)),
        (_StridedShard(0, split_factor=3), Shard(1)),
    ):
        with pytest.raises(ValueError, match="x must be divided evenly where shards"):
            block(*placements)
    with pytest.raises(ValueError, match="x must be divided evenly where shards"):
        block(_StridedShard(0, split_factor=3), Shard(0), n=13)


def test_blocks_of_any_rank_without_a_mesh():
    assert block_of((7, 5), (4,), (3,), (Shard(0),)) == ((6, 0), (1, 5))
    assert block_of((5, 5), (4,), (3,), (Shard(0),)) == ((5, 0), (0, 5))
    assert block_of((5, 9), (2, 3), (1, 2), (Replicate(), Shard(1))) == ((0, 6), (5, 3))
    where = (2**20, 2**25), (2**10, 2**10), (2**10 - 1, 5), (Shard(0), Shard(1))
    assert block_of(*where) == ((2**20 - 2**10, 5 * 2**15), (2**10, 2**15))


def test_the_blocks_of_16384_ranks_fill_the_tensor():
    shape, mesh_shape = (1001, 12, 700), (64, 16, 16)  # uneven, and some are empty
    placements = Shard(0), Shard(1), Shard(2)
    edges = [set(), set(), set()]
    n_elements = 0
    for coordinates in itertools.product(*map(range, mesh_shape)):
        offsets, sizes = block_of(shape, mesh_shape, coordinates, placements)
        n_elements += math.prod(sizes)
        for d in range(3):
            # Along a dimension the block depends on one coordinate, and continues the last.
            edges[d].add((coordinates[d], offsets[d], offsets[d] + sizes[d]))
    for d, ends in enumerate(edges):
        _, begins, ends = zip(*sorted(ends), strict=True)
        assert len(begins) == mesh_shape[d]
        assert begins == (0, *ends[:-1]) and ends[-1] == shape[d]
    assert n_elements == math.prod(shape)


def test_the_process_group_may_be_gone(as_rank, randn):
    x = DTensor.from_local(randn(2, 5), as_rank(1, 4), [Shard(0)], run_check=False)
    y = sharded_dropout(x, 0.3, 7).to_local()
    dist.destroy_process_group()
    assert torch.equal(sharded_dropout(x, 0.3, 7).to_local(), y)


def test_a_mesh_that_was_never_started(randn):
    mesh = dist.device_mesh.DeviceMesh(DEVICE, [0, 1], _init_backend=False, _rank=1)
    x = DTensor.from_local(randn(2, 5), mesh, [Shard(0)], run_check=False)
    whole = seeded_dropout4x(torch.ones(4, 5, device=DEVICE), 0.3, 7)
    assert torch.equal(sharded_dropout(x, 0.3, 7).to_local() != 0, whole[2:] != 0)


def test_forward_mode_is_an_error(randn):
    x, arguments = randn(3, 5), (0.3, 7, [6, 5], [3, 0])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        BlockDropout.apply(torch.autograd.forward_ad.make_dual(x, x), *arguments)


def test_no_rank_communicates_and_no_tensor_is_kept(as_rank, randn):
    mesh = as_rank(1, 4)
    x = DTensor.from_local(
        randn(2, 5).requires_grad_(), mesh, [Shard(0)], run_check=False
    )
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x)
    with CommDebugMode() as communication, hooks:
        y = sharded_dropout(x, 0.3, 7)
        y.to_local().sum().backward()
    assert communication.get_total_counts() == 0
    assert not saved


def test_the_result_is_contiguous_also_if_x_is_not(as_rank, randn):
    mesh = as_rank(1, 2)
    x = DTensor.from_local(randn(4, 6).T, mesh, [Shard(1)], run_check=False)
    y = sharded_dropout(x, 0.3, 7)
    assert y.shape == (6, 8) and y.stride() == (8, 1)
    whole = seeded_dropout4x(torch.ones(6, 8, device=DEVICE), 0.3, 7)
    assert torch.equal(y.to_local() != 0, whole[:, 4:] != 0)


def test_a_recomputed_layer_draws_the_same_mask(as_rank, randn):
    mesh = as_rank(1, 2)
    x = DTensor.from_local(randn(3, 6), mesh, [Shard(0)], run_check=False)
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        leaf = x.detach().requires_grad_()
        y = run(lambda x: sharded_dropout(x, 0.5, 7).sin(), leaf)
        y.to_local().sum().backward()
        gradients.append(leaf.grad.to_local())
    assert torch.equal(*gradients)


def test_second_derivatives(as_rank, randn):
    mesh = as_rank(1, 2)
    x = randn(3, 5, dtype=torch.float64).requires_grad_()

    def function(x):
        x = DTensor.from_local(x, mesh, [Shard(0)], run_check=False)
        return sharded_dropout(x, 0.3, 7).to_local()

    def doubled(x):
        return (2 * DTensor.from_local(x, mesh, [Shard(0)], run_check=False)).to_local()

    torch.autograd.gradcheck(function, x)
    if not torch.autograd.gradgradcheck(doubled, x, raise_exception=False):
        pytest.skip("second derivatives through a DTensor are lost in this PyTorch")
    torch.autograd.gradgradcheck(function, x)


def test_a_rank_outside_the_mesh_has_nothing_to_do(as_rank):
    as_rank(3, 4)
    mesh = dist.device_mesh.DeviceMesh(DEVICE, [0, 1])
    x = DTensor.from_local(
        torch.ones(0, device=DEVICE), mesh, [Shard(0)], run_check=False
    )
    assert sharded_dropout(x, 0.5, 7) is x


def test_errors(as_rank, randn):
    mesh = as_rank(0, 2)
    x = DTensor.from_local(randn(2, 5), mesh, [Shard(0)], run_check=False)
    partial = DTensor.from_local(randn(2, 5), mesh, [Partial()], run_check=False)
    integers = DTensor.from_local(randn(2, 5).int(), mesh, [Shard(0)], run_check=False)
    with pytest.raises(TypeError, match="x must be a DTensor, got Tensor"):
        sharded_dropout(randn(2, 5), 0.5, 7)
    with pytest.raises(ValueError, match="x must not be Partial"):
        sharded_dropout(partial, 0.5, 7)
    with pytest.raises(TypeError, match=r"x must be float16.*got torch.int32"):
        sharded_dropout(integers, 0.5, 7)
    with pytest.raises(ValueError, match="p must be in"):
        sharded_dropout(x, 1.5, 7)
    with pytest.raises(ValueError, match="seed in"):
        sharded_dropout(x, 0.5, 2**64)
    uneven = DTensor.from_local(
        randn(2, 5), mesh, [Shard(0)], run_check=False, shape=(7, 5), stride=(5, 1)
    )
    with pytest.raises(ValueError, match=r"x must have the shape \(4, 5\) on this rank"):
        sharded_dropout(uneven, 0.5, 7)
    with pytest.raises(TypeError, match="got str and int"):
        sharded_dropout(x, "0.5", 7)


RANKS = Path(__file__).with_name("ranks.py")


def outputs(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert not result.returncode, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif(not INTERPRET, reason="processes without GPUs")
def test_masks_gradients_and_losses_on_one_to_four_processes(tmp_path):
    *checks, one, three, four_then_two, weights = outputs(RANKS, tmp_path)
    assert checks == [
        f"{n} ranks: masks and gradients agree with those of one." for n in range(1, 5)
    ]
    losses = [
        [float(loss) for loss in run.split()] for run in (one, three, four_then_two)
    ]
    losses = torch.tensor(losses)
    assert losses.shape == (3, 4)
    torch.testing.assert_close(losses, losses[:1].expand(3, 4), rtol=2e-5, atol=2e-5)
    assert weights == "the weights agree"


@pytest.mark.gpu
@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two GPUs")
def test_masks_gradients_and_speed_of_two_gpus():
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    first, *speeds = outputs(*torchrun, RANKS)
    print(*speeds, sep="\n")
    assert first == "2 ranks: masks and gradients agree with those of one."
    assert any(line.split()[1:4] == ["S(0)", "|", "sharded_dropout"] for line in speeds)
