"""Link the first use of each of the glossary's terms in a lesson, so that lessons need no markup."""

import re
from pathlib import Path

from docutils import nodes

NOT_IN = (nodes.reference, nodes.literal, nodes.title, nodes.raw, nodes.image)


def link(app, doctree, docname):
    lessons = app.config.sphinx_gallery_conf["gallery_dirs"]
    if Path(docname).parent.name != lessons or Path(docname).name == "index":
        return
    std = app.env.domains["std"]
    entries = {
        term.lower(): where
        for (kind, term), where in std.objects.items()
        if kind == "term"
    }
    if not entries:
        return
    longest_first = sorted(map(re.escape, entries), key=len, reverse=True)
    word = re.compile(rf"\b({'|'.join(longest_first)})s?\b", flags=re.IGNORECASE)
    linked = set()
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.Admonition):
            continue
        for text in list(paragraph.findall(nodes.Text)):
            ancestor = text.parent
            while ancestor is not paragraph and not isinstance(ancestor, NOT_IN):
                ancestor = ancestor.parent
            if ancestor is not paragraph:
                continue
            pieces, end = [], 0
            for match in word.finditer(text):
                entry = entries[match[1].lower()]
                if entry in linked:
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
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
