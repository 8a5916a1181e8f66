"""Processes that have the large packages imported already: a server imports them, and is forked."""

import multiprocessing
import os
import signal
import sys

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "torch", "triton", "numpy", "pandas", "matplotlib.pyplot", "tabulate", "pytest",
        "IPython.core.interactiveshell",
        "sphinx.cmd.build", "sphinx.builders.html", "sphinx.ext.autodoc", "sphinx_gallery.gen_gallery",
        "sphinx_gallery.gen_rst", "myst_parser.sphinx_ext.main", "pydata_sphinx_theme",
        "sphinx_design", "sphinx_copybutton", "sphinx_sitemap", "sphinxext.opengraph",
        "notfound.extension",
    ]
)  # fmt: skip


def redirected(log, function, *arguments):
    # Ignored if the tests were started in a shell's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.exit(function(*arguments))


def start(log, function, *arguments):
    """Call a function in a process of its own. What it prints goes to ``log``; it returns a status."""
    process = server.Process(target=redirected, args=(str(log), function, *arguments))
    process.start()
    return process
