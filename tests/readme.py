"""The README's table of lessons, as the lessons describe themselves: run this to write it."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ROWS = re.compile(r"(?:^\| \[.+\]\(tutorials/.*\n)+", re.MULTILINE)
sys.path.append(str(ROOT / "docs/_ext"))

import course  # noqa: E402


def settings():
    """What ``conf.py`` assigns to ``course``."""
    tree = ast.parse((ROOT / "conf.py").read_text())
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "course"
    ]
    return ast.literal_eval(value)


def lessons(order=None):
    """The lessons, as the pages describe them."""
    config = SimpleNamespace(
        course=settings() if order is None else order,
        sphinx_gallery_conf={
            "examples_dirs": "../tutorials",
            "gallery_dirs": "tutorials",
        },
        only_lesson="",
    )
    return course.lessons(SimpleNamespace(srcdir=ROOT / "docs", config=config))


def markdown(rst):
    """Literals have one backtick there, and a reference is only its name."""
    return re.sub(r":\w+:`(.+?)`", r"\1", rst).replace("``", "`")


def rows():
    return "".join(
        f"| [{lesson.title}](tutorials/{lesson.name}.py) | {markdown(lesson.promise)} |\n"
        for lesson in lessons()
    )


if __name__ == "__main__":
    text = rows()
    README.write_text(ROWS.sub(lambda _: text, README.read_text(), count=1))
