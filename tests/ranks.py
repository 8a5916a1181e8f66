"""What real ranks draw, and how fast. On two GPUs, for the page *Benchmarks*:

    python -m torch.distributed.run --standalone --nproc-per-node=2 tests/ranks.py \\
        >> docs/results/ranks.txt

On the CPU, with 1, 2, 3 and 4 processes, and with the training of the lesson:

    TRITON_INTERPRET=1 python tests/ranks.py FOLDER
"""

import multiprocessing
import os
import socket
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch._dynamo  # DTensor imports it when it is first used, in each process anew
import torch.distributed as dist
import triton
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorials"))
import sharded_dropout as lesson
from sharded_dropout import DEVICE, INTERPRET, launch_block_dropout, sharded_dropout


def check_masks(mesh):
    """Blocks of one mask, gathered, are the mask of one rank; also where they are uneven."""
    ones = torch.ones(7, 5, 6, device=DEVICE)
    whole = launch_block_dropout(ones, 0.5, 7, list(ones.shape), [0, 0, 0])
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        y = sharded_dropout(distribute_tensor(ones, mesh, [placement]), 0.5, 7)
        assert torch.equal(y.full_tensor(), whole), placement


def check_gradients(mesh):
    """Two layers with two dropouts, divided as Megatron does, beside the same on one rank."""
    torch.manual_seed(0)
    inputs = [torch.randn(size, device=DEVICE) for size in ((6, 8), (8, 10), (10, 4))]
    placements = Replicate(), Shard(1), Shard(0)
    divided = [
        distribute_tensor(tensor, mesh, [placement]).requires_grad_()
        for tensor, placement in zip(inputs, placements, strict=True)
    ]
    alone = [tensor.clone().requires_grad_() for tensor in inputs]

    def loss(x, up, down, dropout):
        y = dropout((x @ up).relu(), 0.5, 3) @ down
        if isinstance(y, DTensor):
            y = y.redistribute(placements=[Replicate()])
        return dropout(y, 0.1, 4).square().mean()

    def dropout_alone(x, p, seed):
        mask = launch_block_dropout(torch.ones_like(x), p, seed, list(x.shape), [0, 0])
        return x * mask

    found = torch.autograd.grad(loss(*divided, sharded_dropout), divided)
    expected = torch.autograd.grad(loss(*alone, dropout_alone), alone)
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.full_tensor(), right, rtol=1e-4, atol=1e-6)


def gpu_seconds(run, calls=10):
    """Of one call on the GPU. Calls that follow each other hide what a call costs the CPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls / 1000


def cpu_seconds(run, calls=100):
    """Of one call until it returns."""
    torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - start) / calls
    torch.accelerator.synchronize()
    return seconds


def runs(mesh, rows):
    """What is measured, for blocks of this many rows of 8192 elements."""
    block = torch.randn(rows, 8192, device=DEVICE, dtype=torch.bfloat16)
    rank = dist.get_rank()
    calls = {("", "copy"): block.clone}
    for placement in (Shard(0), Shard(1), Replicate()):
        x = DTensor.from_local(block, mesh, [placement], run_check=False)
        offsets = [0, 0]
        if placement.is_shard():
            offsets[placement.dim] = rank * block.shape[placement.dim]
        arguments = block, 0.5, 7, list(x.shape), offsets
        name = str(placement)
        calls[name, "sharded_dropout"] = lambda x=x: sharded_dropout(x, 0.5, 7)
        calls[name, "its launch"] = lambda a=arguments: launch_block_dropout(*a)
        calls[name, "F.dropout"] = lambda x=x: torch.nn.functional.dropout(x)
    return calls


def measure(mesh, n=2**28, repeats=5):
    """A table: GB/s of the slowest rank while all work, and the CPU's time of a call for a tiny block.

    Nothing is sent while a time is taken. Each round measures everything once.
    """
    large, small = runs(mesh, n // 8192), runs(mesh, 1)
    for run in (*large.values(), *small.values()):
        run()
    times = [
        [[gpu_seconds(large[name]), cpu_seconds(small[name])] for name in large]
        for _ in range(repeats)
    ]
    times = torch.tensor(times, device=DEVICE).median(dim=0).values
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    copy = times[0, 0].item()
    rows = [
        [*name, 4 * n / gpu / 1e9, copy / gpu, 1e6 * cpu]
        for name, (gpu, cpu) in zip(large, times.tolist(), strict=True)
    ]
    head = "placement", "call", "GB/s", "of the copy", "CPU's time of a call, µs"
    print_once("\n" + tabulate(rows, head, "github", (*"gg", ".0f", ".2f", ".0f")))
    print_once(
        f"\nbfloat16, {n:,} elements a rank; medians of {repeats}, the slowest rank. Measured with "
        f"{dist.get_world_size()} × {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {date.today()}."
    )


def print_once(*values):
    if dist.get_rank() == 0:
        print(*values, flush=True)


def check():
    torch.set_num_threads(1)
    if not INTERPRET:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    check_masks(mesh)
    check_gradients(mesh)
    n_ranks = dist.get_world_size()
    print_once(f"{n_ranks} ranks: masks and gradients agree with those of one.")
    if not INTERPRET:
        measure(mesh)
    dist.destroy_process_group()


def train(first_step, last_step, before, after):
    """The lesson's worker, which prints the losses."""
    sys.modules["functions"] = lesson
    sys.argv[1:] = str(first_step), str(last_step), before, after
    exec(lesson.WORKER, {})


def fork(n_ranks, function, *arguments):
    """Run the function on so many ranks. They are copies of this process, and start at once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n_ranks),
    }

    def run(rank):
        os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        function(*arguments)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank,)) for rank in range(n_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(f"{function.__name__} failed on {n_ranks} ranks")


def main(folder):
    for n_ranks in (1, 2, 3, 4):
        fork(n_ranks, check)
    weights = []
    for numbers in ((1,), (3,), (4, 2)):  # on four, and resumed on two
        before = ""
        for i, n_ranks in enumerate(numbers):
            steps = 4 * i // len(numbers), 4 * (i + 1) // len(numbers)
            fork(n_ranks, train, *steps, before, f"{folder}/state.pt")
            before = f"{folder}/state.pt"
        print(flush=True)
        weights.append(torch.load(before))
        torch.testing.assert_close(weights[-1], weights[0], rtol=1e-5, atol=1e-6)
    print("the weights agree")


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1:] else check()
