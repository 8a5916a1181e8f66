import copy
import io
import math
import pickle
import warnings
import weakref
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from recurrent_dropout import (
    DEVICE,
    FORMS,
    HEADERS,
    INTERPRET,
    EmbeddingDropout,
    LockedDropout,
    WeightDrop,
    shared_dropout,
    shared_dropout_op,
    side_by_side,
)
from seeded_dropout import seeded_dropout4x
from torch.utils.checkpoint import checkpoint

BACKEND = "aot_eager" if DEVICE == "cpu" else "inductor"
SHAPES = [
    (1, 1, 1),
    (3, 5, 1),
    (1, 37, 1),
    (2, 3, 300),
    (4, 130, 3),
    (0, 3, 2),
    (2, 0, 1),
    (2, 3, 0),
]


def seed_of(value):
    return torch.tensor([value], device=DEVICE)


def same_seed(module, *inputs):
    torch.manual_seed(5)
    return module(*inputs)


# The operator


@pytest.mark.parametrize("shape", SHAPES)
def test_decisions_are_those_of_seeded_dropout(randn, shape, dtype):
    x = randn(*shape, dtype=dtype)
    decisions = seeded_dropout4x(torch.ones(shape[1], device=DEVICE), 0.3, 11) != 0
    expected = (x.double() / 0.7 * decisions[:, None]).to(dtype)
    y = shared_dropout(x, 0.3, seed_of(11))
    assert torch.equal(y != 0, (x != 0) & decisions[:, None])
    torch.testing.assert_close(y, expected)


def test_share_of_kept_decisions():
    n = 20_000
    for p in (0.1, 0.5, 0.9):
        x = torch.ones(1, n, 1, device=DEVICE)
        kept = (shared_dropout(x, p, seed_of(3)) != 0).sum().item()
        # five deviations: a false alarm for fewer than one seed in a million
        assert abs(kept - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("seed", [0, -1, 2**62, -(2**63)])
def test_any_seed(seed):
    x = torch.ones(1, 200, 1, device=DEVICE)
    expected = seeded_dropout4x(x, 0.5, seed)
    assert torch.equal(shared_dropout(x, 0.5, seed_of(seed)), expected)


# Philox4x32-10 of counter 0 under key 0, as its authors published it
KNOWN_WORDS = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8


@pytest.mark.parametrize(("i", "word"), list(enumerate(KNOWN_WORDS)))
def test_known_words_decide(i, word):
    x = torch.ones(1, 4, 1, device=DEVICE)
    assert shared_dropout(x, word / 2**32, seed_of(0))[0, i] != 0
    assert shared_dropout(x, (word + 1) / 2**32, seed_of(0))[0, i] == 0


def test_p_of_0_and_1(randn):
    x = randn(2, 9, 2)
    x[0, 0, 0] = math.nan
    torch.testing.assert_close(
        shared_dropout(x, 0.0, seed_of(1)), x, rtol=0, atol=0, equal_nan=True
    )
    assert not shared_dropout(x, 1.0, seed_of(1)).any()
    assert not shared_dropout(x, 1 - 1e-12, seed_of(1)).any()


def test_a_dropped_nan_becomes_0(randn):
    x = torch.full((1, 100, 1), math.inf, device=DEVICE)
    y = shared_dropout(x, 0.5, seed_of(1))
    assert set(y.flatten().tolist()) == {0.0, math.inf}


def test_layouts(randn):
    x = randn(4, 6, 5)
    for view in (x.transpose(0, 2), x[:, ::2], x[:1].expand(3, -1, -1)):
        expected = shared_dropout(view.contiguous(), 0.5, seed_of(2))
        assert torch.equal(shared_dropout(view, 0.5, seed_of(2)), expected)
    negated = torch.complex(x, x).conj().imag
    assert torch.equal(
        shared_dropout(negated, 0.5, seed_of(2)), -shared_dropout(x, 0.5, seed_of(2))
    )


def test_gradients(randn):
    x = randn(2, 3, 2, dtype=torch.float64).requires_grad_()
    function = partial(shared_dropout, p=0.4, seed=seed_of(3))
    torch.autograd.gradcheck(function, x, fast_mode=True)
    torch.autograd.gradgradcheck(function, x, fast_mode=True)
    (gradient,) = torch.autograd.grad(function(x), x, randn(2, 2, 3).double().mT)
    assert gradient.shape == x.shape


def test_operator_keeps_its_promises(randn, dtype):
    for x in (randn(2, 3, 2, dtype=dtype), randn(2, 2, 3, dtype=dtype).mT):
        torch.library.opcheck(shared_dropout_op, (x, 0.5, seed_of(7)))


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_the_gradient_is_the_same_dropout(randn, p):
    x, gradient = randn(2, 9, 3).requires_grad_(), randn(3, 9, 2).transpose(0, 2)
    y = shared_dropout(x, p, seed_of(3))
    (got,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
    assert torch.equal(got, shared_dropout(gradient, p, seed_of(3)))
    (got,) = torch.autograd.grad(y, x, randn(1, 1, 1).expand(2, 9, 3))
    assert torch.equal(got == 0, shared_dropout(torch.ones_like(x), p, seed_of(3)) == 0)


def test_input_is_left_alone(randn):
    x = randn(2, 9, 3)
    before = x.clone()
    shared_dropout(x, 0.5, seed_of(1))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("x", "p", "seed", "error", "message"),
    [
        ([1.0], 0.5, seed_of(1), TypeError, "x must be a dense tensor, not nested, got list"),
        (
            torch.ones(1, 3, 1).to_sparse(),
            0.5,
            seed_of(1),
            TypeError,
            "x must be a dense tensor, not nested, got torch.sparse_coo",
        ),
        (torch.ones(1, 3, 1).int(), 0.5, seed_of(1), TypeError, "x must be float16"),
        (torch.ones(1, 3, 1).to(torch.complex64), 0.5, seed_of(1), TypeError, "x must be float16"),
        (torch.ones(3), 0.5, seed_of(1), ValueError, r"x must be \(repeats, .*got shape \(3,\)"),
        (torch.ones(1, 3, 1, device="meta"), 0.5, seed_of(1), ValueError, "device type"),
        (torch.ones(1, 3, 1), 1.5, seed_of(1), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (torch.ones(1, 3, 1), math.nan, seed_of(1), ValueError, "p must be in"),
        (torch.ones(1, 3, 1), "0.5", seed_of(1), TypeError, "p must be a number, got str"),
        (torch.ones(1, 3, 1), 0.5, seed_of(1).int(), ValueError, "seed must be one int64"),
        (torch.ones(1, 3, 1), 0.5, seed_of(1)[:0], ValueError, "seed must be one int64"),
    ],
)  # fmt: skip
def test_errors_of_the_operator(x, p, seed, error, message):
    if isinstance(x, torch.Tensor) and x.device.type == "cpu":
        x = x.to(DEVICE)
    with pytest.raises(error, match=message):
        shared_dropout(x, p, seed)


# The table


@pytest.mark.parametrize("name", FORMS)
def test_the_table_has_a_shape_and_a_source_for_each_form(name):
    assert len(FORMS[name]) == len(HEADERS) - 1
    _, shape, gates, drawn, *_ = FORMS[name]
    assert set(shape.split()) <= set("TBGHV1")
    assert ("G" in shape) == (gates == "own")
    assert ("T" in shape) == (drawn == "step")


def test_the_drawing_has_all_forms():
    drawing = Path(__file__).parent.parent / "docs/_static/recurrent_forms.svg"
    text = drawing.read_text()
    for name, (_, shape, *_) in FORMS.items():
        assert f">{name}</text>" in text and shape.replace(" ", " × ") in text


# LockedDropout


def test_locked_dropout_is_the_published_formula(randn, dtype):
    x, p = randn(6, 3, 5, dtype=dtype), 0.4
    module = LockedDropout(p)
    keep = same_seed(module, torch.ones(1, 3, 5, device=DEVICE)) != 0
    # awd-lstm-lm: a Bernoulli mask of (1, batch, features), divided by 1 - p, expanded
    expected = x.double() * keep.double() / (1 - p)
    got = same_seed(module, x)
    torch.testing.assert_close(got, expected.to(dtype))
    assert got.dtype == dtype


def test_locked_dropout_draws_anew(randn):
    module, x = LockedDropout(0.5), torch.ones(2, 10, 10, device=DEVICE)
    assert not torch.equal(module(x), module(x))
    assert module.eval()(x) is x
    assert LockedDropout(0.0)(x) is x
    assert module.train()(x).count_nonzero() < 200


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_locked_dropout_of_little(shape):
    y = LockedDropout(0.5)(torch.ones(shape, device=DEVICE))
    assert y.shape == shape


def test_locked_dropout_refuses_other_inputs():
    with pytest.raises(
        ValueError, match=r"x must be \(time, batch, features\), got shape"
    ):
        LockedDropout(0.5)(torch.ones(3, 4, device=DEVICE))
    with pytest.raises(
        TypeError, match="x must be a dense tensor, not nested, got ndarray"
    ):
        LockedDropout(0.5)(np.ones((2, 3, 4)))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_get_a_sentence(layout):
    parts = [torch.ones(2, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    for module in (LockedDropout(0.5), LockedDropout(0.5).eval()):
        with pytest.raises(TypeError, match="x must be a dense tensor, not nested, got"):
            module(x)


def test_locked_dropout_takes_the_rate_of_a_call():
    """As in awd-lstm-lm: ``LockedDropout()(x, dropout)``."""
    x, module = torch.ones(2, 100, 100, device=DEVICE), LockedDropout()
    assert module(x, 0) is x and module(x, dropout=0.0) is x
    assert module.eval()(x, 0.9) is x
    module.train()
    assert not module(x, 1.0).any()
    for rate in (None, 0.1, 0.5):
        y = same_seed(module, x, rate)
        assert torch.equal(y, same_seed(LockedDropout(0.5 if rate is None else rate), x))
    kept = (module(x, 0.1) != 0).float().mean().item()
    # one mask of 10 000 decisions; five deviations
    assert abs(kept - 0.9) < 5 * (0.9 * 0.1 / 10_000) ** 0.5
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\], got -0.1"):
        module(x, -0.1)


@pytest.mark.parametrize("make", [LockedDropout, partial(WeightDrop, torch.nn.Linear(2, 2), ["weight"]), partial(EmbeddingDropout, torch.nn.Embedding(2, 2))])  # fmt: skip
def test_modules_refuse_a_rate_that_is_none(make):
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\], got 1.1"):
        make(1.1)
    with pytest.raises(ValueError, match="dropout must be in"):
        make(math.nan)
    with pytest.raises(TypeError, match="dropout must be a number, got str"):
        make("0.5")


# WeightDrop


def make_lstm(**options):
    torch.manual_seed(0)
    return torch.nn.LSTM(4, 6, **options).to(DEVICE)


def drawn_mask(shape, p, variational=False):
    """The mask that WeightDrop draws first after ``same_seed``."""
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,), device=DEVICE)
    decisions = torch.ones(shape[0] if variational else math.prod(shape), device=DEVICE)
    mask = seeded_dropout4x(decisions, p, seed.item())
    return mask.view(-1, 1).expand(shape) if variational else mask.view(shape)


@pytest.mark.parametrize("variational", [False, True])
def test_weight_drop_is_the_published_formula(randn, variational):
    x, lstm = randn(5, 3, 4), make_lstm()
    expected = copy.deepcopy(lstm)
    mask = drawn_mask((24, 6), 0.5, variational)
    with torch.no_grad():
        expected.weight_hh_l0 *= mask
    y = same_seed(WeightDrop(lstm, ["weight_hh_l0"], 0.5, variational), x)[0]
    torch.testing.assert_close(y, expected(x)[0])
    dropped = (mask == 0).sum().item()
    assert 0 < dropped < 144
    if variational:
        assert dropped % 6 == 0 and (mask == 0).all(dim=1).sum() * 6 == dropped


@pytest.mark.parametrize("variational", [False, True])
def test_weight_drop_gradients_reach_the_raw_weights(randn, variational):
    x, lstm = randn(5, 3, 4), make_lstm()
    module = WeightDrop(lstm, ["weight_hh_l0"], 0.5, variational)
    same_seed(module, x)[0].square().sum().backward()

    expected = make_lstm()
    mask = drawn_mask((24, 6), 0.5, variational)
    with torch.no_grad():
        expected.weight_hh_l0 *= mask
    expected(x)[0].square().sum().backward()
    torch.testing.assert_close(lstm.weight_hh_l0.grad, expected.weight_hh_l0.grad * mask)
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        got, wanted = (getattr(model, name).grad for model in (lstm, expected))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("variational", [False, True])
def test_weight_drop_train_and_eval_in_any_order(randn, variational):
    x, lstm = randn(5, 3, 4), make_lstm()
    plain = lstm(x)[0]
    module = WeightDrop(lstm, ["weight_hh_l0"], 0.5, variational)
    for mode in (False, True, True, False, True, False):
        module.train(mode)
        assert torch.equal(module(x)[0], plain) != mode
    assert not torch.equal(module.train()(x)[0], module(x)[0])


def test_weight_drop_travels(randn):
    x, module = randn(5, 3, 4), WeightDrop(make_lstm(), ["weight_hh_l0"])
    module(x)[0].sum().backward()  # the old one could not be copied after this
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = WeightDrop(torch.nn.LSTM(4, 6).to(DEVICE), ["weight_hh_l0"])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        torch.testing.assert_close(same_seed(other, x)[0], same_seed(module, x)[0])
        with torch.no_grad():
            other.module.weight_hh_l0.zero_()  # a copy's weights are its own
    assert module.module.weight_hh_l0.all()
    assert list(module.state_dict()) == [
        f"module.{name}" for name in make_lstm().state_dict()
    ]


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}, {"bias": False}, {"batch_first": True}])  # fmt: skip
def test_weight_drop_around_other_lstms(randn, options):
    x, lstm = randn(3, 3, 4), make_lstm(**options)
    weights = [
        name for name, _ in lstm.named_parameters() if name.startswith("weight_hh")
    ]
    module = WeightDrop(lstm, weights, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = same_seed(module, x)[0]
    assert y.shape == lstm(x)[0].shape and not torch.equal(y, lstm(x)[0])
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_weight_drop_around_any_module(randn):
    x, linear = randn(3, 6), torch.nn.Linear(6, 4).to(DEVICE)
    for module in (torch.nn.GRU(4, 5), torch.nn.RNN(4, 5), torch.nn.LSTMCell(4, 5)):
        name = next(name for name, _ in module.named_parameters() if "weight_hh" in name)
        WeightDrop(module.to(DEVICE), [name])(randn(2, 3, 4)[0] if name == "weight_hh" else randn(2, 3, 4))  # fmt: skip
    y = same_seed(WeightDrop(linear, ["weight"]), x)
    expected = x @ (linear.weight * drawn_mask((4, 6), 0.5)).T + linear.bias
    torch.testing.assert_close(y, expected)
    # nested names and keyword arguments
    nested = WeightDrop(torch.nn.Sequential(linear), ["0.weight"])
    torch.testing.assert_close(same_seed(nested, x), expected)
    torch.testing.assert_close(same_seed(WeightDrop(linear, ["weight"]), *[x]), expected)


def test_weight_drop_keeps_states(randn):
    x, state = randn(5, 3, 4), (randn(1, 3, 6), randn(1, 3, 6))
    module = WeightDrop(make_lstm(), ["weight_hh_l0"], 0.5)
    y, (h, c) = same_seed(module, x, state)
    torch.testing.assert_close(y[-1:], h)
    assert c.shape == (1, 3, 6)


def test_side_by_side_is_one_block(randn):
    parameters = dict(make_lstm().named_parameters())
    block = side_by_side(parameters)
    pointers = sorted((t.data_ptr(), t.nbytes) for t in block.values())
    assert all(a + n == b for (a, n), (b, _) in pairwise(pointers))
    assert all(torch.equal(block[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            "weight_hh_l0",
            TypeError,
            "weights must be a list of names, got 'weight_hh_l0'",
        ),
        (None, TypeError, "weights must be a list of names, got None"),
        (7, TypeError, "weights must be a list of names, got 7"),
        (["weight_hh"], ValueError, r"weights must be different .* got \['weight_hh'\]"),
        ([None], ValueError, r"weights must be different ones of .* got \[None\]"),
        (["weight_hh_l0"] * 2, ValueError, "weights must be different ones of"),
    ],
)
def test_errors_of_weight_drop(weights, error, message):
    with pytest.raises(error, match=message):
        WeightDrop(make_lstm(), weights)


def test_weight_drop_takes_any_iterable_and_any_shape(randn):
    module = WeightDrop(make_lstm(), (name for name in ["weight_hh_l0"]))
    assert module.weights == ["weight_hh_l0"]
    for shape in [(), (0, 3), (3, 0), (2, 3, 4)]:
        inner = torch.nn.Module()
        inner.raw = torch.nn.Parameter(torch.ones(shape, device=DEVICE))
        inner.forward = lambda inner=inner: inner.raw * 1
        for variational in (False, True):
            y = WeightDrop(inner, ["raw"], 0.5, variational)()
            assert y.shape == shape and set(y.flatten().tolist()) <= {0.0, 2.0}
            if variational and y.numel() > 0 and y.dim() > 1:
                assert (y.flatten(1) == y.flatten(1)[:, :1]).all()


def test_weight_drop_takes_the_arguments_of_awd_lstm_lm(randn):
    x, lstm = randn(5, 3, 4), make_lstm()
    named = WeightDrop(lstm, weights=["weight_hh_l0"], dropout=0.3, variational=True)
    positional = WeightDrop(lstm, ["weight_hh_l0"], 0.3, True)
    assert torch.equal(same_seed(named, x)[0], same_seed(positional, x)[0])
    assert (named.dropout, named.variational) == (0.3, True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'p'"):
        WeightDrop(lstm, ["weight_hh_l0"], p=0.3)


@pytest.mark.parametrize("nested", [False, True])
def test_weight_drop_lets_the_masked_weights_go(randn, nested, monkeypatch):
    import recurrent_dropout

    drawn = []

    def watched(*arguments):
        y = shared_dropout(*arguments)
        drawn.append(weakref.ref(y))
        return y

    monkeypatch.setattr(recurrent_dropout, "shared_dropout", watched)
    x, lstm = randn(5, 3, 4), make_lstm()
    module = WeightDrop(lstm, ["weight_hh_l0"])
    if nested:
        module = WeightDrop(torch.nn.ModuleList([lstm]), ["0.weight_hh_l0"])
        module.module.forward = lambda x: lstm(x)
    y = module(x)[0]
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))
    y.sum().backward()
    del y
    assert drawn[0]() is None
    assert torch.equal(module.eval()(x)[0], lstm(x)[0])


# EmbeddingDropout


@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1])
def test_embedding_dropout_is_the_published_formula(padding_idx):
    table = torch.nn.Embedding(9, 5, padding_idx=padding_idx).to(DEVICE)
    with torch.no_grad():
        table.weight.normal_()
    words = torch.tensor([[0, 8, 4], [8, 2, 1]], device=DEVICE)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,), device=DEVICE)
    mask = seeded_dropout4x(torch.ones(9, 1, device=DEVICE), 0.3, seed.item())
    y = same_seed(EmbeddingDropout(table, 0.3), words)
    torch.testing.assert_close(y, (table.weight * mask)[words])

    y.sum().backward()
    counts = torch.bincount(words.flatten(), minlength=9).to(DEVICE)[:, None] * mask
    expected = counts.expand(9, 5).clone()
    if padding_idx is not None:
        expected[padding_idx] = 0
    torch.testing.assert_close(table.weight.grad, expected)


def test_embedding_dropout_learns_the_last_word():
    table = torch.nn.Embedding(3, 2).to(DEVICE)
    module = EmbeddingDropout(table, 0.0)
    module(torch.tensor([2], device=DEVICE)).sum().backward()
    assert table.weight.grad[2].all()
    module = EmbeddingDropout(table, 0.5)
    for _ in range(50):
        module(torch.tensor([2], device=DEVICE)).sum().backward()
    assert table.weight.grad[2, 0] > 1


def test_embedding_dropout_modes_and_words():
    table = torch.nn.Embedding(50, 3).to(DEVICE)
    module = EmbeddingDropout(table, 0.5)
    words = torch.arange(50, device=DEVICE)
    assert torch.equal(module.eval()(words), table(words))
    y = module.train()(words)
    dropped = (y == 0).all(dim=1)
    assert torch.equal(dropped, (y == 0).any(dim=1)) and 0 < dropped.sum() < 50
    torch.testing.assert_close(y[~dropped], 2 * table(words)[~dropped])
    assert module(words[:0]).shape == (0, 3)
    assert torch.equal(same_seed(copy.deepcopy(module), words), same_seed(module, words))


def test_a_computed_weight_is_refused():
    table = torch.nn.utils.parametrizations.weight_norm(torch.nn.Embedding(9, 4))
    with pytest.raises(ValueError, match="a weight that nothing else computes"):
        EmbeddingDropout(table)


def test_errors_of_embedding_dropout():
    with pytest.raises(
        TypeError, match=r"embedding must be an nn\.Embedding, got Linear"
    ):
        EmbeddingDropout(torch.nn.Linear(2, 2))
    for options in ({"sparse": True}, {"max_norm": 1.0}):
        with pytest.raises(ValueError, match="embedding must have sparse=False"):
            EmbeddingDropout(torch.nn.Embedding(2, 2, **options))


# Together


def test_modules_replay_under_checkpoint(randn):
    x = randn(4, 3, 5).requires_grad_()
    module = torch.nn.Sequential(
        LockedDropout(0.5), WeightDrop(torch.nn.Linear(5, 5).to(DEVICE), ["weight"])
    )
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(module(x).sin().sum(), x)
    torch.manual_seed(1)
    y = checkpoint(module, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sin().sum(), x)
    torch.testing.assert_close(got, expected)


def test_modules_compile_once(randn):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = EmbeddingDropout(torch.nn.Embedding(9, 5), 0.3)
            self.locked = LockedDropout(0.5)
            self.linear = WeightDrop(torch.nn.Linear(5, 4), ["weight"])

        def forward(self, words):
            return self.linear(self.locked(self.words(words)))

    model = Model().to(DEVICE)
    words = torch.arange(8, device=DEVICE).view(4, 2)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(same_seed(compiled, words), same_seed(model, words))
    assert len(graphs) == 1

    torch.compiler.reset()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    compiled(words).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weight_drop_of_an_lstm_compiles(randn):
    torch.compiler.reset()
    x, module = randn(3, 2, 4), WeightDrop(make_lstm(), ["weight_hh_l0"])
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(same_seed(compiled, x)[0], same_seed(module, x)[0])


MODULES = {
    "locked": lambda: LockedDropout(0.5),
    "weights": lambda: WeightDrop(torch.nn.Linear(4, 4).to(DEVICE), ["weight"], 0.5),
    "lstm": lambda: WeightDrop(make_lstm(), ["weight_hh_l0"], 0.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_by_torch_func(randn, name):
    if name == "lstm" and not INTERPRET:
        pytest.skip("torch.nn.LSTM on a GPU asks for memory that torch.func hides")
    module, x = MODULES[name](), randn(3, 2, 4)

    def loss(parameters, x):
        y = torch.func.functional_call(module, parameters, x)
        return (y[0] if name == "lstm" else y).sin().sum()

    parameters = dict(module.named_parameters())
    got = same_seed(torch.func.grad(loss, argnums=(0, 1)), parameters, x)
    x = x.requires_grad_()
    inputs = [*parameters.values(), x]
    expected = torch.autograd.grad(same_seed(loss, parameters, x), inputs)
    torch.testing.assert_close([*got[0].values(), got[1]], list(expected))


def test_gradients_of_an_embedding_by_torch_func():
    table = torch.nn.Embedding(7, 3).to(DEVICE)
    module, words = EmbeddingDropout(table, 0.5), torch.arange(7, device=DEVICE)

    def loss(weight):
        parameters = {"embedding.weight": weight}
        return torch.func.functional_call(module, parameters, words).sin().sum()

    got = same_seed(torch.func.grad(loss), table.weight.detach())
    same_seed(loss, table.weight).backward()
    torch.testing.assert_close(got, table.weight.grad)


def test_forward_mode_is_an_error_and_not_a_zero(randn):
    x = randn(3, 2, 4)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(LockedDropout(0.5), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError):
            LockedDropout(0.5)(dual)
        for module, name in (
            (WeightDrop(torch.nn.Linear(4, 4).to(DEVICE), ["weight"]), "module.weight"),
            (EmbeddingDropout(torch.nn.Embedding(5, 4).to(DEVICE)), "embedding.weight"),
        ):
            weight = dict(module.named_parameters())[name].detach()
            dual = torch.autograd.forward_ad.make_dual(weight, weight)
            inputs = x if "module" in name else torch.arange(5, device=DEVICE)
            with pytest.raises(NotImplementedError):
                torch.func.functional_call(module, {name: dual}, inputs)


@pytest.mark.gpu
def test_no_compaction_warning(randn):
    lstm = torch.nn.LSTM(40, 60, num_layers=2).to(DEVICE)
    module = WeightDrop(lstm, ["weight_hh_l0", "weight_hh_l1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            module.to(dtype)(randn(3, 2, 40, dtype=dtype))[0].sum().backward()


@pytest.mark.gpu
def test_replays_of_a_graph_draw_other_masks(randn):
    module, x = LockedDropout(0.5), randn(3, 40, 50)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
