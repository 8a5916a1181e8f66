"""What runs a notebook's cells, in a process of its own. It is imported there, so it imports little."""

import os

import conftest  # noqa: F401  it chooses the interpreter where there is no GPU
from IPython.core.interactiveshell import InteractiveShell


def run_cells(cells, folder):
    os.chdir(folder)
    shell = InteractiveShell.instance()
    for cell in cells:
        shell.run_cell(cell, store_history=True).raise_error()
