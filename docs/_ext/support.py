"""Tables of what the lessons were tried with: versions of Triton, and GPUs to compile for.

``make matrix`` and ``make targets`` write what they show to ``docs/results``.
"""

import json
from pathlib import Path

from sphinx.util.docutils import SphinxDirective
from tabulate import tabulate


class Support(SphinxDirective):
    """A table, from the record of the same name; nothing if there is none."""

    def run(self):
        path = Path(self.env.srcdir) / f"results/{self.name}.json"
        self.env.note_dependency(str(path))
        if not path.exists():
            return []
        headers, rows, *notes = self.table(json.loads(path.read_text()))
        table = tabulate(rows, headers, tablefmt="rst", disable_numparse=True)
        return self.parse_text_to_nodes("\n\n".join([table, *notes]))


class Versions(Support):
    def table(self, versions):
        rows = []
        for triton, row in versions.items():
            tests = row["lessons"]
            failed = {
                name: len(found["failed"])
                for name, found in tests.items()
                if found["failed"]
            }
            names = f" ({', '.join(failed)})" if failed else ""
            rows.append(
                [
                    f"{triton}, beside PyTorch {row['torch']}, Python {row['python']}",
                    len(set(tests) - {"solutions"}),
                    sum(found["passed"] for found in tests.values()),
                    f"{sum(failed.values())}{names}",
                    max((found["date"] for found in tests.values()), default=""),
                ]
            )
        return ["Triton", "lessons", "tests passed", "failed", "date"], rows


class Targets(Support):
    """Registers a thread of each kernel on each GPU, and whether it spills."""

    def table(self, record):
        gpus, kernels, notes = [], {}, []
        for lesson, found in record["lessons"].items():
            for kernel, uses in found.items():
                for gpu, use in uses.items():
                    gpus += [gpu] if gpu not in gpus else []
                    # Some lessons repeat a kernel of an earlier one.
                    kernels.setdefault(kernel, {}).setdefault(gpu, []).append(use)
                    if use["problem"]:
                        notes.append(
                            f"{lesson}, ``{kernel}`` on {gpu}: {use['problem']}."
                        )
        rows = [
            [f"``{kernel}``", *(cell(uses.get(gpu, [])) for gpu in gpus)]
            for kernel, uses in kernels.items()
        ]
        said = f"Compiled by Triton {record['triton']} on {record['date']}."
        headers = ["registers", *(gpu.replace("_", r"\_") for gpu in gpus)]
        return headers, rows, said, *notes


def cell(uses):
    if not uses or any(use["problem"] for use in uses):
        return "no"
    spilled = any(use["spilled"] for use in uses)
    return f"{max(use['registers'] for use in uses)}" + r" \*" * spilled


def setup(app):
    app.add_directive("versions", Versions)
    app.add_directive("targets", Targets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
