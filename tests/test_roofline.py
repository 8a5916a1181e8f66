"""The figure of all recorded kernels, and what is counted for it."""

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import roofline
from benchmarks import schema
from inside_a_kernel import compile_for
from test_course import ROOT


def machine(level=None):
    """Two kernels at 2 and 3 TB/s, of 3, and perhaps arithmetic of so many TFLOP/s."""
    lines = {"kernel": ["#d55e00", "-"], "limit": ["#555555", "--"]}
    values = {
        "a.one-float32": [[500, 1000], [2000, 3000]],
        "b.two-bfloat16": [[3000, 3000]],
        "inside_a_kernel.roofline": [[1, level], [2, level]],
    }
    benchmarks = {}
    for name, rows in list(values.items())[: 3 if level else 2]:
        looks = {"xlabel": "n", "unit": "GB/s", "x_log": True, "y_log": False}
        found = schema.Benchmark(**looks, lines=lines, commit="", date="", name=name)
        table = pd.DataFrame(rows, columns=["kernel", "limit"], index=range(len(rows)))
        found.tables[None, ""] = table
        benchmarks[name] = found
    about = {"gpu": "GPU", "torch": "1", "triton": "1", "date": "today"}
    return SimpleNamespace(
        **about, benchmarks=benchmarks, read=lambda name: benchmarks[name].read()
    )


COUNTS = {"b.two-bfloat16": 8.0, "a.one-float32": 3.0, "c.not-recorded": 1.0}


def test_points_are_the_largest_sizes_of_what_is_recorded_and_counted():
    found = roofline.points(machine(), COUNTS)
    assert [point[1:] for point in found] == [(3.0, 2000, 3000), (8.0, 3000, 3000)]


@pytest.mark.parametrize(("level", "expected"), [(None, None), (60, 30_000)])
def test_the_level_comes_from_the_lesson(level, expected, tmp_path):
    on_record = machine(level)
    assert roofline.arithmetic(on_record) == expected
    path = tmp_path / "roofline.svg"
    roofline.draw_roofline(on_record, roofline.points(on_record, COUNTS), path)
    assert "2 kernels: 67% to 100% of the limit" in path.read_text()


def test_every_recorded_speed_has_a_count():
    counts = roofline.counted(ROOT / "docs/results")
    for found in schema.machines(ROOT / "docs/results"):
        for name, benchmark in found.benchmarks.items():
            roles = {line.role for line in benchmark.lines.values()}
            if benchmark.unit == "GB/s" and {"kernel", "limit"} <= roles:
                assert 0.25 < counts[name] < 100, "run tests/arithmetic.py"


def test_what_is_counted_are_instructions_over_the_bytes_of_the_lesson():
    """Beside what the lesson 'Inside a kernel' counts for the same kernel, compiled alone."""
    code = "import arithmetic; print(arithmetic.count('fused_softmax'))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        str(ROOT / folder) for folder in ("tests", "tutorials", "docs/_ext")
    )
    output = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env=environment
    )
    counted = ast.literal_eval(output)["fused_softmax.softmax"]
    (kernel,) = compile_for({"BLOCK": 16384, "num_warps": 32})
    n_cols = 128 * 99  # the last size of the benchmark: a block is not full
    expected = kernel["instructions"] * 32 * 32 / (8 * n_cols)
    assert abs(counted - expected) < 0.05 * expected
