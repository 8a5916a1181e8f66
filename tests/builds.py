"""Builds of a small project, for the tests: each in a process that has all packages imported already.

A server process imports them once, and is forked for each build. What must be tried with ``make``
itself (kills, the Makefile) takes ``Project.start``.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LESSON = '''"""
.. _{name} lesson:

The {name} lesson
=================

Some prose.

Needs: PyTorch.
"""

# %%
# Run
# ---
#
# It runs.

import os

with open(os.environ["RUNS"], "a") as runs:
    runs.write("{name} ")
print("{output}")
'''

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch", "pandas", "matplotlib.pyplot", "tabulate", "sphinx.cmd.build",
        "sphinx.builders.html", "sphinx_gallery.gen_gallery", "sphinx_gallery.gen_rst",
        "myst_parser.sphinx_ext.main", "pydata_sphinx_theme", "sphinx_design", "sphinx_copybutton",
        "notfound.extension", "sphinx.ext.autodoc", "sphinx_sitemap", "sphinxext.opengraph",
    ]
)  # fmt: skip


def build(folder, environment, options, log):
    """What ``make html`` runs, in a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, f"{folder}/docs/_ext")
    import build

    sys.exit(build.main(*options))


class Project:
    """A copy of what builds the site, with two lessons that say when they run."""

    def __init__(self, folder, lessons=("first", "second")):
        self.folder = folder
        self.site = folder / "_build/html"
        self.runs = folder / "runs"
        (folder / "docs").mkdir(parents=True)
        for name in ("conf.py", "requirements.txt", "Makefile"):
            shutil.copy(ROOT / name, folder)
        for name in ("_ext", "_static", "_templates"):
            shutil.copytree(
                ROOT / "docs" / name,
                folder / "docs" / name,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        (folder / "docs/index.md").write_text(
            "# Home\n\n```{toctree}\ntutorials/index\n```\n"
        )
        (folder / "tutorials").mkdir()
        shutil.copy(ROOT / "tutorials/index.rst", folder / "tutorials")
        for name in lessons:
            self.write(name, f"{name} output")

    def write(self, name, output, then=""):
        path = self.folder / f"tutorials/{name}.py"
        path.write_text(LESSON.format(name=name, output=output) + then)

    def environment(self, settings):
        self.runs.write_text("")
        return {**os.environ, "RUNS": str(self.runs), **settings}

    def start(self, *arguments, **settings):
        """``make html`` itself."""
        return subprocess.Popen(
            ["make", "html", "VENV=", f"PYTHON={sys.executable}", *arguments],
            cwd=self.folder,
            env=self.environment(settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def begin(self, *options, log="log", **settings):
        log = str(self.folder / log)
        arguments = (str(self.folder), self.environment(settings), options, log)
        process = server.Process(target=build, args=arguments)
        process.start()
        return process

    def build(self, *options, **settings):
        """The exit status and the output of a build."""
        process = self.begin(*options, **settings)
        process.join(120)
        output = (self.folder / "log").read_text()
        assert process.exitcode is not None, output
        return process.exitcode, output

    def ran(self, *options, **settings):
        """Build, and return the lessons that were run."""
        status, output = self.build(*options, **settings)
        assert status == 0, output
        return sorted(self.runs.read_text().split())

    def failed(self, *options, **settings):
        """A build that fails: the part of its output that names what failed, and why."""
        status, output = self.build(*options, **settings)
        assert status != 0, output
        return output.partition("Lessons that failed:\n")[2]

    def page(self, name):
        return (self.site / f"tutorials/{name}.html").read_text()

    def paper(self, name):
        return json.loads((self.folder / f"docs/tutorials/{name}.made.json").read_text())

    def wait_until_running(self, name):
        deadline = time.monotonic() + 60
        while name not in self.runs.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
