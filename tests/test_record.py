"""The recorder, on a small lesson whose function returns numbers instead of measuring."""

import json
import sys

import matplotlib
import pandas as pd
import pytest
from benchmarks import draw, nvml, record, schema, show

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
MACHINE = {
    "gpu": "Some GPU (80GB)",
    "torch": "2.0",
    "triton": "3.6.0",
    "copy_limit": "3000 GB/s",
}


class Recorder:
    def __init__(self, folder):
        self.folder = folder
        self.results = folder / "results/some-gpu-80gb-"

    def write(self, name, text):
        (self.folder / f"{name}.py").write_text(text)

    def record(self, *lessons, **machine):
        for name in lessons:
            sys.modules.pop(name, None)
        made = schema.Machine(**MACHINE | machine)
        return record.record(lessons, self.folder / "results", made, runs=2)

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
    assert speed["lines"] == {
        "ours": {"role": "kernel", "colour": "#d55e00", "dashes": "-"},
        "theirs, slow": {"role": "PyTorch", "colour": "#0072b2", "dashes": ":"},
    }
    assert {"commit", "date"} <= machine.keys() & speed.keys()

    runs = pd.read_csv(recorder.results / "runs/lesson_a.speed.csv")
    assert list(runs.columns) == ["n", "line", "run", "GB/s"]
    assert len(runs) == 8 and runs.iloc[-1].tolist()[:3] == [2**28, "theirs, slow", 2]

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
    assert sorted(path.stem for path in recorder.results.glob("runs/*.csv")) == names


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
    monkeypatch.setattr(sys, "argv", ["benchmarks", "softmaks"])
    with pytest.raises(
        SystemExit, match=r"No such lesson: softmaks\. There are: baseline"
    ):
        record.main()


def test_a_gpu_that_something_else_is_using_is_refused(monkeypatch):
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    answers = {"--query-compute-apps=pid,name,used_memory": [["7", "python", "512"]]}
    monkeypatch.setattr(nvml, "ask", lambda query: answers.get(query, []))
    with pytest.raises(SystemExit, match=r"not idle.*process 7 \(python, 512 MiB\)"):
        record.main()


def test_what_a_container_hides_is_seen_by_its_work(monkeypatch):
    busy = iter(["90", "80", "90", "1", "0"])
    rows = {"--query-gpu=utilization.gpu": lambda: [[next(busy)]]}
    monkeypatch.setattr(nvml, "ask", lambda query: rows.get(query, list)())
    monkeypatch.setattr(nvml.time, "sleep", lambda seconds: None)
    assert "80% busy" in nvml.others()
    assert nvml.others() == ""  # it was the end of what ran before
    assert nvml.others() == ""


def test_each_run_is_kept_with_the_state_of_the_gpu(recorder, monkeypatch):
    facts = {"SM MHz": 1980, "memory MHz": 2619, "°C": 41, "throttled": "power cap"}
    monkeypatch.setattr(nvml.Watch, "look", lambda self: facts)
    recorder.record("lesson_a")
    runs = pd.read_csv(recorder.results / "runs/lesson_a.time.csv")
    assert set(facts) < set(runs.columns) and (runs["throttled"] == "power cap").all()


def test_a_colour_that_means_nothing_is_named(recorder, capsys):
    recorder.write(
        "lesson_a", LESSON.replace("FACTOR", "1").replace("#0072b2", "#123456")
    )
    assert recorder.record("lesson_a") == ["lesson_a.speed"]
    assert "'theirs, slow' has the colour #123456" in capsys.readouterr().err


STYLES = {
    "half": ["#d55e00", ":"],
    "ours": ["#d55e00", "-"],
    "ours again": ["#D55E00", "-"],
    "F.dropout": ["#0072b2", "-"],
    'plain "<b>"': [None, "-"],
    "copy": ["#555555", "--"],
}


def test_old_records_are_read_and_their_roles_guessed():
    lines = schema.roles(STYLES)
    assert [line.role for line in lines.values()] == [
        "variant", "kernel", "variant", "PyTorch", "other", "limit"
    ]  # fmt: skip
    old = {"xlabel": "n, bfloat16", "unit": "GB/s", "x_log": True, "y_log": False}
    old |= {"lines": STYLES, "commit": "abc", "date": "2026-01-01"}
    benchmark = schema.Benchmark(**old, name="a_lesson.seeded-dropout-bfloat16")
    assert benchmark.lines == lines and benchmark.lesson == "a_lesson"
    assert (benchmark.title, benchmark.dtype) == ("Seeded dropout", "bfloat16")


@pytest.fixture
def recorded(recorder):
    recorder.record("lesson_a")
    return recorder


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("machine.json", ""),
        ("machine.json", "[1, 2]"),
        ("machine.json", '{"gpu": "Some GPU'),
        ("machine.json", '{"gpu": "Some GPU", "torch": "2.0"}'),
        ("machine.json", '{"gpu": "", "torch": "", "triton": "", "benchmarks": {"a.b": {}}}'),
        ("lesson_a.speed.csv", ""),
        ("lesson_a.speed.csv", "n,ours (GB/s)\n1,2\n"),
        ("lesson_a.speed.csv", '"n\n'),
        ("lesson_a.speed.csv", "HEADER\n"),
        ("lesson_a.speed.csv", "HEADER\n1024,fast,3,1,1\n"),
        ("lesson_a.speed.csv", "HEADER\nmany,2,3,1,1\n"),
        ("lesson_a.speed.csv", "HEADER\n1024,nan,3,1,1\n"),
        ("lesson_a.speed.csv", "HEADER\n1024,inf,3,1,1\n"),
        ("lesson_a.speed.csv", "HEADER\n1024,-2,3,1,1\n"),
        ("lesson_a.speed.csv", "HEADER\n1024,2,3,1,1\n1024,2,3,1,1\n"),
        ("lesson_a.speed.csv", "HEADER\n,2,3,1,1\n"),
        ("lesson_a.speed.csv", None),
    ],
)  # fmt: skip
def test_a_garbled_file_is_named(recorded, file, text):
    path = recorded.results / file
    header = (recorded.results / "lesson_a.speed.csv").read_text().splitlines()[0]
    path.write_text(text.replace("HEADER", header)) if text is not None else path.unlink()
    with pytest.raises(schema.RecordError, match=file):
        (machine,) = schema.machines(recorded.results.parent)
        machine.read("lesson_a.speed")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("gpu", None),
        ("torch", 2.11),
        ("runs", "two"),
        ("benchmarks lesson_a.speed", None),
        ("benchmarks lesson_a.speed xlabel", None),
        ("benchmarks lesson_a.speed x_log", "false"),
        ("benchmarks lesson_a.speed lines ours", ["reddish", "-"]),
        ("benchmarks lesson_a.speed lines ours colour", "reddish"),
        ("benchmarks lesson_a.speed lines ours dashes", "zz"),
    ],
)
def test_a_fact_of_another_kind_is_named(recorded, where, value):
    path = recorded.results / "machine.json"
    facts = json.loads(path.read_text())
    *keys, last = where.split(" ")
    inner = facts
    for key in keys:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(facts))
    with pytest.raises(schema.RecordError, match=r"machine\.json: "):
        schema.machines(recorded.results.parent)


def test_a_peer_may_refuse_a_size(recorded):
    path = recorded.results / "lesson_a.speed.csv"
    lines = path.read_text().splitlines()
    x, ours, _, *spreads = lines[2].split(",")
    path.write_text("\n".join([*lines[:2], ",".join([x, ours, "", *spreads])]) + "\n")
    (machine,) = schema.machines(recorded.results.parent)
    stand = schema.standing(
        machine.read("lesson_a.speed"), machine.benchmarks["lesson_a.speed"]
    )
    assert stand["peer"].notna().tolist() == [True, False]
    draw.draw(machine, "lesson_a.speed", recorded.folder / "figure.svg")


def test_of_times_the_shorter_is_the_better():
    facts = {"xlabel": "n", "x_log": False, "y_log": False, "commit": "", "date": ""}
    benchmark = schema.Benchmark(**facts, unit="ms", lines=schema.roles(STYLES))
    values = {
        "half": 9,
        "ours": 2,
        "ours again": 2,
        "F.dropout": 3,
        'plain "<b>"': 4,
        "copy": 1,
    }
    table = pd.DataFrame(values, index=[1024, 2**28])
    stand = schema.standing(table, benchmark)
    assert stand.loc[2**28].tolist() == [0.5, "copy", 1.5, "F.dropout"]
    title = "ours: 50% of the speed of “copy”, 1.50 times that of “F.dropout”"
    assert draw.message(benchmark, table) == title


def test_a_figure_of_one_kernel_alone_says_how_far_each_line_goes():
    facts = {"xlabel": "n", "x_log": False, "y_log": False, "commit": "", "date": ""}
    lines = schema.roles({"ours": STYLES["ours"], "ours again": STYLES["ours again"]})
    table = pd.DataFrame({"ours": [18, 101], "ours again": [9, 9]}, index=[1, 2])
    for unit, end in (("% of a copy", "% of a copy"), ("GB/s", " GB/s")):
        benchmark = schema.Benchmark(**facts, unit=unit, lines=lines)
        message = draw.message(benchmark, table)
        assert message == f"ours: 18 to 101, ours again: 9{end}"


def test_sizes_at_which_the_limit_is_a_launch_are_not_losses():
    facts = {"xlabel": "n", "x_log": True, "y_log": False, "commit": "", "date": ""}
    table = pd.DataFrame(
        {"ours": [1.0, 2, 3], "copy": [1.0, 49, 100]}, [2**10, 2**20, 2**28]
    )
    lines = schema.roles({"ours": STYLES["ours"], "copy": STYLES["copy"]})
    speed = schema.Benchmark(**facts, unit="GB/s", lines=lines)
    assert show.busy(speed, table) == [False, False, True]
    time = schema.Benchmark(**facts, unit="ms", lines=lines)
    assert show.busy(time, table) == [True] * 3
    del lines["copy"]
    no_limit = schema.Benchmark(**facts, unit="GB/s", lines=lines)
    assert show.busy(no_limit, table[["ours"]]) == [True] * 3


def test_the_gpu_that_comes_first_is_a_setting(recorder):
    recorder.record("lesson_a")
    recorder.record("lesson_a", gpu="Another GPU")
    results = recorder.results.parent
    first = [machine.gpu for machine in schema.machines(results)]
    assert first == ["Another GPU", "Some GPU (80GB)"]
    machines = schema.machines(results, "some-gpu-80gb-")
    assert [machine.gpu for machine in machines] == first[::-1]


@pytest.mark.parametrize(
    ("x", "text"), [(2**28, "2²⁸"), (50257, "50257"), (2**19, "524288"), (0.5, "0.5")]
)
def test_sizes_are_written_as_readers_know_them(x, text):
    assert draw.size(x) == text


def test_words_with_powers():
    assert draw.powers("columns, 2^28 elements, 2^5x") == "columns, 2²⁸ elements, 2⁵x"


RESULTS = sorted((record.ROOT / "docs/results").glob("*/machine.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_record_can_be_read(path):
    machine = schema.load(path)
    for name in machine.benchmarks:
        assert len(machine.read(name)) and len(machine.read(name, ", spread"))
    tables = {path.stem for path in path.parent.glob("*.csv")}
    assert tables == set(machine.benchmarks)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (record.ROOT / "tutorials").glob("*.py"))
)
def test_the_record_belongs_to_the_lesson_as_it_stands(name):
    """Records from before the functions' names were kept are passed over.

    A new benchmark may wait for its first record.
    """
    machines = [schema.load(path) for path in RESULTS]
    machines = [m for m in machines if any(b.function for b in m.benchmarks.values())]
    if not machines:
        pytest.skip("nothing, or only an old record")
    measured = {
        f"{name}.{benchmark.plot_name}": (function, benchmark)
        for function, benchmark in record.benchmarks(record.load(name))
    }
    for machine in machines:
        kept = {key for key, b in machine.benchmarks.items() if b.lesson == name}
        assert kept <= set(measured), f"{machine.folder}: record {name} again"
        for key in kept:
            function, benchmark = measured[key]
            entry, table = machine.benchmarks[key], machine.read(key)
            assert entry.function == function.__name__
            assert list(entry.lines) == list(benchmark.line_names), key
            assert table.index.tolist() == list(benchmark.x_vals), key
            assert entry.unit == benchmark.ylabel


@pytest.mark.parametrize(
    ("runs", "text"), [([1, 1], "a single run."), ([1, 2], "of 2 runs,")]
)
def test_a_caption_counts_the_runs_that_were_kept(monkeypatch, runs, text):
    monkeypatch.setattr(show, "pinned", lambda app: {})
    (path,) = RESULTS[:1]
    machine = schema.load(path)
    name = next(iter(machine.benchmarks))
    kept = pd.DataFrame({"run": runs})
    monkeypatch.setattr(pd, "read_csv", lambda path: kept)
    machine.read = lambda *names: pd.DataFrame({"GB/s": [1.0]})
    assert text in show.caption(None, machine, name)
