"""Say which packages an environment of the reader's own lacks: ``make VENV=``.

With arguments those are looked for, else what the lessons and the site need.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"


def pinned(*blocks):
    """The packages of these blocks, with their versions: the lessons', the site's, the tests'."""
    text = REQUIREMENTS.read_text().split("\n\n")
    return re.findall(r"^[\w-]+==\S+", "\n".join(text[i] for i in blocks), re.MULTILINE)


def missing(packages):
    for package in packages:
        try:
            version(package.partition("==")[0])
        except PackageNotFoundError:
            yield package


if __name__ == "__main__":
    if lacking := " ".join(missing(sys.argv[1:] or pinned(0, 1))):
        sys.exit(
            f"The active environment, {sys.prefix}, lacks packages. Any recent versions do: "
            f"python -m pip install {lacking}"
        )
