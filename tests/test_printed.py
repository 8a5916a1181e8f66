"""What the lessons print of their measurements on a GPU, tried with numbers that are made up."""

import ast
import importlib
from pathlib import Path
from unittest.mock import MagicMock

import pandas
import pytest
import tabulate
import triton

ROOT = Path(__file__).parent.parent
LESSONS = sorted(path.stem for path in (ROOT / "tutorials").glob("*.py"))


class Measured:
    """In place of what ``perf_report`` gives."""

    def __init__(self, mark):
        self.benchmarks = mark.benchmarks

    def run(self, **options):
        marks = self.benchmarks
        tables = [
            self.table(mark) for mark in (marks if isinstance(marks, list) else [marks])
        ]
        return tables if isinstance(marks, list) else tables[0]

    def fn(self, *arguments):
        return 1.5

    @staticmethod
    def table(mark):
        columns = {mark.x_names[0]: [float(x) for x in mark.x_vals]}
        for i, name in enumerate(mark.line_names):
            columns[f"{name} ({mark.ylabel})"] = [2345.678 - i] * len(mark.x_vals)
        return pandas.DataFrame(columns)


def cells_with_measurements(name):
    """The code that only runs where there is a GPU, if it runs a benchmark."""
    module = ast.parse((ROOT / f"tutorials/{name}.py").read_text())
    for node in ast.walk(module):
        on_gpu = isinstance(node, ast.If) and "not INTERPRET" in ast.unparse(node.test)
        if on_gpu and ".run(show_plots=" in ast.unparse(node):
            yield compile(ast.Module(node.body, []), f"{name}.py", "exec")


@pytest.mark.parametrize("name", LESSONS)
def test_tables_of_a_gpu_fit_the_page(name, monkeypatch, capsys):
    cells = list(cells_with_measurements(name))
    if not cells:
        pytest.skip("it runs no benchmark")
    lesson = importlib.import_module(name)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **options: 1.5)
    kernel = MagicMock()
    kernel.__getitem__.return_value.return_value.n_spills = 0  # of a launch
    names = {**vars(lesson), "tabulate": tabulate.tabulate, "INTERPRET": False}
    names["microseconds"] = lambda *arguments: 1.5  # of the CPU, in one lesson
    for key, value in names.items():
        if isinstance(value, triton.runtime.KernelInterface):
            names[key] = kernel
        if isinstance(value, triton.testing.Mark):
            names[key] = Measured(value)
    for cell in cells:
        exec(cell, names)
    lines = capsys.readouterr().out.splitlines()
    assert lines and max(map(len, lines)) <= 95
