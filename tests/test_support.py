"""The records of versions and GPUs: how they are made, and the tables that show them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matrix
import pytest
import target_calls
from sphinx.testing.util import SphinxTestApp

ROOT = Path(__file__).parent.parent
LESSONS = sorted(path.stem for path in (ROOT / "tutorials").glob("*.py"))


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """``make matrix`` with nothing to install, whose tests do as the function given says."""
    monkeypatch.setattr(matrix, "RECORD", tmp_path / "versions.json")
    monkeypatch.setattr(matrix, "LESSONS", ["first", "second", "solutions"])
    monkeypatch.setattr(matrix, "VERSIONS", {"3.6.0": [], "3.9.0": []})
    monkeypatch.setattr(matrix, "install", lambda triton, others: tmp_path / triton)
    monkeypatch.setattr(
        matrix,
        "versions_in",
        lambda folder: {"torch": "2.13", "python": "3.11", "triton": folder.name},
    )
    monkeypatch.setattr(matrix, "state", lambda lesson: "unchanged")

    def run(run_tests, *arguments):
        monkeypatch.setattr(
            matrix, "run_tests", lambda folder, lesson: run_tests(folder.name, lesson)
        )
        monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
        with pytest.raises(SystemExit) as end:
            matrix.main()
        return end.value.code, json.loads(matrix.RECORD.read_text())

    return run


def passes(triton, lesson):
    return {"passed": 3, "skipped": 0, "failed": []}


def test_an_interrupted_matrix_goes_on(scripted):
    done = []

    def stops(triton, lesson):
        done.append((triton, lesson))
        if len(done) == 3:
            raise KeyboardInterrupt
        return passes(triton, lesson)

    with pytest.raises(KeyboardInterrupt):
        scripted(stops)
    code, record = scripted(stops)
    # Two were done, the third one is run again.
    every = [(t, name) for t in ("3.6.0", "3.9.0") for name in matrix.LESSONS]
    assert done == [*every[:3], *every[2:]]
    assert not code and {len(row["lessons"]) for row in record.values()} == {3}


def test_what_failed_or_changed_is_run_again(scripted, monkeypatch):
    def fails(triton, lesson):
        return {"passed": 2, "skipped": 0, "failed": ["test_it"] * (lesson == "second")}

    done = []

    def again(triton, lesson):
        done.append(lesson)
        return passes(triton, lesson)

    assert scripted(fails, "3.9.0")[0] == 1
    code, record = scripted(again, "3.9.0")
    assert not code and done == ["second"]
    assert list(record) == ["3.9.0"]
    monkeypatch.setattr(matrix, "state", lambda lesson: f"{lesson == 'first'}")
    scripted(again, "3.9.0", "first", "solutions")
    assert done == ["second", "first", "solutions"]


def test_a_lesson_that_does_not_exist_is_a_sentence(scripted, monkeypatch, tmp_path):
    (tmp_path / "versions.json").write_text("{}")
    message, _ = scripted(passes, "3.9.0", "mistyped")
    assert message == "there is no lesson mistyped, only first, second, solutions"


def test_outcome_of_a_run(tmp_path):
    tests = "import pytest\n\ndef test_a(): pass\ndef test_b(): assert False\n"
    tests += "def test_c(): pytest.skip()\n@pytest.fixture\ndef bad(): raise ValueError\n"
    (tmp_path / "test_few.py").write_text(tests + "def test_d(bad): pass\n")
    (tmp_path / "test_none.py").write_text("raise ImportError\n")
    for name in ("few", "none"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--rootdir=."]
        command += [f"test_{name}.py", f"--junitxml={name}.xml"]
        subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = matrix.outcome(tmp_path / "few.xml")
    assert found == {"passed": 1, "skipped": 1, "failed": ["test_b", "test_d"]}
    assert matrix.outcome(tmp_path / "none.xml")["failed"]
    assert matrix.outcome(tmp_path / "absent.xml")["failed"]


def test_a_lesson_is_run_again_when_its_code_or_its_tests_change(tmp_path, monkeypatch):
    for name in ("tutorials/first.py", "tests/conftest.py", "tests/test_first.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    states = {matrix.state("first")}
    for name in ("tutorials/first.py", "tests/test_first.py"):
        (tmp_path / name).write_text("pass")
        states.add(matrix.state("first"))
        (tmp_path / name).write_text('"""Prose."""\n\npass  # more prose')
        states.add(matrix.state("first"))
    assert len(states) == 3


def test_there_are_calls_for_every_lesson():
    assert set(LESSONS) <= set(target_calls.CALLS)


def compiled(lesson, *targets):
    """Compiled in a process of its own: here Triton interprets."""
    code = "import json, sys, targets as t; print(json.dumps(t.compile_all(sys.argv[1:2], sys.argv[2:])))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "tests")}
    output = subprocess.check_output(
        [sys.executable, "-c", code, lesson, *targets], text=True, env=environment
    )
    return json.loads(output.splitlines()[-1])[lesson]


@pytest.mark.parametrize(
    ("lesson", "kernel"),
    [("operators", "seeded_dropout4x_kernel"), ("block_dropout", "block_dropout_kernel")],
)
def test_kernels_compile_for_gpus_that_are_not_here(lesson, kernel):
    found = compiled(lesson, "sm_90", "gfx942")
    assert list(found) == [kernel]
    for use in found[kernel].values():
        assert use["problem"] is None
        assert 8 <= use["registers"] <= 255 and use["spilled"] == 0


def test_settings_that_a_gpu_can_not_launch_are_noticed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = """
import json, targets, types
def kernel(num_warps, shared):
    return types.SimpleNamespace(metadata=types.SimpleNamespace(num_warps=num_warps, shared=shared))
cases = [(32, 0, "sm_90"), (32, 0, "gfx942"), (4, 120_000, "sm_90"), (4, 120_000, "sm_120")]
print(json.dumps([targets.problem(kernel(w, s), gpu) for w, s, gpu in cases]))
"""
    output = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT / "tests", text=True
    )
    right, threads, fits, shared = json.loads(output)
    assert right is fits is None
    assert threads.startswith("2048 threads") and shared.startswith("117 KiB")


VERSIONS = {
    "3.9.0": {
        "torch": "2.13.0",
        "python": "3.11.7",
        "lessons": {
            "one": {"passed": 5, "skipped": 1, "failed": [], "date": "2026-11-25"},
            "two": {
                "passed": 4,
                "skipped": 0,
                "failed": ["test_x"],
                "date": "2026-11-26",
            },
            "solutions": {"passed": 1, "skipped": 0, "failed": [], "date": "2026-11-24"},
        },
    }
}
USE = {"registers": 40, "spilled": 0, "problem": None}
TARGETS = {
    "triton": "3.7.1",
    "date": "2026-11-25",
    "lessons": {
        "one": {"a_kernel": {"sm_90": USE, "gfx942": USE | {"problem": "2048 threads"}}},
        "two": {"a_kernel": {"sm_90": USE | {"registers": 50, "spilled": 8}}},
    },
}


@pytest.fixture
def page(tmp_path):
    """The text of a page with both tables, made from the records given."""

    def build(**records):
        (tmp_path / "results").mkdir(exist_ok=True)
        for name, record in records.items():
            (tmp_path / f"results/{name}.json").write_text(json.dumps(record))
        (tmp_path / "conf.py").write_text("extensions = ['support']\n")
        (tmp_path / "index.rst").write_text(
            "Page\n====\n\n.. versions::\n\n.. targets::\n"
        )
        app = SphinxTestApp("text", tmp_path, freshenv=True)
        app.build()
        warnings = app.warning.getvalue()
        app.cleanup()
        assert not warnings
        return (tmp_path / "_build/text/index.txt").read_text()

    return build


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_versions(page):
    header, row = cells(page(versions=VERSIONS))
    assert header == ["Triton", "lessons", "tests passed", "failed", "date"]
    assert row[0] == "3.9.0, beside PyTorch 2.13.0, Python 3.11.7"
    assert row[1:] == ["2", "10", "1 (two)", "2026-11-26"]


def test_the_table_of_gpus(page):
    text = page(targets=TARGETS)
    header, row = cells(text)
    assert header == ["registers", "sm_90", "gfx942"]
    assert row == ['"a_kernel"', "50 *", "no"]
    assert 'one, "a_kernel" on gfx942: 2048 threads.' in text
    assert "Compiled by Triton 3.7.1 on 2026-11-25." in text


def test_there_is_no_table_without_a_record(page):
    assert page() == "Page\n****\n"


def test_what_is_on_record_passed():
    for name in ("versions", "targets"):
        path = ROOT / f"docs/results/{name}.json"
        if not path.exists():
            pytest.skip("nothing is on record")
    versions = json.loads((ROOT / "docs/results/versions.json").read_text())
    assert list(versions) == list(matrix.VERSIONS)
    assert not [
        f for v in versions.values() for t in v["lessons"].values() for f in t["failed"]
    ]
