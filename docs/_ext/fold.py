"""Fold notes that begin with "Try it first", so that nobody reads a solution by accident."""

from docutils import nodes

SUMMARY = "Try it first"


def fold(app, doctree):
    for note in list(doctree.findall(nodes.note)):
        if note.astext().startswith(SUMMARY):
            opening = nodes.raw(
                "", f"<details><summary>{SUMMARY}</summary>", format="html"
            )
            closing = nodes.raw("", "</details>", format="html")
            note.replace_self([opening, *note.children, closing])


def setup(app):
    app.connect("doctree-read", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
