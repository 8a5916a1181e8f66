"""Text alternatives for the lessons' figures: the axes, the lines, and the values at the right end.

Sphinx-Gallery takes the alternative from a figure's title, seen or not, and appends the titles of
its axes. It puts it into HTML as it is, so characters that mean something there are escaped here.
"""

from html import escape

from sphinx_gallery.scrapers import matplotlib_scraper


def describe(axes):
    def label(text):
        return text.partition("\n")[0]

    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    text = " over ".join(filter(None, map(label, (axes.get_ylabel(), axes.get_xlabel()))))
    ends = [
        f"{line.get_label()} {line.get_ydata()[-1]:.4g}"
        for line in lines
        if len(line.get_ydata())
    ]
    if ends:
        right = max(line.get_xdata()[-1] for line in lines if len(line.get_xdata()))
        place = f"{right:,.0f}" if right == int(right) else f"{right:.4g}"
        text += f"; at {place}: {', '.join(ends)}"
    return text


def scraper(block, block_vars, gallery_conf):
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        figure = plt.figure(number)
        if not figure.get_suptitle():
            text = ". ".join(filter(None, map(describe, figure.axes)))
            figure.suptitle(escape(text), visible=False)
    return matplotlib_scraper(block, block_vars, gallery_conf, format="svg")
