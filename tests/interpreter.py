"""Triton's interpreter, with less to do.

At each launch, and at each call of a function within a kernel, it looks through all of ``triton.language``
for what it replaces. What it finds is the same each time, and is kept here. A Triton whose interpreter
is written otherwise stays as it is.
"""

import inspect

from triton.language.core import is_builtin
from triton.runtime import interpreter

builtins = {}


def patch_builtin(package, builder, scope):
    if package not in builtins:
        builtins[package] = inspect.getmembers(package, is_builtin)
    for name, member in builtins[package]:
        if getattr(package, name) is member:  # not replaced already
            interpreter._patch_attr(package, name, member, builder, scope)


if hasattr(interpreter, "_LangPatchScope"):
    interpreter._patch_builtin = patch_builtin
