"""
.. _language model:

A language model with dropout
=============================

You train a small language model with several kinds of dropout, alone and together, and find out
which conclusions the result allows. The model is that of AWD-LSTM, and the text comes with Python,
so nothing has to be downloaded. At the end you measure what dropping the weights of an LSTM costs,
once including the CPU's time and once without it.

You will learn

- where AWD-LSTM puts its masks, and how little code that takes once the modules exist;
- how to compare forms of dropout over several seeds, and when a difference means something;
- how a CUDA graph separates the GPU's time from the CPU's.

Needs: PyTorch, and :ref:`recurrent dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/language_model.svg'
import os
import sys
from datetime import date

import torch

GPU = torch.accelerator.current_accelerator(check_available=True)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or GPU is None
DEVICE = "cpu" if INTERPRET else GPU.type
if INTERPRET and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise ImportError("restart Python: Triton was imported before TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

gpu = "no GPU" if INTERPRET else torch.get_device_module(DEVICE).get_device_name()
MACHINE = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
if __name__ == "__main__":
    print(MACHINE)
    if INTERPRET:
        print("Triton's interpreter runs the kernels: speed is measured on a GPU only.")

# %%
# The three modules again
# -----------------------
#
# This lesson runs alone, so it repeats the kernel and the modules of :ref:`recurrent dropout`. Skip
# the next three cells if you come from there. For each i, the kernel drops all of ``x[:, i, :]`` or
# nothing of it:


@triton.jit
def shared_dropout_kernel(
    y_ptr, x_ptr, n_decisions, width, threshold, scale: tl.float64, seed_ptr,
    DECISIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(tl.cast(n_decisions, tl.int64), DECISIONS)
    pid = tl.program_id(0).to(tl.int64)
    repeat, block = pid // n_blocks, pid % n_blocks

    counters = block * (DECISIONS // 4) + tl.arange(0, DECISIONS // 4)
    w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    keep = words >= tl.cast(threshold, tl.uint32)

    decision = block * DECISIONS + tl.arange(0, DECISIONS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    offsets = (repeat * n_decisions + decision)[:, None] * width + column[None, :]
    inside = (decision < n_decisions)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep[:, None], x * scale, 0.0), mask=inside)


# %%
# Here is its launch, with the gradient. To keep it short, it has no checks and no operator for
# ``torch.compile``, and the rate must be below 1. In a program of your own, use the version of
# :ref:`recurrent dropout`.


class SharedDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed):
        x = x.contiguous()
        y = torch.empty_like(x)
        repeats, n_decisions, width = x.shape
        WIDTH = min(triton.next_power_of_2(width), 256)
        DECISIONS = 1024 // WIDTH
        grid = repeats * triton.cdiv(n_decisions, DECISIONS), triton.cdiv(width, WIDTH)
        sizes = n_decisions, width, round(p * 2**32), 1 / (1 - p)
        with torch.cuda.device_of(x):  # if there are several GPUs
            shared_dropout_kernel[grid](y, x, *sizes, seed, DECISIONS, WIDTH)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, gradient):
        return SharedDropout.apply(gradient, ctx.p, *ctx.saved_tensors), None, None


quick_apply = super(torch.autograd.Function, SharedDropout).apply


def apply(*arguments):
    # Function.apply is slow, because it looks up names for the compiler and torch.func.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return SharedDropout.apply(*arguments)
    return quick_apply(*arguments)


# %%
# ``LockedDropout`` has one mask for all time steps, ``WeightDrop`` drops some weights of a module,
# here an LSTM, and ``EmbeddingDropout`` drops whole words.

from torch.func import functional_call


def shared_dropout(x, p):
    if not 0 <= p < 1:
        raise ValueError(f"a rate of dropout must be in [0, 1), got {p}")
    return apply(x, p, torch.randint(2**62, (1,), device=x.device))


class LockedDropout(torch.nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        if not self.training or self.dropout == 0:
            return x
        return shared_dropout(x.reshape(len(x), -1, 1), self.dropout).view(x.shape)


class WeightDrop(torch.nn.Module):
    def __init__(self, module, weights, dropout=0.5, variational=False):
        super().__init__()
        self.module, self.weights = module, weights
        self.dropout, self.variational = dropout, variational

    def forward(self, *args):
        if not self.training or self.dropout == 0:
            return self.module(*args)
        parameters = dict(self.module.named_parameters())
        for name in self.weights:
            raw = parameters[name]
            flat = raw[None] if self.variational else raw.view(1, -1, 1)
            parameters[name] = shared_dropout(flat, self.dropout).view(raw.shape)
        # cuDNN wants them side by side in one block of memory, matrices first.
        names = sorted(parameters, key=lambda name: -parameters[name].dim())
        block = torch.cat([parameters[name].flatten() for name in names])
        pieces = block.split([parameters[name].numel() for name in names])
        for name, piece in zip(names, pieces, strict=True):
            parameters[name] = piece.view_as(parameters[name])
        output = functional_call(self.module, parameters, args)
        # The LSTM's own list of weights still holds the masked ones: let them go.
        names = self.module._flat_weights_names
        self.module._flat_weights = [getattr(self.module, name) for name in names]
        return output


class EmbeddingDropout(torch.nn.Module):
    def __init__(self, embedding, dropout=0.1):
        super().__init__()
        self.embedding, self.dropout = embedding, dropout

    def forward(self, words):
        if not self.training or self.dropout == 0:
            return self.embedding(words)
        weight = shared_dropout(self.embedding.weight[None], self.dropout)[0]
        return functional_call(self.embedding, {"weight": weight}, words)


# %%
# The model
# ---------
#
# A language model reads words and gives every word of its vocabulary a score for coming next. This
# one has an embedding, two LSTM layers, and an output layer that shares the weights of the
# embedding. The picture shows where AWD-LSTM puts its masks.
#
# .. image:: /_static/language_model.svg
#    :alt: Words go into the embedding, of which whole words are dropped. Then come locked dropout, the first LSTM, locked dropout, the second LSTM and locked dropout again; both LSTMs have dropped recurrent weights. The output layer shares the weights of the embedding and gives a score for each next word.
#
# Each kind of dropout has a rate of its own, and a rate of 0 switches it off. ``naive`` puts
# ``nn.Dropout``, with a new mask at each step, in the place of ``LockedDropout``.

from itertools import pairwise


class LanguageModel(torch.nn.Module):
    """Scores of the next word, (time, batch, n_words), from words, (time, batch).

    ``states`` has the state of each of the two LSTMs, or None to begin; new states are
    returned beside the scores. The rates naive, locked, weight and word are in [0, 1).
    """

    def __init__(
        self, n_words, width, hidden, naive=0.0, locked=0.0, weight=0.0, word=0.0
    ):
        super().__init__()
        embedding = torch.nn.Embedding(n_words, width)
        torch.nn.init.normal_(embedding.weight, std=0.3)
        self.embedding = EmbeddingDropout(embedding, word)
        self.lstms = torch.nn.ModuleList(
            WeightDrop(torch.nn.LSTM(*sizes), ["weight_hh_l0"], weight)
            for sizes in pairwise([width, hidden, width])
        )
        self.dropout = torch.nn.Dropout(naive) if naive else LockedDropout(locked)
        self.bias = torch.nn.Parameter(torch.zeros(n_words))

    def forward(self, words, states=(None, None)):
        x = self.dropout(self.embedding(words))
        new_states = []
        for lstm, state in zip(self.lstms, states, strict=True):
            x, state = lstm(x, state)
            x = self.dropout(x)
            new_states.append([part.detach() for part in state])
        weight = self.embedding.embedding.weight
        return torch.nn.functional.linear(x, weight, self.bias), new_states


# %%
# The text
# --------
#
# The text is the help that Python's own interpreter prints for ``help("FORMATTING")`` and other
# topics. Paragraphs that occur twice are used once. The last tenth of each topic is held out. Words
# that occur only once in the training part become ``<unk>``.

import re
from collections import Counter


def read_corpus():
    """Training and held-out text as tensors of word numbers, and the number of words."""
    from pydoc_data.topics import topics

    parts, seen = ([], []), set()
    for topic in sorted(topics):
        paragraphs = [
            tuple(re.findall(r"[a-z_]+|[.,:;()]", paragraph))
            for paragraph in topics[topic].lower().split("\n\n")
        ]
        fresh = [p for p in dict.fromkeys(paragraphs) if p and p not in seen]
        seen.update(fresh)
        cut = round(0.9 * len(fresh))
        for part, chosen in zip(parts, (fresh[:cut], fresh[cut:]), strict=True):
            part += [word for p in chosen for word in [*p, "<eos>"]]
    counts = Counter(parts[0])
    known = ["<unk>", *(word for word, count in counts.items() if count > 1)]
    number = {word: i for i, word in enumerate(known)}
    texts = [torch.tensor([number.get(word, 0) for word in part]) for part in parts]
    return *texts, len(known)


if __name__ == "__main__":
    training, held_out, n_words = read_corpus()
    print(f"{len(training)} words to train on, {len(held_out)} held out")
    print(f"{n_words} different ones; {(training == 0).float().mean():.1%} are <unk>")

# %%
# Training
# --------
#
# The training loop is the usual one for such models. The text is cut into streams that run side by
# side, and each stream into pieces. The state is carried from piece to piece, the optimizer is
# Adam, and gradients are clipped.
#
# Every variant is trained from scratch with several seeds, and after each epoch we compute the
# *perplexity* of the held-out text, the exponential of the mean loss of a word. A model that
# hesitates between 60 equally likely words has a perplexity of 60. Without a GPU the sizes are so
# small that everything takes seconds, and the perplexities mean nothing.

VARIANTS = {
    "no dropout": {},
    "naive": {"naive": 0.5},
    "locked": {"locked": 0.5},
    "weight drop": {"weight": 0.5},
    "all together": {"locked": 0.5, "weight": 0.5, "word": 0.1},
}
STREAMS, PIECE, WIDTH, HIDDEN, EPOCHS, SEEDS = 40, 70, 200, 300, 16, 3
if INTERPRET:
    STREAMS, PIECE, WIDTH, HIDDEN, EPOCHS, SEEDS = 2, 4, 4, 4, 2, 2


def streams(text):
    """The text cut into streams side by side: (time, STREAMS)."""
    length = len(text) // STREAMS
    return text[: STREAMS * length].view(STREAMS, length).T.to(DEVICE)


def run_through(model, text, optimizer=None):
    """The mean loss of a word in the text; with an optimizer, train on the way."""
    model.train(optimizer is not None)
    states, total = (None, None), 0
    for start in range(0, len(text) - 1, PIECE):
        words = text[start : start + PIECE + 1]
        scores, states = model(words[:-1], states)
        targets = words[1:].flatten()
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets)
        total += loss.detach() * (len(words) - 1)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
    return (total / (len(text) - 1)).item()


def held_out_losses(variant, seed, training, held_out, n_words):
    """Train from scratch; the held-out loss after each epoch."""
    torch.manual_seed(seed)
    model = LanguageModel(n_words, WIDTH, HIDDEN, **VARIANTS[variant]).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    losses = []
    for _ in range(EPOCHS):
        run_through(model, streams(training), optimizer)
        with torch.no_grad():
            losses.append(run_through(model, streams(held_out)))
    return losses


def table(losses):
    """For each variant the best and the last perplexity, and how far it is behind the best."""
    best = {variant: runs.amin(1).exp() for variant, runs in losses.items()}
    first = min(best.values(), key=torch.mean)
    rows = []
    for variant, runs in losses.items():
        values, last = best[variant], runs[:, -1].exp()
        behind = (values.mean() - first.mean()) / (values.var() + first.var()).sqrt()
        numbers = [f"{v.mean():.1f} ± {v.std():.1f}" for v in (values, last)]
        epoch = runs.mean(0).argmin().item() + 1
        rows.append([variant, numbers[0], epoch, numbers[1], f"{behind:.1f} spreads"])
    return rows


if __name__ == "__main__":
    import matplotlib.pyplot as plt
    from tabulate import tabulate

    corpus = training, held_out, n_words
    if INTERPRET:
        corpus = training[:10], held_out[:10], n_words
    losses = {}
    for variant in VARIANTS:
        runs = [held_out_losses(variant, seed, *corpus) for seed in range(SEEDS)]
        losses[variant] = torch.tensor(runs)  # (seeds, epochs)
    headers = ["held-out perplexity", "best", "at epoch", "last", "behind the best"]
    print(tabulate(table(losses), headers))

    figure, axis = plt.subplots(figsize=(8, 4.5))
    styles = ["#555555 --", "#0072b2 -", "#cc79a7 -", "#cc79a7 :", "#d55e00 -"]
    for (variant, runs), style in zip(losses.items(), styles, strict=True):
        epochs, (colour, dashes) = range(1, EPOCHS + 1), style.split()
        axis.plot(epochs, runs.mean(0).exp(), color=colour, ls=dashes, label=variant)
        low, high = runs.amin(0).exp(), runs.amax(0).exp()
        axis.fill_between(epochs, low, high, color=colour, alpha=0.2)
    axis.set(xlabel=f"epochs\n{MACHINE}", yscale="log")
    axis.set_ylabel(f"held-out perplexity, mean and range of {SEEDS} seeds")
    best = min(losses, key=lambda variant: losses[variant].mean(0).min())
    lowest = losses[best].mean(0).min().exp()
    axis.set_title(f"Lowest perplexity: {best}, {lowest:.0f}", loc="left")
    axis.legend()
    plt.show()

# %%
# What may you conclude?
# ----------------------
#
# The last column says how many *spreads* a variant is behind the best one. A spread is the standard
# deviation of such a difference from seed to seed. With three seeds, don't trust a difference of
# one or two spreads. "At epoch" is where the mean over the seeds is lowest.
#
# On an H100 the table says this. Without dropout the network soon learns the training text by
# heart, and from then on its held-out perplexity climbs. All forms of dropout prevent or delay
# that. Naive and locked dropout tie for the first place. "All together", the paper's recipe, is
# clearly behind both of them.
#
# The run does not show why. All rates are 0.5 or 0.1 and were not tuned for any variant. A network
# that drops more needs a longer training, and the column "at epoch" shows whether a variant was
# still improving at the end. And this text has far fewer words than the papers' benchmarks, Penn
# Treebank with about a million words and WikiText-2 with two million.
#
# There is more that you can't conclude. Of the eleven forms in the table of
# :ref:`recurrent dropout` only three were trained alone. The best epoch is chosen by the held-out
# text itself, so all variants look better than they are. And you can't compare these perplexities
# with the published 57.3 (Penn Treebank) and 65.8 (WikiText-2) of AWD-LSTM: they come from other
# text, another vocabulary, a larger model, much tuning and another optimizer.
#
# What does WeightDrop cost?
# --------------------------
#
# ``WeightDrop`` adds one pass over ``weight_hh_l0`` and one over all weights, forward and backward.
# In float32, ``torch.nn.LSTM`` then copies them once more. Next to the matrix products of 70 steps
# that should be little. We measure an LSTM of the AWD-LSTM paper's kind, with 70 steps, a batch of
# 80 and 400 inputs, for several numbers of units; 1150 is the paper's.
#
# An LSTM is many small kernels, and the time depends on how fast the CPU launches them. So we
# measure twice. Dotted lines are plain calls. Solid lines are the same calls *captured* in a CUDA
# graph, which the GPU replays without the CPU: they show the GPU's own time. "no dropout" is
# ``torch.nn.LSTM``.

LINES = {"WeightDrop, captured": "#d55e00 -", "no dropout, captured": "#0072b2 -"}
LINES |= {"WeightDrop": "#d55e00 :", "no dropout": "#0072b2 :"}


@triton.testing.perf_report([
    triton.testing.Benchmark(
        x_names=["n_units"], x_vals=[256, 512, 768, 1150, 1536],
        line_arg="line", line_vals=list(LINES), line_names=list(LINES),
        styles=[tuple(style.split()) for style in LINES.values()],
        xlabel=f"units, {dtype}\n{MACHINE}", ylabel="ms",
        plot_name=f"weight-drop-{dtype}", args={"dtype": getattr(torch, dtype)},
    )
    for dtype in ("float32", "bfloat16")
])  # fmt: skip
def benchmark(n_units, dtype, line):
    """Milliseconds of a forward and a backward pass."""
    name, *captured = line.split(", ")
    module = torch.nn.LSTM(400, n_units, device=DEVICE, dtype=dtype)
    if name == "WeightDrop":
        module = WeightDrop(module, ["weight_hh_l0"], 0.5)
    x = torch.randn(70, 80, 400, device=DEVICE, dtype=dtype, requires_grad=True)
    gradient = torch.randn(70, 80, n_units, device=DEVICE, dtype=dtype)
    inputs = [x, *module.parameters()]

    def run():
        torch.autograd.grad(module(x)[0], inputs, gradient)

    testing = triton.testing
    measure = testing.do_bench_cudagraph if captured else testing.do_bench
    return measure(run, return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    times = benchmark.run(show_plots=True, return_df=True)
    for dtype, time in zip(("float32", "bfloat16"), times, strict=True):
        for name, i in (("captured", 1), ("called", 3)):
            ratios = (time.iloc[:, i] / time.iloc[:, i + 1]).round(2)
            print(f"{dtype}, {name}: WeightDrop takes", *ratios, "times as long")

# %%
# The solid lines are the GPU's own time, and their ratio is what ``WeightDrop`` costs it. On an
# H100 and an H200 that is only a few per cent. The dotted lines contain the CPU's time as well.
# With few units the GPU is done with a step before the CPU has launched the next one, and
# ``WeightDrop`` has more to launch. These ratios differ between machines, and between runs on the
# same machine, so don't conclude anything from a single one.
#
# In bfloat16, ``torch.nn.LSTM`` copies its weights side by side in each call (it warns about that),
# with ``WeightDrop`` or without, so only float32 shows what the copies cost. On both GPUs 1150
# units take longer than 1536, because tensor cores, which cuDNN also uses for float32, want rows
# that begin at multiples of 16 bytes, and rows of 1150 numbers don't. :ref:`lstm module` avoids
# that.
#
# Exercises
# ---------
#
# 1. Train ``WeightDrop`` with ``variational=True`` as well, over three seeds. Can you tell its
#    result from that of the plain ``WeightDrop``?
# 2. Which mask makes the full recipe worse? Take away one at a time, and train three more variants.
#
# .. note::
#    Try it first.
#
#    1. It takes one more argument. Count the difference of the two means in spreads. If it is one
#       or two, three seeds can't tell, and the honest answer is no.
#
#       .. code-block:: diff
#
#          -            WeightDrop(torch.nn.LSTM(*sizes), ["weight_hh_l0"], weight)
#          +            WeightDrop(torch.nn.LSTM(*sizes), ["weight_hh_l0"], weight, True)
#
#    2. Add three variants, and three colours for the figure. If the perplexity falls by many
#       spreads without one of the masks, that mask is to blame, at these rates and after so few
#       epochs. If it falls a little without each of them, they drop too much together: try half the
#       rates.
#
#       .. code-block:: diff
#
#          -    "all together": {"locked": 0.5, "weight": 0.5, "word": 0.1},
#          +    "all together": {"locked": 0.5, "weight": 0.5, "word": 0.1},
#          +    "no locked": {"weight": 0.5, "word": 0.1},
#          +    "no weight drop": {"locked": 0.5, "word": 0.1},
#          +    "no words": {"locked": 0.5, "weight": 0.5},
#
# References
# ----------
#
# - S. Merity, N. S. Keskar and R. Socher, `Regularizing and optimizing LSTM language models <https://arxiv.org/abs/1708.02182>`_,
#   2017, and its code, `awd-lstm-lm <https://github.com/salesforce/awd-lstm-lm>`_.
# - W. Zaremba, I. Sutskever and O. Vinyals, `Recurrent neural network regularization <https://arxiv.org/abs/1409.2329>`_,
#   2014: naive dropout, and why it stays off the state.
# - S. Merity, C. Xiong, J. Bradbury and R. Socher, `Pointer sentinel mixture models <https://arxiv.org/abs/1609.07843>`_,
#   2017: WikiText-2.
