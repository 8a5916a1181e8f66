"""What a call of each public function costs the CPU, beside a bare launch of its kernels.

For a machine with a GPU: ``python tests/call_cost.py [LESSON ...]`` prints a table of microseconds,
and ``--csv FILE`` writes it, too. All times of a row are measured in turns, in the same run. The
inputs are small, so that the GPU is done first, and it is not waited for.

"launch" is the bare launch: the lesson's own function that allocates the result, computes sizes and
launches, and runs what else is needed, such as a sum of parts, but has no autograd and no checks of
arguments. Each public function should take at most 1.5 times as long without a gradient, and 1.6
times if one is recorded. "kernels" are the launches of a call alone, repeated with the same
arguments, with one allocation: no more can be saved than what lies above them.
"""

import argparse
import csv
import importlib
import sys
import timeit
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
LAUNCHES, ROUNDS = 50, 15


def normal(*shape):
    return torch.randn(shape, device="cuda")


def seed():
    return torch.tensor([7], device="cuda")


def fused_softmax(lesson):
    yield "row_softmax", normal(64, 256), lesson.row_softmax, lesson.launch_row_softmax


def baseline_dropout(lesson):
    x, mask = normal(1024), normal(1024) > 0
    public = partial(lesson.dropout, x_keep=mask, p=0.5)
    yield "dropout", x, public, partial(lesson.launch_dropout, x_keep=mask, p=0.5)


def seeded_dropout(lesson):
    for name in ("seeded_dropout", "seeded_dropout4x"):
        calls = (getattr(lesson, prefix + name) for prefix in ("", "launch_"))
        yield name, normal(1024), *(partial(call, p=0.5, seed=7) for call in calls)


def softmax_tiles(lesson):
    yield "tile_softmax", normal(64, 256), lesson.tile_softmax, lesson.launch_tile_softmax


def softmax_slices(lesson):
    x = normal(2, 20_000)
    yield "slice_softmax", x, lesson.slice_softmax, lesson.launch_slice_softmax


def operators(lesson):
    yield (
        "both",
        normal(1024),
        *(lambda x, f=f: f(x, 0.5, 7) for f in (lesson.both, lesson.bare)),
    )


def checkpointed_dropout(lesson):
    calls = lesson.replayed_dropout, lesson.launch_replayed_dropout
    yield (
        "replayed_dropout",
        normal(1024),
        *(partial(c, p=0.5, seed=seed()) for c in calls),
    )


def matrix_dropout(lesson):
    seeds = torch.arange(32, device="cuda")
    calls = lesson.matrix_dropout, lesson.launch_matrix_dropout
    yield (
        "matrix_dropout",
        normal(32, 32),
        *(partial(c, p=0.5, seeds=seeds) for c in calls),
    )


def recurrent_dropout(lesson):
    calls = lesson.shared_dropout, lesson.launch_shared_dropout
    yield (
        "shared_dropout",
        normal(4, 16, 16),
        *(partial(c, p=0.5, seed=seed()) for c in calls),
    )


def language_model(lesson):
    x, function = normal(4, 16, 16), lesson.SharedDropout
    yield (
        "shared_dropout",
        x,
        partial(lesson.shared_dropout, p=0.5),
        (lambda x: function.forward(x, 0.5, torch.randint(2**62, (1,), device=x.device))),
    )


def block_dropout(lesson):
    calls = lesson.block_dropout, lesson.launch_block_dropout
    where = {"p": 0.5, "seed": 7, "shape": [64, 64], "offsets": [4, 4]}
    yield "block_dropout", normal(32, 32), *(partial(call, **where) for call in calls)


def sharded_dropout(lesson):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    mesh = init_device_mesh("cuda", (4,))
    local = normal(32, 32)
    where = {"p": 0.5, "seed": 7, "shape": [32, 128], "offsets": [0, 32]}

    def public(x):
        sharded = DTensor.from_local(x, mesh, [Shard(1)], run_check=False)
        return lesson.sharded_dropout(sharded, 0.5, 7)

    yield (
        "sharded_dropout (with from_local)",
        local,
        public,
        partial(lesson.launch_block_dropout, **where),
    )


def sparse_johnson_lindenstrauss(lesson):
    for name, n_in, n_out in (("sparse_jl", 256, 64), ("sparse_jl_transpose", 64, 256)):
        x, transposed = normal(4, n_in), name != "sparse_jl"
        public = partial(getattr(lesson, name), seed=7, density=1 / 3)
        launch = partial(lesson.drawn_product, seed=7, density=1 / 3)
        yield (
            name,
            x,
            lambda x, f=public, n=n_out: f(x, n),
            lambda x, f=launch, n=n_out, t=transposed: f(x, n, transposed=t),
        )


def very_sparse_projection(lesson):
    for name, n_in, n_out in (
        ("very_sparse_jl", 256, 64),
        ("very_sparse_jl_transpose", 64, 256),
    ):
        x, transposed = normal(4, n_in), name != "very_sparse_jl"
        public = partial(getattr(lesson, name), seed=7, density=1 / 32)
        launch = partial(lesson.visited_product, seed=7, density=1 / 32)
        yield (
            name,
            x,
            lambda x, f=public, n=n_out: f(x, n),
            lambda x, f=launch, n=n_out, t=transposed: f(x, n, transposed=t),
        )


def lstm_module(lesson):
    lstm = lesson.LSTM(16, 16, recurrent_dropout=0.5).cuda()
    # It runs matrix products as well, so there is no bare launch to compare with.
    yield "LSTM, 10 steps", normal(10, 2, 16), lstm, None


def pytorch(lesson):
    """For comparison: no kernel of a lesson."""
    yield "F.dropout", normal(1024), torch.nn.functional.dropout, None
    yield "torch.softmax", normal(64, 256), partial(torch.softmax, dim=-1), None


NOT_LESSONS = ("normal", "seed")
LESSONS = {
    name: calls
    for name, calls in globals().items()
    if callable(calls) and getattr(calls, "__module__", "") == __name__
    if name not in NOT_LESSONS
}
# This can't be repeated with the same arguments: the first call uses them up.
ONCE = ("slice_softmax",)


def kernels_of(name, x, launch):
    """The launches of a call, with an allocation of the result; None if it can't be repeated."""
    if launch is None or name in ONCE:
        return None
    launches, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, grid, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = record
    try:
        y = launch(x)
    finally:
        JITFunction.run = run

    def repeat(x):
        result = torch.empty_like(y)
        for kernel, args, grid, kwargs in launches:
            kernel[grid](*args, **kwargs)
        return result

    return repeat


def microseconds(calls):
    """The least time of the CPU for a call of each; turn by turn, so that all see the same."""

    def several(call, x):
        for _ in range(LAUNCHES):
            call(x)

    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, (call, x) in enumerate(calls):
            torch.cuda.synchronize()
            time = timeit.timeit(partial(several, call, x), number=1)
            least[i] = min(least[i], time / LAUNCHES * 1e6)
    torch.cuda.synchronize()
    return least


def measure(names):
    """A row for each public function of these lessons."""
    rows = []
    for lesson in names:
        if not (lesson == "pytorch" or (ROOT / f"tutorials/{lesson}.py").exists()):
            continue
        module = (
            SimpleNamespace() if lesson == "pytorch" else importlib.import_module(lesson)
        )
        for name, x, public, launch in LESSONS[lesson](module):
            calls = {"public": (public, x)}
            kernels = kernels_of(name, x, launch)
            if kernels is not None:
                calls["kernels"] = kernels, x
            if launch is not None:
                calls["launch"] = launch, x
            recorded = x.clone().requires_grad_()
            try:
                public(recorded)
                calls["with gradient"] = public, recorded
            except ValueError as error:  # it has no gradient
                assert "gradient" in str(error)
            times = dict(zip(calls, microseconds(list(calls.values())), strict=True))
            bare = times.get("launch")
            if bare is not None:
                times["ratio"] = times["public"] / bare
                if "with gradient" in times:
                    times["ratio with gradient"] = times["with gradient"] / bare
            rows.append({"lesson": lesson, "function": name} | times)
    return rows


COLUMNS = ["lesson", "function", "kernels", "launch", "public", "with gradient"]
COLUMNS += ["ratio", "ratio with gradient"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="*", choices=[[], *LESSONS])
    parser.add_argument("--csv", help="a file for the table")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tutorials"))
    rows = measure(arguments.lessons or LESSONS)
    print(",".join(COLUMNS))
    for row in rows:
        print(
            *(
                f"{v:.2f}" if isinstance(v := row.get(c, ""), float) else v
                for c in COLUMNS
            ),
            sep=",",
        )
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
