"""Fold notes whose first paragraph is "Try it first.", so that nobody meets a solution unawares."""

from docutils import nodes


def fold(app, doctree):
    for note in list(doctree.findall(nodes.note)):
        first, *rest = note.children
        if first.astext() == "Try it first.":
            opening = f"<details><summary>{first.astext()}</summary>"
            opening = nodes.raw("", opening, format="html")
            closing = nodes.raw("", "</details>", format="html")
            note.replace_self([opening, *rest, closing])


def setup(app):
    app.connect("doctree-read", fold)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
