"""The look of the figures: those that the lessons draw, and those drawn from the record."""

import os

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


def label_ends(axis):
    """Name each line at its right end, in its colour, and let a linear axis begin at 0."""
    if axis.get_yscale() == "linear":
        axis.set_ylim(bottom=0)
    lines = sorted(axis.get_lines(), key=lambda line: line.get_ydata()[-1])
    to_share = axis.transData + axis.transAxes.inverted()
    height = None
    for line in lines:
        _, y = to_share.transform((line.get_xdata()[-1], line.get_ydata()[-1]))
        height = y if height is None else max(y, height + 0.055)  # names don't overlap
        axis.text(
            1.01, height, line.get_label(), color=line.get_color(), va="center",
            transform=axis.transAxes,
        )  # fmt: skip


def sign(figure, text):
    """Write small below a figure what made it."""
    figure.text(0.9, -0.04, text, fontsize="x-small", color="#555555", ha="right")


def sign_lesson(block, block_vars, gallery_conf):
    """A scraper that takes nothing, but signs with the lesson's ``MACHINE``, and names lines at their ends."""
    import matplotlib.pyplot as plt

    machine = block_vars["example_globals"].get("MACHINE")
    for number in plt.get_fignums() if machine else ():
        figure = plt.figure(number)
        for axis in figure.axes:  # perf_report has no other place for it
            axis.set_xlabel(axis.get_xlabel().removesuffix(f"\n{machine}"))
            if axis.get_legend() and not axis.get_title():
                axis.get_legend().remove()
                label_ends(axis)
        sign(figure, f"{machine}, commit {COMMIT}")
    return ""


def read(path, benchmark, quantity=""):
    """The recorded values of each line (or their ``", spread"``) over x."""
    import pandas as pd

    columns = [f"{line}{quantity} ({benchmark['unit']})" for line in benchmark["lines"]]
    table = pd.read_csv(path, index_col=0)
    return table[columns].set_axis(list(benchmark["lines"]), axis=1)


def draw(table, benchmark, machine, path):
    """Draw a recorded benchmark into the file ``path``."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure()
        axis = figure.subplots()
        for line, (colour, dashes) in benchmark["lines"].items():
            axis.plot(table.index, table[line], label=line, color=colour, ls=dashes)
        axis.set(xlabel=benchmark["xlabel"], ylabel=benchmark["unit"])
        axis.set_xscale("log" if benchmark["x_log"] else "linear")
        axis.set_yscale("log" if benchmark["y_log"] else "linear")
        label_ends(axis)
        made = "{gpu}, torch {torch}, triton {triton}, {date}, commit {commit}"
        sign(figure, made.format(**machine | benchmark))
        figure.savefig(path, dpi=110)
