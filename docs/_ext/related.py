"""Each lesson ends with the one or two other lessons that help most: those that it mentions most often.

What stands beside it in the reading order is linked anyway, and what it needs is named at its top.
"""

from collections import Counter

from course import lessons
from docutils import nodes
from sphinx import addnodes

MOST = 2


def mentions(doctree, labels):
    """How often a page refers to each of these labels, below the paragraphs at its top."""
    prose = [
        section for section in doctree.findall(nodes.section) if section.parent.parent
    ]
    links = {id(link): link for s in prose for link in s.findall(addnodes.pending_xref)}
    return Counter(
        labels[link["reftarget"]]
        for link in links.values()
        if link["reftarget"] in labels
    )


def helpful(env, found, docname):
    """The lessons to name below one of them, most useful first."""
    labels = {lesson.label: lesson.docname for lesson in found}
    order = [lesson.docname for lesson in found]
    here = order.index(docname)
    counts = mentions(env.get_doctree(docname), labels)
    beside = {docname, *order[max(here - 1, 0) : here + 2]}
    others = [other for other in order if counts[other] and other not in beside]
    return sorted(others, key=lambda other: -counts[other])[:MOST]


def add(app, doctree, docname):
    found = lessons(app)
    if docname not in {lesson.docname for lesson in found}:
        return
    items = []
    for other in helpful(app.env, found, docname):
        uri = app.builder.get_relative_uri(docname, other)
        link = nodes.reference("", app.env.titles[other].astext(), refuri=uri)
        items.append(nodes.list_item("", nodes.paragraph("", "", link)))
    if items:
        (timing,) = doctree.findall(
            lambda node: (
                "sphx-glr-timing" in getattr(node, "attributes", {}).get("classes", [])
            )
        )
        place = timing.parent.index(timing)
        timing.parent.insert(place, addnodes.seealso("", nodes.bullet_list("", *items)))


def setup(app):
    app.connect("doctree-resolved", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
