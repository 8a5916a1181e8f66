"""Keep the lessons' outputs true to what made them.

Sphinx-Gallery runs a lesson again when its script changes. Its outputs also depend on the GPU, the
installed versions and the settings of the build: when one of those changes, every lesson is run
again. A lesson that fails, or takes longer than ``lesson_limit`` seconds, stops the build after
the others have run and before any page is written. So does one whose outputs belong to another
version of its script. Each page says at its top what ran it.
"""

import faulthandler
import gc
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from course import lessons
from docutils import nodes
from figures import COMMIT
from sphinx.util.docutils import SphinxDirective
from tabulate import tabulate

PACKAGES = [
    "torch",
    "triton",
    "numpy",
    "pandas",
    "matplotlib",
    "tabulate",
    "scikit-learn",
    "sphinx-gallery",
]


def gallery(app):
    return Path(app.srcdir) / app.config.sphinx_gallery_conf["gallery_dirs"]


def scripts(app):
    """The lessons' scripts, in reading order."""
    folder = Path(app.srcdir) / app.config.sphinx_gallery_conf["examples_dirs"]
    return [folder / f"{lesson.name}.py" for lesson in lessons(app)]


def record(app):
    return gallery(app) / "made_with.json"


def on_gpu():
    return torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def made_with(app):
    """What the outputs depend on, other than the scripts."""
    settings = hashlib.sha256()
    for name in (
        "conf.py",
        "requirements.txt",
        "docs/_ext/figures.py",
        "docs/_ext/alternatives.py",
    ):
        settings.update((Path(app.confdir) / name).read_bytes())
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu() else None,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "settings": settings.hexdigest(),
    }


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Watch:
    """Called by Sphinx-Gallery before and after each lesson.

    ``made`` says for each lesson which script made its outputs, and when.
    """

    def __init__(self, app, made):  # app itself can't be pickled, as this will be
        self.folder = scripts(app)[0].parent
        self.limit = app.config.lesson_limit
        self.record, self.made_with = record(app), made_with(app)
        self.cwd = os.getcwd()
        self.made = made

    def __call__(self, gallery_conf, fname, when):
        if when == "after":
            signal.alarm(0)
            self.timer.cancel()
            del self.timer
            faulthandler.cancel_dump_traceback_later()
            return
        script = digest(self.folder / fname)
        self.made[fname] = {"script": script, "commit": COMMIT, "date": str(date.today())}
        gc.collect()  # what the lesson before has left on the GPU
        if on_gpu():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        signal.signal(signal.SIGALRM, self.stop)
        signal.alarm(self.limit)
        # Python can't interrupt a lesson that waits for the GPU: the build starts again without it.
        self.timer = threading.Timer(1.2 * self.limit, self.start_again, [fname])
        self.timer.daemon = True
        self.timer.start()
        # And if Python itself does not get on, the build ends.
        faulthandler.dump_traceback_later(
            1.5 * self.limit, exit=True, file=sys.__stderr__
        )

    def stop(self, signum, frame):
        raise TimeoutError(f"it took longer than lesson_limit, {self.limit} seconds")

    def start_again(self, fname):
        faulthandler.dump_traceback(sys.__stderr__)
        del self.made[fname]
        self.save()
        os.environ["HUNG_LESSONS"] = " ".join([*hung(), fname])
        os.chdir(self.cwd)
        os.execv(sys.executable, sys.orig_argv)

    def save(self):
        self.record.write_text(json.dumps(self.made_with | {"lessons": self.made}))


class GpuMemory:
    """Sphinx-Gallery's ``show_memory``: runs a cell, and returns the peak in MB so far."""

    def __call__(self, run):
        result = run()
        # Lessons reset the statistics of their own; what is reserved includes what was in use.
        return torch.cuda.max_memory_reserved() / 1e6, result


def hung():
    """The lessons that the build before this one, in the same process, could not end."""
    return os.environ.get("HUNG_LESSONS", "").split()


def before_the_lessons(app):
    """Forget outputs that were made by something else, or by a build that was cut short."""
    made = json.loads(record(app).read_text()) if record(app).exists() else {}
    lessons = made.pop("lessons", {})
    if made == made_with(app):
        record(app).unlink()  # until the lessons are through
    else:
        shutil.rmtree(gallery(app), ignore_errors=True)
        lessons = {}
    names = [script.name for script in scripts(app)]
    for copy in gallery(app).glob("*.py"):
        if copy.name not in names:
            for file in gallery(app).glob(f"{copy.stem}.*"):
                file.unlink()

    conf = app.config.sphinx_gallery_conf
    conf["ignore_pattern"] = "|".join([conf["ignore_pattern"], *map(re.escape, hung())])
    conf["reset_modules"] = (*conf["reset_modules"], Watch(app, lessons))
    conf["reset_modules_order"] = "both"
    if on_gpu():
        conf["show_memory"] = GpuMemory()


def after_the_lessons(app):
    """Write down what made the outputs, and stop if a page would not show its script's."""
    conf = app.config.sphinx_gallery_conf
    watch = conf["reset_modules"][-1]
    failing = {
        Path(script).name: trace.strip().splitlines()[-1]
        for script, trace in conf["failing_examples"].items()
    }
    failing |= dict.fromkeys(
        hung(), "it could not be interrupted: see above where it hung"
    )
    stale = [
        script.name
        for script in scripts(app)
        if watch.made.get(script.name, {}).get("script") != digest(script)
    ]
    for name in {*failing, *stale}:  # run it next time, even if it is as it once was
        (gallery(app) / f"{name}.md5").unlink(missing_ok=True)
        watch.made.pop(name, None)
    watch.save()
    if failing:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in failing.items())
        sys.exit(f"No page was written. Lessons that failed: {reasons}")
    if stale:
        names = ", ".join(stale)
        sys.exit(
            f"No page was written. Outputs are not of the script as it stands: {names}"
        )


class LessonCosts(SphinxDirective):
    """The table of what each lesson took when these pages were made."""

    def run(self):
        app = self.env.app
        rows = [["lesson", "seconds", "peak MB on the GPU"]]
        for script in scripts(app):
            cost = json.loads((gallery(app) / f"{script.stem}.cost.json").read_text())
            lesson = f":doc:`/tutorials/{script.stem}`"
            rows.append([lesson, f"{cost['time']:.1f}", f"{cost['memory']:.0f}"])
        if not on_gpu():
            rows = [row[:-1] for row in rows]
        table = tabulate(rows, "firstrow", tablefmt="rst", disable_numparse=True)
        return self.parse_text_to_nodes(table)


def name_the_memory(app, docname, source):
    source[0] = source[0].replace(
        "**Estimated memory usage:**", "**Peak memory on the GPU:**"
    )


def say_what_ran_it(app, doctree):
    docname = app.env.docname
    if docname != app.config.root_doc and Path(docname).parent.name != gallery(app).name:
        return
    made = json.loads(record(app).read_text())
    versions = "torch {torch}, triton {triton}".format(**made["versions"])
    if made["gpu"]:
        text = f"The lessons were run on an {made['gpu']}, with {versions}."
    else:
        text = (
            "This site was built without a GPU. Triton's interpreter ran the kernels on small data, "
            f"with {versions}: the results are the same, and speed is not measured."
        )
    lesson = made["lessons"].get(f"{Path(docname).name}.py")
    if lesson:
        text += (
            " These outputs were made by the script as it stands, on {date}, with Python {python}, "
            "at commit {commit}."
        ).format(python=made["python"], **lesson)
    title = next(doctree.findall(nodes.title))
    title.parent.insert(1, nodes.note("", nodes.paragraph(text=text)))


def setup(app):
    app.add_config_value("lesson_limit", 300, "", int)
    app.add_directive("lesson-costs", LessonCosts)
    # Sphinx-Gallery runs the lessons with priority 500.
    app.connect("builder-inited", before_the_lessons, priority=100)
    app.connect("builder-inited", after_the_lessons, priority=900)
    app.connect("source-read", name_the_memory)
    app.connect("doctree-read", say_what_ran_it)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
