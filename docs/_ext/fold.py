"""Fold what a reader opens when they want it: answers to exercises, benchmarks, public functions.

Answers are notes whose first paragraph is "Try it first.". Nobody meets a solution unawares.
"""

from docutils import nodes


def details(summary, content):
    opening = f"<details><summary>{summary}</summary>"
    closing = nodes.raw("", "</details>", format="html")
    return [nodes.raw("", opening, format="html"), *content, closing]


def fold(app, doctree):
    for note in list(doctree.findall(nodes.note)):
        first, *rest = note.children
        if first.astext() == "Try it first.":
            note.replace_self(details("Try it first. The answers are in here.", rest))
    for code in list(doctree.findall(nodes.literal_block)):
        section, length = code.parent, len(code.astext().splitlines())
        if code.get("language") != "Python" or not isinstance(section, nodes.section):
            continue
        if section[0].astext() == "As a public function":
            what = "checks of the arguments, documentation and registration"
        elif "@triton.testing.perf_report" in code.astext():
            what = "the benchmark"
        else:
            continue
        copy = code.deepcopy()
        code.replace_self(details(f"{length} lines of code: {what}", [copy]))


def setup(app):
    app.connect("doctree-read", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
