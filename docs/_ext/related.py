"""Each lesson ends with the lessons that it links to, and those that link to it."""

from docutils import nodes
from sphinx import addnodes


def mentioned(env, lesson):
    """The pages whose labels a lesson refers to."""
    labels = env.domains["std"].anonlabels
    return {
        labels[link["reftarget"]][0]
        for link in env.get_doctree(lesson).findall(addnodes.pending_xref)
        if link["reftarget"] in labels
    }


def add(app, doctree, docname):
    index = f"{app.config.sphinx_gallery_conf['gallery_dirs']}/index"
    lessons = app.env.toctree_includes[index]
    if docname not in lessons:
        return
    mentions = {lesson: mentioned(app.env, lesson) for lesson in lessons}
    links = [
        nodes.reference(
            "",
            app.env.titles[lesson].astext(),
            refuri=app.builder.get_relative_uri(docname, lesson),
        )
        for lesson in lessons
        if lesson != docname
        and (lesson in mentions[docname] or docname in mentions[lesson])
    ]
    if links:
        items = [nodes.list_item("", nodes.paragraph("", "", link)) for link in links]
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
