"""
.. _recurrent dropout:

Dropout in recurrent networks
=============================

Ask three libraries for dropout in an LSTM, and you get three different masks, sometimes under the
same name. They differ in what the mask multiplies, in its shape, and in when a new one is drawn.
This lesson puts eleven forms side by side. Then it builds the three modules of the AWD-LSTM
language model, ``LockedDropout``, ``WeightDrop`` and ``EmbeddingDropout``, on a single kernel that
draws every mask from a seed and stores none.

You will learn

- how the forms of the papers, of Keras and of awd-lstm-lm, AWD-LSTM's own code, differ;
- how one kernel draws masks of every shape, because they differ only in what shares a decision;
- how to drop the weights inside any module, without renaming them and without a loop over time.

Needs: PyTorch, and :ref:`seeded dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/recurrent_masks.svg'
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
# Where a mask can go
# -------------------
#
# An LSTM reads a sequence step by step. At step t it takes the input :math:`x_t` and its own last
# output, the *state* :math:`h_{t-1}`, and computes four *gates* from both. With the gates it
# updates its *memory* :math:`c_t` and its output:
#
# .. math::
#
#    i, f, g, o = \sigma, \sigma, \tanh, \sigma \;\text{of}\; W x_t + U h_{t-1} + b, \qquad
#    c_t = f \cdot c_{t-1} + i \cdot g, \qquad h_t = o \cdot \tanh c_t
#
# PyTorch calls W ``weight_ih`` and U ``weight_hh``. Each stacks the four gates' blocks of H rows,
# in the order i, f, g, o. Dropout multiplies a tensor by a random mask of zeros and ones. Its forms
# differ in the tensor that they multiply, in what shares a decision (all time steps, all sequences
# of the batch, all gates), and in when a new mask is drawn: for each step, each sequence or each
# call of the layer.
#
# A mask with shared decisions is smaller than the tensor that it multiplies, and its shape says
# what shares them. In the table there are T steps, B sequences in a batch, G = 4 gates, H hidden
# units (or inputs) and V words in a vocabulary; a 1 means that all share. "At test" means that
# training multiplies by 0 or 1, and testing by the mean, 1 - p. The others divide by 1 - p in
# training, so testing needs no change.

HEADERS = ["form", "acts on", "mask", "gates", "new each", "scale", "source"]
FORMS = {
    "naive": ("x or output", "T B H", "shared", "step", "1/(1-p)", "Zaremba"),
    "Gal, tied": ("x and h", "1 B H", "shared", "sequence", "at test", "Gal"),
    "Gal, untied": ("x and h", "1 B G H", "own", "sequence", "at test", "Gal"),
    "Keras impl. 1": ("x and h", "1 B G H", "own", "call", "1/(1-p)", "Keras 2, 3"),
    "Keras impl. 0, 2": ("x and h", "1 B H", "shared", "call", "1/(1-p)", "Keras 2"),
    "LockedDropout": ("x or output", "1 B H", "shared", "call", "1/(1-p)", "Merity"),
    "WeightDrop": ("U", "G H H", "own", "call", "1/(1-p)", "Merity"),
    "variational=True": ("U", "G H 1", "own", "call", "1/(1-p)", "awd-lstm-lm"),
    "embedding dropout": ("words", "V 1", "shared", "call", "1/(1-p)", "Gal"),
    "Semeniuta": ("g", "T B H", "g alone", "step", "at test", "Semeniuta"),
    "zoneout": ("new c, h", "T B H", "after", "step", "mixed", "Krueger"),
}

if __name__ == "__main__":
    from tabulate import tabulate

    print(tabulate([[name, *form] for name, form in FORMS.items()], HEADERS))

# %%
# Some of these are easy to confuse:
#
# - **Gal and Ghahramani** derive theirs from Bayesian inference over the weights. If the weights of
#   each gate are drawn separately (*untied*), each gate has a mask of its own.
# - In **Keras** the argument ``implementation`` chooses the tied or the untied form. Keras 3 always
#   takes implementation 1 when ``recurrent_dropout`` is above 0. In Keras's cells a rate of exactly
#   1 drops nothing, while the modules of this course then drop everything.
# - **LockedDropout** acts on what goes into a layer and what comes out of it. Nothing inside the
#   recurrence is dropped, so it works with the fast LSTM of cuDNN, NVIDIA's library behind
#   ``torch.nn.LSTM``.
# - **WeightDrop** changes the recurrence and still keeps the fast LSTM, because it masks the
#   weights once, before the loop over time starts. The price is that all sequences of a batch share
#   the mask.
# - **Semeniuta** drops only what is added to the memory c, and **zoneout** replaces a new value by
#   the old one instead of by zero. So neither of them erases the memory step by step.
#
# .. image:: /_static/recurrent_forms.svg
#    :alt: Eleven masks for 4 steps, 3 sequences, 4 gates and 6 units. The naive mask differs in every step and sequence; Gal's and LockedDropout's repeat from step to step; the untied ones differ between gates; WeightDrop's has single entries of U, variational=True whole rows; embedding dropout has whole words; Semeniuta's mask is on g alone.
#
# The picture shows one mask of each form. The units run across, once for each gate, and the
# sequences run downwards, once for each step. Where a pattern repeats, a decision is shared.
# AWD-LSTM is trained on 70 steps of 80 sequences, with 1150 units in a layer. There a naive mask
# has 6.4 million decisions, a locked one 92 thousand, and that of ``WeightDrop`` 5.3 million.
#
# One kernel for all shapes
# -------------------------
#
# Each of these masks is a list of decisions, and each decision is shared along some axes. So we
# view the tensor as three-dimensional, *repeats × decisions × width*, where one decision holds for
# all of ``x[:, i, :]``:
#
# - ``LockedDropout`` on (T, B, F) is T × B·F × 1;
# - ``WeightDrop`` on (4H, H) is 1 × 4H·H × 1, or 1 × 4H × H if ``variational``;
# - embedding dropout on (V, F) is 1 × V × F.
#
# The kernel is that of :ref:`seeded dropout` with a tile of *decisions × width* in place of a block
# of elements. **Decision i is "keep" if word i mod 4 of Philox, with the seed as key and the
# counter ⌊i / 4⌋, is at least p · 2³², rounded to an integer.** The programs of other repeats, such
# as time steps, draw the same words again. That costs arithmetic, but no memory.
#
# The seed is *loaded* from the GPU's memory. So the CPU never has to wait for it. And a CUDA graph,
# which repeats the same launches with the same arguments, draws and finds a new seed each time.


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
# A tile has 1024 elements: 1024 decisions if each holds for one element, and fewer if each holds
# for more.

import numbers


def launch_shared_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    threshold = round(p * 2**32)
    if threshold == 2**32 or y.numel() == 0:
        return y.zero_()
    x = x.resolve_neg().contiguous()  # apply a negation that PyTorch has put off
    repeats, n_decisions, width = x.shape
    WIDTH = min(triton.next_power_of_2(width), 256)
    DECISIONS = 1024 // WIDTH
    grid = repeats * triton.cdiv(n_decisions, DECISIONS), triton.cdiv(width, WIDTH)
    sizes = n_decisions, width, threshold, 1 / (1 - p)
    with torch.cuda.device_of(x):  # if there are several GPUs
        shared_dropout_kernel[grid](y, x, *sizes, seed, DECISIONS, WIDTH)
    return y


if __name__ == "__main__":
    x, seed = torch.randn(2, 5, 3, device=DEVICE), torch.tensor([7], device=DEVICE)
    y = launch_shared_dropout(x, 0.5, seed)
    kept = launch_shared_dropout(torch.ones(1, 5, 1, device=DEVICE), 0.5, seed) != 0
    torch.testing.assert_close(y, torch.where(kept, 2 * x, 0.0))
    print(f"decisions {kept.flatten().int().tolist()} hold for all repeats and columns")

# %%
# Rows are not columns
# --------------------
#
# Is ``WeightDrop(..., variational=True)`` Gal's dropout? No. Its mask of shape (4H, 1) zeroes
# *rows* of U. Gal's mask multiplies h, which has the same effect as zeroing *columns* of U, since
# :math:`U (m \cdot h) = (U \,\mathrm{diag}(m))\, h`.
#
# .. image:: /_static/recurrent_masks.svg
#    :alt: Left: Gal's mask leaves out columns of U, other columns for each sequence, the same for all gates. Right: variational=True leaves out rows of U, the same for all sequences, so that single gates lose all of h.
#
# A dropped column takes one unit of h away from *all* gates of one sequence. A dropped row takes
# *all* of h away from one gate of one unit, in all sequences. That may be useful noise, but it is
# not the mask of Gal or of Keras. No setting of ``WeightDrop`` gives those, because a mask that
# differs between the sequences of a batch does not fit into one weight matrix. It has to be applied
# in the loop over time, and :ref:`fused lstm` does that.
#
# As a public function
# --------------------
#
# Dropout is linear in x. So the backward pass applies the same dropout, with the same seed, to the
# gradient that arrives, and all that is kept between the two passes is the seed. :ref:`operators`
# explains the pattern.

shared_dropout_op = torch.library.custom_op(
    "fast_and_right::shared_dropout", launch_shared_dropout, mutates_args=()
)
shared_dropout_op.register_fake(lambda x, p, seed: x.new_empty(x.shape))


class SharedDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed):
        compiling = torch.compiler.is_compiling()
        return (shared_dropout_op if compiling else launch_shared_dropout)(x, p, seed)

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


def check_dense(x, axes):
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, not nested, got {got}")
    if x.dim() != 3:
        raise ValueError(f"x must be {axes}, got shape {tuple(x.shape)}")


def check_rate(rate, name):
    if not isinstance(rate, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(rate).__name__}")
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {rate}")
    return float(rate)


def shared_dropout(x, p, seed):
    """Drop whole ``x[:, i, :]`` with probability p, and scale the others by 1 / (1 - p).

    ``x`` has three dimensions, (repeats, decisions, width), any strides, and dtype float16,
    bfloat16, float32 or float64; p is in [0, 1], and is rounded to a multiple of 2^-32;
    ``seed`` is one int64 on the device of ``x``. The result is contiguous. A dropped inf or
    NaN becomes 0. Differentiable any number of times, in reverse mode only; works under
    ``torch.compile``. Wrong arguments raise TypeError or ValueError.
    """
    check_dense(x, "(repeats, decisions, width)")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(f"seed must be one int64 on {x.device}, got {seed}")
    return apply(x, check_rate(p, "p"), seed)


# %%
# The modules
# -----------
#
# Each module draws a seed in its forward pass, from PyTorch's own generator on the device.
# ``torch.manual_seed`` sets that generator, ``torch.utils.checkpoint`` replays it, and the module
# has no state that a copy or a saved file could lose.


def draw_seed(device):
    return torch.randint(2**62, (1,), device=device)


class LockedDropout(torch.nn.Module):
    """Dropout of (time, batch, features) with one mask for all time steps.

    In training, each call draws a new mask. In evaluation the input is returned as it is.
    ``dropout`` is the probability of dropping, in [0, 1]; a call may bring another one.
    """

    def __init__(self, dropout=0.5):
        super().__init__()
        self.dropout = check_rate(dropout, "dropout")

    def forward(self, x, dropout=None):
        check_dense(x, "(time, batch, features)")
        dropout = self.dropout if dropout is None else check_rate(dropout, "dropout")
        if not self.training or dropout == 0:
            return x
        flat = x.reshape(len(x), x.shape[1] * x.shape[2], 1)
        return shared_dropout(flat, dropout, draw_seed(x.device)).view(x.shape)


# %%
# ``WeightDrop`` wraps any module. The ``WeightDrop`` of awd-lstm-lm renames the weights and, in
# each call, puts masked ones in their place. After a training step such a module can't be copied,
# and cuDNN warns that the weights are no longer in one block of memory. Here
# ``torch.func.functional_call`` runs the module as if it had other weights. For an LSTM, a GRU or
# an RNN we lay these side by side in one block, matrices first, as cuDNN wants them.
#
# The last lines of ``forward`` save memory. ``torch.nn.LSTM`` keeps a list of the weights that it
# used last, and would hold the masked copy of all weights until the next call.

from collections.abc import Iterable

from torch.func import functional_call


class WeightDrop(torch.nn.Module):
    """Run a module with some of its weights dropped, anew in each call in training.

    ``weights`` is a list of names of parameters of ``module``, such as ["weight_hh_l0"], which
    stay where they are. ``dropout`` is the probability of dropping, in [0, 1]. With
    ``variational=True`` whole rows are dropped: of a recurrent weight, all that one gate of
    one unit receives from h. Not for ``nn.DataParallel``, whose replicas have no parameters.
    """

    def __init__(self, module, weights, dropout=0.5, variational=False):
        super().__init__()
        if isinstance(weights, str) or not isinstance(weights, Iterable):
            raise TypeError(f"weights must be a list of names, got {weights!r}")
        weights = list(weights)
        names = [name for name, _ in module.named_parameters()]
        if any(name not in names or weights.count(name) > 1 for name in weights):
            raise ValueError(f"weights must be different ones of {names}, got {weights}")
        self.module, self.weights = module, weights
        self.dropout, self.variational = check_rate(dropout, "dropout"), variational

    def forward(self, *args, **kwargs):
        if not self.training or self.dropout == 0:
            return self.module(*args, **kwargs)
        parameters = dict(self.module.named_parameters())
        for name in self.weights:
            raw = parameters[name]
            n = raw.shape[:1].numel() if self.variational else raw.numel()
            flat = raw.reshape(1, n, raw.numel() // max(n, 1))
            dropped = shared_dropout(flat, self.dropout, draw_seed(raw.device))
            parameters[name] = dropped.view(raw.shape)
        if isinstance(self.module, torch.nn.RNNBase):
            parameters = side_by_side(parameters)
        output = functional_call(self.module, parameters, args, kwargs)
        for part in self.module.modules():
            if isinstance(part, torch.nn.RNNBase):
                names = part._flat_weights_names
                part._flat_weights = [getattr(part, name) for name in names]
        return output


def side_by_side(parameters):
    """The same tensors, as views of one block of memory: matrices first, then biases."""
    names = sorted(parameters, key=lambda name: -parameters[name].dim())
    sizes = [parameters[name].numel() for name in names]
    block = torch.cat([parameters[name].flatten() for name in names])
    pieces = zip(names, block.split(sizes), strict=True)
    return {name: piece.view_as(parameters[name]) for name, piece in pieces}


# %%
# ``EmbeddingDropout`` drops words rather than numbers: a decision holds for all features of a word,
# wherever the word stands in the batch.


class EmbeddingDropout(torch.nn.Module):
    """Look words up in an ``nn.Embedding`` from which whole words are dropped.

    In training, each call drops each word of the vocabulary with probability ``dropout``. The
    weight stays the embedding's, so an output layer can share it. ``padding_idx`` and
    ``scale_grad_by_freq`` are honoured; ``sparse`` and ``max_norm`` are refused.
    """

    def __init__(self, embedding, dropout=0.1):
        super().__init__()
        if not isinstance(embedding, torch.nn.Embedding):
            got = type(embedding).__name__
            raise TypeError(f"embedding must be an nn.Embedding, got {got}")
        if embedding.sparse or embedding.max_norm is not None:
            raise ValueError("embedding must have sparse=False and max_norm=None")
        if "weight" not in dict(embedding.named_parameters(recurse=False)):
            raise ValueError("embedding must have a weight that nothing else computes")
        self.embedding, self.dropout = embedding, check_rate(dropout, "dropout")

    def forward(self, words):
        if not self.training or self.dropout == 0:
            return self.embedding(words)
        weight = self.embedding.weight
        dropped = shared_dropout(weight[None], self.dropout, draw_seed(weight.device))
        return functional_call(self.embedding, {"weight": dropped[0]}, words)


# %%
# Against the originals
# ---------------------
#
# awd-lstm-lm draws its masks with ``bernoulli_`` and divides by 1 - p. If we put our masks into its
# formulas, we must get our outputs. We get the masks from ``LockedDropout`` on ones: after the same
# ``torch.manual_seed``, all modules make the same decisions.


def after_seed_5(module, *inputs):
    torch.manual_seed(5)
    return module(*inputs)


def first_decisions(*shape):
    return after_seed_5(LockedDropout(0.4), torch.ones(1, *shape, device=DEVICE))[0]


if __name__ == "__main__":
    x = torch.randn(5, 3, 4, device=DEVICE)
    y = after_seed_5(LockedDropout(0.4), x)
    torch.testing.assert_close(y, x * first_decisions(3, 4).expand_as(x))

    lstm = torch.nn.LSTM(4, 6).to(DEVICE)
    for variational, width in ((False, 6), (True, 1)):
        module = WeightDrop(lstm, ["weight_hh_l0"], 0.4, variational)
        weight = {"weight_hh_l0": lstm.weight_hh_l0 * first_decisions(24, width)}
        expected = functional_call(lstm, weight, x)[0]
        torch.testing.assert_close(after_seed_5(module, x)[0], expected)

    table = torch.nn.Embedding(10, 4).to(DEVICE)
    words = torch.tensor([[1, 9, 1], [3, 9, 0]], device=DEVICE)
    y = after_seed_5(EmbeddingDropout(table, 0.4), words)
    torch.testing.assert_close(y, (table.weight * first_decisions(10, 1))[words])
    print("LockedDropout, WeightDrop and EmbeddingDropout follow the published formulas")

# %%
# The names and the order of the arguments are those of awd-lstm-lm as well, so ``LockedDropout()(x,
# 0.4)`` and ``WeightDrop(lstm, weights, dropout=0.4)`` work. Four things differ:
#
# - by default ours drops half of the weights, and the original none;
# - with ``variational=True`` the original drops in evaluation, too, and ours does not;
# - the original renames the weights, so its saved files have names that end in *raw*;
# - embedding dropout is a module here, and there a function with one more argument, ``scale``.
#
# :ref:`language model` trains with all three, and measures what ``WeightDrop`` costs.
#
# Exercises
# ---------
#
# 1. Embedding dropout passes over the whole table, though a batch uses few of its words. Write a
#    kernel that looks up and drops at once. Which number is the decision's index?
# 2. Make ``LockedDropout`` share its mask among the sequences, too. Which view of the tensor does
#    that?
# 3. Write the LSTM as a plain loop over time in PyTorch, and add zoneout. Why is there nothing to
#    scale?
#
# .. note::
#    Try it first.
#
#    1. The index is the word's number, as in the table. So the mask stays that of
#       ``EmbeddingDropout``, bit for bit, and a word that occurs twice is dropped both times.
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
#              kept = column < tl.where(w.to(tl.int64) >= threshold, n_features, 0)
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
#    2. Steps times sequences are the repeats, and the features are the decisions:
#
#       .. code-block:: python
#
#          class BatchDropout(LockedDropout):
#              def forward(self, x):
#                  if not self.training or self.dropout == 0:
#                      return x
#                  flat = x.reshape(-1, x.shape[2], 1)
#                  return shared_dropout(flat, self.dropout, draw_seed(x.device)).view(x.shape)
#
#    3. A value is the old one or the new one, and both have the usual size. Nothing becomes zero,
#       so there is no loss that the other values would have to make up for. At test time the two
#       are mixed, p of the old and 1 - p of the new.
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
#   2013: dropping weights.
# - S. Merity, N. S. Keskar and R. Socher, `Regularizing and optimizing LSTM language models <https://arxiv.org/abs/1708.02182>`_,
#   2017, and its code, `awd-lstm-lm <https://github.com/salesforce/awd-lstm-lm>`_.
# - Keras's documentation of its `LSTM <https://keras.io/api/layers/recurrent_layers/lstm/>`_.
