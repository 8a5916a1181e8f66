import pytest
import sequence_lstm
import torch
from fused_lstm import launch_steps
from sequence_lstm import (
    DEVICE,
    INTERPRET,
    TILES,
    blocks_for,
    launch_sequence,
    plain_loop,
)
from torch.nn.functional import dropout

UNITS = 16 if INTERPRET else 128


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


def arguments(randn, T, B, H=UNITS, G=1, p=0.3, dtype=torch.float64, lengths=None):
    x, weight = randn(T, B, 4, H), randn(G, 4 * H // G, H) / H**0.5
    tensors = [t.to(dtype) for t in (x, weight, randn(B, H), randn(B, H))]
    lengths = torch.full((B,), T) if lengths is None else torch.tensor(lengths)
    wide = torch.promote_types(dtype, torch.float32)
    masks = dropout(torch.ones(G, B, H, dtype=wide, device=DEVICE), p)
    return *tensors, lengths.to(DEVICE), masks


def exact(arguments):
    """The outputs of the plain loop, in float64."""
    *tensors, _, masks = arguments
    return plain_loop(*(t.double() for t in (*tensors, masks)))


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (2, 1), (3, 16), (3, 17), (5, 35)])
def test_agrees_with_the_plain_loop(randn, T, B, G):
    given = arguments(randn, T, B, G=G)
    h, c, gates = launch_sequence(*given)
    torch.testing.assert_close(h[1:], exact(given), rtol=1e-12, atol=1e-13)
    i, f, g, o = gates.unbind(2)
    torch.testing.assert_close(c[1:], f * c[:-1] + i * g)
    torch.testing.assert_close(h[1:], o * c[1:].tanh())


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize(
    ("H", "dtype"), [(UNITS, torch.float32), (2 * UNITS, torch.float64)]
)
def test_agrees_with_a_launch_a_step(randn, dtype, H, G):
    """Also where sequences end, with the gates and the cells that the backward pass reads."""
    ends = [4, 0, 2, 1, *[3] * 15]
    given = arguments(randn, 4, len(ends), H, G, dtype=dtype, lengths=ends)
    torch.testing.assert_close(launch_sequence(*given), launch_steps(*given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(randn, dtype):
    given = arguments(randn, 4, 5, dtype=dtype)
    h, c, gates = launch_sequence(*given)
    assert h.dtype == gates.dtype == dtype and c.dtype == torch.float32
    torch.testing.assert_close(h[1:].double(), exact(given), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-12, 0.999])
def test_extreme_rates(randn, p):
    given = arguments(randn, 3, 2, p=p)
    torch.testing.assert_close(launch_sequence(*given)[0][1:], exact(given))


@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(randn, T, B):
    given = arguments(randn, T, B)
    h, c, gates = launch_sequence(*given)
    assert h.shape == c.shape == (T + 1, B, UNITS) and gates.shape == (T, B, 4, UNITS)
    assert torch.equal(h[0], given[2]) and torch.equal(c[0], given[3])


@pytest.mark.parametrize("G", [1, 4])
def test_units_that_fill_up_stay_zero(randn, G):
    x, weight, h0, c0, *rest = arguments(randn, 3, 2, G=G)
    weight = weight.view(4, UNITS, UNITS)
    for part in (weight[:, 5:], weight[..., 5:], x[..., 5:], h0[:, 5:], c0[:, 5:]):
        part.zero_()
    h, c, _ = launch_sequence(x, weight.view(G, -1, UNITS), h0, c0, *rest)
    assert not h[..., 5:].any() and not c[..., 5:].any()


def test_any_layout(randn):
    x, weight, *rest = arguments(randn, 3, 4)
    expected = launch_sequence(x, weight, *rest)
    x = x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    weight = weight.mT.contiguous().mT
    torch.testing.assert_close(launch_sequence(x, weight, *rest), expected)


def test_two_calls_give_the_same_bits(randn):
    given = arguments(randn, 6, 40, G=4, dtype=torch.float32)
    first, second = launch_sequence(*given), launch_sequence(*given)
    assert all(map(torch.equal, first, second))


# The blocks


class Properties:
    multi_processor_count = 132


@pytest.mark.parametrize("n_units", [128, 384, 1024, 1152, 2048, 8448])
@pytest.mark.parametrize("n_sequences", [1, 16, 17, 80, 1000])
def test_programs_that_wait_for_each_other_fit(monkeypatch, n_sequences, n_units):
    monkeypatch.setattr(sequence_lstm, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    tile, units, blocks, at_once, _ = blocks_for(TILES, n_sequences, n_units, DEVICE)
    programs = {(t, u): p for t, p, u, *_ in TILES}[tile, units]
    assert n_units % units == 0
    assert at_once >= 1 and at_once * n_units // units <= programs * 132
    assert tile * blocks >= n_sequences


def test_too_many_units_are_refused(monkeypatch):
    monkeypatch.setattr(sequence_lstm, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    with pytest.raises(ValueError, match="at most 8448 units fit this GPU, got 8576"):
        blocks_for(TILES, 1, 8576, DEVICE)


@pytest.mark.skipif(not INTERPRET, reason="about the interpreter")
def test_one_program_in_the_interpreter_waits_for_nobody():
    for n_sequences in (1, 16, 33):
        _, units, _, at_once, options = blocks_for(TILES, n_sequences, 64, DEVICE)
        assert (units, at_once, options) == (64, 1, {})


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "B", "H"),
    [(70, 80, 256), (20, 37, 1024), (20, 80, 1152), (10, 80, 2048), (3, 1000, 640)],
)  # fmt: skip
def test_many_programs(randn, T, B, H, dtype, G):
    """Every kind of block: right, and the same bits three times."""
    given = arguments(randn, T, B, H, G, dtype=dtype)
    results = [launch_sequence(*given)[0] for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    wanted = exact(given)
    error = (results[0][1:].double() - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
def test_a_captured_launch_gives_the_same_bits(randn):
    given = arguments(randn, 70, 80, 512, dtype=torch.bfloat16)
    expected = launch_sequence(*given)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = launch_sequence(*given)[0]
    for _ in range(3):
        h.zero_()
        graph.replay()
        assert torch.equal(h, expected)


@pytest.mark.gpu
def test_beside_other_work_on_the_gpu(randn):
    """Programs of another stream take part of the GPU: the launch waits, and never hangs."""
    given = arguments(randn, 100, 80, 1152, dtype=torch.bfloat16)
    expected = launch_sequence(*given)[0]
    a = randn(4096, 4096)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        with torch.cuda.stream(streams[0]):
            for _ in range(10):
                a @ a
        for stream in streams[1:]:
            with torch.cuda.stream(stream):
                results.append(launch_sequence(*given)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
