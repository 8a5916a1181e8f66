"""Show the recorded benchmarks of ``docs/results``: nothing is measured here.

A lesson shows a recorded benchmark where its code runs it: open on a page that was built without a
GPU, and folded where a GPU has just drawn the figure itself. ``benchmarks.md`` ends with those of
all lessons. The directive ``recorded-figure`` shows one figure, and without a name that at the head of the site,
which the setting ``recorded_headline`` names. ``recorded-results`` and ``recorded-losses`` are tables of all, and
the role ``recorded`` is one number.
"""

import re
import shutil
from html import escape
from math import ceil, isfinite
from pathlib import Path
from textwrap import indent

import pandas as pd
from course import lessons
from docutils import nodes
from docutils.parsers.rst import directives
from lesson_runs import on_gpu
from sphinx.util.docutils import SphinxDirective, SphinxRole
from tabulate import tabulate

from . import draw, schema

CELL = "\n.. GENERATED FROM PYTHON SOURCE LINES"  # begins each cell of a lesson
AGREE = 0.1  # runs that differ by more than this share of their values prove nothing
BUSY = 0.5  # a limit below this share of its largest value shows the time of a launch


def machines(app):
    """What is on record, read once a build. The GPU of the headline comes first."""
    if not hasattr(app, "machines_on_record"):
        first, _ = app.config.recorded_headline
        app.machines_on_record = schema.machines(Path(app.srcdir) / "results", first)
    return app.machines_on_record


def drawn(app):
    return f"{app.config.sphinx_gallery_conf['gallery_dirs']}/recorded"


def number(value):
    """Three digits, or all before the point. A peer that refuses a size has none."""
    if not isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def draw_figures(app):
    folder = Path(app.srcdir) / drawn(app)
    shutil.rmtree(folder, ignore_errors=True)
    for machine in machines(app):
        (folder / machine.folder.name).mkdir(parents=True)
        for name in machine.benchmarks:
            draw.draw(machine, name, folder / machine.folder.name / f"{name}.svg")


def tabs(app, content):
    """A tab for each GPU on record that ``content(machine)`` is not empty for, as reStructuredText."""
    text = ""
    for machine in machines(app):
        if rst := content(machine):
            item = f".. tab-item:: {machine.gpu}\n   :sync: {machine.folder.name}\n\n"
            text += indent(item + indent(rst, "   "), "   ") + "\n\n"
    return text and f".. tab-set::\n   :sync-group: gpu\n   :class: recorded\n\n{text}"


def plain(text):
    """Text in which nothing is markup."""
    return re.sub(r"([*`|_\\])", r"\\\1", text)


def grid(rows, headers, kind):
    """A table of this class, as reStructuredText."""
    rst = tabulate([headers, *rows], "firstrow", tablefmt="rst", disable_numparse=True)
    return f".. table::\n   :class: {kind}\n\n{indent(rst, '   ')}\n"


def figure(app, machine, name, caption):
    """A recorded figure, as reStructuredText."""
    benchmark, table = machine.benchmarks[name], machine.read(name)
    last = table.iloc[-1].dropna()
    values = ", ".join(f"{line} {number(value)}" for line, value in last.items())
    says = draw.message(benchmark, table)
    alt = (
        f"{says + '. ' if says else ''}{benchmark.unit} over {benchmark.xlabel}, recorded on an "
        f"{machine.gpu}. At {draw.size(last.name)}: {values}."
    )
    picture = f"/{drawn(app)}/{machine.folder.name}/{name}.svg"
    return f".. figure:: {picture}\n   :alt: {draw.powers(alt)}\n\n   {caption}\n\n"


def numbers(machine, name):
    """The table behind a figure, folded, as reStructuredText."""
    benchmark, table = machine.benchmarks[name], machine.read(name)
    step = ceil(len(table) / 20)
    rows = [[draw.size(x), *map(number, row)] for x, row in table[::step].iterrows()]
    title = f"Numbers, {benchmark.unit}"
    title += f", every {step}th row" if step > 1 else ""
    headers = [draw.powers(benchmark.xlabel.split(",")[0]), *benchmark.lines]
    content = grid(rows, [plain(header) for header in headers], "numbers")
    return f".. dropdown:: {title}\n\n{indent(content, '   ')}\n\n"


def pinned(app):
    """The versions that the requirements ask for."""
    text = (Path(app.confdir) / "requirements.txt").read_text()
    return dict(re.findall(r"^(torch|triton)==(\S+)", text, re.MULTILINE))


def elsewhere(app, machine):
    """A sentence on the versions that one would get today, where they are others."""
    others = [
        f"{name} {version}"
        for name, version in pinned(app).items()
        if getattr(machine, name).partition("+")[0] != version
    ]
    return f"The requirements name {' and '.join(others)} today. " if others else ""


def caption(app, machine, name):
    benchmark, folder = machine.benchmarks[name], machine.folder
    spread = (machine.read(name, ", spread") / machine.read(name)).stack().median()
    base = f"/results/{folder.name}"
    data = f":download:`CSV <{base}/{name}.csv>`"
    runs = machine.runs
    if (folder / f"runs/{name}.csv").exists():
        runs = pd.read_csv(folder / f"runs/{name}.csv")["run"].nunique()
        data += f", :download:`each run, with clocks and temperature <{base}/runs/{name}.csv>`"
    differ = f"by {spread:.1%}" if spread >= 0.0005 else "by less than 0.1%"
    measured = f"medians of {runs} runs, which differ {differ} in the median"
    return (
        f"Recorded on {benchmark.date} on an {machine.gpu} (driver {machine.driver}, torch "
        f"{machine.torch}, triton {machine.triton}, commit {benchmark.commit}): "
        f"{measured if runs > 1 else 'a single run'}. "
        f"{elsewhere(app, machine)}A copy of 2²⁸ float32 elements reaches {machine.copy_limit} "
        f"there. {data}"
    )


class Recorded(SphinxDirective):
    """Recorded benchmarks, in a tab for each GPU."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"folded": directives.flag}

    def run(self):
        names = self.arguments[0].split()
        text = tabs(self.env.app, lambda machine: self.benchmarks(machine, names))
        if "folded" in self.options:
            title = "The same benchmark, as recorded on other machines"
            text = f".. dropdown:: {title}\n\n{indent(text, '   ')}"
        return self.parse_text_to_nodes(text)

    def benchmarks(self, machine, names):
        app = self.env.app
        return "".join(
            figure(app, machine, name, caption(app, machine, name))
            + numbers(machine, name)
            for name in names
            if name in machine.benchmarks
        )


class RecordedFigure(SphinxDirective):
    """A figure, else that of ``recorded_headline``, with the content as its caption, or nothing."""

    optional_arguments = 1
    has_content = True

    def run(self):
        _, name = self.config.recorded_headline
        name = self.arguments[0] if self.arguments else name
        for machine in machines(self.env.app):
            if name in machine.benchmarks:
                text = " ".join(self.content)
                rst = figure(self.env.app, machine, name, text)
                return self.parse_text_to_nodes(rst)
        return []


class Table(SphinxDirective):
    """A row for each benchmark that can be compared, in a tab for each GPU."""

    def run(self):
        return self.parse_text_to_nodes(tabs(self.env.app, self.table))

    def table(self, machine):
        rows = []
        order = {lesson.name: lesson.number for lesson in lessons(self.env.app)}
        for name, benchmark in sorted(
            machine.benchmarks.items(),
            key=lambda item: (order.get(item[1].lesson, 99), item[1].title),
        ):
            table = machine.read(name)
            stand = schema.standing(table, benchmark)
            if stand is not None and (row := self.row(machine, benchmark, stand)):
                link = f":ref:`{plain(benchmark.title)} <benchmark-{name}>`"
                rows.append([link, benchmark.dtype or "–", *row])
        return (
            grid(rows, ["operation", "dtype", *self.headers], "results") if rows else ""
        )


def at(benchmark, x):
    what = benchmark.xlabel.split(",")[0]
    one = re.sub("^([a-z]+)s", r"\1", what)
    return f"{draw.size(x)} {one if x == 1 else what}"


class Results(Table):
    """What each kernel reaches at the largest size."""

    headers = ("size", "share of the limit", "times the best peer", "which")

    def row(self, machine, benchmark, stand):
        x = stand.index[-1]
        limit, peer, which = stand.loc[x, ["limit", "peer", "peer name"]]
        return [
            at(benchmark, x),
            f"{limit:.0%}" if limit == limit else "–",
            f"{peer:.2f}" if peer == peer else "–",
            plain(which) if peer == peer else "–",
        ]


def busy(benchmark, table):
    """At which sizes the work takes longer than its launch, by the speed of the limit."""
    limit = table[benchmark.named("limit")]
    if limit.empty or benchmark.unit != "GB/s":
        return [True] * len(table)
    return (limit >= BUSY * limit.max()).all(axis=1).tolist()


class Losses(Table):
    """Where each kernel does worst, of the sizes that keep the GPU busy and at which the runs agree."""

    headers = (
        "least share of the limit",
        "at",
        "least times the best peer",
        "at",
        "which",
    )

    def row(self, machine, benchmark, stand):
        noise = machine.read(benchmark.name, ", spread") / machine.read(benchmark.name)
        kernel, row = benchmark.named("kernel")[0], []
        stand = stand[busy(benchmark, machine.read(benchmark.name))]
        for key in ("limit", "peer"):
            share, names = stand[key].dropna(), stand[f"{key} name"]
            calm = [
                x for x in share.index
                if noise.loc[x, [kernel, names[x]]].sum() <= AGREE
            ]  # fmt: skip
            if not calm:
                row += ["–"] * (2 if key == "limit" else 3)
                continue
            x = share[calm].idxmin()
            value = share[x]
            row += [
                f"{value:.0%}" if key == "limit" else f"{value:.2f}",
                at(benchmark, x),
            ]
            row += [plain(names[x])] if key == "peer" else []
        return row


class Number(SphinxRole):
    """``NAME; line; x``, or a key of ``machine.json``, of the first GPU that has it."""

    def run(self):
        name, *where = self.text.split("; ")
        for machine in machines(self.env.app):
            if not where:
                return self.shown(getattr(machine, name))
            if name in machine.benchmarks:
                try:
                    value = machine.read(name).loc[float(where[1]), where[0]]
                except KeyError:
                    path = machine.benchmarks[name].path
                    raise schema.RecordError(f"{path}: nothing for {self.text}") from None
                return self.shown(f"{number(value)} {machine.benchmarks[name].unit}")
        return self.shown("(not recorded yet)")

    def shown(self, text):
        return [nodes.inline("", text, classes=["recorded"])], []


def runs(cell, function):
    """Whether the code of a cell runs the benchmark that is this function."""
    return function and ".run(" in cell and re.search(rf"\b{function}\b(?!\()", cell)


def sections(lesson, benchmarks):
    """The part of ``benchmarks.md`` that belongs to a lesson, as Markdown."""
    text = f"\n## {lesson.title}\n\nThe lesson: {{doc}}`/{lesson.docname}`.\n"
    for name, benchmark in benchmarks.items():
        title = ", ".join(filter(None, (benchmark.title, benchmark.dtype)))
        text += f"\n(benchmark-{name})=\n### {title}\n\n"
        text += f"```{{eval-rst}}\n.. recorded:: {name}\n```\n"
    return text


def show_recorded(app, docname, source):
    """Put a lesson's recorded benchmarks behind the code that runs them."""
    on_record = {}
    for machine in machines(app):
        on_record |= machine.benchmarks | on_record  # in the order of the first
    for lesson in lessons(app):
        found = {name: b for name, b in on_record.items() if b.lesson == lesson.name}
        if docname == lesson.docname:
            folded = "   :folded:\n" if on_gpu() else ""
            cells = source[0].split(CELL)
            for i, cell in enumerate(cells):
                here = [name for name, b in found.items() if runs(cell, b.function)]
                if here:
                    cells[i] += f".. recorded:: {' '.join(here)}\n{folded}\n"
            source[0] = CELL.join(cells)
        if docname == "benchmarks" and found:
            source[0] += sections(lesson, found)


def cards(app):
    """The pictures that social media show, if the site has an address: a lesson's first benchmark, else "site"."""
    found = {}
    for machine in machines(app)[:1] if app.config.html_baseurl else ():
        for name, benchmark in machine.benchmarks.items():
            found.setdefault(benchmark.lesson, (machine, name))
        if app.config.recorded_headline[1] in machine.benchmarks:
            found["site"] = machine, app.config.recorded_headline[1]
    return found


def name_card(app, doctree):
    found, page = cards(app), app.env.docname.rpartition("/")[2]
    page = page if page in found else "site"
    if page in found:
        machine, name = found[page]
        base = app.config.html_baseurl.rstrip("/")
        app.env.metadata[app.env.docname] |= {
            "og:image": f"{base}/_images/{page}_card.png",
            "og:image:alt": escape(
                draw.message(machine.benchmarks[name], machine.read(name)) or name
            ),
        }


def draw_cards(app, exception):
    if not exception and app.builder.format == "html":
        for lesson, (machine, name) in cards(app).items():
            draw.draw(machine, name, Path(app.outdir) / f"_images/{lesson}_card.png")


def setup(app):
    # The folder of a GPU, and the benchmark, of the figure at the head of the site.
    app.add_config_value("recorded_headline", ("", ""), "env", (tuple, list))
    # Sphinx-Gallery runs the lessons with priority 500.
    app.connect("builder-inited", draw_figures, priority=950)
    app.connect("source-read", show_recorded)
    app.connect("doctree-read", name_card)
    app.connect("build-finished", draw_cards)
    app.add_directive("recorded", Recorded)
    app.add_directive("recorded-figure", RecordedFigure)
    app.add_directive("recorded-results", Results)
    app.add_directive("recorded-losses", Losses)
    app.add_role("recorded", Number())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
