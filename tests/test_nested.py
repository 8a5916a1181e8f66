"""Nested tensors get a sentence from every function that takes a dense one."""

import importlib

import pytest
import torch
from conftest import DEVICE

CALLS = {
    "fused_softmax.row_softmax": {},
    "softmax_tiles.tile_softmax": {},
    "softmax_slices.slice_softmax": {},
    "baseline_dropout.dropout": {"x_keep": torch.ones(2, 3), "p": 0.5},
    "seeded_dropout.seeded_dropout": {"p": 0.5, "seed": 7},
    "seeded_dropout.seeded_dropout4x": {"p": 0.5, "seed": 7},
    "checkpointed_dropout.replayed_dropout": {"p": 0.5, "seed": torch.tensor([7])},
    "matrix_dropout.matrix_dropout": {"p": 0.5, "seeds": torch.tensor([7, 8])},
    "block_dropout.block_dropout": {"p": 0.5, "seed": 7, "shape": [4, 4], "offsets": [0, 0]},
    "sparse_johnson_lindenstrauss.sparse_jl": {"n_components": 4, "seed": 7},
    "very_sparse_projection.very_sparse_jl": {"n_components": 4, "seed": 7},
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_get_a_sentence(call, layout):
    lesson, name = call.split(".")
    function = getattr(importlib.import_module(lesson), name)
    parts = [torch.ones(2, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    with pytest.raises(TypeError, match="x must be a dense tensor, not nested, got"):
        function(x, **CALLS[call])
