"""The recorder, on a small lesson whose function returns numbers instead of measuring."""

import json
import sys

import matplotlib
import pandas as pd
import pytest
import record

LESSON = """
import triton

def benchmark(name, unit, **options):
    return triton.testing.Benchmark(
        x_names=["n"], x_vals=[1024, 2**28], line_arg="line", line_vals=[1, 2],
        line_names=["ours", "theirs, slow"], xlabel="elements\\nsome machine", ylabel=unit,
        plot_name=name, args={}, **options,
    )

print("not to be seen")
calls = 0

@triton.testing.perf_report(
    [benchmark("speed", "GB/s", x_log=True, styles=[("#d55e00", "-"), ("#0072b2", ":")])]
)
def speed(n, line):
    global calls
    calls += 1
    return FACTOR * n / line + (calls > 4)  # the second run is larger by 1

@triton.testing.perf_report(benchmark("time", "ms"))
def time(n, line):
    return n * line

if __name__ == "__main__":
    raise RuntimeError
"""
MACHINE = {"gpu": "Some GPU (80GB)", "torch": "2.0", "triton": "3.6.0"}


class Recorder:
    def __init__(self, folder):
        self.folder = folder
        self.results = folder / "results/some-gpu-80gb-"

    def write(self, name, text):
        (self.folder / f"{name}.py").write_text(text)

    def record(self, *lessons, **machine):
        for name in lessons:
            sys.modules.pop(name, None)
        return record.record(
            lessons, self.folder / "results", MACHINE | machine, limit=3000.4, runs=2
        )

    @property
    def machine(self):
        return json.loads((self.results / "machine.json").read_text())


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    result = Recorder(tmp_path)
    result.write("lesson_a", LESSON.replace("FACTOR", "1"))
    result.write("lesson_b", LESSON.replace("FACTOR", "1"))
    return result


def test_a_csv_for_each_benchmark_and_what_made_them(recorder, capsys):
    assert recorder.record("lesson_a") == []
    table = pd.read_csv(recorder.results / "lesson_a.speed.csv")
    assert list(table.columns) == [
        "n",
        "ours (GB/s)",
        "theirs, slow (GB/s)",
        "ours, spread (GB/s)",
        "theirs, slow, spread (GB/s)",
    ]
    assert table.n.tolist() == [1024, 2**28]
    assert table.iloc[0].tolist() == [1024, 1024.5, 512.5, 1, 1]

    machine = recorder.machine
    assert machine.items() >= MACHINE.items()
    assert machine["copy_limit"] == "3000 GB/s" and machine["runs"] == 2
    assert list(machine["benchmarks"]) == ["lesson_a.speed", "lesson_a.time"]
    speed = machine["benchmarks"]["lesson_a.speed"]
    assert speed["xlabel"] == "elements" and speed["unit"] == "GB/s" and speed["x_log"]
    assert speed["lines"] == {"ours": ["#d55e00", "-"], "theirs, slow": ["#0072b2", ":"]}
    assert {"commit", "date"} <= machine.keys() & speed.keys()

    output = capsys.readouterr().out
    assert "[1/1] lesson_a" in output and "not to be seen" not in output


def test_what_changed_by_more_than_noise_is_marked(recorder, capsys):
    recorder.record("lesson_a")
    recorder.write(
        "lesson_a", LESSON.replace("FACTOR", "1.1").replace("n * line", "n * 2")
    )
    capsys.readouterr()
    recorder.record("lesson_a")
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [line.partition(" in the middle")[0] for line in lines] == [
        "  * ours: +10.0%",
        "  * theirs, slow: +10.0%",
        "  * ours: +100.0%",
        "    theirs, slow: +0.0%",
    ]
    assert lines[0].endswith("; 2 of 2 moved by more than twice the noise")


def test_noise_is_not_a_change(recorder, capsys):
    recorder.record("lesson_a")  # the runs at 1024 differ by one in a thousand
    recorder.write("lesson_a", LESSON.replace("FACTOR * n", "1.002 * n"))
    recorder.record("lesson_a")
    ours = next(line for line in capsys.readouterr().out.splitlines() if "ours:" in line)
    assert ours.startswith("  * ours: +0.2%") and "1 of 2 moved" in ours


def test_a_lesson_that_fails_is_named_and_its_old_record_kept(recorder, capsys):
    recorder.record("lesson_a", "lesson_b")
    before = (recorder.results / "lesson_a.time.csv").read_text()
    recorder.write(
        "lesson_a",
        LESSON.replace("FACTOR", "1").replace("return n * line", "raise MemoryError"),
    )
    recorder.write("lesson_b", "import nothing_of_this_name")
    assert recorder.record("lesson_a", "lesson_b") == ["lesson_a.time", "lesson_b"]
    assert "MemoryError" in capsys.readouterr().err
    assert (recorder.results / "lesson_a.time.csv").read_text() == before
    assert sorted(recorder.machine["benchmarks"]) == [
        f"lesson_{lesson}.{name}" for lesson in "ab" for name in ("speed", "time")
    ]


def test_what_no_longer_belongs_is_removed(recorder):
    recorder.record("lesson_a", "lesson_b")
    recorder.write("lesson_a", LESSON.replace("FACTOR", "1").replace('"time"', '"times"'))
    recorder.record("lesson_a")  # which says nothing of lesson_b
    names = ["lesson_a.speed", "lesson_a.times", "lesson_b.speed", "lesson_b.time"]
    assert sorted(recorder.machine["benchmarks"]) == names
    assert sorted(path.stem for path in recorder.results.glob("*.csv")) == names


def test_one_record_has_one_set_of_versions(recorder):
    recorder.record("lesson_a", "lesson_b")
    with pytest.raises(SystemExit, match="Record all lessons"):
        recorder.record("lesson_a", torch="2.1")
    recorder.record("lesson_a", "lesson_b", torch="2.1")
    assert recorder.machine["torch"] == "2.1"


def test_without_a_gpu_it_says_that_it_needs_one(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="Recording needs a GPU"):
        record.main()


def test_an_unknown_lesson_is_named(monkeypatch):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["record.py", "softmaks"])
    with pytest.raises(
        SystemExit, match=r"No such lesson: softmaks\. There are: baseline"
    ):
        record.main()
