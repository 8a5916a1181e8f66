"""Run the lessons' benchmarks on a GPU and keep the results: ``make record``.

``docs/results`` has a folder for each GPU, in it a CSV for each benchmark and a ``machine.json``.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import platform
import re
import subprocess
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

ROOT = Path(__file__).parents[2]
# The README's picture is drawn from this benchmark of the first GPU on record.
PICTURE = "fused_softmax.softmax-widths-float32"


def machine():
    """What the results depend on, other than the lessons."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.check_output(query, text=True).splitlines()[0],
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


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


def measure(function, benchmark, runs):
    """Medians of ``runs`` runs, and beside each the spread, largest minus smallest."""
    tables = [Mark(function, benchmark).run(return_df=True) for _ in range(runs)]
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
    return result


def describe(function, benchmark):
    """What is needed to draw the figure, and to find the code that runs it."""
    styles = benchmark.styles or [(None, "-")] * len(benchmark.line_names)
    return {
        "function": function.__name__,
        "xlabel": (benchmark.xlabel or benchmark.x_names[0]).partition("\n")[0],
        "unit": benchmark.ylabel,
        "x_log": benchmark.x_log,
        "y_log": benchmark.y_log,
        "lines": dict(zip(benchmark.line_names, styles, strict=True)),
        "commit": figures.COMMIT,
        "date": str(date.today()),
    }


def noise(path, benchmark):
    """Spread over value; where it is small by luck, its median over the line instead."""
    values = figures.read(path, benchmark)
    share = (figures.read(path, benchmark, ", spread") / values).fillna(0)
    return values, share.clip(lower=share.median(), axis=1)


def changes(before, after):
    """A sentence for each line: how it changed, and whether that is more than noise."""
    (old, old_noise), (new, new_noise) = noise(*before), noise(*after)
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


def lesson_of(name):
    return name.partition(".")[0]


def load(name):
    """Import a lesson, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(name)


def record(lessons, results, machine, limit, runs):
    """Record the lessons and return the names of what failed."""
    folder = results / re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower())
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / "machine.json"
    before = (
        json.loads(facts.read_text()) if facts.exists() else machine | {"benchmarks": {}}
    )
    kept = before["benchmarks"]
    if not machine.items() <= before.items():
        if {lesson_of(name) for name in kept} - set(lessons):
            sys.exit(
                "The driver or a version is another than on record. Record all lessons, or "
                f"first remove {folder}."
            )
        kept = {}
    failed = []
    for number, lesson in enumerate(lessons, 1):
        print(f"[{number}/{len(lessons)}] {lesson}", flush=True)
        try:
            found = list(benchmarks(load(lesson)))
        except Exception:
            traceback.print_exc()
            failed.append(lesson)
            continue
        new = {}
        for function, benchmark in found:
            name = f"{lesson}.{benchmark.plot_name}"
            path = folder / f"{name}.csv"
            start = time.monotonic()
            try:
                table = measure(function, benchmark, runs)
            except Exception:
                traceback.print_exc()
                failed.append(name)
                continue
            new[name] = describe(function, benchmark)
            print(f"  {name}, {time.monotonic() - start:.0f} s", flush=True)
            next_path = path.with_suffix(".next")
            table.to_csv(next_path, index=False, float_format="%.6g")
            if path.exists() and name in before["benchmarks"]:
                old = path, before["benchmarks"][name]
                print(*changes(old, (next_path, new[name])), sep="\n", flush=True)
            next_path.rename(path)
        others = (n for n in kept if lesson_of(n) != lesson or n in failed)
        kept = {name: kept[name] for name in others} | new
        written = machine | {
            "copy_limit": f"{limit:.0f} GB/s",
            "runs": runs,
            "commit": figures.COMMIT,
            "date": str(date.today()),
            "benchmarks": {name: kept[name] for name in sorted(kept, key=lesson_of)},
        }
        facts.write_text(json.dumps(written, indent=2) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
    for path in folder.glob("*.csv"):
        if path.stem not in kept:
            path.unlink()
    return failed


def draw_picture(results, path):
    facts = min(results.glob("*/machine.json"), default=None)
    if facts is None:  # all failed
        return
    machine = json.loads(facts.read_text())
    if benchmark := machine["benchmarks"].get(PICTURE):
        table = figures.read(facts.parent / f"{PICTURE}.csv", benchmark)
        figures.draw(table, benchmark, machine, path)


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
    runs = int(os.environ.get("RUNS") or 2)
    results = ROOT / "docs/results"
    failed = record(lessons, results, machine(), copy_limit(), runs)
    draw_picture(results, ROOT / "docs/_static/fused_softmax.png")
    if failed:
        sys.exit(f"Not recorded, because they failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
