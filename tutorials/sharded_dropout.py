"""
.. _sharded dropout:

Dropout on real ranks
=====================

A model can draw the same dropout masks whether it runs on one GPU, on two or on four. In this
lesson you write dropout for ``DTensor``, PyTorch's tensor that is divided among *ranks*, the
processes that train together. They don't communicate to draw the masks. Then you train a small
model on four processes, stop it, and resume it on two.

You will learn

- how a ``DTensor`` says which block of the whole tensor a rank holds;
- how two layers are divided by columns and by rows, and where dropout goes;
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
# Repeated
# --------
#
# These are the kernel and the launch of :ref:`block dropout`, so that the notebook runs alone. You
# have read them: ``x`` is the block that begins at ``offsets`` in a tensor of shape ``shape``, and
# its mask is that of the whole tensor, cut to the block. ``BlockDropout`` adds the gradient.


@triton.jit
def block_dropout_kernel(
    y_ptr, x_ptr, n_rows, n_cols, first, sizes, places, strides,
    threshold, scale: tl.float64, seed,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid, n_col_blocks = tl.program_id(0), tl.cdiv(n_cols, COLS)
    rows = (pid // n_col_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first_col = (pid % n_col_blocks).to(tl.int64) * COLS
    cols = first_col + tl.arange(0, COLS)[None, :]

    # From the number of a row to the place of its first element, and to its address.
    place = tl.zeros((ROWS, 1), tl.int64) + first
    address = tl.zeros((ROWS, 1), tl.int64)
    rest = rows
    for d in tl.static_range(len(sizes)):  # from the last dimension to the first
        coordinate = rest % sizes[d] if d + 1 < len(sizes) else rest
        rest = rest // sizes[d]
        place += coordinate * places[d]
        address += coordinate * strides[d]

    # One bit for each word, of which each element takes its own.
    groups = tl.arange(0, COLS // GROUP)[None, :]
    counters = (place + first_col) // 4 + groups * (GROUP // 4)
    bits = tl.zeros((ROWS, COLS // GROUP), tl.int32)
    for call in tl.static_range(GROUP // 4 if ALIGNED else GROUP // 4 + 1):
        words = tl.randint4x(seed, counters + call)
        for i in tl.static_range(4):
            keep = words[i] >= tl.cast(threshold, tl.uint32)
            bits |= keep.to(tl.int32) << (4 * call + i)
    if not ALIGNED:
        bits >>= (place % 4).to(tl.int32)
    if GROUP == 8:
        bits = tl.interleave(bits, bits >> 4)
    bits = tl.interleave(bits, bits >> 2)
    keep = tl.interleave(bits, bits >> 1) & 1 == 1

    inside = (rows < n_rows) & (cols < n_cols)
    x = tl.load(x_ptr + address + cols, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + rows * n_cols + cols, tl.where(keep, x * scale, 0.0), mask=inside)


def block_dimensions(x, shape):
    """Size, distance in the whole tensor and in memory of each dimension, from last to first."""
    dimensions, place = [], 1
    whole_sizes = zip(x.shape[::-1], x.stride()[::-1], shape[::-1], strict=True)
    for size, stride, whole in whole_sizes:
        if dimensions:
            inner_size, inner_place, inner_stride = dimensions[-1]
            next_one = inner_size * inner_place, inner_size * inner_stride
            gapless = (place, stride) == next_one
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
    GROUP = max(16 // x.element_size(), 4)  # a thread loads 16 bytes, or 4 places
    BLOCK = 2048 // x.element_size()
    COLS = min(max(triton.next_power_of_2(n_cols), GROUP), BLOCK)
    ROWS = BLOCK // COLS
    with torch.cuda.device_of(x):
        block_dropout_kernel[(triton.cdiv(n_rows, ROWS) * triton.cdiv(n_cols, COLS),)](
            y, x, n_rows, n_cols, first, sizes, places, strides,
            threshold, 1 / (1 - p), seed, ALIGNED, ROWS, COLS, GROUP, num_warps=1,
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
# The ranks of a ``DTensor`` form a *mesh*, a grid in which each rank has a coordinate along each
# dimension. For each dimension of the mesh there is a *placement*. ``Shard(d)`` divides dimension d
# of the tensor among the ranks along that dimension of the mesh, ``Replicate()`` gives each of
# these ranks the whole tensor, and ``Partial()`` says that they hold summands that have not been
# added yet.
#
# So a rank can compute alone which block it holds: it begins with the whole tensor and cuts off
# what others hold, once for each ``Shard``. The shards are as large as those of ``torch.chunk``, so
# the last ones may be smaller, or empty. FSDP, PyTorch's way to divide the weights among ranks to
# save memory, can divide a dimension that is divided already. Its placement, a *strided* shard,
# comes first, but has to be applied last. Its ``split_factor`` says into how many parts the other
# placements divide the dimension.

import functools
import math
import numbers


@functools.cache
def block_of(shape, mesh_shape, coordinates, placements):
    """Where the block of the rank at these coordinates begins, and its shape."""
    places = [range(n) for n in shape]
    divisions = zip(placements, mesh_shape, coordinates, strict=True)
    divisions = [division for division in divisions if not division[0].is_replicate()]
    for i, (placement, _, _) in enumerate(divisions):
        ranks = [n if p.dim == placement.dim else 1 for p, n, _ in divisions]
        if hasattr(placement, "split_factor") and (
            placement.split_factor != math.prod(ranks[i + 1 :])
            or shape[placement.dim] % math.prod(ranks)
        ):
            raise ValueError(
                "x must be divided evenly where shards are strided, got placements "
                f"{placements} of shape {shape} on a mesh of {mesh_shape}"
            )
    # Apply FSDP's placement last.
    divisions.sort(key=lambda division: getattr(division[0], "split_factor", 0))
    for placement, n_ranks, coordinate in divisions:
        mine = places[placement.dim]
        size = -(-len(mine) // n_ranks)  # rounded up
        places[placement.dim] = mine[coordinate * size : (coordinate + 1) * size]
    return tuple(mine.start for mine in places), tuple(map(len, places))


# %%
# As a public function
# --------------------
#
# Each rank applies dropout to its own block, and needs nothing from the others. If several ranks
# hold the same block, they draw the same mask, so the copies stay equal. ``Partial`` is refused:
# its summands have to be added first.


def sharded_dropout(x, p, seed):
    """Dropout of a ``DTensor``: the same mask on any number of ranks.

    ``x`` is float16, bfloat16, float32 or float64; its shards may be uneven or empty, except
    where FSDP divides a dimension that is divided already. ``p`` is the probability of
    dropping, in [0, 1], rounded to a multiple of 2^-32, and ``seed`` an integer of 64 bits,
    the same on all ranks. The result has the placements of ``x``. No rank communicates, and
    no tensor is kept for the backward pass. Differentiable in reverse mode, also twice.

    Other types and ranges raise TypeError or ValueError, and so does a ``Partial`` tensor.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):
        raise TypeError(f"x must be a DTensor, got {type(x).__name__}")
    mesh, local = x.device_mesh, x.to_local()
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError("x must not be Partial: its summands have to be added first")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if local.device.type != DEVICE:
        raise ValueError(f"x must be on {DEVICE!r}, got {local.device.type!r}")
    if not isinstance(p, numbers.Real) or not isinstance(seed, numbers.Integral):
        got = f"{type(p).__name__} and {type(seed).__name__}"
        raise TypeError(f"p must be a number and seed an integer, got {got}")
    if not (0 <= p <= 1 and -(2**63) <= seed < 2**64):
        got = f"{p} and {seed}"
        raise ValueError(f"p must be in [0, 1] and seed in [-2^63, 2^64), got {got}")
    coordinates = mesh.get_coordinate()
    if coordinates is None:  # this rank is not in the mesh, and holds nothing
        return x
    where = tuple(mesh.shape), tuple(coordinates), x.placements
    offsets, sizes = block_of(tuple(x.shape), *where)
    if sizes != local.shape:
        got = tuple(local.shape)
        raise ValueError(f"x must have the shape {sizes} on this rank, got {got}")
    seed = int(seed) - 2**64 if seed >= 2**63 else int(seed)  # as a signed integer
    y = BlockDropout.apply(local, float(p), seed, list(x.shape), offsets)
    stride = torch.empty(x.shape, device="meta").stride()  # allocates nothing
    whole = {"run_check": False, "shape": x.shape, "stride": stride}
    return DTensor.from_local(y, mesh, x.placements, **whole)


# %%
# One process plays all ranks
# ---------------------------
#
# As nothing is communicated, one process can do the work of each rank in turn. PyTorch has a fake
# process group for that, which sends nothing. Below, the columns of a matrix are divided among 1, 2
# and 4 ranks, which all have the same seed. First PyTorch's own dropout draws the masks of the
# ``DTensor``, then ours. Is the joined mask the same as on one rank?

if __name__ == "__main__":
    import warnings

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.filterwarnings("ignore", "DTensor random operators", UserWarning)

    def pytorch_dropout(x, p, seed):
        torch.manual_seed(seed)
        return torch.nn.functional.dropout(x, p)

    hook = sys.excepthook  # each process group replaces it
    for dropout in (pytorch_dropout, sharded_dropout):
        masks = []
        for n in (1, 2, 4):
            blocks = []
            for rank in range(n):
                ranks = {"rank": rank, "world_size": n}
                dist.init_process_group("fake", store=FakeStore(), **ranks)
                mesh = init_device_mesh(DEVICE, (n,))
                ones = torch.ones(16, 32 // n, device=DEVICE)
                x = DTensor.from_local(ones, mesh, [Shard(1)], run_check=False)
                blocks.append(dropout(x, 0.5, seed=7).to_local())
                dist.destroy_process_group()
            masks.append(torch.cat(blocks, dim=1) != 0)
        same = [torch.equal(masks[0], mask) for mask in masks]
        print(f"{dropout.__name__}: the mask of 1, 2, 4 ranks is that of 1: {same}")
    sys.excepthook = hook

# %%
# With PyTorch's dropout the mask changes with the number of ranks, and with ours it does not.
#
# On real ranks
# -------------
#
# Now we use real processes. The worker below trains two layers that are divided as in Megatron-LM.
# The first is divided by columns, so each rank has some of the hidden units, and applies dropout to
# them. The second is divided by rows, so its results are sums over the ranks, and adding them up is
# the only communication of the forward pass. A second dropout acts on the sums, which every rank
# holds as a whole. At the end the worker saves the weights, and the next run starts from them, on
# any number of ranks. The seeds, two for each step, depend on the step alone, so the next run goes
# on with the masks that the first would have drawn.
#
# .. image:: /_static/sharded_layers.svg
#    :alt: Two ranks side by side. Each has all of x, some columns of the first weight, some hidden units with their part of one mask, and some rows of the second weight. The results are summed over the ranks, the only communication; then both draw the same mask.

WORKER = """
import os
import sys

import torch
import torch.distributed as dist
from functions import DEVICE, sharded_dropout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

torch.set_num_threads(1)
if DEVICE != "cpu":
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
first_step, last_step, before, after = sys.argv[1:]
dist.init_process_group("gloo" if DEVICE == "cpu" else None)  # None: PyTorch chooses
mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
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
            # Only exercise 2 needs this redistribution.
            weight -= 0.1 * gradient.redistribute(placements=weight.placements)
    loss = loss.full_tensor().item()
    if dist.get_rank() == 0:
        print(f"{loss:.5f}", end=" ", flush=True)
weights = [weight.full_tensor().detach().cpu() for weight in (up, down)]
if dist.get_rank() == 0:
    torch.save(weights, after)
dist.destroy_process_group()
os._exit(0)  # at once: gloo's threads can crash Python while it shuts down
"""

# %%
# ``torchrun`` (``torch.distributed.run``) starts the worker once for each rank. The new processes
# know nothing of this one, so they import the functions from a file. If there are four GPUs or
# more, each rank has one; otherwise the ranks compute on the CPU, with Triton's interpreter.


def functions_as_a_module(device):
    """The source of this lesson's functions, which the processes import."""
    import inspect
    import re

    cell = "".join(
        inspect.findsource(BlockDropout.forward)[0]
    )  # the source of the file, or of the notebook's cell
    flags = re.MULTILINE | re.DOTALL
    autograd = re.search(r"^class BlockDropout.*?(?=^\S|\Z)", cell, flags)[0]
    functions = block_dropout_kernel.fn, block_dimensions, launch_block_dropout
    functions = *functions, block_of, sharded_dropout
    imports = "functools", "math", "numbers", "torch", "triton", "triton.language as tl"
    header = [f"import {name}" for name in imports] + [f"DEVICE = {device!r}"]
    return "\n\n\n".join(
        ["\n".join(header), *map(inspect.getsource, functions), autograd]
    )


def train_on(n_ranks, first_step, last_step, folder, before="", after="state.pt"):
    """Run the worker on ``n_ranks`` ranks, and return the losses that it prints."""
    import subprocess
    from pathlib import Path

    device, environment = DEVICE, os.environ | {"OMP_NUM_THREADS": "1"}
    if INTERPRET or torch.accelerator.device_count() < 4:
        device, environment["TRITON_INTERPRET"] = "cpu", "1"
    Path(folder, "functions.py").write_text(functions_as_a_module(device))
    Path(folder, "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={n_ranks}", "worker.py"]
    command += [str(first_step), str(last_step), before, after]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print("1 rank:         ", train_on(1, 0, 6, folder))
        losses = train_on(4, 0, 3, folder, after="half.pt")
        print("4 ranks, then 2:", losses + train_on(2, 3, 6, folder, before="half.pt"))

# %%
# The losses agree to all the digits that are printed. They need not agree to the last bit, because
# each rank adds up its part of ``hidden @ down`` before the parts are added, and a single rank adds
# in another order. The masks do agree to the last bit. So a difference larger than rounding is a
# bug.
#
# On two GPUs, both an H100, ``sharded_dropout`` is as fast as a copy; on two H200 it is a seventh
# slower. The page *Benchmarks* has the tables.
#
# Sixteen thousand ranks
# ----------------------
#
# Large runs divide a tensor along several dimensions. Here is one of 2^39 elements on a mesh of 64
# x 16 x 16 ranks, divided by samples, by steps of the sequence and by features. We compute the
# blocks of two thousand random ranks, and compare each pair. Two blocks have an element in common
# only if they overlap along every dimension.

if __name__ == "__main__":
    import random

    shape, mesh_shape = (2**14, 2**12, 2**13), (64, 16, 16)
    placements, blocks = (Shard(0), Shard(1), Shard(2)), []
    for rank in random.Random(0).sample(range(2**14), 2000):
        coordinates = rank // 256, rank // 16 % 16, rank % 16
        blocks.append(block_of(shape, mesh_shape, coordinates, placements))
    begins, sizes = torch.tensor(blocks).unbind(dim=1)
    ends = begins + sizes
    overlap = ((begins[:, None] < ends) & (begins < ends[:, None])).all(dim=-1)
    print(f"{overlap.sum() - len(blocks)} pairs of ranks have an element in common")
    n_elements = math.prod(mesh_shape) * sizes.prod(dim=-1).unique().item()  # all alike
    print(f"together the ranks have {n_elements} elements of {math.prod(shape)}")

# %%
# No two of these ranks have an element in common, and every place has a word of its own, so no word
# is used twice.
#
# Exercises
# ---------
#
# 1. Two ranks that were given different seeds draw parts of two masks, and there is no error.
#    Write a check that notices this. Why is it not part of ``sharded_dropout``?
# 2. Change the worker so that the samples are divided among the ranks as well, on a mesh of two
#    dimensions. Which lines don't have to change?
#
# .. note::
#    Try it first.
#
#    1. The largest and the smallest seed of all ranks must be the same. Comparing them takes a
#       collective call, for which every rank waits, so do it once, before training, rather than in
#       each layer.
#
#       .. code-block:: python
#
#          def check_same_seed(seed):
#              import torch.distributed as dist
#
#              seeds = torch.tensor([seed, -seed], device=DEVICE)
#              dist.all_reduce(seeds, op=dist.ReduceOp.MAX)
#              if seeds[0] != -seeds[1]:
#                  raise ValueError("the ranks have different seeds")
#
#    2. The mesh gets a new first dimension. The rows of ``x`` and ``target`` are divided along it,
#       and the weights are replicated. Both lines with a dropout, and the one with the gradients,
#       stay as they are. The number of ranks must be even.
#
#       .. code-block:: diff
#
#          -mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
#          +mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2))
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
