"""The small functions of the extensions that serve pages."""

import json
import re
from types import SimpleNamespace

import benchmarks.show
import bibliography
import citations
import course
import figures
import findable
import glossary_links
import large_figures
import mathml
import notebooks
import pytest
from docutils import nodes
from docutils.core import publish_doctree

TITLES = {"fused softmax": ("tutorials/fused_softmax", "Fused softmax")}


@pytest.mark.parametrize(
    ("text", "base", "result"),
    [
        ("See `fused softmax`.", "", "See *Fused softmax*."),
        ("`fused softmax`", "https://a.b/", "[Fused softmax](https://a.b/tutorials/fused_softmax.html)"),
        ("`there <fused softmax>`", "", "*there*"),
        ("``fused softmax`` and `x`", "", "``fused softmax`` and `x`"),
        ("```python\nfused softmax\n```", "", "```python\nfused softmax\n```"),
    ],
)  # fmt: skip
def test_labels_in_a_notebook_become_titles(text, base, result):
    assert notebooks.linked(text, TITLES, base) == result


def test_answers_in_a_notebook_fold_and_other_notes_stay():
    box = '<div class="alert alert-info"><h4>Note</h4>\n\n{}\n</div>'
    text = box.format("Try it first.\n\n1. One.\n2. Two.") + "\n" + box.format("A note.")
    folded = notebooks.folded(text)
    assert folded.count("<details>") == folded.count("</details>") == 1
    assert "</summary>\n\n1. One.\n2. Two.\n\n</details>" in folded
    assert box.format("A note.") in folded


PAGE = """
Title
=====

.. GENERATED FROM PYTHON SOURCE LINES 1-5

.. code-block:: Python


    print("a")




.. rst-class:: sphx-glr-script-out

 .. code-block:: none

    a

      b



.. GENERATED FROM PYTHON SOURCE LINES 5-9

Prose, with code in it

.. code-block:: Python

    not_run()

.. GENERATED FROM PYTHON SOURCE LINES 9-12

.. code-block:: Python


    plt.plot(x)



.. image-sg:: /figure.svg
   :alt: copy &lt; &quot;x&quot;
   :srcset: /figure.svg
   :class: sphx-glr-single-img

"""


def test_outputs_are_taken_from_a_page(tmp_path):
    (tmp_path / "figure.svg").write_text("<svg/>")
    printed, drawn = notebooks.outputs(PAGE, tmp_path)
    assert [output["text"] for output in printed] == ["a\n\n  b\n"]
    (figure,) = drawn
    assert figure["data"]["image/svg+xml"] == "<svg/>"
    assert figure["data"]["text/plain"] == 'Figure: copy < "x"'

    code = [{"cell_type": "code", "source": s} for s in ("%pip", "print()", "plot()")]
    notebook = {"cells": [*code, {"cell_type": "markdown", "source": "# End"}]}
    run = notebooks.with_outputs(notebook, PAGE, tmp_path)
    assert "outputs" not in json.dumps(notebook)
    text = "```python\nprint()\n```\n\n```text\na\n\n  b\n```\n\n"
    text += '```python\nplot()\n```\n\n*Figure: copy < "x"*\n\n# End\n'
    assert notebooks.markdown(run) == text
    assert notebooks.with_outputs({"cells": code[:2]}, PAGE, tmp_path) is None


def test_a_picture_becomes_a_link_unless_it_is_in_one_or_decorates():
    body = '<img alt="a" src="a.svg"/><a href="b"><img alt="b" src="b.svg"></a><img alt="" src="c.svg">'
    assert large_figures.linked(body) == body.replace(
        '<img alt="a" src="a.svg"/>',
        '<a class="large" href="a.svg"><img alt="a" src="a.svg"/></a>',
    )


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("M. Milakov and N. Gimelshein, Online", (False, "Milakov")),
        ("P. Tillet, H. T. Kung and D. Cox, Triton", (False, "Tillet")),
        ("A. Vaswani et al., Attention", (False, "Vaswani")),
        ("The documentation of Triton", (True, "The documentation of Triton")),
    ],
)
def test_entries_are_sorted_by_the_first_authors_family_name(entry, name):
    assert bibliography.family_name(nodes.paragraph(text=entry)) == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("as Li, Hastie and Church showed", "Li, Hastie and Church"),
        ("once (Li et al.,\n2006).", "Li et al.,\n2006"),
        ("Li, and later Church", "Li"),
        ("a Li-Church transform; Linear; Church", None),
    ],
)
def test_citations_are_known_by_the_first_author(text, found):
    entry = nodes.paragraph(text="P. Li, T. Hastie and K. W. Church, ")
    entry += nodes.reference("", "Very sparse random projections", refuri="https://a.b")
    names = citations.authors(entry)
    assert names == ["Li", "Hastie", "Church"]
    match = citations.pattern(names).search(text)
    assert (match and match[0]) == found


def test_a_word_of_the_glossary_is_found_but_not_in_a_phrase_that_means_something_else():
    word = glossary_links.pattern(["mask", "memory-bound", "block"], ["attention mask"])
    found = [
        m["term"] for m in word.finditer("An attention\nmask, masks, BLOCKS, unmasked")
    ]
    assert found == [None, "mask", "BLOCK"]
    assert glossary_links.pattern(["mask"], []).search("attention mask")["term"] == "mask"
    assert not glossary_links.pattern(["jit"], []).search("torch.jit.script, jit.script")


@pytest.mark.parametrize(
    ("tex", "space"),
    [(r"\ln n", True), (r"\tanh c", True), (r"\ln(n)", False), (r"\tanh, a b", False)],
)
def test_a_function_keeps_a_distance_from_its_argument(tex, space):
    assert ("<mspace" in mathml.mathml(tex)) == space


def test_no_line_begins_with_the_sign_behind_a_formula():
    doctree = publish_doctree(":math:`x`. Then :math:`y` and (:math:`z`).")
    mathml.join_signs(None, doctree)
    joined = list(doctree.findall(nodes.inline))
    assert [node.astext() for node in joined] == ["x.", "z)."]
    assert doctree.astext() == "x. Then y and (z)."


def test_a_logarithmic_axis_has_plain_numbers_and_a_long_title_breaks():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    _, axis = plt.subplots()
    axis.plot([1, 2], [0.05, 2000])
    axis.set_yscale("log")
    figures.label_ends(axis)
    written = axis.yaxis.get_major_formatter()
    assert [written(y) for y in (0.1, 1, 1000)] == ["0.1", "1", "1,000"]
    figures.title(axis, "a kernel " * 20)
    assert max(map(len, axis.get_title(loc="left").splitlines())) <= 76
    plt.close("all")


def test_functions_with_a_docstring_can_be_found():
    code = 'def f():\n    """Doc."""\n\ndef g(): pass\n\nclass C:\n    """Doc."""\n\ndef _h():\n    """Doc."""'
    assert findable.public(code) == ["f", "C"]
    assert findable.public("%pip install x") == []


@pytest.mark.parametrize(
    ("heights", "result"),
    [([0.1, 0.5], [0.1, 0.5]), ([0.5, 0.5], [0.5, 0.555]), ([0.94, 1.0], [0.895, 0.95])],
)
def test_names_at_the_ends_of_lines_do_not_overlap(heights, result):
    assert figures.apart(heights) == pytest.approx(result)


@pytest.mark.parametrize(
    ("value", "text"),
    [(2899.6, "2900"), (12.34, "12.3"), (0.5, "0.500"), (float("nan"), "–")],
)
def test_numbers_have_three_digits(value, text):
    assert benchmarks.show.number(value) == text


def test_marks_in_a_table_are_no_markup():
    assert benchmarks.show.plain("x * y | `z_` < 1") == r"x \* y \| \`z\_\` < 1"


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("    benchmark.run(show_plots=True)", True),
        ("    for mark in (benchmark, other):\n        mark.run()", True),
        ("    def benchmark(n):", False),
        ("    row_benchmark.run()", False),
    ],
)
def test_the_cell_that_runs_a_benchmark_is_known(cell, found):
    assert bool(benchmarks.show.runs(cell, "benchmark")) == found
    assert not benchmarks.show.runs(cell, "")


def test_descriptions_are_whole_sentences():
    long = "One sentence. " * 30
    page = nodes.section("", nodes.title(text="T"), nodes.paragraph(text=long))
    words = findable.first_words(page)
    assert len(words) <= 200 and words.endswith("sentence.")
    assert not re.search(r"\s\s", words)


def test_the_figure_of_a_benchmark_is_signed_titled_and_its_lines_named():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    plt.close("all")
    _, axis = plt.subplots()
    sizes = [2**10, 2**20]
    axis.plot(sizes, [90, 95], label="ours (GB/s)", color="#d55e00")
    axis.plot(sizes, [45, 95], label='F.dropout, "eager" <b> (GB/s)', color="#0072b2")
    axis.plot(sizes, [100, 100], label="copy (GB/s)", color="#555555", ls="--")
    axis.set(xlabel="elements, 2^4 rows\nsome machine", ylabel="GB/s", xscale="log")
    axis.legend()
    figures.sign_lesson(None, {"example_globals": {"MACHINE": "some machine"}}, {})
    title = "ours: 90 to 95% of “copy”, 1.00 to 2.00 times “F.dropout, ‘eager’ ‹b›”"
    assert axis.get_title(loc="left") == title
    assert axis.get_xlabel() == "elements, 2⁴ rows" and axis.get_legend() is None
    assert {"ours", "copy"} < {text.get_text() for text in axis.texts}
    assert axis.xaxis.get_major_formatter()(2**20, 0) == "2²⁰"
    plt.close("all")


def test_a_lesson_s_words_lose_their_markup():
    found = [SimpleNamespace(label="fused softmax", title="Fused softmax")]
    text = (
        "As :ref:`fused softmax` and :math:`x`: ``tl.load`` of `Triton <https://a.b>`_."
    )
    plain = "As Fused softmax and x: tl.load of Triton."
    assert course.plain(text, found) == plain


def test_sizes_can_be_found_and_years_can_not():
    text = "50257 columns, 12160, in 2019; 2.71828, x1234, 1e1000 and 123."
    section = nodes.section("", nodes.title(text="T"), nodes.paragraph(text=text))
    section += nodes.section("", nodes.paragraph(text="65536"))
    assert list(findable.numbers(section)) == ["50257", "12160"]
