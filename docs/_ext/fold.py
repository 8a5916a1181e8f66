"""Fold what a reader opens when they want it: answers to exercises, benchmarks, public functions,
and what a lesson repeats from earlier ones.

Answers are notes whose first paragraph is "Try it first.". Nobody meets a solution unawares.
"""

import re

from docutils import nodes

SHORT = 12  # lines of code that nobody minds


def details(summary, content):
    opening = f"<details><summary>{summary}</summary>"
    closing = nodes.raw("", "</details>", format="html")
    return [nodes.raw("", opening, format="html"), *content, closing]


def inside(text):
    """What a public function's code holds beside the function."""
    marks = {
        "checks of the arguments": "raise ",
        "documentation": '"""',
        "the gradient": "autograd.Function",
        "registration": "torch.library",
    }
    found = [what for what, mark in marks.items() if mark in text]
    return ", ".join(found) or "the functions"


def fold(app, doctree):
    for note in list(doctree.findall(nodes.note)):
        first, *rest = note.children
        if first.astext() == "Try it first.":
            note.replace_self(details("Try it first. The answers are in here.", rest))
    for code in list(doctree.findall(nodes.literal_block)):
        section, text = code.parent, code.astext()
        length, defines = len(text.splitlines()), re.search("^(def|class) ", text, re.M)
        if code.get("language") != "Python" or not isinstance(section, nodes.section):
            continue
        if "@triton.testing.perf_report" in text:
            what = "the benchmark"
        elif section[0].astext() == "Repeated":
            what = "repeated from earlier lessons"
        elif section[0].astext() == "As a public function" and defines and length > SHORT:
            what = inside(text)
        else:
            continue
        copy = code.deepcopy()
        code.replace_self(details(f"{length} lines of code: {what}", [copy]))


def setup(app):
    app.connect("doctree-read", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
