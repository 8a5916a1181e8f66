"""What the tests of all lessons share. No lesson is imported here: some tests need none."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: more threads would wait for each other, and use a core to do so.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# As the lessons choose, and before anything imports Triton.
GPU = torch.accelerator.current_accelerator(check_available=True)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or GPU is None
DEVICE = "cpu" if INTERPRET else GPU.type
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"

# Layouts of a 2-d tensor: each takes a contiguous tensor and returns another of the same values.
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every second": lambda x: torch.stack([x, -x], dim=2)[:, :, 0],
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """A process for each core, but tests that share a GPU run in this one."""
    return None if INTERPRET else 0


def pytest_collection_modifyitems(items):
    if INTERPRET:
        skip = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(params=FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.fixture(
    params=["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]  # slow on a CPU
)
def backend(request):
    """What ``torch.compile`` compiles with."""
    return request.param


@pytest.fixture
def randn():
    """Normal numbers on the lessons' device, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(DEVICE, dtype)

    return draw
