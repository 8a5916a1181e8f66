"""Link the authors whom a lesson names, "Li, Hastie and Church" or "Milakov, 2018", to its references."""

import re

from bibliography import outside, references
from docutils import nodes

NOT_IN = (nodes.reference, nodes.literal, nodes.raw, nodes.math)


def authors(entry):
    """Their family names, from what stands before an entry's first link."""
    link = next(entry.findall(outside))
    before = "".join(part.astext() for part in entry[: entry.index(link)])
    return re.findall(r"(?:[A-Z]\. )+([A-Z][\w-]+)", before)


def pattern(names):
    """Matches the first author, with the others and the year if they follow."""
    others = "|".join(map(re.escape, names))
    return re.compile(
        rf"\b{re.escape(names[0])}\b(?![-–])(?:(?:,|\sand)\s(?:{others})\b)*"
        r"(?:\set al\.)?(?:,\s\d{4}\b)?"
    )


def cite(paragraph, name, words):
    """Link what matches, once in a paragraph."""
    for text in list(paragraph.findall(nodes.Text)):
        if isinstance(text.parent, NOT_IN) or not (found := words.search(text)):
            continue
        link = nodes.reference("", found[0], refid=name, internal=True)
        start, end = nodes.Text(text[: found.start()]), nodes.Text(text[found.end() :])
        text.parent.replace(text, [start, link, end])
        return


def link(app, doctree):
    entries = [entry for entry in references(doctree) if any(entry.findall(outside))]
    listed = {id(p) for entry in entries for p in entry.parent.parent.findall()}
    for entry in entries:
        names = authors(entry)
        name = nodes.make_id(f"reference-{names[0]}") if names else ""
        if names and name not in doctree.ids:  # of two, the first is meant
            doctree.ids[name] = entry.parent
            entry.parent["ids"].append(name)
            for paragraph in list(doctree.findall(nodes.paragraph)):
                if id(paragraph) not in listed:
                    cite(paragraph, name, pattern(names))


def setup(app):
    app.connect("doctree-read", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
