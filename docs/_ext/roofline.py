"""The directive ``recorded-roofline``: every recorded kernel over the arithmetic for each byte.

Speeds come from the record. The instructions for each byte come from ``results/instructions.json``,
which ``tests/arithmetic.py`` counts in the compiled kernels. The level of the roof is what the lesson
*Inside a kernel* recorded, where it did.
"""

import json
from pathlib import Path
from string import ascii_uppercase

import figures
import matplotlib
from benchmarks import draw, show
from matplotlib.figure import Figure
from sphinx.util.docutils import SphinxDirective

LEVEL = "inside_a_kernel.roofline", "limit"
COLOURS = {"float32": "#0072b2", "bfloat16": "#d55e00"}


def counted(folder):
    path = Path(folder) / "instructions.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content.get("instructions for each byte", {})


def points(machine, counts):
    """Benchmark, instructions a byte, GB/s and the limit's GB/s, by rising instructions."""
    found = []
    for name, per_byte in counts.items():
        if name in machine.benchmarks:
            benchmark, last = machine.benchmarks[name], machine.read(name).iloc[-1]
            lines = benchmark.named("kernel")[0], benchmark.named("limit")[0]
            found.append((benchmark, per_byte, *(last[line] for line in lines)))
    return sorted(found, key=lambda point: point[1])


def arithmetic(machine):
    """Thousands of millions of instructions a second, all threads together; None if unknown."""
    name, line = LEVEL
    if name not in machine.benchmarks:
        return None
    return machine.read(name)[line].max() * 1000 / 2  # a multiply-add counts as two


def draw_roofline(machine, found, path):
    memory = max(limit for *_, limit in found)
    level = arithmetic(machine)
    with matplotlib.rc_context(figures.LOOK):
        figure = Figure()
        axis = figure.subplots()
        x = [0.5 * 1.05**i for i in range(75)]
        roof = [memory if level is None else min(memory, level / each) for each in x]
        axis.plot(x, roof, color="#555555", ls="--")
        taken = [(per_byte, speed) for _, per_byte, speed, _ in found]
        for letter, (benchmark, per_byte, speed, _) in zip(
            ascii_uppercase, found, strict=False
        ):
            colour = COLOURS.get(benchmark.dtype, "#cc79a7")
            axis.plot(per_byte, speed, "o", color=colour)
            height = speed - 0.05 * memory
            while any(
                abs(height - y) < 0.045 * memory and 0.92 < per_byte / x < 1.08
                for x, y in taken
            ):
                height -= 0.01 * memory
            taken.append((per_byte, height))
            axis.text(per_byte, height, letter, color=colour, ha="center", va="center")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set(xlabel="instructions for each byte that must move", ylabel="GB/s")
        axis.set_ylim(0, 1.1 * memory)
        shares = [speed / limit for *_, speed, limit in found]
        title = f"{min(shares):.0%} to {max(shares):.0%} of the limit"
        axis.set_title(f"{len(found)} kernels: {title}", loc="left", weight="bold")
        figures.sign(
            figure,
            f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}, {machine.date}",
        )
        figure.savefig(path, dpi=110, metadata={"Date": None})


class Roofline(SphinxDirective):
    """The figure and its table, in a tab for each GPU."""

    def run(self):
        return self.parse_text_to_nodes(show.tabs(self.env.app, self.roofline))

    def roofline(self, machine):
        app = self.env.app
        counts = counted(Path(app.srcdir) / "results")
        found = points(machine, counts)
        if not found:
            return ""
        picture = f"{show.drawn(app)}/{machine.folder.name}/roofline.svg"
        draw_roofline(machine, found, Path(app.srcdir) / picture)
        rows = [
            [
                letter,
                f":ref:`{show.plain(benchmark.title)} <benchmark-{benchmark.name}>`",
                benchmark.dtype or "–",
                f"{per_byte:.1f}",
                f"{speed / limit:.0%}",
            ]
            for letter, (benchmark, per_byte, speed, limit) in zip(
                ascii_uppercase, found, strict=False
            )
        ]
        headers = ["", "operation", "dtype", "instructions a byte", "share of the limit"]
        low, high = (f"{found[i][1]:.1f}" for i in (0, -1))
        alt = (
            f"GB/s of {len(found)} kernels over their instructions for each byte, from {low} to "
            f"{high}, below a roof at {max(limit for *_, limit in found):.0f} GB/s. "
            "The table below has the numbers."
        )
        level = arithmetic(machine)
        caption = "Orange is bfloat16, blue float32. The dashed line is the limit."
        if level is not None:
            bend = level / max(limit for *_, limit in found)
            caption += f" It bends at {bend:.1f} instructions a byte."
        rst = f".. figure:: /{picture}\n   :alt: {draw.powers(alt)}\n\n   {caption}\n\n"
        return rst + show.grid(rows, headers, "results")


def setup(app):
    app.add_directive("recorded-roofline", Roofline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
