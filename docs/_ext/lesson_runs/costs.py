"""What the lessons take: time, and memory on the GPU."""

import json

import torch
from course import lessons
from sphinx.util.docutils import SphinxDirective
from tabulate import tabulate

from .machine import on_gpu


class GpuMemory:
    """Sphinx-Gallery's ``show_memory``: runs a cell, and returns the peak in MB so far."""

    def __call__(self, run):
        result = run()
        # Lessons reset the statistics of their own; what is reserved includes what was in use.
        gpu = torch.get_device_module(torch.accelerator.current_accelerator().type)
        return gpu.max_memory_reserved() / 1e6, result


class LessonCosts(SphinxDirective):
    """The table of what each lesson took when these pages were made."""

    def run(self):
        rows = [["lesson", "seconds", "peak MB on the GPU"]]
        for lesson in lessons(self.env.app):
            path = self.env.srcdir / f"{lesson.docname}.cost.json"
            cost = json.loads(path.read_text())
            link = f":doc:`/{lesson.docname}`"
            rows.append([link, f"{cost['time']:.1f}", f"{cost['memory']:.0f}"])
        if not on_gpu():
            rows = [row[:-1] for row in rows]
        table = tabulate(rows, "firstrow", tablefmt="rst", disable_numparse=True)
        return self.parse_text_to_nodes(table)


def name_the_memory(app, docname, source):
    source[0] = source[0].replace(
        "**Estimated memory usage:**", "**Peak memory on the GPU:**"
    )
