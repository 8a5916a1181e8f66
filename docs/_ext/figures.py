"""The look of the figures that the lessons draw; those of the record follow it."""

import os
import re
import textwrap

import numpy as np

COMMIT = os.environ.get("COMMIT") or "unknown"
LOOK = {
    "figure.figsize": (8, 4.5),
    "savefig.bbox": "tight",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
}


def style(gallery_conf, fname):
    """Called before each lesson, after Sphinx-Gallery has reset matplotlib."""
    import matplotlib

    matplotlib.rcParams.update(LOOK)


def last(line):
    """The last value that a line has: a peer may refuse the largest sizes."""
    values = np.asarray(line.get_ydata(), float)
    return values[np.isfinite(values)][-1]


def title(axis, text):
    """Write the message above a figure, in lines that are no longer than the figure is wide."""
    text = textwrap.fill(text, 76, break_on_hyphens=False)
    axis.set_title(text, loc="left", weight="bold")


def plain_numbers(axis):
    """Write 30 beside an axis with a logarithmic scale, not 3 x 10^1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:,.10g}" if super().__call__(x, pos) else ""

    axis.yaxis.set_major_formatter(Plain())
    axis.yaxis.set_minor_formatter(Plain(labelOnlyBase=False))


def label_ends(axis):
    """Name each line at its right end, in its colour and beside a piece of it.

    A linear axis begins at 0.
    """
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)
    else:
        plain_numbers(axis)
    drawn = [line for line in axis.get_lines() if np.isfinite(line.get_ydata()).any()]
    lines = sorted(drawn, key=last)
    to_share = axis.transData + axis.transAxes.inverted()
    heights = [
        to_share.transform((line.get_xdata()[-1], last(line)))[1] for line in lines
    ]
    for line, height in zip(lines, apart(heights), strict=True):
        look = {"color": line.get_color(), "transform": axis.transAxes}
        axis.annotate(
            "", (1.01, height), (1.05, height), "axes fraction",
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "lw": 1.5,
                        "ls": line.get_linestyle(), "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        axis.text(1.06, height, line.get_label(), va="center", **look)


def apart(heights, gap=0.055, top=0.95):
    """Rising heights, moved so far that names there don't overlap: up, and down from the top."""
    result = []
    for height in heights:
        result.append(max(height, result[-1] + gap) if result else height)
    for i in reversed(range(len(result))):
        result[i] = min(result[i], top if i == len(result) - 1 else result[i + 1] - gap)
    return result


def sign(figure, text):
    """Write small below a figure what made it."""
    figure.text(0.9, -0.04, text, fontsize="x-small", color="#555555", ha="right")


def message(axis):
    """What a benchmark's figure shows, in the words in which those on record say it."""
    import pandas as pd
    from benchmarks import draw, schema
    from matplotlib.colors import to_hex

    lines = {line.get_label(): line for line in axis.get_lines()}
    looks = {
        name: [to_hex(line.get_color()), line.get_linestyle()]
        for name, line in lines.items()
    }
    columns = {
        name: pd.Series(line.get_ydata(), line.get_xdata())
        for name, line in lines.items()
    }
    benchmark = schema.Benchmark(
        xlabel=axis.get_xlabel(), unit=axis.get_ylabel(), x_log=False, y_log=False,
        lines=schema.roles(looks), commit=COMMIT, date="",
    )  # fmt: skip
    text = draw.message(benchmark, pd.DataFrame(columns, dtype=float))
    # Sphinx-Gallery makes a text alternative of it, and puts that into HTML as it is.
    return re.sub('"(.*?)"', r"‘\1’", text).translate(str.maketrans('"<>&', "”‹›+"))


def sign_lesson(block, block_vars, gallery_conf):
    """A scraper that takes nothing, but signs with the lesson's ``MACHINE``, and names lines at their ends."""
    import matplotlib.pyplot as plt
    from benchmarks import draw

    machine = block_vars["example_globals"].get("MACHINE")
    for number in plt.get_fignums() if machine else ():
        figure = plt.figure(number)
        for axis in figure.axes:  # perf_report has no other place for it
            label = axis.get_xlabel().removesuffix(f"\n{machine}")
            axis.set_xlabel(draw.powers(label))
            if axis.get_xscale() == "log":
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(lambda x, _: draw.size(x))
            if axis.get_legend():
                axis.get_legend().remove()
                for line in axis.get_lines():  # perf_report adds the unit
                    name = line.get_label().removesuffix(f" ({axis.get_ylabel()})")
                    line.set_label(name)
                label_ends(axis)
                title(axis, axis.get_title(loc="left") or message(axis))
        sign(figure, f"{machine}, commit {COMMIT}")
    return ""
