"""``{bibliography}`` lists what the lessons refer to, from the sections that they call References.

An entry is known by its first link. The lessons that have it are named behind it.
"""

import re

from course import lessons
from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class bibliography(nodes.General, nodes.Element):
    pass


class Bibliography(SphinxDirective):
    def run(self):
        return [bibliography()]


def outside(node):
    return isinstance(node, nodes.reference) and "refuri" in node


def references(doctree):
    for section in doctree.findall(nodes.section):
        if section[0].astext() == "References":
            for item in section.findall(nodes.list_item):
                if any(item.findall(outside)):
                    yield next(item.findall(nodes.paragraph))


def family_name(entry):
    """Of the first author; an entry without one is documentation, and comes last."""
    author = re.match(r"(?:[A-Z]\. )+([^,]+?)(?:,| and | et al)", entry.astext())
    return (author is None, author[1] if author else entry.astext())


def fill(app, doctree, docname):
    for place in doctree.findall(bibliography):
        entries, where = {}, {}
        for lesson in lessons(app):
            for entry in references(app.env.get_doctree(lesson.docname)):
                link = next(entry.findall(outside))["refuri"]
                entries.setdefault(link, entry)
                where.setdefault(link, []).append(lesson)
        listed = nodes.bullet_list(classes=["bibliography"])
        for link in sorted(entries, key=lambda link: family_name(entries[link])):
            entry = entries[link]
            if isinstance(
                entry[-1], nodes.Text
            ):  # what follows a colon concerns a lesson
                entry[-1] = nodes.Text(entry[-1].partition(":")[0].rstrip(". \n") + ". ")
            for lesson in where[link]:
                uri = app.builder.get_relative_uri(docname, lesson.docname)
                title = app.env.titles[lesson.docname].astext()
                entry += [nodes.Text(" → "), nodes.reference("", title, refuri=uri)]
            listed += nodes.list_item("", entry)
        place.replace_self(listed)


def setup(app):
    app.add_node(bibliography)
    app.add_directive("bibliography", Bibliography)
    app.connect("doctree-resolved", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
