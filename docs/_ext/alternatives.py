"""Text alternatives for the lessons' figures: their titles, their axes, and what is drawn.

Of lines these are the values at the right end; of pictures, how many cells they have and how many of
these are not 0. Sphinx-Gallery puts an alternative into HTML as it is, so characters that mean
something there are escaped here.
"""

import re
from html import escape

import numpy as np
from sphinx_gallery.scrapers import matplotlib_scraper


def ends(lines):
    """The right end of lines, and the values there."""
    right = max(line.get_xdata()[-1] for line in lines)
    place = f"{right:,.0f}" if right == int(right) else f"{right:.4g}"
    values = [f"{line.get_label()} {line.get_ydata()[-1]:.4g}" for line in lines]
    return f"at {place}: {', '.join(values)}"


def picture(cells, before):
    """What a picture shows beside those before it in the figure."""
    for number, other in enumerate(before, 1):
        if np.array_equal(cells, other):
            return f"the same as picture {number}"
    rows, columns = cells.shape[:2]
    share = np.count_nonzero(cells) / cells.size
    return f"{rows} by {columns} cells, {share:.0%} of them not 0"


def alternative(figure):
    parts, before = [figure.get_suptitle()], []
    for axes in figure.axes:
        title = axes.get_title(loc="left") or axes.get_title()
        labels = [
            text.partition("\n")[0] for text in (axes.get_ylabel(), axes.get_xlabel())
        ]
        parts.append(
            ": ".join(filter(None, [title, " over ".join(filter(None, labels))]))
        )
        lines = [line for line in axes.get_lines() if line.get_label()[0] != "_"]
        if lines := [line for line in lines if len(line.get_xdata())]:
            parts[-1] += f"; {ends(lines)}"
        for image in axes.get_images():
            cells = np.asarray(image.get_array())
            said = f"picture {len(before) + 1}, {picture(cells, before)}"
            parts[-1] = ": ".join(filter(None, [parts[-1], said]))
            before.append(cells)
    return ". ".join(filter(None, parts))


def scraper(block, block_vars, gallery_conf):
    import matplotlib.pyplot as plt

    texts = [escape(alternative(plt.figure(number))) for number in plt.get_fignums()]
    rst = matplotlib_scraper(block, block_vars, gallery_conf, format="svg")
    found = iter(texts)
    return re.sub(r"(?<=:alt:).*", lambda _: f" {next(found)}", rst)
