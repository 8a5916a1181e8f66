"""What made a lesson's outputs: its script, the GPU, the installed versions, the settings.

When one of them changes, the outputs no longer stand and the lesson is run again. Each page says
at its top what ran it.
"""

import hashlib
import importlib
import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

from course import scripts
from docutils import nodes

from .machine import gpu

COMMIT = os.environ.get("COMMIT") or "unknown"
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
# What a run leaves in the gallery.
SUFFIXES = [".py", ".py.md5", ".rst", ".ipynb", ".zip", ".cost.json", ".made.json"]


def gallery(app):
    return Path(app.srcdir) / app.config.sphinx_gallery_conf["gallery_dirs"]


def digest(*paths, text=""):
    result = hashlib.sha256(text.encode())
    for path in paths:
        result.update(Path(path).read_bytes())
    return result.hexdigest()


def note_settings(app, config):
    """Before Sphinx-Gallery adds what is not set, and things that change with each build."""
    app.gallery_settings = json.dumps(
        config.sphinx_gallery_conf, sort_keys=True, default=repr
    )


def settings(app):
    """A digest of what decides how a lesson is run and its figures drawn."""
    conf = json.loads(app.gallery_settings)
    named = [*conf.get("image_scrapers", []), *conf.get("reset_modules", [])]
    modules = {name.rpartition(".")[0] for name in named if "." in name}
    files = [importlib.import_module(name).__file__ for name in sorted(modules)]
    files.append(Path(app.confdir) / "requirements.txt")
    return digest(*files, text=app.gallery_settings)


def made_with(app):
    """What the outputs depend on, other than the script."""
    return {
        "gpu": gpu(),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "settings": settings(app),
    }


def paper(app, script):
    return gallery(app) / f"{script.stem}.made.json"


def stands(app, script):
    """Whether the lesson's outputs are there, and made by what there is now."""
    if not all((gallery(app) / f"{script.stem}{suffix}").exists() for suffix in SUFFIXES):
        return False
    made = json.loads(paper(app, script).read_text())
    return (made["script"], made["made_with"]) == (digest(script), made_with(app))


def forget(app, script):
    """To be run next time, even if the script is then as it once was."""
    for suffix in (".made.json", ".py.md5", ".py"):
        (gallery(app) / f"{script.stem}{suffix}").unlink(missing_ok=True)


def vouch(app, script):
    """Write down what made the outputs that are there now."""
    # Of the copy that was run: the script itself may have been edited meanwhile.
    made = {
        "script": digest(gallery(app) / script.name),
        "made_with": made_with(app),
        "commit": COMMIT,
        "date": str(date.today()),
    }
    new = paper(app, script).with_suffix(".next")
    new.write_text(json.dumps(made))
    new.rename(paper(app, script))


def say_what_ran_it(app, doctree):
    docname = app.env.docname
    if docname != app.config.root_doc and Path(docname).parent.name != gallery(app).name:
        return
    ran = made_with(app)
    versions = "torch {torch}, triton {triton}".format(**ran["versions"])
    if ran["gpu"]:
        text = f"The lessons were run on an {ran['gpu']}, with {versions}."
    else:
        text = (
            "This site was built without a GPU. Triton's interpreter ran the kernels on small data, "
            f"with {versions}: the results are the same, and speed is not measured."
        )
    for script in scripts(app):
        if script.stem == Path(docname).name:
            made = json.loads(paper(app, script).read_text())
            text += (
                " These outputs were made by the script as it stands, on {date}, with Python {python}, "
                "at commit {commit}."
            ).format(python=ran["python"], **made)
    title = next(doctree.findall(nodes.title))
    title.parent.insert(1, nodes.note("", nodes.paragraph(text=text)))
