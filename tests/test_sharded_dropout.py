"""Dropout of tensors that are divided among ranks: simulated ones, and processes."""

import pytest
import torch
import torch.distributed as dist
from seeded_dropout import seeded_dropout4x
from sharded_dropout import (
    DEVICE,
    WORKER,
    functions_as_a_module,
    sharded_dropout,
    train_on,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def as_rank():
    """A mesh as one of its ranks sees it; nothing that is sent arrives."""

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


def test_errors(as_rank, randn):
    mesh = as_rank(0, 2)
    x = DTensor.from_local(randn(2, 5), mesh, [Shard(0)], run_check=False)
    partial = DTensor.from_local(randn(2, 5), mesh, [Partial()], run_check=False)
    integers = DTensor.from_local(randn(2, 5).int(), mesh, [Shard(0)], run_check=False)
    with pytest.raises(TypeError, match="x must be a DTensor, got Tensor"):
        sharded_dropout(randn(2, 5), 0.5, 7)
    with pytest.raises(ValueError, match="x must not be Partial"):
        sharded_dropout(partial, 0.5, 7)
    with pytest.raises(TypeError, match="x must be floating-point"):
        sharded_dropout(integers, 0.5, 7)
    with pytest.raises(ValueError, match="p must be in"):
        sharded_dropout(x, 1.5, 7)
    with pytest.raises(ValueError, match="seed in"):
        sharded_dropout(x, 0.5, 2**64)
    with pytest.raises(TypeError, match="got str and int"):
        sharded_dropout(x, "0.5", 7)


def test_losses_do_not_depend_on_the_number_of_processes(tmp_path):
    (tmp_path / "functions.py").write_text(functions_as_a_module())
    (tmp_path / "worker.py").write_text(WORKER)
    runs = [train_on(1, 0, 4, tmp_path), train_on(3, 0, 4, tmp_path)]
    half = train_on(4, 0, 2, tmp_path, after="half.pt")
    runs.append(half + train_on(2, 2, 4, tmp_path, before="half.pt"))
    losses = torch.tensor([[float(loss) for loss in run.split()] for run in runs])
    assert losses.shape == (3, 4)
    torch.testing.assert_close(losses, losses[:1].expand(3, 4), rtol=2e-6, atol=2e-6)
