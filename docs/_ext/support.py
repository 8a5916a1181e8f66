"""Tables of what the lessons were tried with: versions of Triton, and GPUs to compile for.

``make matrix`` and ``make targets`` write what they show to ``docs/results``.
"""

import json
from pathlib import Path

from sphinx.util.docutils import SphinxDirective
from tabulate import tabulate


class Support(SphinxDirective):
    def run(self):
        path = Path(self.env.srcdir) / f"results/{self.name}.json"
        self.env.note_dependency(str(path))
        if not path.exists():
            return []
        headers, rows = self.table(json.loads(path.read_text()))
        rows = [[str(cell).replace("_", r"\_") for cell in row] for row in rows]
        table = tabulate(rows, headers, tablefmt="rst", disable_numparse=True)
        return self.parse_text_to_nodes(table)


class Versions(Support):
    def table(self, versions):
        rows = [
            [
                *(triton, row["torch"], row["python"], row["passed"], len(row["failed"])),
                row["date"],
            ]
            for triton, row in versions.items()
        ]
        return ["Triton", "PyTorch", "Python", "passed", "failed", "date"], rows


class Targets(Support):
    """Registers a thread of each kernel on each GPU, and the bytes that it spills."""

    def table(self, targets):
        rows = []
        for kernel, found in targets["kernels"].items():
            cells = [
                f"{found[gpu]['registers']}" + " *" * (found[gpu]["spilled"] > 0)
                for gpu in targets["gpus"]
            ]
            rows.append([f"``{kernel}``", *cells])
        return ["registers a thread", *targets["gpus"]], rows


def setup(app):
    app.add_directive("versions", Versions)
    app.add_directive("targets", Targets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
