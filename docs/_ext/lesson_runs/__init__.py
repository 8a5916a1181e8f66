"""Run the lessons that changed, each in a process of its own, and vouch for their outputs.

This happens before Sphinx-Gallery looks at the lessons, which then finds all of them as they should
be and runs none. If a lesson fails, or its outputs are not those of its script as it stands, the
build stops after the others have run and before any page is written.

``child`` runs one lesson. ``provenance`` knows what made its outputs, and says so on its page.
``machine`` asks for the GPU. ``costs`` tells what the lessons took.
"""

import os
import re
import sys
import time

import packages
import torch
from course import LessonError, describe, scripts
from sphinx.util import logging

from . import costs, provenance
from .child import Child
from .machine import on_gpu

__all__ = ["on_gpu"]

logger = logging.getLogger(__name__)


def remove_old(app):
    """Remove what lessons that are no longer there have left."""
    names = {script.stem for script in scripts(app, every=True)} | {"index"}
    for page in provenance.gallery(app).glob("*.rst"):
        if page.stem not in names:
            for file in provenance.gallery(app).glob(f"{page.stem}.*"):
                file.unlink()


def not_running(script):
    """Why the outputs of a lesson that may not be run can't be shown."""
    try:
        describe(script)
    except LessonError as error:
        return str(error)
    return "its outputs are not of the script as it stands"


def run(app, changed):
    """Run lessons, on a GPU one after the other, and return why each that failed did."""
    # Not Sphinx's own -j: what fails there while pages are written is not reported.
    conf = app.config.sphinx_gallery_conf
    if on_gpu():
        conf["show_memory"] = costs.GpuMemory()
    (provenance.gallery(app) / "images/thumb").mkdir(parents=True, exist_ok=True)
    at_once = 1 if on_gpu() else min(len(os.sched_getaffinity(0)), 4)
    if at_once > 1:
        torch.set_num_threads(1)  # of each: more would wait for each other
    waiting, running, failed = list(changed), [], {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                script = waiting.pop()  # the later lessons take longer
                provenance.forget(app, script)
                logger.info("running %s", script.name)
                gallery, limit = provenance.gallery(app), app.config.lesson_limit
                running.append(Child(script, gallery, conf, limit))
            time.sleep(0.02)
            for child in [child for child in running if child.ended()]:
                running.remove(child)
                if child.failure is None:
                    provenance.vouch(app, child.script)
                else:
                    provenance.forget(app, child.script)
                    failed[child.script.name] = child.failure
    finally:
        for child in running:
            child.kill()
    return failed


def run_lessons(app):
    remove_old(app)
    changed = [script for script in scripts(app) if not provenance.stands(app, script)]
    if app.config.sphinx_gallery_conf["plot_gallery"]:
        failed = run(app, changed)
    else:
        failed = {script.name: not_running(script) for script in changed}
    if failed:
        reasons = "\n".join(f"{name} ({failed[name]})" for name in sorted(failed))
        sys.exit(f"No page was written. Lessons that failed:\n{reasons}")


def only_one(app, config):
    """Read the page of one lesson alone, without the links that need the others."""
    if name := config.only_lesson:
        gallery = config.sphinx_gallery_conf["gallery_dirs"]
        config.sphinx_gallery_conf["ignore_pattern"] = rf"^(?!{re.escape(name)}\.py$)"
        config.exclude_patterns.append(f"{gallery}/recorded")
        config.exclude_patterns += [
            f"{gallery}/{script.stem}.*"
            for script in scripts(app, every=True)
            if script.stem != name
        ]
        config.suppress_warnings += ["ref", "toc", "myst.xref_missing"]


def install_first(app, config):
    """A notebook begins with installing what the lessons import."""
    packages_needed = " ".join(packages.pinned(0))
    config.sphinx_gallery_conf["first_notebook_cell"] = (
        f"%pip install --quiet {packages_needed}"
    )


def setup(app):
    # A lesson that takes longer, in seconds, fails the build.
    app.add_config_value("lesson_limit", 300, "", int)
    app.connect("config-inited", provenance.note_settings, priority=1)
    app.connect("config-inited", only_one)
    app.connect("config-inited", install_first)
    # Sphinx-Gallery looks at the lessons with priority 500.
    app.connect("builder-inited", run_lessons, priority=400)
    app.connect("doctree-read", provenance.say_what_ran_it)
    app.connect("source-read", costs.name_the_memory)
    app.add_directive("lesson-costs", costs.LessonCosts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
