"""Let autodoc see the Python function behind a Triton function: its signature and its docstring."""

import inspect


def signature(app, what, name, obj, options, signature, return_annotation):
    if hasattr(obj, "fn"):
        parameters = [
            p.replace(annotation=p.empty, default=getattr(p.default, "value", p.default))
            for p in inspect.signature(obj.fn).parameters.values()
        ]
        return str(inspect.Signature(parameters)), None


def docstring(app, what, name, obj, options, lines):
    if hasattr(obj, "fn"):
        lines[:] = [*(inspect.getdoc(obj.fn) or "").splitlines(), ""]


def setup(app):
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True}
