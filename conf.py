"""How Sphinx builds the site. ``make html`` runs it with ``docs/`` as the source folder."""

import sys
import warnings
from pathlib import Path

from sphinx_gallery.sorting import ExplicitOrder

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

# What PyTorch and Triton warn of concerns the machine, not the reader of a page.
warnings.filterwarnings("ignore", module=r"(torch|triton)\.")

project = "Fast and Right"
author = "The authors of Fast and Right"
copyright = "2026, the authors of Fast and Right"
html_title = "Fast and Right: GPU kernels in Triton, measured and checked"

extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx_gallery.gen_gallery",
    "fold",
    "lesson_runs",
    "mathml",
    "recorded",
    "triton_functions",
]
exclude_patterns = ["_ext"]
nitpicky = True

sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    # The reading order. A lesson that is not named here comes last.
    "within_subsection_order": ExplicitOrder(
        [
            "fused_softmax.py",
            "baseline_dropout.py",
            "seeded_dropout.py",
            "checkpointed_dropout.py",
            "matrix_dropout.py",
            "sparse_johnson_lindenstrauss.py",
            "recurrent_dropout.py",
            "fused_lstm.py",
            "*",
        ]
    ),
    "filename_pattern": "",
    "download_all_examples": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "show_signature": False,
    "image_srcset": ["2x"],
    "image_scrapers": ("figures.sign_lesson", "matplotlib"),
    "reset_modules": ("matplotlib", "figures.style"),
    "notebook_images": True,
    "first_notebook_cell": "%pip install --quiet "
    + " ".join((ROOT / "requirements.txt").read_text().split("\n\n")[0].splitlines()[1:]),
}

# A lesson that takes longer than so many seconds fails the build.
lesson_limit = 300

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
html_sidebars = {"index": [], "benchmarks": [], "install": [], "reference/*": []}
html_math_renderer = "mathml"
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
