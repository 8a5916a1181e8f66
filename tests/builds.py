"""Builds of a small project, for the tests.

Each is in a process that has all packages imported already. What must be tried with ``make`` itself
(kills, the Makefile) takes ``Project.start``.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
from conftest import GPU

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


def build(folder, environment, options):
    """What ``make html`` runs."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, f"{folder}/docs/_ext")
    import build

    return build.main(*options)


class Project:
    """A copy of what builds the site, with two lessons that say when they run."""

    def __init__(self, folder, lessons=("first", "second")):
        self.folder = folder
        self.site = folder / "_build/html"
        self.runs = folder / "runs"
        (folder / "docs").mkdir(parents=True)
        for name in ("conf.py", "requirements.txt", "Makefile"):
            shutil.copy(ROOT / name, folder)
        for name in ("_ext", "_static", "_templates", "inventories"):
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
        return os.environ | {"RUNS": str(self.runs)} | settings

    def start(self, *arguments, **settings):
        """``make html`` itself, which chooses between GPU and interpreter."""
        environment = self.environment(settings)
        if GPU is None:
            environment.pop("TRITON_INTERPRET", None)
        return subprocess.Popen(
            ["make", "html", "VENV=", f"PYTHON={sys.executable}", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def begin(self, *options, log="log", **settings):
        environment = self.environment(settings)
        log = self.folder / log
        return forked.start(log, build, str(self.folder), environment, options)

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
