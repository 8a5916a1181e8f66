"""Link the first use of each of the glossary's terms in a lesson, so that lessons need no markup.

``glossary_exceptions`` lists phrases in which a term means something else.
"""

import re

from course import lessons
from docutils import nodes

NOT_IN = (nodes.reference, nodes.literal, nodes.title, nodes.raw, nodes.image)


def pattern(terms, exceptions):
    """Matches a term as ``term``, and a phrase that only looks like one with no name."""

    def any_of(phrases):
        longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
        return "|".join(longest_first).replace(r"\ ", r"\s+")

    other = f"(?:{any_of(exceptions)})|" if exceptions else ""
    word = rf"(?:{other}(?P<term>{any_of(terms)}))s?"
    # Not in the middle of a name such as torch.jit.script.
    return re.compile(rf"(?<![\w.]){word}\b(?!\.\w)", flags=re.IGNORECASE)


def link(app, doctree, docname):
    if docname not in {lesson.docname for lesson in lessons(app)}:
        return
    std = app.env.domains["std"]
    entries = {
        term.lower(): where
        for (kind, term), where in std.objects.items()
        if kind == "term"
    }
    if not entries:
        return
    word = pattern(entries, app.config.glossary_exceptions)
    linked = set()
    for paragraph in doctree.findall(nodes.paragraph):
        small_print = "made" in paragraph["classes"]
        if small_print or isinstance(paragraph.parent, nodes.Admonition):
            continue
        for text in list(paragraph.findall(nodes.Text)):
            ancestor = text.parent
            while ancestor is not paragraph and not isinstance(ancestor, NOT_IN):
                ancestor = ancestor.parent
            if ancestor is not paragraph:
                continue
            pieces, end = [], 0
            for match in word.finditer(text):
                entry = entries.get(" ".join((match["term"] or "").lower().split()))
                if entry is None or entry in linked:
                    continue
                linked.add(entry)
                page, anchor = entry
                uri = f"{app.builder.get_relative_uri(docname, page)}#{anchor}"
                pieces += [
                    nodes.Text(text[end : match.start()]),
                    nodes.reference("", match[0], refuri=uri, classes=["term"]),
                ]
                end = match.end()
            if pieces:
                text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def setup(app):
    app.add_config_value("glossary_exceptions", [], "env", (list, tuple))
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
