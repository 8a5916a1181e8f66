"""
.. _recurrent dropout:

Dropout in recurrent networks
=============================

Ask three libraries for dropout in an LSTM and you get three different things, sometimes under one
name. What differs is the mask: its shape, what it multiplies, and when a new one is drawn. This
lesson puts the forms side by side, in one table and one figure, and builds the modules of the
AWD-LSTM language model, ``LockedDropout``, ``WeightDrop`` and ``EmbeddingDropout``, on a single
kernel that draws every mask from a seed and stores none.

You will learn

- which recurrent dropout is which, from the papers, from Keras and from awd-lstm-lm;
- how one kernel serves masks of every shape, because a mask is only a rule for sharing decisions;
- what each form does for a language model that you train here.

You need to know PyTorch and, roughly, what an LSTM computes. You need no CUDA.
"""

# %%
# Setting the stage
# -----------------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/recurrent_masks.svg'
import numbers
import os
import sys
from datetime import date

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRET else "cuda"
if INTERPRET and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise ImportError("restart Python: Triton was imported before TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

gpu = "no GPU" if INTERPRET else torch.cuda.get_device_name()
MACHINE = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
print(MACHINE)

# %%
# Where a mask can go
# -------------------
#
# An LSTM reads a sequence of T steps. At step t it takes the input :math:`x_t` and its own last
# output :math:`h_{t-1}`, and computes four *gates* from both:
#
# .. math::
#
#    i, f, g, o = \sigma, \sigma, \tanh, \sigma \;\text{of}\; W x_t + U h_{t-1} + b, \qquad
#    c_t = f \cdot c_{t-1} + i \cdot g, \qquad h_t = o \cdot \tanh c_t
#
# PyTorch calls W ``weight_ih`` and U ``weight_hh``; each stacks the four gates' blocks of H rows,
# in the order i, f, g, o. (Keras writes c for g, the *candidate*.) Dropout multiplies something in
# these formulas by a random mask of zeros and ones. Three questions tell its forms apart:
#
# - **What does it multiply?** The input, the state, the weights, the candidate.
# - **Who shares a decision?** All time steps? All sequences of the batch? All gates?
# - **When is a new mask drawn?**
#
# A mask whose decisions are shared has fewer of them than the tensor that it multiplies. Its shape
# tells: T steps, B sequences of a batch, G = 4 gates, H hidden units or as many inputs, V words of
# a vocabulary, and 1 where all of them share. So a form is a line of a table. The first line is
# plain dropout, with a decision for every element of every step:

import matplotlib.pyplot as plt
from tabulate import tabulate
from torch.func import functional_call
from torch.nn.functional import cross_entropy

FORMS = {  # what it acts on, the mask's shape, when it is drawn, when it is scaled, source
    "naive": ("x or output", "T B H", "step", "1/(1-p)", "Zaremba"),
    "Gal, tied": ("x and h", "1 B H", "sequence", "at test", "Gal"),
    "Gal, untied": ("x and h", "1 B G H", "sequence", "at test", "Gal"),
    "Keras impl. 1": ("x and h", "1 B G H", "call", "1/(1-p)", "Keras 2, 3"),
    "Keras impl. 0, 2": ("x and h", "1 B H", "call", "1/(1-p)", "Keras 2"),
    "LockedDropout": ("x or output", "1 B H", "call", "1/(1-p)", "Merity"),
    "WeightDrop": ("U", "G H H", "call", "1/(1-p)", "Merity"),
    "variational=True": ("U", "G H 1", "call", "1/(1-p)", "awd-lstm-lm"),
    "embedding dropout": ("words", "V 1", "call", "1/(1-p)", "Gal"),
    "Semeniuta": ("g", "T B H", "step", "at test", "Semeniuta"),
    "zoneout": ("new c, h", "T B H", "step", "at test", "Krueger"),
}

rows = []
for name, (target, shape, *rest) in FORMS.items():
    gates = "own" if "G" in shape else "shared"
    gates = {"g": "g alone", "new c, h": "after"}.get(target, gates)
    rows.append([name, target, shape, gates, *rest])
headers = ["form", "acts on", "mask", "gates", "new each", "scale", "source"]
print(tabulate(rows, headers))

# %%
# Some lines hide a trap:
#
# - The two of **Gal and Ghahramani** are the ones with an argument behind them: dropout as
#   approximate Bayesian inference over the weights, and a sequence sees one draw of the weights.
#   Where the weights of the gates are drawn apart, *untied*, each gate has its own mask.
# - **Keras** has both under the name ``implementation``. Today's Keras switches to 1 as soon as
#   ``recurrent_dropout`` is above 0, whatever you ask for, so that 0 and 2 concern the input alone.
# - **LockedDropout** acts on what goes into and comes out of a layer, so an optimized LSTM can stay
#   whole, such as that of cuDNN, NVIDIA's library behind ``torch.nn.LSTM``. Nothing within the
#   recurrence is dropped.
# - **WeightDrop** reaches into the recurrence without touching the loop: the weights are masked
#   once, before the loop starts. All sequences of the batch share the mask, which is the price.
# - **Semeniuta** drops only what is added to the memory, and **zoneout** replaces a new value by
#   the old one instead of by zero, so neither erases the memory at a rate of p at each step, as a
#   naive mask on c would.
# - "At test" says that training multiplies by 0 or 1, and testing by the mean, 1 - p. (Zoneout
#   mixes old and new in that proportion.) Dividing by 1 - p in training instead leaves testing
#   alone, and is what code does today.
#
# One kernel for all shapes
# -------------------------
#
# Every mask above is a list of decisions, each shared along some axes. Look at the tensor as
# three-dimensional, *repeats × decisions × width*, where one decision holds for a whole
# ``x[:, i, :]``:
#
# - ``LockedDropout`` on (T, B, F) is T × B·F × 1;
# - ``WeightDrop`` on (4H, H) is 1 × 4H·H × 1, and 1 × 4H × H if ``variational``;
# - embedding dropout on (V, F) is 1 × V × F.
#
# :ref:`seeded dropout` draws a decision for each element, and its mask needs no memory, since
# anyone who has the seed can draw it again. Here is that kernel with a tile of *decisions × width*
# in place of a block of elements. **Decision i keeps when word i mod 4 of Philox, with the seed as
# key and the counter ⌊i / 4⌋, is at least p · 2³², rounded.** A time step is one more group of
# programs that draw the same words again, which costs arithmetic but no memory.


@triton.jit
def shared_dropout_kernel(
    y_ptr,
    x_ptr,
    n_decisions,
    width,
    threshold,
    scale: tl.float64,
    seed_ptr,
    DECISIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
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
# Two details. The seed is *loaded*: it stays on the GPU, no one waits for it, and a CUDA graph
# that is replayed reads a new one each time. And the backward pass, as ever with dropout, is the
# same kernel on the incoming gradient, with the same seed. So the operator's gradient is itself,
# and all it keeps is the 8 bytes of the seed.


@torch.library.custom_op("fast_and_right::shared_dropout", mutates_args=())
def shared_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Drop whole ``x[:, i, :]`` with probability p, and scale the others by 1 / (1 - p).

    Parameters
    ----------
    x : torch.Tensor
        Three-dimensional, (repeats, decisions, width), of any strides, on the GPU (on the
        CPU when Triton interprets); float16, bfloat16, float32 or float64.
    p : float
        The probability of dropping, in [0, 1], rounded to a multiple of 2^-32.
    seed : torch.Tensor
        One int64, on the device of ``x``.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. A dropped inf or NaN becomes 0.

    Raises
    ------
    TypeError, ValueError
        If an argument has another dtype, shape, device or range.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    if x.dim() != 3:
        raise ValueError(f"x must have 3 dimensions, got {x.dim()}")
    if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device:
        got = f"{seed.numel()} of {seed.dtype} on {seed.device}"
        raise ValueError(f"seed must be one int64 on {x.device}, got {got}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    threshold = round(p * 2**32)
    if threshold == 2**32 or x.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    y = torch.empty_like(x)
    repeats, n_decisions, width = x.shape
    WIDTH = min(triton.next_power_of_2(width), 256)
    DECISIONS = 1024 // WIDTH
    grid = repeats * triton.cdiv(n_decisions, DECISIONS), triton.cdiv(width, WIDTH)
    with torch.cuda.device_of(x):
        shared_dropout_kernel[grid](
            y, x, n_decisions, width, threshold, 1 / (1 - p), seed, DECISIONS, WIDTH
        )
    return y


@shared_dropout.register_fake
def _(x, p, seed):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def keep_p_and_seed(ctx, inputs, output):
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def backward(ctx, gradient):
    return shared_dropout(gradient, ctx.p, *ctx.saved_tensors), None, None


shared_dropout.register_autograd(backward, setup_context=keep_p_and_seed)

# %%
# Check it as the other lessons do: the gradient against finite differences, the operator against
# what it promises, and the mask against the one that a plain dropout of the decisions gives.

seed = torch.tensor([7], device=DEVICE)
x = torch.randn(2, 5, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
torch.autograd.gradcheck(lambda x: shared_dropout(x, 0.5, seed), x)
print("passed:", *torch.library.opcheck(shared_dropout, (x, 0.5, seed)))
assert torch.equal(
    shared_dropout(x, 0.5, seed),
    x * shared_dropout(torch.ones_like(x[:1, :, :1]), 0.5, seed),
)

# %%
# What the masks look like
# ------------------------
#
# Now draw the table. Each panel shows a mask for 4 steps, 3 sequences and 6 units: across, the
# units, once for each gate; downwards, the sequences, once for each step. Masks of weights know of
# no steps and no sequences: there, downwards are the inputs of U, or the words of the embedding.
# Where a pattern repeats, a decision is shared.

SIZES = {"T": 4, "B": 3, "G": 4, "H": 6, "V": 12, "1": 1}


def picture(target, shape, seed):
    """A mask as an image: steps and sequences, or inputs, or words, by gates and units."""
    sizes = [SIZES[axis] for axis in shape.split()]
    ones = torch.ones(1, torch.Size(sizes).numel(), 1, device=DEVICE)
    mask = shared_dropout(ones, 0.5, torch.tensor([seed], device=DEVICE)).view(sizes)
    if "V" in shape:
        return mask.expand(-1, 24)
    if shape[0] == "G":
        return mask.expand(4, 6, 6).flatten(0, 1).T
    if "G" not in shape:
        mask = mask.unsqueeze(2)
    mask = mask.expand(4, 3, 4, 6).clone()
    if target == "g":
        mask[:, :, [0, 1, 3]] = 1
    return mask.flatten(2).flatten(0, 1)


colours = plt.matplotlib.colors.ListedColormap(["#dddddd", "#0072b2"])
figure, axes = plt.subplots(3, 4, figsize=(9, 6.6), layout="constrained")
for seed, (name, (target, shape, *_)) in enumerate(FORMS.items(), start=20):
    axis = axes.flat[seed - 20]
    image = picture(target, shape, seed).cpu() != 0
    axis.imshow(image, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axis.set_title(f"{name}\n{shape}", fontsize=9)
    axis.set(xticks=[2.5, 8.5, 14.5, 20.5], xticklabels="ifgo", yticks=[])
    axis.set_ylabel({"G": "inputs of U", "V": "words"}.get(shape[0], "steps"))
    for gate in (1, 2, 3):
        axis.axvline(6 * gate - 0.5, color="white", linewidth=2)
    for step in (1, 2, 3) if "B" in shape else ():
        axis.axhline(3 * step - 0.5, color="white", linewidth=2)
axes.flat[-1].axis("off")
figure.suptitle("Blue is kept, grey is dropped")
plt.show()

# %%
# Rows are not columns
# --------------------
#
# ``WeightDrop(..., variational=True)`` has raised the same question since 2017: is it Gal's
# dropout? Its mask of shape (4H, 1) zeroes *rows* of U. Gal's mask multiplies h, and that is
# zeroing *columns* of U, since :math:`U (m \cdot h) = (U \,\mathrm{diag}(m))\, h`. Do it in
# numbers: a batch of two sequences, and what is left of U for each.

H = 6
U = torch.randn(4 * H, H, device=DEVICE)
h = torch.randn(2, H, device=DEVICE)
decisions = torch.ones(1, 6 * H, 1, device=DEVICE)
decisions = shared_dropout(decisions, 0.5, torch.tensor([3], device=DEVICE)).flatten()
columns, rows = decisions[: 2 * H].view(2, H), decisions[2 * H :].view(4 * H, 1)

gal = torch.stack([(U * columns[i]) @ h[i] for i in range(2)])
torch.testing.assert_close(gal, (columns * h) @ U.T)
torch.testing.assert_close(h @ (U * rows).T, (h @ U.T) * rows.T)

figure, axes = plt.subplots(1, 4, figsize=(9, 4), layout="constrained")
titles = ["Gal, sequence 0", "Gal, sequence 1", "variational, 0", "variational, 1"]
masks = [*columns[:, None].expand(-1, 4 * H, -1), *rows.expand(2, -1, H)]
for axis, title, mask in zip(axes, titles, masks, strict=True):
    axis.imshow((U * mask).cpu(), cmap="RdBu", vmin=-3, vmax=3, aspect="auto")
    axis.set(title=title, xticks=[], yticks=[6 * gate + 2.5 for gate in range(4)])
    axis.set(yticklabels="ifgo", xlabel="units of h")
figure.suptitle("U, as each sequence sees it")
plt.show()

# %%
# The two asserts say what each does. A dropped column takes one unit of h away from *all* gates of
# one sequence. A dropped row takes *all* of h away from one gate of one unit, in all sequences:
# that gate then sees the input alone. Nothing is wrong with that as noise, but it is not the mask
# that the theory is about, it is not the same as Keras's ``recurrent_dropout``, and there is no
# setting of ``WeightDrop`` that is. Gal's mask differs between the sequences of a batch, so no
# single weight matrix can hold it. It belongs in the time loop, and
# :ref:`fused lstm` puts it there.
#
# The modules
# -----------
#
# Three modules, with the names and the arguments of awd-lstm-lm. Each draws a seed in its forward
# pass from PyTorch's own generator of the device: ``torch.manual_seed`` governs it, ``checkpoint``
# replays it, and the module has no state that a copy, a pickle or a checkpoint could lose.


def check_p(p):
    if not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    return float(p)


def draw_seed(device):
    return torch.randint(2**62, (1,), device=device)


class LockedDropout(torch.nn.Module):
    """Dropout with one mask for all time steps.

    In training, an input of shape (time, batch, features) is multiplied by a mask of shape
    (1, batch, features), drawn anew in each call and scaled by 1 / (1 - p). In evaluation
    the input is returned as it is.

    Parameters
    ----------
    p : float
        The probability of dropping, in [0, 1].

    Raises
    ------
    TypeError, ValueError
        If ``p`` is not a number in [0, 1], or the input does not have three dimensions.

    References
    ----------
    Gal and Ghahramani, 2016; Merity, Keskar and Socher, 2017.
    """

    def __init__(self, p=0.5):
        super().__init__()
        self.p = check_p(p)

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(
                f"x must be (time, batch, features), got shape {tuple(x.shape)}"
            )
        if not self.training or self.p == 0:
            return x
        flat = x.reshape(len(x), x.shape[1] * x.shape[2], 1)
        return shared_dropout(flat, self.p, draw_seed(x.device)).view(x.shape)


# %%
# ``WeightDrop`` wraps any module. The old one renamed the weights and set masked ones in their
# place in each call. That broke copying, pickling, and switching between training and evaluation,
# and it took the weights out of the one block of memory in which cuDNN wants them, hence the
# famous warning. Here nothing is renamed and nothing is set: ``functional_call`` runs the module
# as if it had other weights. For an LSTM, a GRU or an RNN the masked weights are laid side by
# side, as cuDNN wants them, matrices first.


class WeightDrop(torch.nn.Module):
    """Run a module with some of its weights dropped.

    In training, each call draws new masks. In evaluation the module runs as it is.

    Parameters
    ----------
    module : torch.nn.Module
        Any module. Its parameters stay its own, under the same names. (The replicas of
        ``nn.DataParallel`` have none: use ``DistributedDataParallel``.)
    weights : list of str
        The names of the parameters to drop, such as ``["weight_hh_l0"]``.
    p : float
        The probability of dropping, in [0, 1].
    variational : bool
        False drops single elements. True drops whole rows, as awd-lstm-lm does: for a
        recurrent weight (4H, H) that is all recurrent input of one gate of one unit. It
        is not the mask of Gal and Ghahramani, which drops columns, a sequence at a time.

    Raises
    ------
    TypeError, ValueError
        If ``p`` is not a number in [0, 1], or ``weights`` is not a list of names of
        parameters of ``module``.

    References
    ----------
    Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", 2017;
    Wan et al., "Regularization of neural networks using DropConnect", 2013.
    """

    def __init__(self, module, weights, p=0.5, variational=False):
        super().__init__()
        if isinstance(weights, str):
            raise TypeError(
                f"weights must be a list of names, got the string {weights!r}"
            )
        weights = list(weights)
        if len(set(weights)) < len(weights):
            raise ValueError(f"weights must differ from each other, got {weights}")
        names = [name for name, _ in module.named_parameters()]
        for name in weights:
            if name not in names:
                raise ValueError(f"weights must be among {names}, got {name!r}")
        self.module, self.weights, self.p = module, weights, check_p(p)
        self.variational = variational

    def forward(self, *args, **kwargs):
        if not self.training or self.p == 0:
            return self.module(*args, **kwargs)
        parameters = dict(self.module.named_parameters())
        for name in self.weights:
            raw = parameters[name]
            shared = raw.dim() - 1 if self.variational else 0
            width = raw.shape[raw.dim() - shared :].numel()
            flat = raw.reshape(1, raw.numel() // max(width, 1), width)
            dropped = shared_dropout(flat, self.p, draw_seed(raw.device))
            parameters[name] = dropped.view(raw.shape)
        if isinstance(self.module, torch.nn.RNNBase):
            parameters = side_by_side(parameters)
        return functional_call(self.module, parameters, args, kwargs)


def side_by_side(parameters):
    """The same tensors, as views of one block of memory: matrices first, then biases."""
    names = sorted(parameters, key=lambda name: -parameters[name].dim())
    sizes = [parameters[name].numel() for name in names]
    block = torch.cat([parameters[name].flatten() for name in names])
    pieces = zip(names, block.split(sizes), strict=True)
    return {name: piece.view_as(parameters[name]) for name, piece in pieces}


# %%
# ``EmbeddingDropout`` drops words, not numbers: a decision holds for all features of a word,
# wherever in the batch it occurs.


class EmbeddingDropout(torch.nn.Module):
    """Look words up in an embedding from which whole words are dropped.

    In training, each call draws one decision for each word of the vocabulary. A dropped word
    is a row of zeros, the others are scaled by 1 / (1 - p). In evaluation the embedding is
    used as it is. Its ``padding_idx`` and ``scale_grad_by_freq`` are honoured.

    Parameters
    ----------
    embedding : torch.nn.Embedding
        The embedding. Its weight stays its own, so that an output layer can share it.
    p : float
        The probability of dropping a word, in [0, 1].

    Raises
    ------
    TypeError, ValueError
        If ``p`` is not a number in [0, 1], or ``embedding`` is not an ``nn.Embedding``, or one
        with ``sparse``, ``max_norm`` or a parametrized weight.

    References
    ----------
    Gal and Ghahramani, 2016; Merity, Keskar and Socher, 2017.
    """

    def __init__(self, embedding, p=0.1):
        super().__init__()
        if not isinstance(embedding, torch.nn.Embedding):
            got = type(embedding).__name__
            raise TypeError(f"embedding must be an nn.Embedding, got {got}")
        if embedding.sparse or embedding.max_norm is not None:
            raise ValueError("embedding must have sparse=False and max_norm=None")
        if "weight" not in dict(embedding.named_parameters(recurse=False)):
            raise ValueError("embedding must have a weight that nothing else computes")
        self.embedding, self.p = embedding, check_p(p)

    def forward(self, words):
        if not self.training or self.p == 0:
            return self.embedding(words)
        weight = self.embedding.weight
        dropped = shared_dropout(weight[None], self.p, draw_seed(weight.device))[0]
        return functional_call(self.embedding, {"weight": dropped}, words)


# %%
# (``functional_call`` comes from ``torch.func``. It passes on what the embedding was made with, so
# an absent ``padding_idx`` is not mistaken for -1, the last word, as happens to code from before
# -1 had that meaning.)
#
# Against the originals
# ---------------------
#
# awd-lstm-lm draws its masks with ``bernoulli_`` and divides by 1 - p. Its formulas, with our masks
# put in, must give our outputs. To see the mask of a module, pass it ones after the same
# ``torch.manual_seed``.


def same_seed(module, *inputs):
    torch.manual_seed(5)
    return module(*inputs)


T, B, F, H, p = 5, 3, 4, 6, 0.4
x = torch.randn(T, B, F, device=DEVICE)
locked = LockedDropout(p)
mask = same_seed(locked, torch.ones(1, B, F, device=DEVICE))
torch.testing.assert_close(same_seed(locked, x), x * mask.expand_as(x))
print(
    f"LockedDropout: a mask of {tuple(mask.shape)}, {(mask == 0).sum()} of {mask.numel()} dropped"
)

lstm = torch.nn.LSTM(F, H).to(DEVICE)
for variational in (False, True):
    ones = torch.nn.Linear(H, 4 * H, bias=False).to(DEVICE)
    torch.nn.init.ones_(ones.weight)
    mask = same_seed(
        WeightDrop(ones, ["weight"], p, variational), torch.eye(H, device=DEVICE)
    ).T
    expected = torch.nn.LSTM(F, H).to(DEVICE)
    expected.load_state_dict(lstm.state_dict())
    with torch.no_grad():
        expected.weight_hh_l0 *= mask
    got = same_seed(WeightDrop(lstm, ["weight_hh_l0"], p, variational), x)[0]
    torch.testing.assert_close(got, expected(x)[0])
    n_rows = (mask == 0).all(dim=1).sum()
    print(
        f"WeightDrop, variational={variational}: {n_rows} of {4 * H} rows dropped whole"
    )

words = torch.tensor([[1, 9, 1], [3, 9, 0]], device=DEVICE)
table = torch.nn.Embedding(10, F, padding_idx=0).to(DEVICE)
mask = same_seed(LockedDropout(p), torch.ones(1, 10, 1, device=DEVICE))[0]
expected = torch.nn.functional.embedding(words, table.weight * mask)
torch.testing.assert_close(same_seed(EmbeddingDropout(table, p), words), expected)
print(f"EmbeddingDropout: words {mask[:, 0].argwhere()[:, 0].tolist()} are kept")

# %%
# What does it cost?
# ------------------
#
# ``WeightDrop`` leaves cuDNN's LSTM whole, and what it adds, once a call, is a pass over U and one
# over all weights to lay them side by side, forward and backward. Against 70 steps of matrix
# products that should be little. Here are LSTMs of the AWD-LSTM paper's kind, 70 steps, batch 80,
# 400 inputs, up to its 1150 units and beyond, forward and backward.

import warnings


def training_time(module, x):
    """Milliseconds of a forward and a backward pass."""
    y = module(x)[0]
    gradient = torch.randn_like(y)
    inputs = [x, *module.parameters()]

    def step():
        torch.autograd.grad(module(x)[0], inputs, gradient)

    return triton.testing.do_bench(step, return_mode="median")


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_units"],
            x_vals=[256, 512, 768, 1150, 1536],
            line_arg="form",
            line_vals=["rows", "elements", "plain"],
            line_names=["WeightDrop, variational=True", "WeightDrop", "no dropout"],
            styles=[("#d55e00", ":"), ("#d55e00", "-"), ("#0072b2", "-")],
            xlabel=f"units, {dtype}\n{MACHINE}",
            ylabel="ms",
            plot_name=f"weight-drop-{dtype}",
            args={"dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)
def benchmark(form, n_units, dtype):
    x = torch.randn(70, 80, 400, device=DEVICE, dtype=dtype, requires_grad=True)
    module = torch.nn.LSTM(400, n_units, device=DEVICE, dtype=dtype)
    if form != "plain":
        module = WeightDrop(module, ["weight_hh_l0"], 0.5, form == "rows")
    with warnings.catch_warnings():
        # In bfloat16, PyTorch's own LSTM complains that its weights need to be compacted.
        warnings.simplefilter("ignore" if form == "plain" else "error")
        return training_time(module, x)


if INTERPRET:
    print("No figures: speed is measured on a GPU only, and this run had none.")
elif __name__ == "__main__":
    for dtype, times in zip(
        ("float32", "bfloat16"),
        benchmark.run(show_plots=True, return_df=True),
        strict=True,
    ):
        n_units, rows, elements, plain = times.iloc[3]
        print(
            f"{n_units:.0f} units, {dtype}: {elements / plain:.3f} times as long as without "
            f"dropout (variational=True: {rows / plain:.3f})"
        )

# %%
# With few units the GPU is done with a step before the CPU has launched the next, and what you see
# is the CPU's time. It wavers, and there ``WeightDrop`` costs a good deal: it has more to launch. In
# bfloat16 PyTorch's LSTM lays its weights side by side in each call, too, so only float32 shows what
# that costs. On the GPU recorded below, 1150 units take longer than 1536: tensor cores want rows
# that begin at multiples of 16 bytes, and 1150 numbers of either dtype are none. :ref:`fused lstm`
# does something about both.
#
# A language model
# ----------------
#
# AWD-LSTM (Merity et al., 2017) uses all three at once. In order: embedding dropout, locked
# dropout, LSTM layers with dropped weights and locked dropout between them, locked dropout, and an
# output layer that shares the embedding's weights. Here it is, small, with a switch for each part.
# Naive stands for ``nn.Dropout`` in the place of ``LockedDropout``: between layers, never on the
# state.

from itertools import pairwise


class LanguageModel(torch.nn.Module):
    """Words in, scores of the next word out; (time, batch) to (time, batch, words)."""

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

    def forward(self, words, states):
        x = self.dropout(self.embedding(words))
        new_states = []
        for lstm, state in zip(self.lstms, states, strict=True):
            x, state = lstm(x, state)
            x = self.dropout(x)
            new_states.append([part.detach() for part in state])
        weight = self.embedding.embedding.weight
        return torch.nn.functional.linear(x, weight, self.bias), new_states


# %%
# The text is the help of Python's own interpreter, which comes with every Python: what
# ``help("FORMATTING")`` prints. Paragraphs that occur twice are taken once. The last tenth of each
# topic is held out. Words that the training part has only once become ``<unk>``.

import re
from collections import Counter
from pydoc_data.topics import topics


def read_corpus():
    """Training and held-out text as tensors of word numbers, and the number of words."""
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


training, held_out, n_words = read_corpus()
share = (training == 0).float().mean()
print(
    f"{len(training)} words to train on, {len(held_out)} held out, {n_words} different ones; "
    f"{share:.1%} are <unk>"
)

# %%
# The loop is the usual one: the text as some streams side by side, cut into pieces, the state
# carried over from piece to piece, Adam, and gradients clipped. The perplexity is the exponential
# of the mean loss of a word: among how many words the model hesitates, as it were. On a CPU the
# sizes shrink so that it takes seconds, and the perplexities mean nothing.

VARIANTS = {
    "no dropout": {},
    "naive": {"naive": 0.5},
    "locked": {"locked": 0.5},
    "weight drop": {"weight": 0.5},
    "all together": {"locked": 0.5, "weight": 0.5, "word": 0.1},
}
if INTERPRET:
    STREAMS, PIECE, WIDTH, HIDDEN, EPOCHS, SEEDS = 2, 4, 4, 4, 2, 2
    training, held_out = training[:10], held_out[:10]
else:
    STREAMS, PIECE, WIDTH, HIDDEN, EPOCHS, SEEDS = 40, 70, 200, 300, 16, 3


def streams(text, n):
    """The text cut into n streams side by side: (time, n)."""
    length = len(text) // n
    return text[: n * length].view(n, length).T.to(DEVICE)


def run_through(model, text, optimizer=None):
    """The mean loss of a word in the text; with an optimizer, train on the way."""
    model.train(optimizer is not None)
    states, total = [None] * len(model.lstms), 0
    for start in range(0, len(text) - 1, PIECE):
        words = text[start : start + PIECE + 1]
        scores, states = model(words[:-1], states)
        loss = cross_entropy(scores.flatten(0, 1), words[1:].flatten())
        total += loss.detach() * (len(words) - 1)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
    return (total / (len(text) - 1)).item()


def held_out_losses(variant, seed):
    """Train from scratch; the held-out loss after each epoch."""
    torch.manual_seed(seed)
    model = LanguageModel(n_words, WIDTH, HIDDEN, **VARIANTS[variant]).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    losses = []
    for _ in range(EPOCHS):
        run_through(model, streams(training, STREAMS), optimizer)
        with torch.no_grad():
            losses.append(run_through(model, streams(held_out, STREAMS)))
    return losses


if __name__ == "__main__":
    losses = {}
    print(f"{'held-out perplexity':19} {'best':>12} {'at epoch':>9} {'last':>13}")
    for variant in VARIANTS:
        runs = torch.tensor([held_out_losses(variant, seed) for seed in range(SEEDS)])
        losses[variant] = runs  # (seeds, epochs)
        best, last = runs.amin(1).exp(), runs[:, -1].exp()
        epoch = runs.mean(0).argmin().item() + 1
        print(
            f"{variant:19} {best.mean():6.1f} ± {best.std():3.1f} {epoch:9}"
            f" {last.mean():7.1f} ± {last.std():3.1f}"
        )

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = ["#555555", "#cc79a7", "#0072b2", "#009e73", "#d55e00"]
    for (variant, runs), colour in zip(losses.items(), colours, strict=True):
        epochs = range(1, EPOCHS + 1)
        axis.plot(epochs, runs.mean(0), color=colour, label=variant)
        axis.fill_between(epochs, runs.amin(0), runs.amax(0), color=colour, alpha=0.2)
    axis.set(xlabel=f"epochs\n{MACHINE}", ylabel="held-out loss, nats a word")
    axis.set_title(f"Mean and range of {SEEDS} seeds")
    axis.legend()
    plt.show()

# %%
# What may you conclude? Without dropout the network soon learns the training text by heart, and its
# held-out loss climbs. Every form of dropout delays that or prevents it, and the lines show by how
# much, at these rates.
#
# And what not? The training is short: a line that still falls at its end would go on, and the more
# is dropped, the longer. This text has far fewer words than the papers' benchmarks, Penn Treebank
# with about a million and WikiText-2 with two. The spread is over seeds alone; the rates were not
# tuned for each line; and the best epoch is picked on the held-out text itself, which flatters all
# of them. Forms within each other's spread are not ranked by this.
# Nor can these perplexities be set beside the published 57.3 (Penn Treebank) and 65.8 (WikiText-2)
# of AWD-LSTM: another text, another vocabulary, a larger model, much tuning, and averaged SGD.
#
# Exercises
# ---------
#
# 1. Embedding dropout passes over the whole table though a batch uses few of its words. Write a
#    kernel that looks up and drops at once. Which number is the decision's index?
# 2. Make ``LockedDropout`` share its mask among the sequences, too. Which view of the tensor does
#    it?
# 3. Add zoneout to the plain loop of :ref:`fused lstm`. Why is there nothing to scale?
# 4. Train with ``variational=True`` in place of the plain ``WeightDrop``, over three seeds. Can
#    you tell them apart?
#
# .. note::
#    Try it first.
#
#    1. The word's number, as in the table: so the mask stays that of ``EmbeddingDropout``, bit for
#       bit, and a word that occurs twice is dropped twice.
#
#       .. code-block:: python
#
#          @triton.jit
#          def lookup_kernel(
#              y_ptr, table_ptr, words_ptr, n_features, threshold, scale, seed_ptr,
#              BLOCK: tl.constexpr,
#          ):
#              place = tl.program_id(0).to(tl.int64)
#              column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
#              i = tl.load(words_ptr + place)
#              w0, w1, w2, w3 = tl.randint4x(tl.load(seed_ptr), i // 4)
#              w = tl.where(i % 4 == 0, w0, tl.where(i % 4 == 1, w1, tl.where(i % 4 == 2, w2, w3)))
#              inside = column < n_features
#              kept = inside & (w.to(tl.int64) >= threshold)
#              x = tl.load(table_ptr + i * n_features + column, mask=kept, other=0.0)
#              tl.store(y_ptr + place * n_features + column, x * scale, mask=inside)
#
#
#          def lookup(table, words, p, seed):
#              """What EmbeddingDropout gives, for float32 and p < 1."""
#              n_features = table.shape[1]
#              y = table.new_empty(*words.shape, n_features)
#              lookup_kernel[words.numel(), triton.cdiv(n_features, 256)](
#                  y, table, words, n_features, round(p * 2**32), 1 / (1 - p), seed, 256
#              )
#              return y
#
#    2. Steps times sequences are the repeats, features the decisions:
#
#       .. code-block:: python
#
#          class SharedDropout(LockedDropout):
#              def forward(self, x):
#                  if not self.training or self.p == 0:
#                      return x
#                  flat = x.reshape(-1, x.shape[2], 1)
#                  return shared_dropout(flat, self.p, draw_seed(x.device)).view(x.shape)
#
#    3. A value is the old one or the new one, and both have the usual size: nothing is zeroed that
#       the others would have to make up for. At test time the two are mixed, p of the old and 1 - p
#       of the new.
#
#       .. code-block:: python
#
#          from torch.nn.functional import linear
#
#
#          def zoneout_loop(x, weight_ih, weight_hh, bias, h, c, p_h, p_c):
#              outputs = []
#              for step in linear(x, weight_ih) + bias:
#                  i, f, g, o = (step + linear(h, weight_hh)).chunk(4, dim=-1)
#                  new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
#                  new_h = o.sigmoid() * new_c.tanh()
#                  h = torch.where(torch.rand_like(h) < p_h, h, new_h)
#                  c = torch.where(torch.rand_like(c) < p_c, c, new_c)
#                  outputs.append(h)
#              return torch.stack(outputs), c
#
#    4. One argument more. Compare the difference of the two means with the spread of the seeds,
#       which the table prints behind each. If the ranges overlap, three seeds can't tell, and the
#       honest answer is no.
#
#       .. code-block:: diff
#
#          -            WeightDrop(torch.nn.LSTM(*sizes), ["weight_hh_l0"], weight)
#          +            WeightDrop(torch.nn.LSTM(*sizes), ["weight_hh_l0"], weight, True)
#
# References
# ----------
#
# - W. Zaremba, I. Sutskever and O. Vinyals, `Recurrent neural network regularization <https://arxiv.org/abs/1409.2329>`_,
#   2014.
# - Y. Gal and Z. Ghahramani, `A theoretically grounded application of dropout in recurrent neural networks <https://arxiv.org/abs/1512.05287>`_,
#   2016.
# - S. Semeniuta, A. Severyn and E. Barth, `Recurrent dropout without memory loss <https://arxiv.org/abs/1603.05118>`_,
#   2016.
# - D. Krueger et al., `Zoneout: regularizing RNNs by randomly preserving hidden activations <https://arxiv.org/abs/1606.01305>`_,
#   2017.
# - L. Wan et al., `Regularization of neural networks using DropConnect <https://proceedings.mlr.press/v28/wan13.html>`_,
#   2013.
# - S. Merity, N. S. Keskar and R. Socher, `Regularizing and optimizing LSTM language models <https://arxiv.org/abs/1708.02182>`_,
#   2017, and its code, `awd-lstm-lm <https://github.com/salesforce/awd-lstm-lm>`_.
# - Keras's documentation of its `LSTM <https://keras.io/api/layers/recurrent_layers/lstm/>`_.
