"""The course: its lessons in reading order, by parts, with their minutes and what they need.

The setting ``course`` has the order. What is said of a lesson comes from its docstring: a label, a
title, a paragraph whose first sentence is shown alone, and a last paragraph ``Needs: ...``. A
lesson that no part names comes last, and a name that has no lesson yet is passed over. The
directive ``course`` lists the lessons.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

WORDS_A_MINUTE, LINES_A_MINUTE = 180, 15


class LessonError(ValueError):
    """What a lesson lacks. The message is for the one who writes it."""


@dataclass(frozen=True)
class Lesson:
    name: str
    docname: str
    part: str
    number: int
    label: str
    title: str
    promise: str
    needs: str
    picture: str


def describe(path):
    """What a lesson says of itself: label, title, promise, needs and picture."""
    if not path.stem.isidentifier():
        raise LessonError("its name is none that Python can import")
    try:
        script = path.read_text(encoding="utf-8")
        text = ast.get_docstring(ast.parse(script, path.name))
    except UnicodeDecodeError as error:
        raise LessonError(f"it is not UTF-8: {error}") from None
    except SyntaxError as error:
        raise LessonError(f"SyntaxError: {error}") from None
    found = re.match(r"\.\. _(.+):\n\n(.+)\n=+\n\n((?s:.+))", text or "")
    if not found:
        raise LessonError(
            "its docstring must begin with a label (.. _name:), an empty line, a title underlined "
            "with =, an empty line and a paragraph"
        )
    label, title, body = found.groups()
    promise = re.match(r".+?[.?!](?=\s|$)", " ".join(body.split("\n\n")[0].split()))
    if not promise:
        raise LessonError("the first paragraph of its docstring must end like a sentence")
    needs = re.search(r"^Needs: (.+)\Z", body, re.MULTILINE | re.DOTALL)
    picture = re.search(r"sphinx_gallery_thumbnail_path = '(.+)'", script)
    return {
        "label": label,
        "title": title,
        "promise": promise[0],
        "needs": " ".join(needs[1].split()) if needs else "",
        "picture": picture[1] if picture else "",
    }


def order(app, every=False):
    """The lessons' scripts in reading order, each with its number and its part."""
    folder = Path(app.srcdir) / app.config.sphinx_gallery_conf["examples_dirs"]
    there = {path.stem: path for path in sorted(folder.glob("*.py"))}
    wanted = app.config.only_lesson
    if wanted and wanted not in there:
        raise ExtensionError(f"No such lesson: {wanted}. There are: {', '.join(there)}")
    named = [(n, part) for part, names in app.config.course.items() for n in names]
    missing = there.keys() - {name for name, _ in named}
    found = [(name, part) for name, part in named if name in there]
    found += [(name, "More") for name in there if name in missing]
    return [
        (there[name], number, part)
        for number, (name, part) in enumerate(found, 1)
        if every or wanted in ("", name)
    ]


def scripts(app, every=False):
    """The lessons' scripts, in reading order."""
    return [script for script, _, _ in order(app, every)]


def lessons(app):
    """All lessons, in reading order. They are described once a build: it parses their scripts."""
    if not hasattr(app, "described_lessons"):
        folder = app.config.sphinx_gallery_conf["gallery_dirs"]
        app.described_lessons = [
            Lesson(
                script.stem, f"{folder}/{script.stem}", part, number, **describe(script)
            )
            for script, number, part in order(app)
        ]
    return app.described_lessons


def plain(text, found):
    """A lesson's words without markup: labels of lessons become their titles."""
    titles = {lesson.label: lesson.title for lesson in found}
    text = re.sub(r":ref:`([^`<>]+)`", lambda label: titles.get(label[1], label[1]), text)
    text = re.sub(r":\w+:`([^`<]+?)(?: <[^`]*>)?`|`([^`<]+?) <[^`]*>`__?", r"\1\2", text)
    return re.sub(r"``([^`]+)``|`([^`]+)`", r"\1\2", text)


def minutes(app, lesson):
    """How long the page takes to read: its prose, its code and what the code printed.

    What is folded and need not be read doesn't count: answers, recorded benchmarks, and code that is
    repeated from earlier lessons.
    """
    page = (Path(app.srcdir) / f"{lesson.docname}.rst").read_text(encoding="utf-8")
    page = page.partition("\n.. rst-class:: sphx-glr-timing")[0]
    page = re.sub(
        r"^\.\. note::\n +Try it first\..*?(?=^\S)", "", page,
        flags=re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    top, *blocks = page.split(".. GENERATED FROM PYTHON SOURCE LINES")
    words = lines = 0
    repeated = False
    for block in [top.partition("\n===")[2], *blocks]:
        # Directives and their options, such as the description of a picture, are not read.
        read = re.sub(r"^ *(\.\.|:[\w-]+:)( .*)?$", "", block, flags=re.MULTILINE)
        if "\n.. code-block:: Python\n" not in block:
            words += len(re.findall(r"\S*\w\S*", read))
            repeated = "\nRepeated\n---" in block
        elif not repeated and "@triton.testing.perf_report" not in block:
            lines += len(re.findall(r"^ +\S", read, re.MULTILINE))
    return round(words / WORDS_A_MINUTE + lines / LINES_A_MINUTE)


def card(app, lesson, titles):
    # A card is a link as a whole, and can hold no other.
    def title(label):
        return f"*{titles.get(label[1], label[1])}*"

    needs = re.sub(":ref:`(.+?)`", title, lesson.needs)
    picture = (
        f"   :img-top: /{lesson.picture.lstrip('/')}\n   :img-alt:\n"
        if lesson.picture
        else ""
    )
    return (
        f".. grid-item-card:: {lesson.number}. {lesson.title}\n"
        f"   :link: /{lesson.docname}\n   :link-type: doc\n{picture}\n"
        f"   {lesson.promise}\n\n"
        f"   .. card-footer::\n\n"
        f"      {minutes(app, lesson)} minutes. Needs: {needs}\n"
    )


class Course(SphinxDirective):
    """The lessons, part by part: cards, and the toctree."""

    option_spec = {"toctree": lambda _: True}

    def run(self):
        app, text = self.env.app, ""
        found, level = lessons(app), 2 if "toctree" in self.options else 3
        titles = {lesson.label: lesson.title for lesson in found}
        for part in dict.fromkeys(lesson.part for lesson in found):
            chosen = [lesson for lesson in found if lesson.part == part]
            cards = "\n".join(card(app, lesson, titles) for lesson in chosen)
            text += f".. rubric:: {part}\n   :heading-level: {level}\n\n"
            text += f".. grid:: 1 1 2 3\n   :gutter: 3\n\n{indent(cards, '   ')}\n\n"
            if "toctree" in self.options:
                names = "\n".join(f"   /{lesson.docname}" for lesson in chosen)
                text += f".. toctree::\n   :hidden:\n   :caption: {part}\n\n{names}\n\n"
        return self.parse_text_to_nodes(text)


def say_what_it_takes(app, doctree):
    """Below a lesson's title: its place in the course, its minutes, what it needs."""
    found = {lesson.docname: lesson for lesson in lessons(app)}
    lesson = found.get(app.env.docname)
    if lesson:
        text = (
            f"{lesson.part} · lesson {lesson.number} of {len(found)}"
            f" · {minutes(app, lesson)} minutes"
        )
        title = next(doctree.findall(nodes.title))
        title.parent.insert(1, nodes.paragraph(text=text, classes=["course"]))


def setup(app):
    app.add_config_value("course", {}, "env", dict)
    app.add_config_value("only_lesson", "", "env", str)  # of which alone the page is made
    app.add_directive("course", Course)
    # After lesson_runs has said what ran the page: this stands above it.
    app.connect("doctree-read", say_what_it_takes, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
