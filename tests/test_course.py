"""What all lessons have in common: their form, and that importing one does nothing."""

import ast
import importlib
import json
import random
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import course
import forked
import numpy
import pytest
import readme
import torch
from docutils import nodes
from docutils.core import publish_doctree

ROOT = Path(__file__).parent.parent
LESSONS = {path.stem: path for path in sorted((ROOT / "tutorials").glob("*.py"))}


SKELETON = ROOT / "tests/skeleton/squares.py"
FORMED = [*LESSONS.values(), SKELETON]  # the skeleton is a lesson as it stands


def test_the_course_names_every_lesson_once():
    named = [name for names in readme.settings().values() for name in names]
    assert len(named) == len(set(named))
    assert not LESSONS.keys() - set(named)  # some that are named may still be to come


def test_lessons_that_are_still_to_come_leave_no_gap():
    found = readme.lessons(
        {"A": ["not_yet", "operators"], "B": ["nor_this", "debugging"]}
    )
    assert [(lesson.name, lesson.part) for lesson in found[:2]] == [
        ("operators", "A"),
        ("debugging", "B"),
    ]
    assert {lesson.part for lesson in found[2:]} == {"More"}
    assert [lesson.number for lesson in found] == list(range(1, len(LESSONS) + 1))
    assert found[0].docname == "tutorials/operators"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "its docstring must begin with a label"),
        ('"""A title\n=======\n\nText."""', "its docstring must begin with a label"),
        ('""".. _a:\n\nA title\n=======\n\nNo sentence"""', "must end like a sentence"),
        ('"""\nnever ended', r"SyntaxError: .*\(lesson.py, line"),
    ],
)
def test_a_lesson_that_lacks_something_says_what(tmp_path, text, message):
    (tmp_path / "lesson.py").write_text(text)
    with pytest.raises(course.LessonError, match=message):
        course.describe(tmp_path / "lesson.py")


@pytest.mark.parametrize("path", FORMED, ids=lambda path: path.stem)
def test_a_lesson_promises_teaches_and_needs(path):
    lesson = SimpleNamespace(**course.describe(path))
    docstring = path.read_text().split('"""')[1]
    assert 20 <= len(lesson.promise) <= 200
    assert docstring.count("\n- ") == 3 and "You will learn" in docstring
    assert lesson.needs.startswith("PyTorch")
    order = {earlier.label: earlier.number for earlier in readme.lessons()}
    for label in re.findall(r":ref:`(.+?)`", lesson.needs):
        assert order[label] < order.get(lesson.label, len(order) + 1)


def test_the_readme_lists_the_lessons_as_they_call_themselves():
    (rows,) = readme.ROWS.findall(readme.README.read_text())
    assert rows == readme.rows(), "to mend it: python tests/readme.py"


def setup_cells():
    """The first cell of each lesson, without the path of its picture."""
    for path in FORMED:
        text = path.read_text()
        cell = re.search(r"^# Setting up\n.*?(?=^# %%)", text, re.MULTILINE | re.DOTALL)
        cell = cell[0] if cell else ""
        yield path, re.sub("^# sphinx_gallery_thumb.*\n", "", cell, flags=re.MULTILINE)


def test_all_lessons_start_with_the_same_lines():
    cells = dict(setup_cells())
    code = {
        path.stem: re.sub("^#.*\n", "", cell, flags=re.MULTILINE).strip()
        for path, cell in cells.items()
    }
    usual = code[SKELETON.stem]
    assert [name for name, lines in code.items() if lines != usual] == []
    # The first lesson explains them, and the others say so in the same words.
    others = [path.stem for path, cell in cells.items() if cell != cells[SKELETON]]
    assert others == ["fused_softmax"]


SLOW = ("sklearn", "matplotlib.pyplot")


def state():
    """What an import could change unseen."""
    return (
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
    )


def import_alone(path):
    """Print whether anything has changed, the seconds that it took, and what it imported."""
    for name in SLOW:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(path.parent))
    before, start = state(), time.process_time()
    importlib.import_module(path.stem)
    seconds = time.process_time() - start
    print(json.dumps([before == state(), seconds, [n for n in SLOW if n in sys.modules]]))


@pytest.mark.parametrize("path", FORMED, ids=lambda path: path.stem)
def test_importing_a_lesson_defines_its_functions_and_does_nothing_else(path, tmp_path):
    process = forked.start(tmp_path / "log", import_alone, path)
    process.join(100)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    (line,) = (tmp_path / "log").read_text().splitlines()  # nothing else was printed
    unchanged, seconds, imported = json.loads(line)
    assert unchanged
    assert not imported
    assert seconds < 5  # of the CPU, where torch and triton are imported already


@pytest.mark.parametrize("path", FORMED, ids=lambda path: path.stem)
def test_a_lesson_is_no_longer_than_a_class_can_bear(path):
    text = re.sub(r"# Repeated\n# ---.*?(?=# %%)", "", path.read_text(), flags=re.DOTALL)
    assert text.count("\n") <= 560  # answers included


@pytest.mark.parametrize("path", FORMED, ids=lambda path: path.stem)
def test_references_are_a_list_of_paragraphs_with_links(path):
    _, references = path.read_text().split("\n# References\n# ----------\n#\n")
    listed, *_ = publish_doctree(re.sub("^# ?", "", references, flags=re.MULTILINE))
    assert isinstance(listed, nodes.bullet_list)
    for item in listed:
        # An initial on the only line of an entry makes it a numbered list.
        assert isinstance(item[0], nodes.paragraph) and len(item) == 1, item.astext()
        assert list(item.findall(nodes.reference)), item.astext()


def kernels(code):
    """The kernels in a text, without their documentation and comments."""
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and "jit" in ast.unparse(
            node.decorator_list
        ):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            found[node.name] = ast.unparse(body)
    return found


def test_kernels_that_a_lesson_repeats_are_those_of_the_lesson_before():
    first = {}
    for name in ("fused_lstm", "sequence_lstm", "sequence_backward", "lstm_module"):
        text = LESSONS[name].read_text()
        repeated = re.search(r"# Repeated\n# ---.*?(?=# %%)", text, re.DOTALL)
        assert bool(repeated) == (name != "fused_lstm")
        if repeated:
            copies = kernels(repeated[0])
            assert copies == {kernel: first[kernel] for kernel in copies}
        first |= kernels(text)


def test_operators_have_names_of_their_own():
    """PyTorch takes a name that is registered again from the lesson that had it."""
    texts = [path.read_text() for path in LESSONS.values()]
    names = [n for text in texts for n in re.findall(r'custom_op\(\s*"(\S+)"', text)]
    assert len(names) > 10
    assert len(names) == len(set(names))
