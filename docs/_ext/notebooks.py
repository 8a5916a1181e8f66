"""The notebooks as good as the pages, and each lesson as text.

Sphinx-Gallery's notebooks name other lessons by their labels and show the answers to exercises. Here
the labels become titles, links where the site has an address, and the answers fold. Beside the clean
notebook stands ``NAME_with_outputs.ipynb``, with what the run on the page printed and drew. The
same as Markdown is ``NAME.md`` beside each page, and ``llms.txt`` lists these.
"""

import html
import json
import re
import zipfile
from pathlib import Path

from course import lessons, plain

CELL = ".. GENERATED FROM PYTHON SOURCE LINES"
ANSWERS = re.compile(
    r'<div class="alert alert-info"><h4>Note</h4>\s*Try it first\.\s*(.*?)\n</div>',
    re.DOTALL,
)
OUTPUTS = "_with_outputs"


def address(app):
    base = app.config.html_baseurl
    return f"{base.rstrip('/')}/" if base else ""


def linked(text, titles, base):
    """Markdown in which the labels of lessons are titles, and links if ``base`` is known."""

    def title(match):
        words, label = match[1], match[2] or match[1]
        if label not in titles:
            return match[0]
        docname, name = titles[label]
        words = name if words == label else words
        return f"[{words}]({base}{docname}.html)" if base else f"*{words}*"

    return re.sub(r"(?<![`\w])`([^`<>\n]+?)(?: <([^`<>]+)>)?`(?!`)", title, text)


def folded(text):
    return ANSWERS.sub(
        r"<details><summary>Try it first. The answers are in here.</summary>\n\n\1\n\n</details>",
        text,
    )


def outputs(page, folder):
    """For each cell of code on a page of Sphinx-Gallery's: what it printed and drew."""
    for cell in page.split(CELL)[1:]:
        head, is_code, rest = cell.partition("\n.. code-block:: Python\n")
        if not is_code or head.count("\n") > 2:
            continue
        found = []
        for kind, value in re.findall(
            r"^ *\.\. (image-sg|code-block):: (.*)$", rest, re.MULTILINE
        ):
            if kind == "image-sg":
                svg = (folder / value.strip().lstrip("/")).read_text(encoding="utf-8")
                alt = re.search(rf"image-sg:: {re.escape(value)}\n\s*:alt: (.*)", rest)
                found.append(
                    {
                        "output_type": "display_data",
                        "metadata": {},
                        "data": {
                            "image/svg+xml": svg,
                            "text/plain": f"Figure: {html.unescape(alt[1]) if alt else ''}",
                        },
                    }
                )
        printed = re.search(
            r"^\.\. rst-class:: sphx-glr-script-out\n\n \.\. code-block:: none\n\n((?:    .*\n|\n)+)",
            rest,
            re.MULTILINE,
        )
        if printed:
            lines = [
                line.removeprefix("    ") for line in printed[1].rstrip().split("\n")
            ]
            text = "\n".join(lines) + "\n"
            found.insert(0, {"output_type": "stream", "name": "stdout", "text": text})
        yield found


def with_outputs(notebook, page, folder):
    """The notebook as if it had been run here, or None if the page has other cells of code.

    Its first cell, which installs, was not run.
    """
    result = json.loads(json.dumps(notebook))
    cells = [cell for cell in result["cells"] if cell["cell_type"] == "code"]
    installs = "".join(cells[0]["source"]).startswith("%pip") if cells else False
    cells, found = cells[installs:], list(outputs(page, folder))
    if len(cells) != len(found):
        return None
    for number, (cell, output) in enumerate(zip(cells, found, strict=True), 1):
        cell["outputs"], cell["execution_count"] = output, number
    return result


def source(cell):
    return "".join(cell["source"]).strip()


def markdown(notebook):
    """A notebook with outputs as one text."""
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(
                r'<img src="data:[^"]*"(?: alt="([^"]*)")?[^>]*>',
                lambda image: f"*Picture: {html.unescape(image[1] or '')}*",
                source(cell),
            )
            parts.append(text)
            continue
        if source(cell).startswith("%pip"):
            continue
        if source(cell):
            parts.append(f"```python\n{source(cell)}\n```")
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{output['text'].rstrip()}\n```")
            else:
                parts.append(f"*{output['data']['text/plain']}*")
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def improve(app):
    """Once Sphinx-Gallery has written its notebooks. What it wrote is kept, to begin with next time."""
    found = lessons(app)
    titles = {lesson.label: (lesson.docname, lesson.title) for lesson in found}
    for lesson in found:
        path = Path(app.srcdir) / f"{lesson.docname}.ipynb"
        plain = path.with_suffix(".plain")
        text = path.read_text(encoding="utf-8")
        if '"fast_and_right"' not in text:
            plain.write_text(text, "utf-8")
        notebook = json.loads(plain.read_text(encoding="utf-8"))
        notebook["metadata"]["fast_and_right"] = {"lesson": lesson.name}
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                text = linked("".join(cell["source"]), titles, address(app))
                cell["source"] = folded(text).strip().splitlines(keepends=True)
        write(path, notebook)
        script = path.with_suffix(".py")
        with zipfile.ZipFile(
            path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED
        ) as bundle:
            bundle.write(script, script.name)
            bundle.write(path, path.name)
        page = path.with_suffix(".rst").read_text(encoding="utf-8")
        run = with_outputs(notebook, page, Path(app.srcdir))
        write(path.with_name(f"{lesson.name}{OUTPUTS}.ipynb"), run or notebook)


def offer(app, docname, source):
    """Below the downloads of a lesson: the notebook with outputs, and the text."""
    for lesson in lessons(app):
        if lesson.docname == docname and ".. container:: sphx-glr-download " in source[0]:
            run = f"{lesson.name}{OUTPUTS}.ipynb"
            offered = f"""
    .. container:: sphx-glr-download sphx-glr-download-outputs

      :download:`Download the notebook with its outputs: {run} <{run}>`

    .. container:: sphx-glr-download sphx-glr-download-text

      .. raw:: html

         <p><a class="reference download internal" href="{lesson.name}.md" download>Download all as
         Markdown: {lesson.name}.md</a></p>

"""
            head, container, rest = source[0].partition(
                "    .. container:: sphx-glr-download sphx-glr-download-python"
            )
            source[0] = head + offered.lstrip("\n") + container + rest


def name_the_text(app, pagename, templatename, context, doctree):
    """In a page's head, for tools."""
    if pagename in {lesson.docname for lesson in lessons(app)}:
        context["text_of_the_page"] = f"{pagename.rpartition('/')[2]}.md"


def write_texts(app, exception):
    if exception or app.builder.format != "html":
        return
    found = lessons(app)
    lines = [
        f"# {app.config.project}\n",
        f"> {app.config.html_title}. Each lesson as one Markdown file: prose, code, outputs.\n",
    ]
    part = None
    for lesson in found:
        notebook = f"{lesson.docname}{OUTPUTS}.ipynb"
        notebook = json.loads((Path(app.srcdir) / notebook).read_text(encoding="utf-8"))
        text = markdown(notebook)
        (Path(app.outdir) / f"{lesson.docname}.md").write_text(text, "utf-8")
        if lesson.part != part:
            part = lesson.part
            lines.append(f"\n## {part}\n")
        lines.append(
            f"- [{lesson.title}]({address(app)}{lesson.docname}.md): "
            f"{plain(lesson.promise, found)}"
        )
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", "utf-8")


def setup(app):
    # Sphinx-Gallery runs the lessons with priority 500.
    app.connect("builder-inited", improve, priority=940)
    app.connect("source-read", offer)
    app.connect("html-page-context", name_the_text)
    app.connect("build-finished", write_texts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
