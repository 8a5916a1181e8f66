"""The look of the lessons' figures."""


def style(gallery_conf, fname):
    """Called before each lesson, after Sphinx-Gallery has reset matplotlib."""
    import matplotlib

    matplotlib.rcParams.update(
        {
            "figure.figsize": (8, 4.5),
            "savefig.bbox": "tight",
            "axes.grid": True,
            "grid.alpha": 0.3,
        }
    )
