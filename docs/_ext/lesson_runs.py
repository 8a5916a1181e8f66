"""Keep the lessons' outputs true to what made them.

Sphinx-Gallery runs a lesson again when its script changes. Its outputs also depend on the GPU, the
installed versions and the settings of the build: when one of those changes, every lesson is run
again. A lesson that fails stops the build before any page is written. Each page says at its top
what ran it.
"""

import hashlib
import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from docutils import nodes

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


def record(app):
    return gallery(app) / "made_with.json"


def made_with(app):
    """What the outputs depend on, other than the scripts."""
    on_gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    settings = hashlib.sha256()
    for name in ("conf.py", "requirements.txt", "docs/_ext/figures.py"):
        settings.update((Path(app.confdir) / name).read_bytes())
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": settings.hexdigest(),
    }


def before_the_lessons(app):
    """Forget outputs that were made by something else, or by a build that was cut short."""
    if record(app).exists() and json.loads(record(app).read_text()) == made_with(app):
        record(app).unlink()  # until the lessons are through
    else:
        shutil.rmtree(gallery(app), ignore_errors=True)
    scripts = Path(app.srcdir) / app.config.sphinx_gallery_conf["examples_dirs"]
    for copy in gallery(app).glob("*.py"):
        if not (scripts / copy.name).exists():
            for made in gallery(app).glob(f"{copy.stem}.*"):
                made.unlink()


def after_the_lessons(app):
    failing = app.config.sphinx_gallery_conf["failing_examples"]
    failing = [Path(script).name for script in failing]
    for name in failing:  # run it again next time, even if the script is as it once was
        (gallery(app) / f"{name}.md5").unlink(missing_ok=True)
    record(app).write_text(json.dumps(made_with(app)))
    if failing:
        sys.exit(f"No page was written. Lessons that failed: {', '.join(failing)}")


def say_what_ran_it(app, doctree):
    docname = app.env.docname
    if docname != app.config.root_doc and Path(docname).parent.name != gallery(app).name:
        return
    made = json.loads(record(app).read_text())
    versions = "torch {torch} and triton {triton}".format(**made["versions"])
    if made["gpu"]:
        text = f"The lessons were run on an {made['gpu']}, with {versions}."
    else:
        text = (
            "This site was built without a GPU. Triton's interpreter ran the kernels on small data, "
            f"with {versions}: the results are the same, and speed is not measured."
        )
    title = next(doctree.findall(nodes.title))
    title.parent.insert(1, nodes.note("", nodes.paragraph(text=text)))


def setup(app):
    # Sphinx-Gallery runs the lessons with priority 500.
    app.connect("builder-inited", before_the_lessons, priority=100)
    app.connect("builder-inited", after_the_lessons, priority=900)
    app.connect("doctree-read", say_what_ran_it)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
