"""Maths as MathML, which browsers render by themselves: no script, no font, no network.

Powers of two in prose, written 2^28, are set as powers.
"""

import re

from benchmarks.draw import powers
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

# A function's name keeps a small distance from an argument that has no bracket.
APPLIED = re.compile(r"<mo>&ApplyFunction;</mo>(?!\s*(?:<mrow>\s*)*<mo[^>]*>\s*[(\[{|,])")


def mathml(tex, **options):
    space = '<mspace width="0.167em"></mspace>'
    return APPLIED.sub(rf"\g<0>{space}", tex2mathml(tex, **options))


def visit_inline(translator, node):
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(translator, node):
    formula = mathml(node.astext(), as_block=True)
    # On a narrow screen it scrolls, also from the keyboard.
    translator.body.append(
        f'<div class="formula" tabindex="0" role="group" aria-label="formula">{formula}</div>'
    )
    raise nodes.SkipNode


def raise_powers(app, doctree):
    for text in list(doctree.findall(nodes.Text)):
        kept = (
            nodes.literal,
            nodes.literal_block,
            nodes.raw,
            nodes.math,
            nodes.math_block,
        )
        if "2^" in text and not isinstance(text.parent, kept):
            text.parent.replace(text, nodes.Text(powers(text)))


def join_signs(app, doctree):
    """Keep a formula and the full stop behind it on one line."""
    for formula in list(doctree.findall(nodes.math)):
        text = formula.next_node(descend=False, siblings=True)
        sign = isinstance(text, nodes.Text) and re.match(r"[.,:;?!)]+", text)
        if sign:
            parent, rest = formula.parent, nodes.Text(text[sign.end() :])
            parent.remove(text)
            joined = nodes.inline("", "", classes=["joined"])
            parent.replace(formula, [joined, rest])
            joined += [formula, nodes.Text(sign[0])]


def setup(app):
    app.connect("doctree-read", raise_powers)
    app.connect("doctree-read", join_signs)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
