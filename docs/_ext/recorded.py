"""Show the recorded benchmarks of ``docs/results``: nothing is measured here.

A lesson shows a recorded benchmark where its code runs it: open on a page that was built without a
GPU, and folded where a GPU has just drawn the figure itself. ``benchmarks.md`` ends with those of
all lessons. The directive ``recorded-figure`` shows one figure, ``recorded-summary`` a table of
all, and the role ``recorded`` one number.
"""

import json
import re
import shutil
from math import ceil
from pathlib import Path
from textwrap import indent

import figures
import pandas as pd
from course import lessons
from docutils import nodes
from docutils.parsers.rst import directives
from lesson_runs import on_gpu
from sphinx.util.docutils import SphinxDirective, SphinxRole
from tabulate import tabulate

OURS, LIMIT = ["#d55e00", "-"], "#555555"
CELL = "\n.. GENERATED FROM PYTHON SOURCE LINES"  # begins each cell of a lesson


def machines(app):
    """What is on record: the contents of each ``machine.json``, and its ``folder``."""
    for path in sorted(Path(app.srcdir).glob("results/*/machine.json")):
        yield json.loads(path.read_text()) | {"folder": path.parent}


def load(machine, name, quantity=""):
    path = machine["folder"] / f"{name}.csv"
    return figures.read(path, machine["benchmarks"][name], quantity)


def lesson_of(name):
    return name.partition(".")[0]


def number(value):
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def draw_figures(app):
    drawn = Path(app.srcdir) / "tutorials/recorded"
    shutil.rmtree(drawn, ignore_errors=True)
    for machine in machines(app):
        (drawn / machine["folder"].name).mkdir(parents=True)
        for name, benchmark in machine["benchmarks"].items():
            path = drawn / machine["folder"].name / f"{name}.svg"
            figures.draw(load(machine, name), benchmark, machine, path)


def tabs(env, content):
    """A tab for each GPU on record that ``content(machine)`` is not empty for, as reStructuredText."""
    text = ""
    for machine in machines(env):
        if rst := content(machine):
            item = (
                f".. tab-item:: {machine['gpu']}\n   :sync: {machine['folder'].name}\n\n"
            )
            text += indent(item + indent(rst, "   "), "   ") + "\n\n"
    return text and f".. tab-set::\n   :sync-group: gpu\n   :class: recorded\n\n{text}"


def grid(rows, headers):
    """A table, as reStructuredText."""
    rows = [
        [re.sub(r"([*`|_\\])", r"\\\1", cell) for cell in row] for row in [headers, *rows]
    ]
    return tabulate(rows, "firstrow", tablefmt="rst", disable_numparse=True)


def figure(machine, name, caption):
    """A recorded figure, as reStructuredText."""
    benchmark, last = machine["benchmarks"][name], load(machine, name).iloc[-1]
    values = ", ".join(f"{line} {number(value)}" for line, value in last.items())
    alt = (
        f"{benchmark['unit']} over {benchmark['xlabel']}, recorded on an {machine['gpu']}. "
        f"At {last.name}: {values}."
    )
    picture = f"/tutorials/recorded/{machine['folder'].name}/{name}.svg"
    return f".. figure:: {picture}\n   :alt: {alt}\n\n   {caption}\n\n"


def numbers(machine, name):
    """The table behind a figure, folded, as reStructuredText."""
    table = load(machine, name)
    step = ceil(len(table) / 20)
    rows = [[str(x), *map(number, row)] for x, row in table[::step].iterrows()]
    title = f"Numbers, {machine['benchmarks'][name]['unit']}"
    title += f", every {step}th row" if step > 1 else ""
    text = grid(rows, [table.index.name, *table.columns])
    return f".. dropdown:: {title}\n\n{indent(text, '   ')}\n\n"


class Recorded(SphinxDirective):
    """Recorded benchmarks, in a tab for each GPU."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"folded": directives.flag}

    def run(self):
        names = self.arguments[0].split()
        text = tabs(self.env, lambda machine: benchmarks(machine, names))
        if "folded" in self.options:
            title = "The same benchmark, as recorded on other machines"
            text = f".. dropdown:: {title}\n\n{indent(text, '   ')}"
        return self.parse_text_to_nodes(text)


def benchmarks(machine, names):
    """Figures, captions and tables, as reStructuredText."""
    text = ""
    for name in names:
        if name not in machine["benchmarks"]:
            continue
        spread = (load(machine, name, ", spread") / load(machine, name)).stack().median()
        csv = f"/results/{machine['folder'].name}/{name}.csv"
        caption = (
            "Recorded on {date} on an {gpu} (driver {driver}, torch {torch}, triton {triton}, "
            "commit {commit}): medians of {runs} runs, which differ by {spread:.1%} in the "
            "median. A copy of 2²⁸ float32 elements reaches {copy_limit} there. "
            ":download:`CSV <{csv}>`"
        ).format(**machine | machine["benchmarks"][name] | {"spread": spread, "csv": csv})
        text += figure(machine, name, caption) + numbers(machine, name)
    return text


class RecordedFigure(SphinxDirective):
    """One figure, of the first GPU that has it, with the content as its caption, or nothing."""

    required_arguments = 1
    has_content = True

    def run(self):
        for machine in machines(self.env):
            if self.arguments[0] in machine["benchmarks"]:
                caption = " ".join(self.content)
                return self.parse_text_to_nodes(
                    figure(machine, self.arguments[0], caption)
                )
        return []


def standing(machine, name):
    """Where this benchmark's kernel does worst beside its limit, and beside its best peer."""
    benchmark, speed = machine["benchmarks"][name], load(machine, name)
    noise = load(machine, name, ", spread") / speed
    if benchmark["unit"] in ("ms", "MiB"):  # the less, the better
        speed = 1 / speed
    colours = pd.Series({line: style[0] for line, style in benchmark["lines"].items()})
    ours = [line for line, style in benchmark["lines"].items() if style == OURS]
    limit, peers = (
        speed.loc[:, colours == LIMIT],
        speed.loc[:, ~colours.isin([OURS[0], LIMIT])],
    )
    if not ours or (limit.empty and peers.empty):
        return None
    row = [name, ours[0]]
    for others, form in ((limit, "{:.0%}"), (peers, "{:.2f}")):
        share = speed[ours[0]] / others.max(axis=1)
        share = share[share < float("inf")]  # which a kernel that needs no memory reaches
        if share.empty:
            row += ["", ""]
        else:
            x = share.idxmin()
            best = others.loc[x].idxmax()
            star = "*" if noise.loc[x, [ours[0], best]].sum() > 0.1 else ""
            row += [form.format(share[x]) + star, f"{best}, at {x}"]
    return row


class RecordedSummary(SphinxDirective):
    """Where the kernel of each benchmark does worst, in a tab for each GPU."""

    def run(self):
        return self.parse_text_to_nodes(tabs(self.env, self.table))

    def table(self, machine):
        rows = [standing(machine, name) for name in machine["benchmarks"]]
        headers = ["benchmark", "kernel", "least share of the limit", "which, and where"]
        headers += ["least, beside the best peer", "which, and where"]
        return grid([row for row in rows if row], headers)


class Number(SphinxRole):
    """``NAME; line; x``, or a key of ``machine.json``, of the first GPU that has it."""

    def run(self):
        name, *where = self.text.split("; ")
        text = "(not recorded yet)"
        for machine in reversed(list(machines(self.env))):
            if where and name in machine["benchmarks"]:
                value = load(machine, name).loc[float(where[1]), where[0]]
                text = f"{number(value)} {machine['benchmarks'][name]['unit']}"
            elif not where:
                text = machine[name]
        return [nodes.inline("", text, classes=["recorded"])], []


def runs(cell, function):
    """Whether the code of a cell runs the benchmark that is this function."""
    return ".run(" in cell and re.search(rf"\b{function}\b(?!\()", cell)


def show_recorded(app, docname, source):
    """Put a lesson's recorded benchmarks behind the code that runs them."""
    on_record = {
        name: benchmark["function"]
        for machine in machines(app)
        for name, benchmark in machine["benchmarks"].items()
    }
    for lesson in lessons(app):
        names = [name for name in on_record if lesson_of(name) == lesson.name]
        if docname == lesson.docname:
            folded = "   :folded:\n" if on_gpu() else ""
            cells = source[0].split(CELL)
            for i, cell in enumerate(cells):
                run_here = [n for n in names if runs(cell, on_record[n])]
                if run_here:
                    cells[i] += f".. recorded:: {' '.join(run_here)}\n{folded}\n"
            source[0] = CELL.join(cells)
        if docname == "benchmarks" and names:
            source[0] += (
                f"\n## {lesson.title}\n\nThe lesson: {{doc}}`{lesson.docname}`.\n\n"
                f"```{{eval-rst}}\n.. recorded:: {' '.join(names)}\n```\n"
            )


def setup(app):
    # Sphinx-Gallery runs the lessons with priority 500.
    app.connect("builder-inited", draw_figures, priority=950)
    app.connect("source-read", show_recorded)
    app.add_directive("recorded", Recorded)
    app.add_directive("recorded-figure", RecordedFigure)
    app.add_directive("recorded-summary", RecordedSummary)
    app.add_role("recorded", Number())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
