"""Build the site and put it in place if it is whole: what ``make html`` runs.

``_build/html`` is always a whole site, the new one or the one before: the new one is built beside it
and changes places with it in one step. A second build waits for the first. ``--lesson=NAME`` makes
the page of one lesson alone, in ``_build/page``: ``make page`` runs it so.
"""

import ctypes
import fcntl
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).parents[2]
BETWEEN = ROOT / "_build/between"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def lacking(site):
    """What a whole site has and this one does not."""
    wanted = ["searchindex.js", "objects.inv"]
    for page in (ROOT / "docs").rglob("[!_]*.md"):
        wanted.append(f"{page.relative_to(ROOT / 'docs').with_suffix('')}.html")
    for script in sorted((ROOT / "tutorials").glob("*.py")):
        wanted.append(f"tutorials/{script.stem}.html")
        wanted += [
            f"_downloads/*/{script.stem}{suffix}" for suffix in (".py", ".ipynb", ".zip")
        ]
    return [name for name in wanted if not any(site.glob(name))]


def exchange(new, old):
    """Let two folders change places in one step, where the file system can."""
    paths = [str(path).encode() for path in (new, old)]
    try:
        failed = ctypes.CDLL(None).renameat2(
            AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE
        )
    except AttributeError:  # a C library without it
        failed = True
    if failed:
        old.rename(BETWEEN)
        new.rename(old)
        BETWEEN.rename(new)


def put_in_place(new, site):
    if site.exists():
        exchange(new, site)
        shutil.rmtree(new)
    else:
        new.rename(site)


def locked(path):
    """The file, once no other build has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another build is running here. This one waits for it.", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def run(*options):
    *options, folder = map(str, options)
    return sphinx(["-c", str(ROOT), *options, str(ROOT / "docs"), folder])


def build_site(build, options):
    new, site = build / "next", build / "html"
    if BETWEEN.exists() and not site.exists():  # the last build was stopped just there
        BETWEEN.rename(site)
    shutil.rmtree(new, ignore_errors=True)
    status = run("-E", "-d", build / "doctrees", "--fail-on-warning", *options, new)
    if status:
        return status
    if lacks := lacking(new):
        return f"The new site is not whole and was not put in place: it lacks {', '.join(lacks)}"
    put_in_place(new, site)
    print("The site is in _build/html. To read it: make serve")
    return 0


def build_page(build, lesson, options):
    page = build / "page"
    doctrees = build / "page-doctrees"
    status = run("-d", doctrees, "-D", f"only_lesson={lesson}", *options, page)
    if not status:
        print(f"The page is _build/page/tutorials/{lesson}.html")
    return status


def main(first="", *others):
    build = ROOT / "_build"
    build.mkdir(exist_ok=True)
    with locked(build / "lock"):
        if first.startswith("--lesson="):
            return build_page(build, first.partition("=")[2], others)
        return build_site(build, [first, *others] if first else [])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
