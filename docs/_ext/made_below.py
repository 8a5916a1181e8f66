"""What ran the lessons is said in small print: below the first page, and not in a box on a lesson's."""

from docutils import nodes


def move(app, doctree):
    """The note that ``lesson_runs`` has put behind the title."""
    section = next(iter(doctree.findall(nodes.section)), None)
    for note in list(section.children)[1:3] if section else ():
        if isinstance(note, nodes.note) and len(note) == 1:
            small = nodes.paragraph("", "", *note[0].children, classes=["made"])
            place = section.index(note)
            section.remove(note)
            if app.env.docname == app.config.root_doc:
                section += small
            else:
                section.insert(place, small)


def setup(app):
    app.connect("doctree-read", move, priority=650)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
