"""Each picture on a page is a link to itself alone: on a phone that shows it larger."""

import re

PICTURE = re.compile(r'<img\b[^>]*\bsrc="([^"]+\.(?:svg|png))"[^>]*>')
LINK = re.compile(r"<a\b.*?</a>", re.DOTALL)


def linked(body):
    """HTML in which each picture outside a link is one. What has no alternative only decorates."""
    pieces, end = [], 0
    links = [(link.start(), link.end()) for link in LINK.finditer(body)]
    for picture in PICTURE.finditer(body):
        inside = any(start < picture.start() < stop for start, stop in links)
        if inside or 'alt=""' in picture[0]:
            continue
        pieces += [body[end : picture.start()]]
        pieces += [f'<a class="large" href="{picture[1]}">{picture[0]}</a>']
        end = picture.end()
    return "".join([*pieces, body[end:]])


def add(app, pagename, templatename, context, doctree):
    if doctree is not None and "body" in context:
        context["body"] = linked(context["body"])


def setup(app):
    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
