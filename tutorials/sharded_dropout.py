"""
.. _sharded dropout:

Dropout on real ranks
=====================

A model that is divided among GPUs can draw the same dropout masks on one of them, on two and on four.
In this lesson you give dropout to ``DTensor``, PyTorch's tensor that is divided among ranks, without a
word between the ranks, and train a small model on four processes, stop it, and resume it on two.

You will learn

- how a ``DTensor`` says which block of the whole tensor a rank holds;
- how a layer is divided by columns and by rows, and where dropout stands in it;
- how to compare a run on four ranks with a run on one.

Needs: PyTorch, and :ref:`block dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/sharded_layers.svg'
import os
import sys
from datetime import date

import torch

GPU = torch.accelerator.current_accelerator(check_available=True)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or GPU is None
DEVICE = "cpu" if INTERPRET else GPU.type
if INTERPRET and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise ImportError("restart Python: Triton was imported before TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

gpu = "no GPU" if INTERPRET else torch.get_device_module(DEVICE).get_device_name()
MACHINE = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
if __name__ == "__main__":
    print(MACHINE)
    if INTERPRET:
        print("Triton's interpreter runs the kernels: speed is measured on a GPU only.")

# %%
# Dropout of a block, again
# -------------------------
#
# These are the kernel and the launch of :ref:`block dropout`: ``x`` is a block of a tensor of
# shape ``shape`` that begins at ``offsets``, and its mask is that of the whole tensor, cut to the
# block.


@triton.jit
def block_dropout_kernel(
    y_ptr, x_ptr, n_rows, n_cols, first, sizes, places, strides,
    threshold, scale: tl.float64, seed,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n_col_blocks = tl.cdiv(n_cols if ALIGNED else n_cols + 3, COLS)
    rows = pid // n_col_blocks * ROWS + tl.arange(0, ROWS)[:, None]

    # From the number of a row to the place of its first element, and to its address.
    place = tl.zeros((ROWS, 1), tl.int64) + first
    address = tl.zeros((ROWS, 1), tl.int64)
    rest = rows
    for d in tl.static_range(len(sizes)):  # from the last dimension to the first
        coordinate = rest % sizes[d]
        rest = rest // sizes[d]
        place += coordinate * places[d]
        address += coordinate * strides[d]

    first_col = pid % n_col_blocks * COLS
    cols = first_col + tl.arange(0, COLS)[None, :]
    if not ALIGNED:
        cols -= place % 4
    counters = (place + first_col) // 4 + tl.arange(0, COLS // 4)[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    keep = words >= tl.cast(threshold, tl.uint32)

    inside = (rows < n_rows) & (cols >= 0) & (cols < n_cols)
    x = tl.load(x_ptr + address + cols, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + rows * n_cols + cols, tl.where(keep, x * scale, 0.0), mask=inside)


def block_dimensions(x, shape):
    """Size, distance in the whole tensor and distance in memory of each dimension, last first."""
    dimensions, place = [], 1
    for size, stride, whole in zip(
        x.shape[::-1], x.stride()[::-1], shape[::-1], strict=True
    ):
        if dimensions:
            inner_size, inner_place, inner_stride = dimensions[-1]
            gapless = (place, stride) == (
                inner_size * inner_place,
                inner_size * inner_stride,
            )
        if dimensions and gapless:
            dimensions[-1] = (inner_size * size, inner_place, inner_stride)
        elif size > 1 or not dimensions:
            dimensions.append((size, place, stride))
        place *= whole
    return dimensions


def launch_block_dropout(
    x: torch.Tensor, p: float, seed: int, shape: list[int], offsets: list[int]
) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    threshold = round(p * 2**32)
    if x.numel() == 0 or threshold == 2**32:
        return y.zero_()
    if p == 0:
        return y.copy_(x)
    first, place = 0, 1
    for offset, whole in zip(offsets[::-1], shape[::-1], strict=True):
        first, place = first + offset * place, place * whole
    if x.ndim == 0 or x.stride(-1) != 1:
        x = x.contiguous()
    (n_cols, _, _), *outer = block_dimensions(x, shape) or [(1, 1, 1)]
    n_rows = x.numel() // n_cols
    sizes, places, strides = zip(*outer, strict=True) if outer else ((1,), (0,), (0,))
    ALIGNED = all(place % 4 == 0 for place in (first, *places))
    width = n_cols if ALIGNED else n_cols + 3
    COLS = min(max(triton.next_power_of_2(width), 4), 1024)
    ROWS = 1024 // COLS
    with torch.cuda.device_of(x):
        block_dropout_kernel[(triton.cdiv(n_rows, ROWS) * triton.cdiv(width, COLS),)](
            y, x, n_rows, n_cols, first, sizes, places, strides,
            threshold, 1 / (1 - p), seed, ALIGNED, ROWS, COLS,
        )  # fmt: skip
    return y


class BlockDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *arguments):
        ctx.arguments = arguments
        return launch_block_dropout(x, *arguments)

    @staticmethod
    def backward(ctx, gradient):
        return BlockDropout.apply(gradient, *ctx.arguments), None, None, None, None


# %%
# From placements to a block
# --------------------------
#
# A ``DTensor`` knows the shape of the whole tensor, the *mesh* of the ranks, and a *placement* for
# each dimension of the mesh: ``Shard(d)`` divides dimension d, ``Replicate()`` gives every rank
# the same, and ``Partial()`` says that the ranks hold summands that have not been added yet. From
# these PyTorch computes which block this rank holds. All else is local: no rank asks another for
# anything.
#
# Dropout of a ``Partial`` tensor makes no sense, because dropping a summand does not drop the sum.
# So that is refused. What every rank holds as a whole, it drops alike, and so all copies stay
# equal.


import numbers


def sharded_dropout(x, p, seed):
    """Dropout of a ``DTensor``: the same mask on any number of ranks, in any placement.

    Parameters
    ----------
    x : torch.distributed.tensor.DTensor
        Of any shape; float16, bfloat16, float32 or float64. Shards may be uneven or empty.
    p : float
        The probability of dropping, in [0, 1], rounded to a multiple of 2^-32.
    seed : int
        Any integer of 64 bits, the same on all ranks.

    Returns
    -------
    torch.distributed.tensor.DTensor
        With the placements of ``x``. No rank communicates, and only p, the seed and two
        lists of integers are kept for the backward pass.

    Raises
    ------
    TypeError, ValueError
        If an argument has another type or range, or ``x`` is ``Partial``.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(x, DTensor):
        raise TypeError(f"x must be a DTensor, got {type(x).__name__}")
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(
            "x must not be Partial: its elements are not known before they are summed"
        )
    if not isinstance(p, numbers.Real) or not isinstance(seed, numbers.Integral):
        got = f"{type(p).__name__} and {type(seed).__name__}"
        raise TypeError(f"p must be a number and seed an integer, got {got}")
    if not (0 <= p <= 1 and -(2**63) <= seed < 2**64):
        raise ValueError(
            f"p must be in [0, 1] and seed in [-2^63, 2^64), got {p} and {seed}"
        )
    local = x.to_local()
    if not local.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    seed = (
        int(seed) - 2**64 if seed >= 2**63 else int(seed)
    )  # as a signed integer of 64 bits
    where = (x.device_mesh, x.placements)
    size, offsets = compute_local_shape_and_global_offset(x.shape, *where)
    if tuple(size) != tuple(local.shape):
        raise ValueError(
            f"x must be divided evenly where shards are strided, got {x.placements}"
        )
    offsets = [
        min(begin, n) for begin, n in zip(offsets, x.shape, strict=True)
    ]  # empty shards
    y = BlockDropout.apply(local, float(p), seed, list(x.shape), list(offsets))
    return DTensor.from_local(
        y, *where, run_check=False, shape=x.shape, stride=x.stride()
    )


# %%
# One process can play all the ranks in turn, because nothing is communicated. PyTorch has a fake
# process group for that, which does nothing when it is asked to send. Here are four ranks as a
# mesh of 2 by 2, with rows divided along one of its dimensions and columns along the other:

if __name__ == "__main__":
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = launch_block_dropout(
        torch.ones(6, 10, device=DEVICE), 0.5, 7, [6, 10], [0, 0]
    )
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        mesh = init_device_mesh(DEVICE, (2, 2))
        upper, left = rank // 2, rank % 2  # this rank's coordinates in the mesh
        for placements, mine in (
            ([Shard(0), Shard(1)], whole.chunk(2, 0)[upper].chunk(2, 1)[left]),
            ([Replicate(), Shard(0)], whole.chunk(2, 0)[left]),
            ([Replicate(), Replicate()], whole),
        ):
            block = torch.ones_like(mine)
            x = DTensor.from_local(block, mesh, placements, run_check=False)
            assert torch.equal(sharded_dropout(x, 0.5, seed=7).to_local(), mine)
        dist.destroy_process_group()
    print("4 ranks, 3 placements: every block is cut from the same mask")

# %%
# On real ranks
# -------------
#
# Now with processes. The worker below trains two layers that are divided as Megatron divides them:
# the first by columns, so that each rank has some of the hidden units and drops among them, the
# second by rows. Its results are sums over the ranks, which is the only communication. A second
# dropout follows on the sums, which every rank holds as a whole. The state is saved after each
# run, and the next run goes on from it, on any number of ranks.
#
# .. image:: /_static/sharded_layers.svg
#    :alt: Two ranks side by side. Each has all of x, some columns of the first weight, some hidden units with their part of one mask, and some rows of the second weight. The results are summed over the ranks, the only communication; then both draw the same mask.

WORKER = """
import sys

import torch
import torch.distributed as dist
from functions import sharded_dropout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

torch.set_num_threads(1)
first_step, last_step, before, after = sys.argv[1:]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
x, target = torch.randn(8, 16), torch.randn(8, 4)
up, down = torch.load(before) if before else (torch.randn(16, 24) / 4, torch.randn(24, 4) / 5)
x = distribute_tensor(x, mesh, [Replicate()])
target = distribute_tensor(target, mesh, [Replicate()])
up = distribute_tensor(up, mesh, [Shard(1)]).requires_grad_()
down = distribute_tensor(down, mesh, [Shard(0)]).requires_grad_()
for step in range(int(first_step), int(last_step)):
    hidden = sharded_dropout((x @ up).relu(), 0.5, seed=2 * step)
    output = (hidden @ down).redistribute(placements=[Replicate()])
    loss = (sharded_dropout(output, 0.1, seed=2 * step + 1) - target).square().mean()
    gradients = torch.autograd.grad(loss, [up, down])
    with torch.no_grad():
        for weight, gradient in zip((up, down), gradients):
            weight -= 0.1 * gradient.redistribute(placements=weight.placements)
    if dist.get_rank() == 0:
        print(f"{loss.full_tensor().item():.6f}", end=" ", flush=True)
    else:
        loss.full_tensor()
weights = [weight.full_tensor().detach() for weight in (up, down)]
if dist.get_rank() == 0:
    torch.save(weights, after)
dist.destroy_process_group()
"""


def functions_as_a_module():
    """The source of this lesson's functions, which the processes import."""
    import inspect
    import re

    cell = "".join(
        inspect.findsource(BlockDropout.forward)[0]
    )  # of the file, or the cell
    autograd = re.search(
        r"^class BlockDropout.*?(?=^\S)", cell, re.MULTILINE | re.DOTALL
    )[0]
    functions = [
        block_dropout_kernel.fn,
        block_dimensions,
        launch_block_dropout,
        sharded_dropout,
    ]
    header = "import numbers\nimport torch\nimport triton\nimport triton.language as tl\n\nDEVICE = 'cpu'"
    return "\n\n\n".join([header, *map(inspect.getsource, functions), autograd])


def train_on(n_ranks, first_step, last_step, folder, before="", after="state.pt"):
    """Run the worker on so many processes, on the CPU; the losses that it prints."""
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_ranks}", "worker.py"]
    result = subprocess.run(
        [*command, str(first_step), str(last_step), before, after], cwd=folder,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return result.stdout


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "functions.py").write_text(functions_as_a_module())
        Path(folder, "worker.py").write_text(WORKER)
        print("1 rank:              ", train_on(1, 0, 6, folder))
        print("4 ranks:             ", train_on(4, 0, 6, folder))
        four = train_on(4, 0, 3, folder, after="half.pt")
        print(
            "4 ranks, resumed on 2:", four + train_on(2, 3, 6, folder, before="half.pt")
        )

# %%
# The losses agree to all the digits that are printed. They need not agree to the last bit: a sum
# over four ranks adds up in another order than a sum on one. The masks do agree to the last bit,
# so what is left is rounding, and a difference beyond rounding is a bug that you can look for.
#
# On a machine with several GPUs the same worker runs with ``nccl`` in place of ``gloo`` and
# ``cuda`` in place of ``cpu``. It is run on the CPU here so that every reader can.
#
# Exercises
# ---------
#
# 1. Two ranks that were given different seeds draw parts of two masks, and nothing complains.
#    Write the check that notices. Why is it not part of ``sharded_dropout``?
# 2. Which two lines of the worker would you change to divide the samples among the ranks as well?
#
# .. note::
#    Try it first.
#
#    1. The largest and the smallest seed of all ranks must be the same. It takes a collective call,
#       for which every rank waits; do it once, before training, rather than in each layer.
#
#       .. code-block:: python
#
#          def check_same_seed(seed):
#              import torch.distributed as dist
#
#              seeds = torch.tensor([seed, -seed])
#              dist.all_reduce(seeds, op=dist.ReduceOp.MAX)
#              if seeds[0] != -seeds[1]:
#                  raise ValueError("the ranks have different seeds")
#
#    2. The mesh gets a second dimension, and ``x`` and ``target`` are divided along it by rows. The
#       weights are replicated along it, and the mean of the loss is formed over both.
#
#       .. code-block:: diff
#
#          -mesh = init_device_mesh("cpu", (dist.get_world_size(),))
#          +mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
#          -x = distribute_tensor(x, mesh, [Replicate()])
#          -target = distribute_tensor(target, mesh, [Replicate()])
#          -up = distribute_tensor(up, mesh, [Shard(1)]).requires_grad_()
#          -down = distribute_tensor(down, mesh, [Shard(0)]).requires_grad_()
#          +x = distribute_tensor(x, mesh, [Shard(0), Replicate()])
#          +target = distribute_tensor(target, mesh, [Shard(0), Replicate()])
#          +up = distribute_tensor(up, mesh, [Replicate(), Shard(1)]).requires_grad_()
#          +down = distribute_tensor(down, mesh, [Replicate(), Shard(0)]).requires_grad_()
#          -    output = (hidden @ down).redistribute(placements=[Replicate()])
#          +    output = (hidden @ down).redistribute(placements=[Shard(0), Replicate()])
#
# References
# ----------
#
# - M. Shoeybi et al., `Megatron-LM: training multi-billion parameter language models using model parallelism <https://arxiv.org/abs/1909.08053>`_,
#   2019: how layers are divided among GPUs.
# - PyTorch's documentation of `DTensor <https://docs.pytorch.org/docs/stable/distributed.tensor.html>`_.
