"""Show the recorded benchmarks of ``docs/results``: nothing is measured here.

Each lesson that has some ends with them, and ``benchmarks.md`` with those of all lessons. The
directive ``recorded-figure`` shows one figure, ``recorded-summary`` a table of all, and the role
``recorded`` one number.
"""

import json
import re
import shutil
from math import ceil
from pathlib import Path
from textwrap import indent

import figures
import pandas as pd
from docutils import nodes
from sphinx.util.docutils import SphinxDirective, SphinxRole
from tabulate import tabulate

OURS, LIMIT = ["#d55e00", "-"], "#555555"


def machines(app):
    """What is on record: the contents of each ``machine.json``, and its ``folder``."""
    for path in sorted(Path(app.srcdir).glob("results/*/machine.json")):
        yield json.loads(path.read_text()) | {"folder": path.parent}


def load(machine, name, quantity=""):
    path = machine["folder"] / f"{name}.csv"
    return figures.read(path, machine["benchmarks"][name], quantity)


def lesson_of(name):
    return name.partition(".")[0]


def reading_order(app):
    index = (Path(app.srcdir) / "tutorials/index.rst").read_text()
    return re.findall(r"^   /tutorials/(\w+)$", index, flags=re.MULTILINE)


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
    """The recorded benchmarks of a lesson, in a tab for each GPU."""

    required_arguments = 1

    def run(self):
        return self.parse_text_to_nodes(tabs(self.env, self.benchmarks))

    def benchmarks(self, machine):
        names = [n for n in machine["benchmarks"] if lesson_of(n) == self.arguments[0]]
        text = (
            "Recorded on an {gpu}: driver {driver}, CUDA {cuda}, torch {torch}, triton "
            "{triton}, Python {python}. A copy reaches {copy_limit} there. Each number is the "
            "median of {runs} runs.\n\n"
        ).format(**machine)
        for name in names:
            spread = (
                (load(machine, name, ", spread") / load(machine, name)).stack().median()
            )
            csv = f"/results/{machine['folder'].name}/{name}.csv"
            caption = (
                "``{name}``, recorded on {date} at commit {commit}; the runs differ by "
                "{spread:.1%} in the median. :download:`CSV <{csv}>`"
            ).format(name=name, spread=spread, csv=csv, **machine["benchmarks"][name])
            text += figure(machine, name, caption) + numbers(machine, name)
        return names and text


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


def append_recorded(app, docname, source):
    """Let lessons end with their benchmarks, before the downloads."""
    found = {
        lesson_of(name) for machine in machines(app) for name in machine["benchmarks"]
    }
    lesson = docname.removeprefix("tutorials/")
    if docname != lesson and lesson in found:
        title = "Recorded benchmarks"
        section = f"{title}\n{'-' * len(title)}\n\n.. recorded:: {lesson}\n\n"
        text, timing, footer = source[0].rpartition("\n.. rst-class:: sphx-glr-timing")
        source[0] = f"{text}\n{section}{timing}{footer}"
    if docname == "benchmarks":
        for lesson in reading_order(app):
            if lesson in found:
                script = (Path(app.srcdir) / f"tutorials/{lesson}.py").read_text()
                title = re.search(r"\n(.+)\n=+\n", script)[1]
                source[0] += (
                    f"\n## {title}\n\nThe lesson: {{doc}}`tutorials/{lesson}`.\n\n"
                    f"```{{eval-rst}}\n.. recorded:: {lesson}\n```\n"
                )


def setup(app):
    # Sphinx-Gallery runs the lessons with priority 500.
    app.connect("builder-inited", draw_figures, priority=950)
    app.connect("source-read", append_recorded)
    app.add_directive("recorded", Recorded)
    app.add_directive("recorded-figure", RecordedFigure)
    app.add_directive("recorded-summary", RecordedSummary)
    app.add_role("recorded", Number())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
