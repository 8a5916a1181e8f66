"""What a search leads to first, and what a page says of itself to those who link to it.

The names of a lesson's public functions, its label, sizes that it names and the recorded benchmarks
become entries of the index, which a search shows before the places where a word merely occurs. Each
page gets a description: a lesson's promise, or its first paragraph.
"""

import ast
import html
import re

from course import lessons, plain
from docutils import nodes
from sphinx import addnodes


def public(code):
    """The functions and classes with a docstring that a cell of code defines, and does not hide."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a cell may have what only a notebook understands
        return []
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node)
    ]


def index(section, names, main=""):
    """Let these names lead to a section."""
    entries = [("single", name, section["ids"][0], main, None) for name in names]
    if entries:
        section.insert(1, addnodes.index(entries=entries))


def numbers(section):
    """Sizes that the text of a section names. A search passes over words that are numbers."""
    text = " ".join(
        part.astext() for part in section.children if not isinstance(part, nodes.section)
    )
    return dict.fromkeys(
        re.findall(r"(?<![\w.])(?!(?:19|20)\d\d\b)\d{4,7}(?![\w.]\d)\b", text)
    )


def add_names(app, doctree):
    here = app.env.docname
    for lesson in lessons(app):
        if lesson.docname == here:
            index(next(doctree.findall(nodes.section)), [lesson.label], "main")
            for section in list(doctree.findall(nodes.section)):
                code = [b for b in section.children if isinstance(b, nodes.literal_block)]
                names = [name for block in code for name in public(block.astext())]
                late = section[0].astext() == "As a public function"
                index(section, dict.fromkeys(names), "main" if late else "")
                if section[0].astext() != "References":
                    index(section, numbers(section))
    if here == "benchmarks":
        for section in list(doctree.findall(nodes.section)):
            title = section[0].astext()
            if ", " in title and any("benchmark-" in name for name in section["ids"]):
                index(section, [title.replace(",", "")], "main")
    for signature in list(doctree.findall(addnodes.desc_signature)):
        if signature.get("module") == "triton.language":
            name = f"tl.{signature['fullname']}"
            entry = ("single", name, signature["ids"][0], "main", None)
            signature.parent.insert(0, addnodes.index(entries=[entry]))


def first_words(doctree, most=200):
    for paragraph in doctree.findall(nodes.paragraph):
        in_prose = isinstance(paragraph.parent, nodes.section)
        if in_prose and not paragraph["classes"]:
            text = " ".join(paragraph.astext().split())
            while len(text) > most and re.search(r"[.?!] ", text):
                text = re.match(r"(.*[.?!]) ", text)[1]
            return text
    return ""


def describe(app, doctree):
    found = lessons(app)
    promises = {lesson.docname: plain(lesson.promise, found) for lesson in found}
    text = promises.get(app.env.docname) or first_words(doctree)
    # Under this name also the cards of social media take it.
    app.env.metadata[app.env.docname]["og:description"] = html.escape(text)


def write_description(app, pagename, templatename, context, doctree):
    if text := app.env.metadata.get(pagename, {}).get("og:description"):
        context["metatags"] = (
            context.get("metatags", "")
            + f'<meta name="description" content="{text}" />\n'
        )


def setup(app):
    app.connect("doctree-read", add_names, priority=400)  # before code is folded
    app.connect("doctree-read", describe, priority=900)
    # Before sphinxext.opengraph, which else finds words of its own.
    app.connect("html-page-context", write_description, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
