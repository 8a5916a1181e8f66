"""The lessons' benchmarks: recorded on a GPU, stored in ``docs/results``, drawn and shown.

``schema`` is what recorder and site agree on: the form of a record. ``python -m benchmarks`` runs
``record``, which measures and writes it; ``make record`` does so. The Sphinx extension
``benchmarks.show`` reads it and puts it on the pages, with the figures of ``draw``. ``nvml`` asks the
driver how the GPU is.
"""
