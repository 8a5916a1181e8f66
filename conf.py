"""How Sphinx builds the site. ``make html`` runs it with ``docs/`` as the source folder."""

import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

# What PyTorch and Triton warn of concerns the machine, not the reader of a page.
warnings.filterwarnings("ignore", module=r"(torch|triton)\.")

# Where the site and its source will be, if anywhere: make html SITE_URL=... REPOSITORY=...
site_address = os.environ.get("SITE_URL", "")
repository = os.environ.get("REPOSITORY", "")

project = "Fast and Right"
author = "The authors of Fast and Right"
copyright = "2026, the authors of Fast and Right"
html_title = "Fast and Right: GPU kernels in Triton, measured and checked"

extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx_gallery.gen_gallery",
    "notfound.extension",
    "address",
    "benchmarks.show",
    "bibliography",
    "citations",
    "course",
    "findable",
    "fold",
    "glossary_links",
    "roofline",
    "large_figures",
    "lesson_runs",
    "made_below",
    "mathml",
    "notebooks",
    "related",
    "support",
    "triton_functions",
]
exclude_patterns = ["_ext", "_templates"]
templates_path = ["docs/_templates"]
nitpicky = True
# Of a folder above the lessons it does not matter.
suppress_warnings = ["sphinx_gallery.space_in_filename"]

# The reading order. A lesson that is not named here comes last.
course = {
    "Start": ["fused_softmax", "baseline_dropout", "seeded_dropout"],
    "Make it yours": [
        "inside_a_kernel",
        "debugging",
        "operators",
        "checkpointed_dropout",
        "matrix_dropout",
    ],
    "At the limit": [
        "softmax_tiles",
        "softmax_slices",
        "sparse_johnson_lindenstrauss",
        "very_sparse_projection",
    ],
    "Recurrent": [
        "recurrent_dropout",
        "language_model",
        "fused_lstm",
        "sequence_lstm",
        "sequence_backward",
        "lstm_module",
    ],
    "On many GPUs": ["block_dropout", "sharded_dropout"],
}

sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "copyfile_regex": r"index\.rst",
    "filename_pattern": "",
    "download_all_examples": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "show_signature": False,
    "image_scrapers": ("figures.sign_lesson", "alternatives.scraper"),
    "reset_modules": ("matplotlib", "figures.style"),
    "notebook_images": True,
}

# The figure at the head of the site and of the README: a folder of docs/results, and a benchmark.
recorded_headline = "nvidia-h100-80gb-hbm3", "softmax_tiles.softmax-tiles-bfloat16"

# Words of the glossary mean something else in these.
glossary_exceptions = [
    "attention mask",
    "block of H rows",
    "blocks of H rows",
    "in stages",
]

# A lesson that takes longer than so many seconds is ended, and fails the build.
lesson_limit = 300

# Names in code lead to these. The inventories are kept here, so that the build asks no network:
# the names that lessons use, without classes that lessons derive from (theirs would lead there, too).
intersphinx_mapping = {
    "matplotlib": ("https://matplotlib.org/stable/", "inventories/matplotlib.inv"),
    "torch": ("https://docs.pytorch.org/docs/stable/", "inventories/torch.inv"),
    "triton": ("https://triton-lang.org/main/", "inventories/triton.inv"),
}

myst_enable_extensions = ["colon_fence", "dollarmath"]
autodoc_typehints = "none"
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_static_path = ["docs/_static"]
html_css_files = ["site.css"]
html_favicon = "docs/_static/favicon.svg"
html_show_sourcelink = False
# Only the lessons have a list beside them.
html_sidebars = {
    page: []
    for page in (
        "index",
        "benchmarks",
        "install",
        "glossary",
        "bibliography",
        "course",
        "404",
        "reference/*",
    )
}
html_math_renderer = "mathml"
html_context = {
    "default_mode": "auto",
    # Beside a repository, see docs/_ext/address.py.
    "edit_page_url_template": "{{ repository }}/edit/main/"
    "{% if file_name == 'tutorials/index.rst' %}tutorials/index.rst"
    "{% elif file_name.startswith('tutorials/') %}{{ file_name | replace('.rst', '.py') }}"
    "{% else %}docs/{{ file_name }}{% endif %}",
}
html_theme_options = {
    "logo": {
        "text": "Fast and Right",
        "image_light": "_static/favicon.svg",
        "image_dark": "_static/favicon.svg",
    },
    "navbar_align": "left",
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc", "sg_download_links"],
    "footer_start": ["copyright"],
    "footer_end": [],
}

sitemap_url_scheme = "{link}"
sitemap_excludes = ["404.html", "genindex.html", "search.html"]
