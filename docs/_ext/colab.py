"""Let a lesson's page say where Colab finds its notebook, on the branch that holds the built site."""

from pathlib import Path


def notebook_on_colab(app, pagename, templatename, context, doctree):
    _, notebook = app.env.dlfiles.get(Path(f"{pagename}.ipynb"), (None, None))
    if notebook:
        repository = app.config.html_context["repository"].removeprefix(
            "https://github.com/"
        )
        context["colab"] = (
            f"https://colab.research.google.com/github/{repository}"
            f"/blob/gh-pages/_downloads/{notebook}"
        )


def setup(app):
    app.connect("html-page-context", notebook_on_colab)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
