"""Where the site and its source are, if anywhere, and what follows from it.

``site_address`` adds a sitemap, the cards that social media show, and links on the page for what is
not found. ``repository`` adds a link to edit each page, and one that opens a lesson in Colab, from
the branch that holds the built site.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

from sphinx.errors import ConfigError


def site(text):
    """The site's address, with no slash at its end."""
    if not re.fullmatch(r"https?://[\w.:-]+(/[\w.~%/-]*)?", text):
        raise ConfigError(
            f"SITE_URL is {text!r}. It is an address such as https://example.org/kernels"
        )
    return text.rstrip("/")


def page(text):
    """The repository's page on the web, also from what ``git clone`` takes."""
    found = re.fullmatch(
        r"(?:(?:https|ssh)://)?(?:[\w.:-]+@)?([\w.-]+)(?::\d+/|[:/])([\w./-]+?)(?:\.git)?/?",
        text,
    )
    if not found or "/" not in found[2]:
        raise ConfigError(
            f"REPOSITORY is {text!r}. It is an address such as https://github.com/someone/kernels"
        )
    return f"https://{found[1]}/{found[2]}"


def say_where(app, config):
    config.notfound_urls_prefix = "/"
    if config.site_address:
        address = site(config.site_address)
        config.html_baseurl = config.ogp_site_url = f"{address}/"
        config.notfound_urls_prefix = f"{urlsplit(address).path}/"
        config.ogp_custom_meta_tags = [
            '<meta name="twitter:card" content="summary_large_image" />'
        ]
    if config.repository:
        config.html_context["repository"] = page(config.repository)
        options = config.html_theme_options
        options["use_edit_page_button"] = True
        options["secondary_sidebar_items"] += ["colab", "edit-this-page"]


def notebook_on_colab(app, pagename, templatename, context, doctree):
    host, _, path = context.get("repository", "").removeprefix("https://").partition("/")
    _, notebook = app.env.dlfiles.get(Path(f"{pagename}.ipynb"), (None, None))
    if notebook and host == "github.com":
        context["colab"] = (
            f"https://colab.research.google.com/github/{path}"
            f"/blob/gh-pages/_downloads/{notebook}"
        )


def setup(app):
    app.add_config_value("site_address", "", "html", str)
    app.add_config_value("repository", "", "html", str)
    if app.config.site_address:
        app.setup_extension("sphinx_sitemap")
        app.setup_extension("sphinxext.opengraph")
    app.connect("config-inited", say_where, priority=100)
    app.connect("html-page-context", notebook_on_colab)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
