"""The form of a record: what ``machine.json`` and the tables of ``docs/results/GPU`` hold.

Whatever is wrong with a file is a ``RecordError`` that names it.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import is_color_like

# What the colour of a line means, in all lessons. The recorder writes the meaning down.
COLOURS = {
    "#d55e00": "kernel",
    "#0072b2": "PyTorch",
    "#009e73": "torch.compile",
    "#cc79a7": "other",
    "#555555": "limit",
}
PEERS = ("PyTorch", "torch.compile", "other")
ROLES = ("kernel", "variant", *PEERS, "limit")
DTYPES = ("float16", "bfloat16", "float32", "float64")
TIMES = ("ms", "us", "µs")
LESS_IS_BETTER = (*TIMES, "MiB")


DASHES = ("-", "--", "-.", ":")


class RecordError(ValueError):
    """A file of the record can't be read as one."""


def check_kinds(values):
    """Whether the fields of a dataclass that are texts, numbers or choices are such."""
    for f in fields(values):
        value = getattr(values, f.name)
        if f.type in (str, int, bool, str | None) and not isinstance(value, f.type):
            raise TypeError(f"{f.name} is {value!r}")


@dataclass
class Line:
    role: str
    colour: str | None
    dashes: str

    def __post_init__(self):
        check_kinds(self)
        if self.colour is not None and not is_color_like(self.colour):
            raise ValueError(f"the colour {self.colour!r} is none")
        if self.dashes not in DASHES:
            raise ValueError(f"the dashes {self.dashes!r} are none of {' '.join(DASHES)}")
        if self.role not in ROLES:
            raise ValueError(f"the role {self.role!r} is none of {', '.join(ROLES)}")


def roles(styles):
    """The roles of lines from their colours: the first kernel that is drawn solid is *the* kernel."""
    lines, kernel = {}, False
    for name, (colour, dashes) in styles.items():
        role = COLOURS.get((colour or "").lower(), "other")
        if role == "kernel" and (kernel or dashes != "-"):
            role = "variant"
        kernel |= role == "kernel"
        lines[name] = Line(role, colour, dashes)
    return lines


@dataclass
class Benchmark:
    """What is needed to draw a figure, and to find the code that measures it."""

    xlabel: str
    unit: str
    x_log: bool
    y_log: bool
    lines: dict[str, Line]
    commit: str
    date: str
    function: str = ""  # records before it was kept
    name: str = field(default="", repr=False)  # LESSON.PLOTNAME, the key in the file
    path: Path | None = field(default=None, repr=False)
    tables: dict = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        check_kinds(self)
        values = self.lines.values()
        if all(
            isinstance(line, list) for line in values
        ):  # records before there were roles
            self.lines = roles(self.lines)
        elif not all(isinstance(line, Line) for line in values):
            self.lines = {name: Line(**line) for name, line in self.lines.items()}

    @property
    def lesson(self):
        return self.name.partition(".")[0]

    @property
    def dtype(self):
        words = re.findall(r"\w+", f"{self.name} {self.xlabel}".replace("-", " "))
        return next((word for word in words if word in DTYPES), "")

    @property
    def title(self):
        """The plot's name as words: "Softmax tiles backward"."""
        words = self.name.partition(".")[2].replace("-", " ").removesuffix(self.dtype)
        words = words.strip().capitalize()
        return re.sub("(?i)lstm", "LSTM", words).replace("johnson l", "Johnson-L")

    @property
    def less_is_better(self):
        return self.unit in LESS_IS_BETTER

    def named(self, *roles):
        return [name for name, line in self.lines.items() if line.role in roles]

    def read(self, quantity=""):
        """The recorded values of each line (or their ``", spread"``) over x."""
        key = self.path, quantity
        if key not in self.tables:
            self.tables[key] = self.read_file(quantity)
        return self.tables[key]

    def read_file(self, quantity):
        try:
            table = pd.read_csv(self.path, index_col=0)
            columns = [f"{line}{quantity} ({self.unit})" for line in self.lines]
            table = table[columns].set_axis(list(self.lines), axis=1).astype(float)
            table.index = pd.to_numeric(table.index)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{self.path}: {error}") from error
        if table.empty:
            raise RecordError(f"{self.path}: it has no row")
        if not np.isfinite(table.index).all() or not table.index.is_unique:
            raise RecordError(f"{self.path}: a size is missing, infinite or there twice")
        if np.isinf(table).any(axis=None) or (table < 0).any(axis=None):
            raise RecordError(f"{self.path}: a value is infinite or negative")
        missing = table[self.named("kernel", "limit")].isna().any(axis=1)
        if missing.any():  # a peer may refuse a size
            at = table.index[missing][0]
            raise RecordError(
                f"{self.path}: the lesson's kernel or the limit has no number at {at}"
            )
        return table


@dataclass
class Machine:
    """A GPU on record: what the results depend on other than the lessons, and the results."""

    gpu: str
    torch: str
    triton: str
    driver: str = "unknown"
    cuda: str | None = None
    python: str = ""
    copy_limit: str = ""
    runs: int = 0
    commit: str = ""
    date: str = ""
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    folder: Path | None = field(default=None, repr=False)

    def __post_init__(self):
        check_kinds(self)
        self.benchmarks = {
            name: benchmark
            if isinstance(benchmark, Benchmark)
            else Benchmark(
                **benchmark, name=name, path=self.folder and self.folder / f"{name}.csv"
            )
            for name, benchmark in self.benchmarks.items()
        }

    @property
    def made_with(self):
        """What must be the same for all that stands in one record."""
        return self.gpu, self.driver, self.cuda, self.torch, self.triton, self.python

    def read(self, name, quantity=""):
        return self.benchmarks[name].read(quantity)

    def save(self):
        values = asdict(self)
        del values["folder"]
        for benchmark in values["benchmarks"].values():
            del benchmark["name"], benchmark["path"], benchmark["tables"]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "machine.json"
        new = path.with_suffix(".next")
        new.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        new.rename(path)


def load(path):
    """The machine that a ``machine.json`` describes."""
    known = {f.name for f in fields(Machine)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {key: value for key, value in values.items() if key in known}
        return Machine(**values, folder=path.parent)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from error


def machines(results, first=""):
    """All that is on record. The folder named ``first`` comes first."""
    paths = sorted(Path(results).glob("*/machine.json"))
    return [
        load(path) for path in sorted(paths, key=lambda path: path.parent.name != first)
    ]


def standing(table, benchmark):
    """Over x: the kernel's speed over the limit's, over the best peer's, and which peer that is.

    None where the benchmark has no kernel, or nothing to hold it against.
    """
    speed = 1 / table if benchmark.less_is_better else table
    kernel = benchmark.named("kernel")
    others = {"limit": benchmark.named("limit"), "peer": benchmark.named(*PEERS)}
    if not kernel or not any(others.values()):
        return None
    result = pd.DataFrame(index=table.index)
    for key, names in others.items():
        found = speed[names].dropna(how="all") if names else speed.iloc[:0]
        share = speed[kernel[0]] / found.max(axis=1)
        # A kernel that needs no memory is infinitely better than one that does.
        result[key] = share.where(share < float("inf"))
        result[f"{key} name"] = found.idxmax(axis=1) if names else None
    return result
