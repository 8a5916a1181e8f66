"""What all lessons have in common: their form, and that importing one does nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import course
import pytest

ROOT = Path(__file__).parent.parent
LESSONS = {path.stem: path for path in sorted((ROOT / "tutorials").glob("*.py"))}


def settings():
    text = (ROOT / "conf.py").read_text()
    return re.search(r"^course = (\{.*?^\})", text, re.MULTILINE | re.DOTALL)[1]


def described():
    conf = {"examples_dirs": "../tutorials", "gallery_dirs": "tutorials"}
    config = SimpleNamespace(course=eval(settings()), sphinx_gallery_conf=conf)
    return course.lessons(SimpleNamespace(srcdir=ROOT / "docs", config=config))


def test_the_course_names_every_lesson_once():
    named = re.findall(r'"(\w+)"', settings())
    assert sorted(name for name in named if name in LESSONS) == list(LESSONS)


@pytest.mark.parametrize("lesson", described(), ids=lambda lesson: lesson.name)
def test_a_lesson_promises_teaches_and_needs(lesson):
    docstring = LESSONS[lesson.name].read_text().split('"""')[1]
    assert 20 <= len(lesson.promise) <= 200
    assert docstring.count("\n- ") == 3 and "You will learn" in docstring
    assert lesson.needs.startswith("PyTorch")
    order = {earlier.label: earlier.number for earlier in described()}
    for label in re.findall(r":ref:`(.+?)`", lesson.needs):
        assert order[label] < lesson.number


def test_the_readme_lists_the_lessons_as_they_call_themselves():
    rows = re.findall(r"^\| \[(.+)\]\(tutorials/(\w+)\.py\) \|", README, re.MULTILINE)
    assert rows == [(lesson.title, lesson.name) for lesson in described()]


README = (ROOT / "README.md").read_text()


def test_all_lessons_start_with_the_same_lines():
    cells = set()
    for path in LESSONS.values():
        (cell,) = re.findall(
            r"^# Setting up\n.*?(?=^# %%)", path.read_text(), re.MULTILINE | re.DOTALL
        )
        cells.add(
            re.sub("^# sphinx_gallery_thumbnail_path.*\n", "", cell, flags=re.MULTILINE)
        )
    explained = {cell for cell in cells if "explains them" not in cell}
    code = {re.sub("^#.*\n", "", cell, flags=re.MULTILINE).strip() for cell in cells}
    assert len(code) == 1
    assert len(explained) == 1 and len(cells) == 2  # the first lesson explains them


IMPORT = """
import json, os, random, sys, time
import numpy, torch
os.environ.setdefault("TRITON_INTERPRET", "1")
import triton
os.environ["MPLBACKEND"] = "agg"
def state():
    return (
        torch.random.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
    )
before, start = state(), time.perf_counter()
__import__(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps([before == state(), seconds, [n for n in ("sklearn", "matplotlib.pyplot") if n in sys.modules]]))
"""


@pytest.mark.parametrize("name", LESSONS)
def test_importing_a_lesson_defines_its_functions_and_does_nothing_else(name):
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, name], cwd=ROOT / "tutorials",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = result.stdout.splitlines()  # nothing else was printed
    unchanged, seconds, imported = json.loads(line)
    assert unchanged
    assert not imported
    assert seconds < 10  # seconds on a busy machine, of which a fraction is the lesson's


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_no_longer_than_a_class_can_bear(name):
    assert len(LESSONS[name].read_text().splitlines()) <= 560  # answers included
