"""Small functions of the extensions, alone: what they make of a document, a site or a setting."""

import pkgutil
from pathlib import Path
from types import SimpleNamespace

import benchmarks.show
import build
import course
import lesson_runs
import made_below
import mathml
import packages
import pytest
import related
import triton
import triton.language as tl
import triton_functions
from docutils import nodes
from docutils.utils import new_document
from lesson_runs import costs, provenance
from sphinx import addnodes

INVENTORIES = Path(__file__).parent.parent / "docs/inventories"


def app(folder, **settings):
    conf = {"examples_dirs": "lessons", "gallery_dirs": "pages"}
    defaults = {"course": {}, "only_lesson": "", "sphinx_gallery_conf": conf}
    config = SimpleNamespace(**defaults | settings)
    return SimpleNamespace(srcdir=str(folder), confdir=str(folder), config=config)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "lessons").mkdir()
    (tmp_path / "pages").mkdir()
    for name in ("one", "two", "three"):
        text = f'""".. _the {name}:\n\nLesson {name}\n==========\n\nIt is {name}. And more.\n"""\n'
        (tmp_path / f"lessons/{name}.py").write_text(text)
    return tmp_path


def test_lessons_are_described_once_and_in_the_order_of_the_settings(folder, monkeypatch):
    here = app(folder, course={"A": ["two"], "B": ["one"]})
    found = course.lessons(here)
    assert [(lesson.number, lesson.name, lesson.part) for lesson in found] == [
        (1, "two", "A"),
        (2, "one", "B"),
        (3, "three", "More"),
    ]
    assert found[0].docname == "pages/two" and found[0].promise == "It is two."
    monkeypatch.setattr(course, "describe", None)
    assert course.lessons(here) is found


def test_one_lesson_alone_keeps_its_number(folder):
    here = app(folder, course={"A": ["two", "one"]}, only_lesson="one")
    (lesson,) = course.lessons(here)
    assert (lesson.name, lesson.number) == ("one", 2)
    assert len(course.scripts(here, every=True)) == 3


def section(title, *content):
    result = nodes.section("", nodes.title(text=title), ids=[title])
    result += content
    return result


def mention(label):
    link = addnodes.pending_xref("", nodes.inline(text=label), reftarget=label)
    return nodes.paragraph("", "", link)


def document(content):
    result = new_document("page")
    result += content
    return result


def test_the_lessons_that_are_mentioned_most_are_named_below():
    names = ("a", "b", "c", "d", "e")
    found = [SimpleNamespace(label=f"the {n}", docname=n) for n in names]
    links = [mention(f"the {n}") for n in "bdeedcb"] + [mention("elsewhere")]
    top = [mention("the d")] * 3  # what a lesson needs is named at its top anyway
    text = document([section("A", *top, section("Below", *links))])
    env = SimpleNamespace(get_doctree=lambda docname: text)
    assert related.mentions(text, {"the e": "e", "the d": "d"}) == {"e": 2, "d": 2}
    # b stands beside a; c is mentioned less often than d and e.
    assert related.helpful(env, found, "a") == ["d", "e"]
    assert related.helpful(env, found, "d") == ["b"]


def test_powers_are_raised_in_prose_and_left_in_code():
    text = document([nodes.paragraph(text="2^28 of 2^-3"), nodes.literal(text="2^28")])
    mathml.raise_powers(None, text)
    assert [part.astext() for part in text] == ["2²⁸ of 2⁻³", "2^28"]


@pytest.mark.parametrize(("docname", "last"), [("index", True), ("lesson", False)])
def test_what_ran_a_page_is_small_print(docname, last):
    note = nodes.note("", nodes.paragraph(text="Run on a GPU."))
    text = document([section("Title", note, nodes.paragraph(text="Prose."))])
    env, config = SimpleNamespace(docname=docname), SimpleNamespace(root_doc="index")
    made_below.move(SimpleNamespace(env=env, config=config), text)
    small = text[0][-1 if last else 1]
    assert small["classes"] == ["made"] and small.astext() == "Run on a GPU."
    assert not list(text.findall(nodes.note))


@triton.jit
def plus(x, y: tl.constexpr = 3):
    """Add."""
    return x + y


def test_a_triton_function_has_the_signature_of_its_python_function():
    described = triton_functions.signature(*[None] * 3, plus, *[None] * 3)
    assert described == ("(x, y=3)", None)
    lines = ["wrapped"]
    triton_functions.docstring(*[None] * 3, plus, None, lines)
    assert lines == ["Add.", ""]
    assert triton_functions.signature(*[None] * 3, len, *[None] * 3) is None


def test_what_a_site_lacks_is_named(tmp_path, monkeypatch):
    for name in ("docs/a.md", "docs/_b.md", "tutorials/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    site = tmp_path / "site"
    kinds = ("py", "ipynb", "zip")
    whole = ["searchindex.js", "objects.inv", "a.html", "tutorials/c.html"]
    whole += [f"_downloads/0/c.{kind}" for kind in kinds]
    for name in whole:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).touch()
    assert build.lacking(site) == []
    for name in whole:
        (site / name).unlink()
        assert len(build.lacking(site)) == 1, name
        (site / name).touch()


def test_a_notebook_installs_what_the_lessons_import():
    config = SimpleNamespace(sphinx_gallery_conf={})
    lesson_runs.install_first(None, config)
    cell = config.sphinx_gallery_conf["first_notebook_cell"]
    assert cell.startswith("%pip install --quiet torch==") and "triton==" in cell
    assert "sphinx" not in cell and "pytest" not in cell


def test_packages_are_pinned_in_blocks():
    lessons, site, tests = (packages.pinned(i) for i in range(3))
    assert packages.pinned(0, 1) == lessons + site
    assert any(package.startswith("sphinx==") for package in site)
    assert any(package.startswith("pytest==") for package in tests)


def test_what_a_lesson_that_is_gone_has_left_is_removed(folder):
    for name in ("one.rst", "gone.rst", "gone.ipynb", "index.rst"):
        (folder / "pages" / name).touch()
    lesson_runs.remove_old(app(folder))
    assert sorted(path.name for path in (folder / "pages").iterdir()) == [
        "index.rst",
        "one.rst",
    ]


def test_why_outputs_cannot_be_shown(folder):
    script = folder / "lessons/one.py"
    says = "its outputs are not of the script as it stands"
    assert lesson_runs.not_running(script) == says
    script.write_text("x = 1")
    assert "its docstring must begin with a label" in lesson_runs.not_running(script)


def test_a_digest_changes_with_every_file_and_the_text(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    calls = [((a,), ""), ((b,), ""), ((a, b), ""), ((a, b), "x")]
    assert len({provenance.digest(*paths, text=text) for paths, text in calls}) == 4
    assert provenance.digest(a) == provenance.digest(a)


def test_the_peak_of_memory_is_not_called_an_estimate():
    source = ["**Estimated memory usage:**  30 MB"]
    costs.name_the_memory(None, "page", source)
    assert source == ["**Peak memory on the GPU:**  30 MB"]


def test_a_recorded_version_that_one_would_not_get_today_is_named(folder):
    (folder / "requirements.txt").write_text("torch==2.13.0\ntriton==3.7.1\n\nnumpy==2\n")
    here = app(folder)
    assert benchmarks.show.pinned(here) == {"torch": "2.13.0", "triton": "3.7.1"}
    same = SimpleNamespace(torch="2.13.0+cu130", triton="3.7.1")
    assert benchmarks.show.elsewhere(here, same) == ""
    old = SimpleNamespace(torch="2.11.0+cu130", triton="3.7.1")
    says = "The requirements name torch 2.13.0 today. "
    assert benchmarks.show.elsewhere(here, old) == says


@pytest.mark.parametrize("path", sorted(INVENTORIES.glob("*.inv")), ids=lambda p: p.stem)
def test_names_of_an_inventory_exist(path):
    head, _, _, *lines = path.read_text().splitlines()
    assert head == "# Sphinx inventory version 1" and lines == sorted(set(lines))
    for line in lines:
        name, kind, page = line.split()
        found = pkgutil.resolve_name(name)
        assert callable(found) and kind in ("class", "function", "method"), name
        assert page.endswith(".html")


def test_the_page_of_benchmarks_has_a_section_for_each():
    lesson = SimpleNamespace(title="Fused softmax", docname="tutorials/fused_softmax")
    found = {
        "a.b": SimpleNamespace(title="softmax", dtype="float32"),
        "a.c": SimpleNamespace(title="rows", dtype=""),
    }
    text = benchmarks.show.sections(lesson, found)
    assert text.count("```{eval-rst}\n.. recorded:: a.") == text.count("\n```\n") == 2
    assert "(benchmark-a.b)=\n### softmax, float32\n" in text
    assert "### rows\n" in text and "{doc}`/tutorials/fused_softmax`" in text
