"""The GPU that the lessons find.

It is asked for in a process of its own: a process that has used a GPU can't fork others that do.
"""

import multiprocessing
import os
from functools import cache

import torch


def name():
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return gpu and torch.get_device_module(gpu.type).get_device_name()


@cache
def gpu():
    """Its name, or None where the lessons use the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(name)


def on_gpu():
    return gpu() is not None
