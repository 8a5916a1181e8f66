"""For each lesson calls of its functions that launch all its kernels."""

import torch


def block_dropout(lesson):
    lesson.block_dropout(torch.empty(99, 1000), 0.5, 7, (200, 2000), (4, 4))
    lesson.block_dropout(torch.empty(99, 1000).bfloat16(), 0.5, 7, (201, 2001), (3, 5))


CALLS = {
    "block_dropout": block_dropout,
}
