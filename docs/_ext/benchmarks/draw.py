"""Draw recorded benchmarks."""

import re

import figures
import matplotlib
from matplotlib.figure import Figure

from . import schema


def message(benchmark, table):
    """What a figure shows, as a title: the kernel beside its limit and beside its peers."""
    stand = schema.standing(table, benchmark)
    if stand is None:
        form = ".0f" if table.min().min() >= 1 else ".2f"
        spans = [f"{name}: {span(table[name].dropna(), form)}" for name in table]
        unit = benchmark.unit if benchmark.unit.startswith("%") else f" {benchmark.unit}"
        return f"{', '.join(spans)}{unit}"
    parts = []
    what = "the speed of " if benchmark.unit in schema.TIMES else ""
    for key, all_of_them in (("limit", "the limit"), ("peer", "the best of the others")):
        share, names = stand[key].dropna(), stand[f"{key} name"].dropna().unique()
        if share.empty:
            continue
        name = f"“{names[0]}”" if len(names) == 1 else all_of_them
        if key == "limit":
            parts.append(f"{span(100 * share, '.0f')}% of {what}{name}")
        else:
            parts.append(f"{span(share, '.2f')} times {what}{name}")
        what = what and "that of "
    kernel = benchmark.named("kernel")[0]
    return f"{kernel}: {', '.join(parts)}" if parts else ""


def span(values, form):
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"


def powers(text):
    """``2^28`` as it is written: 2²⁸."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return re.sub(r"(?<=2)\^(-?\d+)", lambda power: power[1].translate(raised), text)


def size(x):
    """A size as a reader knows it: a large power of two as one."""
    x = int(x) if float(x).is_integer() else x
    if isinstance(x, int) and x >= 2**20 and x & (x - 1) == 0:
        return powers(f"2^{x.bit_length() - 1}")
    return str(x)


def limits(machine, benchmark):
    """The same scale for a benchmark's dtypes: their largest value."""
    name = benchmark.name.removesuffix(benchmark.dtype)
    twins = [
        other for other in machine.benchmarks.values()
        if benchmark.dtype and other.name.removesuffix(other.dtype) == name
    ]  # fmt: skip
    return max(twin.read().max().max() for twin in twins or [benchmark])


def draw(machine, name, path):
    """Draw a recorded benchmark into the file ``path``."""
    benchmark = machine.benchmarks[name]
    table = benchmark.read()
    with matplotlib.rc_context(figures.LOOK):
        figure = Figure()
        axis = figure.subplots()
        for line, look in benchmark.lines.items():
            axis.plot(
                table.index, table[line], label=line, color=look.colour, ls=look.dashes
            )
        axis.set(xlabel=powers(benchmark.xlabel), ylabel=benchmark.unit)
        figures.title(axis, powers(message(benchmark, table)))
        axis.set_xscale("log", base=2) if benchmark.x_log else None
        if benchmark.y_log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.05 * limits(machine, benchmark))
        if benchmark.x_log:
            axis.xaxis.set_major_formatter(lambda x, _: size(x))
        figures.label_ends(axis)
        figures.sign(
            figure,
            f"{machine.gpu}, torch {machine.torch}, triton {machine.triton}, "
            f"{benchmark.date}, commit {benchmark.commit}",
        )
        figure.savefig(path, dpi=110, metadata={"Date": None})
