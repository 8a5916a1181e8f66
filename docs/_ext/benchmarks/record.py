"""Run the lessons' benchmarks on a GPU and keep the results: ``make record``.

``docs/results`` has a folder for each GPU, in it a CSV for each benchmark and a ``machine.json``. Its
folder ``runs`` has each single number that was measured, with the state of the GPU at that moment.
"""

import contextlib
import gc
import importlib
import io
import os
import platform
import re
import sys
import time
import traceback
import warnings
from datetime import date
from pathlib import Path

import figures
import matplotlib
import numpy as np
import pandas as pd
import torch
import triton
from triton.testing import Benchmark, Mark

from . import draw, nvml, schema

ROOT = Path(__file__).parents[3]


def machine():
    """What the results depend on, other than the lessons."""
    return schema.Machine(
        gpu=torch.cuda.get_device_name(),
        driver=nvml.driver(),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
    )


def copy_limit():
    """GB/s of a copy of 2^28 elements of float32."""
    x = torch.empty(2**28, device="cuda")
    return 2 * x.nbytes / triton.testing.do_bench(x.clone, return_mode="median") / 1e6


def benchmarks(module):
    """The benchmarks of a lesson: pairs of a function and what to call it with."""
    for mark in vars(module).values():
        if isinstance(mark, Mark):
            single = isinstance(mark.benchmarks, Benchmark)
            for benchmark in [mark.benchmarks] if single else mark.benchmarks:
                yield mark.fn, benchmark


def watched(function, benchmark, run, rows, watch):
    """The function, which notes in ``rows`` what it returned and how the GPU was then."""

    def call(**arguments):
        value = function(**arguments)
        number = value[0] if isinstance(value, tuple) else value
        line = benchmark.line_vals.index(arguments[benchmark.line_arg])
        x = {name: arguments[name] for name in benchmark.x_names}
        found = {"line": benchmark.line_names[line], "run": run, benchmark.ylabel: number}
        rows.append(x | found | watch.look())
        return value

    return call


def measure(function, benchmark, runs, watch):
    """Medians of ``runs`` runs, beside each the spread, largest minus smallest; and each number."""
    rows, tables = [], []
    for run in range(1, runs + 1):
        call = watched(function, benchmark, run, rows, watch)
        tables.append(Mark(call, benchmark).run(return_df=True))
        matplotlib.pyplot.close("all")
    n = len(benchmark.x_names)
    result = tables[0].iloc[:, :n].apply(pd.to_numeric, downcast="integer")
    values = np.stack([table.iloc[:, n:].to_numpy(float) for table in tables])
    for quantity, numbers in (
        ("", np.median(values, 0)),
        (", spread", np.ptp(values, 0)),
    ):
        for name, column in zip(benchmark.line_names, numbers.T, strict=True):
            result[f"{name}{quantity} ({benchmark.ylabel})"] = column
    return result, pd.DataFrame(rows)


def describe(function, benchmark, name, path):
    """What is needed to draw the figure, and to find the code that runs it."""
    styles = benchmark.styles or [(None, "-")] * len(benchmark.line_names)
    styles = dict(zip(benchmark.line_names, styles, strict=True))
    for line, (colour, _) in styles.items():
        if colour is not None and colour not in schema.COLOURS:
            raise ValueError(
                f"the line {line!r} has the colour {colour}. The figures use "
                + ", ".join(f"{c} ({what})" for c, what in schema.COLOURS.items())
            )
    return schema.Benchmark(
        function=function.__name__,
        xlabel=(benchmark.xlabel or benchmark.x_names[0]).partition("\n")[0],
        unit=benchmark.ylabel,
        x_log=benchmark.x_log,
        y_log=benchmark.y_log,
        lines=schema.roles(styles),
        commit=figures.COMMIT,
        date=str(date.today()),
        name=name,
        path=path,
    )


def noise(benchmark):
    """Spread over value; where it is small by luck, its median over the line instead."""
    values = benchmark.read()
    share = (benchmark.read(", spread") / values).fillna(0)
    return values, share.clip(lower=share.median(), axis=1)


def changes(before, after):
    """A sentence for each line: how it changed, and whether that is more than noise."""
    (old, old_noise), (new, new_noise) = noise(before), noise(after)
    for line in new.columns.intersection(old.columns):
        change = (new[line] / old[line] - 1).dropna()  # NaN at sizes that only one has
        threshold = 2 * (old_noise[line] + new_noise[line])
        moved = change[change.abs() > threshold[change.index]]
        if change.empty:
            continue
        largest = change.abs().idxmax()
        yield (
            f"  {'  ' if moved.empty else '* '}{line}: {change.median():+.1%} in the middle, "
            f"{change[largest]:+.1%} at {largest}; "
            f"{len(moved)} of {len(change)} moved by more than twice the noise"
        )


def load(name):
    """Import a lesson, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name)


def record_one(function, benchmark, lesson, folder, before, runs, watch):
    """Measure a benchmark and write its tables. Return its description."""
    name = f"{lesson}.{benchmark.plot_name}"
    path, start = folder / f"{name}.csv", time.monotonic()
    table, numbers = measure(function, benchmark, runs, watch)
    new = describe(function, benchmark, name, path.with_suffix(".next"))
    table.to_csv(new.path, index=False, float_format="%.6g")
    new.read()  # which fails if there is no number for the kernel
    print(f"  {name}, {time.monotonic() - start:.0f} s", flush=True)
    if path.exists() and name in before:
        with contextlib.suppress(schema.RecordError):  # it is about to be replaced
            print(*changes(before[name], new), sep="\n", flush=True)
    (folder / "runs").mkdir(exist_ok=True)
    numbers.to_csv(folder / f"runs/{name}.csv", index=False, float_format="%.6g")
    new.path = new.path.rename(path)
    return new


def record_lesson(lesson, folder, before, runs, watch, failed):
    """Record a lesson's benchmarks. Return their descriptions, and add to ``failed`` what failed."""
    try:
        found = list(benchmarks(load(lesson)))
    except Exception:
        traceback.print_exc()
        failed.append(lesson)
        return {}
    new = {}
    for function, benchmark in found:
        name = f"{lesson}.{benchmark.plot_name}"
        try:
            new[name] = record_one(
                function, benchmark, lesson, folder, before, runs, watch
            )
        except Exception:
            traceback.print_exc()
            failed.append(name)
    return new


def record(lessons, results, machine, runs):
    """Record the lessons and return the names of what failed."""
    folder = results / re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower())
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / "machine.json"
    before, kept = {}, {}
    if facts.exists():
        old = schema.load(facts)
        before = kept = old.benchmarks
        if old.made_with != machine.made_with:
            if {benchmark.lesson for benchmark in kept.values()} - set(lessons):
                sys.exit(
                    "The driver or a version is another than on record. Record all lessons, or "
                    f"first remove {folder}."
                )
            kept = {}
    failed, watch = [], nvml.Watch()
    for number, lesson in enumerate(lessons, 1):
        print(f"[{number}/{len(lessons)}] {lesson}", flush=True)
        new = record_lesson(lesson, folder, before, runs, watch, failed)
        kept = {
            name: benchmark
            for name, benchmark in kept.items()
            if benchmark.lesson != lesson or name in failed or lesson in failed
        } | new
        machine.folder, machine.runs = folder, runs
        machine.commit, machine.date = figures.COMMIT, str(date.today())
        machine.benchmarks = dict(sorted(kept.items(), key=lambda item: item[1].lesson))
        machine.save()
        gc.collect()
        torch.cuda.empty_cache()
    for path in [*folder.glob("*.csv"), *folder.glob("runs/*.csv")]:
        if path.stem not in kept:
            path.unlink()
    return failed


def draw_picture(results, path):
    """The README's picture: the figure at the head of the site."""
    sys.path.insert(0, str(ROOT))
    from conf import recorded_headline

    gpu, name = recorded_headline
    for machine in schema.machines(results, gpu)[:1]:
        if name in machine.benchmarks:
            draw.draw(machine, name, path)


def main():
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit(
            "Recording needs a GPU: the time that Triton's interpreter takes says nothing."
        )
    matplotlib.use("agg")
    warnings.filterwarnings("ignore", module=r"torch\.")  # of peers, as on the pages
    sys.path.insert(0, str(ROOT / "tutorials"))
    every = sorted(path.stem for path in (ROOT / "tutorials").glob("*.py"))
    lessons = sys.argv[1:] or every
    if unknown := set(lessons) - set(every):
        sys.exit(f"No such lesson: {', '.join(unknown)}. There are: {', '.join(every)}")
    runs = int(os.environ.get("RUNS") or 5)
    if users := nvml.others():
        sys.exit(f"The GPU is not idle, so that no time can be trusted: {users}.")
    results, made = ROOT / "docs/results", machine()
    made.copy_limit = f"{copy_limit():.0f} GB/s"
    failed = record(lessons, results, made, runs)
    draw_picture(results, ROOT / "docs/_static/fused_softmax.png")
    if failed:
        sys.exit(f"Not recorded, because they failed: {', '.join(failed)}")
