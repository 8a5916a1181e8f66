import ast
import copy
import importlib
import io
import math
import pickle
from pathlib import Path

import lstm_module
import pytest
import torch
from fused_lstm import lstm_loop
from lstm_module import (
    DEVICE,
    LSTM,
    LSTMSequence,
    launch_sequence,
    launch_sequence_backward,
    lstm_sequence,
    lstm_sequence_backward,
)
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint

BACKEND = "aot_eager" if DEVICE == "cpu" else "inductor"
F, H = 4, 6
TUTORIALS = Path(__file__).parent.parent / "tutorials"


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def make(
    dropout=0.3, recurrent_dropout=0.4, implementation=1, dtype=torch.float64, **options
):
    torch.manual_seed(0)
    options |= {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
    lstm = LSTM(F, H, implementation=implementation, **options)
    return lstm.to(DEVICE, dtype)


def drawn_masks(lstm, n_sequences):
    """The masks that the module draws after ``torch.manual_seed(5)``, and the seed set."""
    G, like = 4 if lstm.implementation == 1 else 1, next(lstm.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    n_units = max(16, H) if DEVICE == "cpu" else 128
    masks = []
    torch.manual_seed(5)
    for units, n, p in [(F, F, lstm.dropout), (n_units, H, lstm.recurrent_dropout)]:
        ones = torch.ones(G, n_sequences, units, device=DEVICE, dtype=dtype)
        masks.append(dropout(ones, p)[..., :n].double() if p else ones[..., :n].double())
    torch.manual_seed(5)
    return masks


def plain(lstm, x, hx=None, lengths=None):
    """The definition: each sequence alone, through the loop, in float64."""
    masks = drawn_masks(lstm, x.shape[1])
    parameters = [parameter.double() for parameter in lstm.parameters()]
    weight_ih, weight_hh, bias_ih, bias_hh = parameters
    zeros = torch.zeros(2, 1, x.shape[1], H, device=DEVICE, dtype=torch.float64)
    h0, c0 = zeros if hx is None else (part.double() for part in hx)
    outputs, ends = [], []
    for b in range(x.shape[1]):
        length = len(x) if lengths is None else int(lengths[b])
        here = slice(b, b + 1)
        h, c = h0[0, here], c0[0, here]
        output = x.new_zeros(0, 1, H, dtype=torch.float64)
        if length > 0:
            mine = [mask[:, here] for mask in masks]
            output, c = lstm_loop(
                x[:length, here].double(),
                weight_ih,
                weight_hh,
                bias_ih + bias_hh,
                h,
                c,
                *mine,
            )
            h = output[-1]
        padding = output.new_zeros(len(x) - length, 1, H)
        outputs.append(torch.cat([output, padding]))
        ends.append((h, c))
    if not outputs:
        return zeros[0].expand(len(x), -1, -1), (h0, c0)
    h_n, c_n = (torch.cat(parts)[None] for parts in zip(*ends, strict=True))
    return torch.cat(outputs, dim=1), (h_n, c_n)


def flat(result):
    output, (h, c) = result
    return [output, h, c]


def compare(lstm, x, hx=None, lengths=None, **tolerance):
    """Outputs, states and all gradients, against the definition."""
    inputs = [x, *(hx or []), *lstm.parameters()]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    wanted = flat(plain(lstm, x, hx, lengths))
    torch.manual_seed(5)
    got = flat(lstm(x, hx, lengths))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(DEVICE) for t in got]
    gradients = []
    for results in (got, wanted):
        loss = sum((w * r.double()).sum() for w, r in zip(weights, results, strict=True))
        gradients.append(torch.autograd.grad(loss, inputs, materialize_grads=True))
    for a, b in zip([*got, *gradients[0]], [*wanted, *gradients[1]], strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.double(), b.double(), **tolerance)


@pytest.mark.parametrize("implementation", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 7)])
def test_outputs_and_gradients(randn, implementation, shape):
    lstm = make(implementation=implementation)
    x, hx = randn(*shape, F).double(), [randn(1, shape[1], H).double() for _ in range(2)]
    compare(lstm, x, rtol=1e-12, atol=1e-13)
    compare(lstm, x, hx, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", [1, 2])
def test_dtypes(randn, dtype, implementation):
    lstm = make(implementation=implementation, dtype=dtype)
    x, hx = randn(4, 3, F, dtype=dtype), [randn(1, 3, H, dtype=dtype) for _ in range(2)]
    tolerance = {
        torch.float16: {"rtol": 2e-2, "atol": 2e-2},
        torch.bfloat16: {"rtol": 1e-1, "atol": 1e-1},
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    }[dtype]
    compare(lstm, x, hx, **tolerance)


@pytest.mark.parametrize(
    "lengths", [[5, 5, 5], [1, 5, 3], [0, 2, 5], [0, 0, 0], [2, 1, 3]]
)
@pytest.mark.parametrize("implementation", [1, 2])
def test_lengths(randn, lengths, implementation):
    lstm, x = make(implementation=implementation), randn(5, 3, F).double()
    hx = [randn(1, 3, H).double() for _ in range(2)]
    compare(lstm, x, hx, lengths, rtol=1e-12, atol=1e-13)
    compare(lstm, x, hx, torch.tensor(lengths), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(randn, shape):
    lstm, x = make(), randn(*shape, F).double()
    hx = [randn(1, shape[1], H).double() for _ in range(2)]
    compare(lstm, x, hx)
    output, (h, c) = lstm(x, hx)
    assert output.shape == (*shape, H)
    if shape[0] == 0:
        assert torch.equal(h, hx[0]) and torch.equal(c, hx[1])


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-12, 0.999])
def test_extreme_rates(randn, p):
    compare(make(p, p), randn(4, 3, F).double())


def test_padding_may_hold_anything(randn):
    lstm, x = make(), randn(4, 2, F).double()
    clean = x.clone()
    x[2:, 0] = math.nan
    x.requires_grad_()
    torch.manual_seed(5)
    y = lstm(x, lengths=[2, 4])[0]
    torch.manual_seed(5)
    torch.testing.assert_close(y, lstm(clean, lengths=[2, 4])[0])
    for gradient in torch.autograd.grad(y.sum(), [x, *lstm.parameters()]):
        assert gradient.isfinite().all()


def test_layouts(randn, layout):
    lstm, x = make(), randn(6, F * 3).double()
    view = (
        layout(x).reshape(6, 3, F)
        if layout(x).is_contiguous()
        else layout(x).unflatten(1, (3, F))
    )
    torch.manual_seed(5)
    y = lstm(view)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(y, lstm(x.view(6, 3, F))[0])
    torch.manual_seed(5)
    negated = torch.complex(x, -x).conj().imag.view(6, 3, F)
    torch.testing.assert_close(y, lstm(negated)[0])


def test_gradients_of_any_layout(randn):
    lstm, x = make(), randn(4, 3, F).double().requires_grad_()
    results = []
    for gradient in (randn(H, 3, 4).double().permute(2, 1, 0), None):
        gradient = results[0][0] if gradient is None else gradient
        torch.manual_seed(5)
        (got,) = torch.autograd.grad(lstm(x)[0], x, gradient)
        results.append((gradient.contiguous(), got))
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.manual_seed(5)
    (got,) = torch.autograd.grad(lstm(x)[0].sum(), x)  # an expanded gradient
    torch.manual_seed(5)
    (wanted,) = torch.autograd.grad(
        lstm(x)[0], x, torch.ones(4, 3, H, device=DEVICE).double()
    )
    torch.testing.assert_close(got, wanted)


# torch.nn.LSTM


def twin(lstm, **options):
    reference = torch.nn.LSTM(F, H, **options).to(DEVICE, next(lstm.parameters()).dtype)
    reference.load_state_dict(lstm.state_dict())
    return reference


@pytest.mark.parametrize("batch_first", [False, True])
def test_agrees_with_torch_when_nothing_is_dropped(randn, batch_first):
    x, hx = (
        randn(4, 3, F).double(),
        [randn(1, 4 if batch_first else 3, H).double() for _ in range(2)],
    )
    lstm = make(batch_first=batch_first).eval()
    for got, wanted in zip(
        flat(lstm(x, hx)), flat(twin(lstm, batch_first=batch_first)(x, hx)), strict=True
    ):
        torch.testing.assert_close(got, wanted)
        assert got.shape == wanted.shape
    lstm = make(0.0, 0.0, batch_first=batch_first)
    reference = twin(lstm, batch_first=batch_first)
    torch.testing.assert_close(lstm.train()(x)[0], reference(x)[0])


@pytest.mark.parametrize("n_units", [1, 7, 16, 17])
@pytest.mark.parametrize("implementation", [1, 2])
def test_any_number_of_units(randn, n_units, implementation):
    x = randn(3, 2, F).double().requires_grad_()
    lstm = LSTM(F, n_units, implementation=implementation).to(DEVICE, torch.float64)
    reference = torch.nn.LSTM(F, n_units).to(DEVICE, torch.float64)
    reference.load_state_dict(lstm.state_dict())
    results = []
    for module in (lstm, reference):
        y = module(x)[0]
        gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
        results.append([y, *gradients])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences(randn, batch_first):
    lstm = make(batch_first=batch_first).eval()
    reference = twin(lstm, batch_first=batch_first)
    sequences = [randn(length, F).double() for length in (2, 5, 1, 5)]
    cases = [
        pack_sequence(sequences, enforce_sorted=False),
        pack_sequence(sorted(sequences, key=len, reverse=True)),
        pack_padded_sequence(randn(3, 3, F).double(), [3, 3, 2], batch_first),
    ]
    for packed in cases:
        n = packed.batch_sizes[0].item()
        hx = [randn(1, n, H).double() for _ in range(2)]
        got, wanted = lstm(packed, hx), reference(packed, hx)
        assert isinstance(got[0], PackedSequence)
        for a, b in zip(got[0], wanted[0], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
        torch.testing.assert_close(got[1], tuple(wanted[1]))


def test_packed_and_padded_draw_the_same_masks(randn):
    lstm, x, lengths = make(), randn(5, 3, F).double(), [2, 5, 3]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.manual_seed(5)
    a, state = lstm(packed)
    torch.manual_seed(5)
    b, wanted = lstm(x, lengths=lengths)
    b = pack_padded_sequence(b, lengths, enforce_sorted=False)
    torch.testing.assert_close(a.data, b.data)
    torch.testing.assert_close(state, wanted)


# Masks


@pytest.mark.parametrize("implementation", [1, 2])
def test_masks_hold_for_all_steps_and_differ_elsewhere(implementation):
    lstm = make(0.5, 0.5, implementation)
    inputs, states = drawn_masks(lstm, 50)
    assert len(inputs) == len(states) == (4 if implementation == 1 else 1)
    for mask in (inputs, states):
        rows = {tuple(row.tolist()) for gate in mask for row in gate}
        assert len(rows) > 10
        kept = (mask != 0).double()
        # five deviations: a false alarm for fewer than one seed in a million
        assert abs(kept.mean() - 0.5) < 5 * 0.5 / kept.numel() ** 0.5
        if implementation == 1:
            assert len({tuple(gate.flatten().tolist()) for gate in mask}) == 4


def test_draws_anew_and_not_in_evaluation(randn):
    lstm, x = make(), randn(3, 2, F).double()
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    state = torch.random.get_rng_state()
    assert torch.equal(lstm.eval()(x)[0], lstm(x)[0])
    assert torch.equal(torch.random.get_rng_state(), state)


# The operators


def operator_arguments(randn, G, grad=False):
    n_units = 16 if DEVICE == "cpu" else 128
    sizes = (3, 2, 4, n_units), (G, 4 * n_units // G, n_units), (2, n_units), (2, n_units)
    tensors = [randn(*size).double().requires_grad_(grad) for size in sizes]
    masks = dropout(torch.ones(G, 2, n_units, device=DEVICE).double(), 0.3)
    return *tensors, torch.tensor([3, 1], device=DEVICE), masks


@pytest.mark.parametrize("G", [1, 4])
def test_operators_keep_their_promises(randn, G):
    arguments = operator_arguments(randn, G)
    torch.library.opcheck(lstm_sequence, arguments)
    _, weight, *_, ends, masks = arguments
    h, c, gates = lstm_sequence(*arguments)
    dh, dc = torch.randn_like(h), torch.randn_like(c)
    saved = gates, weight, h, c, ends, masks
    torch.library.opcheck(lstm_sequence_backward, (dh, dc, *saved))


@pytest.mark.parametrize("G", [1, 4])
def test_gradcheck(randn, G):
    arguments = operator_arguments(randn, G, grad=True)
    torch.autograd.gradcheck(
        lambda *x: LSTMSequence.apply(*x)[:2], arguments, fast_mode=True
    )


@pytest.mark.parametrize("G", [1, 4])
def test_autograd_runs_the_backward_launch(randn, G):
    arguments = operator_arguments(randn, G, grad=True)
    h, c, gates = LSTMSequence.apply(*arguments)
    assert not gates.requires_grad
    dh, dc = torch.randn_like(h), torch.randn_like(c)
    got = torch.autograd.grad((h, c), arguments[:4], (dh, dc))
    _, weight, *_, ends, masks = (t.detach() for t in arguments)
    h, c, gates = launch_sequence(*(t.detach() for t in arguments))
    expected = launch_sequence_backward(dh, dc, gates, weight, h, c, ends, masks)
    torch.testing.assert_close(got, expected)


def test_backward_twice(randn):
    lstm, x = make(), randn(3, 2, F).double().requires_grad_()
    y = lstm(x)[0].square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, x), first)


# In company


def test_checkpoint(randn):
    lstm, x = make(), randn(3, 2, F).double().requires_grad_()
    torch.manual_seed(5)
    wanted = torch.autograd.grad(lstm(x)[0].sum(), x)
    torch.manual_seed(5)
    y = checkpoint(lambda x: lstm(x)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), wanted)


def test_travels(randn):
    lstm, x = make(), randn(3, 2, F).double()
    lstm(x)[0].sum().backward()
    file = io.BytesIO()
    torch.save(lstm.state_dict(), file)
    file.seek(0)
    loaded = LSTM(F, H, dropout=0.3, recurrent_dropout=0.4, implementation=1)
    loaded = loaded.to(DEVICE, torch.float64)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), loaded):
        torch.manual_seed(5)
        got = other(x)[0]
        torch.manual_seed(5)
        torch.testing.assert_close(got, lstm(x)[0])


def test_compiles_once(randn):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    lstm, x = make(), randn(3, 2, F).double()
    compiled = torch.compile(lstm, backend=backend, fullgraph=True)
    for _ in range(3):
        torch.manual_seed(5)
        got = compiled(x)[0]
        torch.manual_seed(5)
        torch.testing.assert_close(got, lstm(x)[0])
    assert len(graphs) == 1

    torch.compiler.reset()
    torch.compile(lstm.eval(), backend=BACKEND, fullgraph=True)(x)[0].sum().backward()
    got = [parameter.grad.clone() for parameter in lstm.parameters()]
    lstm.zero_grad()
    lstm(x)[0].sum().backward()
    for gradient, parameter in zip(got, lstm.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_autocast(randn):
    lstm, x = make(dtype=torch.float32), randn(3, 2, F)
    torch.manual_seed(5)
    wanted = lstm(x)[0]
    torch.manual_seed(5)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = lstm(x)[0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=5e-2, atol=5e-2)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())


# Errors


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, "input_size must be an integer of at least 1, got 0"),
        (
            (3, 2.0),
            {},
            ValueError,
            "hidden_size must be an integer of at least 1, got 2.0",
        ),
        ((3, 3), {"dropout": 1.1}, ValueError, r"dropout must be in \[0, 1\], got 1.1"),
        (
            (3, 3),
            {"recurrent_dropout": math.nan},
            ValueError,
            "recurrent_dropout must be in",
        ),
        ((3, 3), {"recurrent_dropout": "0.1"}, TypeError, "must be a number, got str"),
        ((3, 3), {"implementation": 3}, ValueError, "must be 0, 1 or 2, got 3"),
        ((3, 3, 1), {}, TypeError, "positional arguments"),  # torch.nn.LSTM's num_layers
    ],
)
def test_errors_of_the_module(sizes, options, error, message):
    with pytest.raises(error, match=message):
        LSTM(*sizes, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": [1.0]}, "input must be a tensor or a PackedSequence, got list"),
        ({"lengths": [3.0, 1.0]}, "lengths must be int32 or int64, got torch.float32"),
        ({"hx": (None, None)}, "hx must be None or a pair of tensors"),
    ],
)
def test_errors_of_type(randn, arguments, message):
    with pytest.raises(TypeError, match=message):
        make()(**({"input": randn(3, 2, F).double()} | arguments))


def test_no_sequences_and_no_lengths(randn):
    assert make()(randn(3, 0, F).double(), lengths=[])[0].shape == (3, 0, H)


def test_states_are_apart_from_the_output(randn):
    lstm, x = make().eval(), randn(3, 2, F).double()
    y, (h, _) = lstm(x)
    expected = h.clone()
    y.detach().zero_()
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("implementation", [1, 2])
def test_an_infinite_input_saturates_gates(randn, implementation):
    """Units that fill up must not spread a NaN."""
    x = randn(3, 2, F).double()
    x[0, 0, 0] = math.inf
    lstm = make(0.0, 0.0, implementation)
    reference = twin(lstm)
    torch.testing.assert_close(lstm(x)[0], reference(x)[0], equal_nan=True)
    assert not lstm(x)[0].isnan().any()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, F), {}, r"input must be \(time, batch, 4\), got shape \(3, 4\)"),
        ((3, 2, F + 1), {}, r"input must be \(time, batch, 4\), got shape \(3, 2, 5\)"),
        ((3, 2, F), {"lengths": [1]}, r"lengths must be 2 on the CPU, got shape \(1,\)"),
        ((3, 2, F), {"lengths": [1, 4]}, r"lengths must be from 0 to 3, got \[1, 4\]"),
        ((3, 2, F), {"lengths": [-1, 2]}, "lengths must be from 0 to 3"),
        (
            (3, 2, F),
            {"hx": torch.zeros(2, 1, 3, H)},
            r"hx must be two tensors of shape \(1, 2, 6\)",
        ),
    ],
)
def test_errors_of_a_call(shape, options, message):
    with pytest.raises(ValueError, match=message):
        make(dtype=torch.float32)(torch.zeros(shape, device=DEVICE), **options)


def test_a_packed_sequence_has_its_own_lengths(randn):
    packed = pack_sequence([randn(2, F).double()])
    with pytest.raises(ValueError, match="lengths must be None for a PackedSequence"):
        make()(packed, lengths=[2])
    with pytest.raises(ValueError, match=r"input must be \(batch, time, 4\)"):
        make(batch_first=True)(randn(3, 4).double())


# Keras


def keras_lstm(lstm, n_sequences):
    """Keras's LSTM with our weights, and our masks put in the place of its own."""
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("needs Keras on its torch backend")
    layer = keras.layers.LSTM(
        H,
        dropout=lstm.dropout,
        recurrent_dropout=lstm.recurrent_dropout,
        implementation=lstm.implementation,
        return_sequences=True,
        return_state=True,
        dtype="float64",
        use_cudnn=False,  # whose path takes no list of masks
    )
    layer.build((n_sequences, None, F))
    weight_ih, weight_hh, bias_ih, bias_hh = lstm.parameters()
    weights = weight_ih.T, weight_hh.T, bias_ih + bias_hh
    layer.set_weights([weight.detach().cpu().numpy() for weight in weights])
    masks = [
        mask.to(layer.cell.kernel.value.device) for mask in drawn_masks(lstm, n_sequences)
    ]

    def as_keras(mask):
        # implementation 1 takes a list for i, f, c, o: for a shared mask four times the same
        return list(mask.expand(4, -1, -1)) if layer.cell.implementation == 1 else mask[0]

    layer.cell.get_dropout_mask = lambda x: as_keras(masks[0])
    layer.cell.get_recurrent_dropout_mask = lambda h: as_keras(masks[1])
    return layer


@pytest.mark.parametrize("rates", [(0.3, 0.4), (0.3, 0.0), (0.0, 0.4), (0.0, 0.0)])
@pytest.mark.parametrize("implementation", [0, 1, 2])
def test_agrees_with_keras(randn, monkeypatch, implementation, rates):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    lstm = make(*rates, implementation, batch_first=True)
    x = randn(3, 5, F).double()
    layer = keras_lstm(lstm, 3)
    wanted = layer(x.to(layer.cell.kernel.value.device), training=True)
    torch.manual_seed(5)
    output, (h, c) = lstm(x)
    for got, result in zip((output, h[0], c[0]), wanted, strict=True):
        torch.testing.assert_close(got, result.to(DEVICE), rtol=0, atol=1e-6)


def test_agrees_with_keras_on_padded_sequences(randn, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    lstm, x = make(batch_first=True), randn(3, 5, F).double()
    lengths = torch.tensor([5, 2, 4])
    layer = keras_lstm(lstm, 3)
    mask = torch.arange(5)[None] < lengths[:, None]
    device = layer.cell.kernel.value.device
    _, h, c = layer(x.to(device), mask=mask.to(device), training=True)
    torch.manual_seed(5)
    _, (h_n, c_n) = lstm(x, lengths=lengths)
    torch.testing.assert_close(h_n[0], h.to(DEVICE), rtol=0, atol=1e-6)
    torch.testing.assert_close(c_n[0], c.to(DEVICE), rtol=0, atol=1e-6)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [1, 2])
def test_many_units(randn, monkeypatch, implementation):
    def draw(ones, *rest):  # the same masks for both dtypes
        return dropout(ones.float(), *rest).to(ones.dtype)

    monkeypatch.setattr(lstm_module, "dropout", draw)
    torch.manual_seed(0)
    rates = {"dropout": 0.3, "recurrent_dropout": 0.3}
    lstm = LSTM(50, 1150, **rates, implementation=implementation).to(DEVICE)
    x = randn(20, 33, 50).requires_grad_()
    grads = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(5)
        lstm.to(dtype)
        y = lstm(x.to(dtype))[0]
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, *lstm.parameters()])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [1, 2])
def test_a_captured_module(randn, implementation):
    captured, lstm = (
        make(implementation=implementation, dtype=torch.float32) for _ in range(2)
    )
    x = randn(4, 3, F).requires_grad_()
    torch.cuda.make_graphed_callables(captured, (torch.randn_like(x).requires_grad_(),))
    results = []
    for module in (captured, lstm):
        # the generator moves on as PyTorch's own operators do in a graph
        y = module(x)[0]
        results.append(torch.autograd.grad(y.sum(), [x, *module.parameters()]))
    torch.manual_seed(1)
    first = captured(x)[0].clone()
    assert not torch.equal(captured(x)[0], first)
    torch.manual_seed(1)
    assert torch.equal(captured(x)[0], first)
    torch.manual_seed(1)
    torch.testing.assert_close(lstm(x)[0], first)


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 1e-1, 1, 10])
def test_small_inputs_keep_their_digits(randn, scale):
    reference = torch.nn.LSTM(5, 6, bias=False).to(DEVICE)
    lstm = LSTM(5, 6).to(DEVICE).eval()
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            if "bias" in name:
                parameter.zero_()
            else:
                parameter.copy_(getattr(reference, name))
    x = scale * randn(4, 3, 5)
    exact = reference.double()(x.double())[0]
    error = (lstm(x)[0] - exact).abs().max() / exact.abs().max()
    assert error < 1e-5


def test_forward_mode_and_second_derivatives_are_errors(randn):
    lstm = LSTM(3, 4, dropout=0.5, recurrent_dropout=0.5).to(DEVICE)
    x = randn(2, 2, 3)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        lstm(torch.autograd.forward_ad.make_dual(x, x))
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(lstm(x)[0].sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="LSTM has no second derivatives"):
        torch.autograd.grad(first.sum(), x)


def test_gradients_by_torch_func(randn):
    lstm, x = LSTM(3, 4).to(DEVICE).eval(), randn(2, 2, 3)
    got = torch.func.grad(lambda x: lstm(x)[0].sin().sum())(x)
    x = x.requires_grad_()
    (expected,) = torch.autograd.grad(lstm(x)[0].sin().sum(), x)
    torch.testing.assert_close(got, expected)


def test_states_of_another_kind_are_refused(randn):
    lstm, x = LSTM(3, 4).to(DEVICE), randn(2, 2, 3)
    state = randn(1, 2, 4)
    for hx, error, message in [
        (5, TypeError, "hx must be None or a pair of tensors"),
        ((state, state.double()), TypeError, "hx must be torch.float32, as input"),
        ((state.to("meta"), state), ValueError, "hx must be on .*, as input, got meta"),
    ]:
        with pytest.raises(error, match=message):
            lstm(x, hx)
    with pytest.raises(TypeError, match=r"as the weights, got torch\.float64"):
        lstm(x.double())


def test_lengths_when_the_default_device_is_another(randn):
    lstm, x = LSTM(3, 4).to(DEVICE).eval(), randn(3, 2, 3)
    expected = lstm(x, lengths=[3, 1])[0]
    torch.set_default_device("meta")
    try:
        torch.testing.assert_close(lstm(x, lengths=[3, 1])[0], expected)
    finally:
        torch.set_default_device(None)


def function(lesson, name):
    """A function's code, without its docstring and comments."""
    tree = ast.parse((TUTORIALS / f"{lesson}.py").read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    found.body = found.body[ast.get_docstring(found) is not None :]
    return ast.unparse(found)


SHARED = ["arrive", "wait", "blocks_for", "launch_all_steps"]
FORWARD = ["sequence_kernel", "launch_sequence", *SHARED]
BACKWARD = ["sequence_backward_kernel", "launch_sequence_backward"]
REPEATED = [
    ("sequence_lstm", "fused_lstm", ["tanh"]),
    ("sequence_backward", "sequence_lstm", ["tanh", *SHARED]),
    ("lstm_module", "sequence_lstm", ["tanh", *FORWARD]),
    ("lstm_module", "sequence_backward", BACKWARD),
]


@pytest.mark.parametrize(
    ("lesson", "first", "name"),
    [(lesson, first, name) for lesson, first, names in REPEATED for name in names],
)
def test_a_function_on_few_lines_is_the_one_of_its_lesson(lesson, first, name):
    assert function(lesson, name) == function(first, name)


def test_blocks_are_those_of_their_lesson():
    here = importlib.import_module("lstm_module")
    assert here.TILES == importlib.import_module("sequence_lstm").TILES
    backward = importlib.import_module("sequence_backward").BACKWARD_TILES
    assert backward == here.BACKWARD_TILES


@pytest.mark.parametrize("n_sequences", [16, 17, 40])
def test_more_sequences_than_a_block(randn, n_sequences):
    compare(make(), randn(2, n_sequences, F).double(), rtol=1e-12, atol=1e-13)


def test_two_calls_give_the_same_bits(randn):
    lstm, x = make(), randn(5, 19, F).double().requires_grad_()
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        y = lstm(x)[0]
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *lstm.parameters()])])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_nested_tensor_gets_a_sentence():
    x = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)])
    with pytest.raises(TypeError, match="input must be a dense tensor, got a nested one"):
        LSTM(4, 7)(x)
