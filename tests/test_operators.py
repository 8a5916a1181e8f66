"""Every way to call the kernel, and the table that the lesson prints of them."""

import pytest
import torch
from operators import CHECKS, DEVICE, INTERPRET, WAYS, custom, listed, outcome
from test_seeded_dropout import philox_words

EXPECTED = {
    "gradient": "error yes yes yes yes yes",
    "second_gradient": "error yes yes yes yes yes",
    "torch_func": "error error error error error yes",
    "forward_mode": "NO error NO NO NO error",
    "under_vmap": "error error yes yes yes error",
    "passes_opcheck": "error error yes error yes yes",
    "compiled": "error error yes error yes yes",
    "exported": "error error yes error yes yes",
    "captured": "yes yes yes yes yes yes",
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_table(check):
    found = [outcome(check, call) for call in WAYS.values()]
    expected = EXPECTED[check.__name__].split()
    if not INTERPRET and check.__name__ in ("passes_opcheck", "compiled", "exported"):
        # What the compiler makes of a launch that it can see depends on its version.
        seen = [list(WAYS).index(way) for way in ("bare", "Function", "triton_op")]
        for i in seen:
            assert found[i] != "NO"
            found[i] = expected[i]
    assert found == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_way_computes_the_known_mask(way, transposed):
    x = torch.full((40, 5), 3.0, device=DEVICE)
    if transposed:
        x = x.T.contiguous().T
    y = WAYS[way](x, 0.3, 7)
    keep = philox_words(7, 0, 50).flatten() >= round(0.3 * 2**32)
    expected = torch.where(keep, torch.tensor(3.0) * (1 / 0.7), 0.0)
    torch.testing.assert_close(y.cpu().flatten(), expected)


@pytest.mark.parametrize(
    "operator", [custom, listed.default], ids=["custom_op", "Library"]
)
def test_operators_keep_their_promises(operator):
    for x in (torch.ones(9, device=DEVICE), torch.ones(4, 5, device=DEVICE).T):
        torch.library.opcheck(operator, (x, 0.5, 7))
        torch.library.opcheck(operator, (x.clone().requires_grad_(), 0.5, 7))
