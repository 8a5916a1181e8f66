import warnings

import language_model
import pytest
import recurrent_dropout
import torch
from language_model import DEVICE, VARIANTS, LanguageModel

MODULES = {
    "locked": lambda lesson: lesson.LockedDropout(0.4),
    "weights": lambda lesson: lesson.WeightDrop(lstm(), ["weight_hh_l0"], 0.4),
    "rows": lambda lesson: lesson.WeightDrop(lstm(), ["weight_hh_l0"], 0.4, True),
    "words": lambda lesson: lesson.EmbeddingDropout(table(), 0.4),
}


def lstm():
    torch.manual_seed(0)
    return torch.nn.LSTM(4, 6).to(DEVICE)


def table():
    torch.manual_seed(0)
    return torch.nn.Embedding(9, 4).to(DEVICE)


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_are_those_of_the_lesson_before(randn, name):
    x = randn(5, 3, 4)
    if name == "words":
        x = torch.arange(27, device=DEVICE).view(9, 3) % 9
    results = []
    for lesson in (language_model, recurrent_dropout):
        module = MODULES[name](lesson)
        torch.manual_seed(1)
        y = module(x)
        y = y[0] if name in ("weights", "rows") else y
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(y.sin().sum(), parameters) if parameters else ()
        z = module.eval()(x)
        results.append([y, *gradients, z[0] if name in ("weights", "rows") else z])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_the_masked_weights_are_let_go(randn):
    module = MODULES["weights"](language_model)
    module(randn(5, 3, 4))[0].sum().backward()
    kept, own = module.module._flat_weights, module.parameters()
    assert all(a is b for a, b in zip(kept, own, strict=True))


def test_the_corpus():
    training, held_out, n_words = language_model.read_corpus()
    assert len(training) > 20_000 and len(held_out) > 2_000
    assert training.max() == n_words - 1 and held_out.max() < n_words
    assert training.min() == held_out.min() == 0
    counts = torch.bincount(training, minlength=n_words)
    assert (counts[1:] > 1).all()


def test_streams_are_the_text():
    text = torch.arange(10 * language_model.STREAMS + 1)
    streams = language_model.streams(text)
    assert streams.shape == (10, language_model.STREAMS)
    assert torch.equal(streams.T.flatten().cpu(), text[:-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_language_model_learns(variant, monkeypatch):
    monkeypatch.setattr(language_model, "EPOCHS", 2)
    text = torch.arange(10 * language_model.STREAMS) % 3
    losses = language_model.held_out_losses(variant, 0, text, text, 3)
    assert len(losses) == 2 and losses[1] < losses[0]
    if variant == "all together":
        again = language_model.held_out_losses(variant, 0, text, text, 3)
        assert losses == again


def test_the_loss_is_the_mean_of_all_words(monkeypatch):
    """In pieces, with the state carried over, as in one go."""
    monkeypatch.setattr(language_model, "PIECE", 4)
    torch.manual_seed(0)
    model = LanguageModel(5, 4, 6, **VARIANTS["all together"]).to(DEVICE)
    text = language_model.streams(torch.arange(11 * language_model.STREAMS) % 5)
    with torch.no_grad():
        loss = language_model.run_through(model, text)
        scores, _ = model.eval()(text[:-1])
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_language_model_shares_its_weights():
    model = LanguageModel(11, 4, 6, **VARIANTS["all together"]).to(DEVICE)
    names = [name for name, _ in model.named_parameters()]
    assert (
        names[0] == "bias" and "embedding.embedding.weight" in names and len(names) == 10
    )
    words = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    scores, states = model(words)
    assert scores.shape == (3, 2, 11) and len(states) == 2
    assert not any(part.requires_grad for state in states for part in state)


def test_each_rate_switches_its_own_masks():
    for variant, rates in VARIANTS.items():
        model = LanguageModel(11, 4, 6, **rates)
        naive = isinstance(model.dropout, torch.nn.Dropout)
        assert naive == (variant == "naive")
        rate = model.dropout.p if naive else model.dropout.dropout
        assert rate == rates.get("naive" if naive else "locked", 0)
        assert {lstm.dropout for lstm in model.lstms} == {rates.get("weight", 0)}
        assert model.embedding.dropout == rates.get("word", 0)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    words = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    for name in ("locked", "weight", "word"):
        model = LanguageModel(5, 4, 4, **{name: rate}).to(DEVICE)
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got"):
            model(words)


def test_forward_mode_is_an_error_and_not_a_zero(randn):
    x = randn(3, 2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError):
            language_model.LockedDropout(0.5)(dual)


def test_the_table_counts_from_the_best():
    losses = {"a": torch.tensor([[3.0, 2.0], [3.0, 2.2]]).log()}
    losses["b"] = torch.tensor([[4.0, 5.0], [4.4, 5.0]]).log()
    a, b = language_model.table(losses)
    assert a == ["a", "2.1 ± 0.1", 2, "2.1 ± 0.1", "0.0 spreads"]
    # 4.2 - 2.1, over the root of 0.02 + 0.08
    assert b == ["b", "4.2 ± 0.3", 1, "5.0 ± 0.0", "6.6 spreads"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_drop_in_a_cuda_graph(dtype):
    """What the benchmark captures draws other masks in each replay, and warns of nothing."""
    module = language_model.WeightDrop(
        torch.nn.LSTM(40, 64, device=DEVICE, dtype=dtype), ["weight_hh_l0"], 0.5
    )
    x = torch.randn(7, 8, 40, device=DEVICE, dtype=dtype, requires_grad=True)
    inputs = [x, *module.parameters()]

    def run():
        y = module(x)[0]
        return y, torch.autograd.grad(y.sum(), inputs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, gradients = run()
    graph.replay()
    first, first_gradient = y.clone(), gradients[2].clone()
    graph.replay()
    assert y.isfinite().all() and not torch.equal(first, y)
    # a dropped weight has no gradient: about half of them, and others each time
    dropped = (first_gradient == 0).float().mean().item()
    assert 0.4 < dropped < 0.6 and not torch.equal(first_gradient == 0, gradients[2] == 0)


@pytest.mark.gpu
def test_no_dropout_overfits_and_the_full_recipe_is_behind():
    """What the lesson says, on a short training: about 20 seconds."""
    training, held_out, n_words = language_model.read_corpus()
    best, last = {}, {}
    for variant in ("no dropout", "naive", "locked", "all together"):
        losses = language_model.held_out_losses(variant, 0, training, held_out, n_words)
        best[variant], last[variant] = min(losses), losses[-1]
    assert last["no dropout"] > best["no dropout"] + 0.05
    assert max(best["naive"], best["locked"]) < best["all together"]
