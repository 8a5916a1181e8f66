"""
.. _fused lstm:

A fused LSTM with recurrent dropout
===================================

You write the step of an LSTM as one kernel, with recurrent dropout inside, and give the whole
sequence to the GPU at once. The mask on the state belongs inside the time loop, and cuDNN, NVIDIA's
library behind ``torch.nn.LSTM``, has no place for it. So recurrent dropout sends Keras, and
everybody else, back to a loop of small operators, which is several times slower. At the end you
compare the kernel with cuDNN without dropout, both launched in the same way.

You will learn

- how Keras's ``dropout`` and ``recurrent_dropout`` are defined, and what ``implementation``
  changes;
- how to fuse a step of a recurrent network, forward and backward, around a matrix product;
- how CUDA graphs take the CPU out of a loop, and why every replay still draws new masks.

Needs: PyTorch, and :ref:`recurrent dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/fused_lstm.svg'
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
# The masks of Keras
# ------------------
#
# An LSTM computes four gates from the input :math:`x_t` and its own last output :math:`h_{t-1}`:
#
# .. math::
#
#    i, f, g, o = \sigma, \sigma, \tanh, \sigma \;\text{of}\; W x_t + U h_{t-1} + b, \qquad
#    c_t = f \cdot c_{t-1} + i \cdot g, \qquad h_t = o \cdot \tanh c_t
#
# Keras's LSTM takes two rates. ``dropout`` masks the input, ``recurrent_dropout`` the state. Both
# masks are drawn once a call and hold for all steps, as Gal and Ghahramani derived it, and what is
# kept is scaled by 1 / (1 - p). ``implementation`` says who shares them:
#
# - **1**: each gate has a mask of its own, in the order i, f, g, o. (Keras calls g c.)
# - **2** and **0**: the four gates share one.
#
# (Today's Keras takes implementation 1 whenever ``recurrent_dropout`` is above 0. Here you choose.)
# :ref:`recurrent dropout` has all the other forms, side by side.
#
# This is the loop, as one would write it. Masks have shape (G, batch, units), and G is 4 or 1.

import gc
import numbers

from torch.nn.functional import linear, pad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def lstm_loop(x, weight_ih, weight_hh, bias, h, c, input_masks, state_masks):
    """The plain loop; returns the outputs of all steps, and the last cell state."""
    G = len(state_masks)

    def project(x, masks, weight):
        parts = zip(masks, weight.chunk(G), strict=True)
        return torch.cat([linear(x * mask, part) for mask, part in parts], dim=-1)

    from_input = project(x, input_masks, weight_ih) + bias
    outputs = []
    for step in from_input:
        i, f, g, o = (step + project(h, state_masks, weight_hh)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), c


# %%
# How fast could it be?
# ---------------------
#
# Step t needs the output of step t - 1, so the loop over time stays. What each step must do is one
# product of the masked state, batch × H, with U, H × 4H, and some arithmetic on batch × H numbers.
# Everything that does not depend on the step before can leave the loop: the products with the
# inputs become one large product before it, and the gradients of both weights become large
# products after it. What is left:
#
# .. image:: /_static/fused_lstm.svg
#    :alt: A chain of steps. In each, a matrix product with U, then one kernel with gates, cell and mask, whose masked output enters the product of the next step.
#
# That is two launches a step, where the plain loop has a dozen, and as many in the backward pass.
# The product is PyTorch's. The other launch is ours.
#
# One kernel for a step
# ---------------------
#
# Each program takes one sequence and a block of units. It reads what the product left, applies the
# gates, and writes c, h and the *masked* h, once for each mask, ready for the next product. It
# also leaves the gates' values where it found their arguments, because the backward pass needs
# them.
#
# The mask is drawn, not read: **the state of unit u in sequence b is kept for gate k when word k
# of Philox, with the seed as key and the counter b · 2³² + u, is at least p · 2³², rounded.** Four
# gates, four words. With one shared mask it is word 0. Every step draws the same words again,
# which takes arithmetic, and no memory.
#
# Sequences may differ in length: from a sequence's end on, everything that is read counts as 0.
#
# Two words are new. ``tl.static_range`` is a loop that the compiler writes out, so that it knows k.
# And for an integer argument that is 1 or a multiple of 16 Triton compiles a kernel of its own,
# which ``do_not_specialize`` forbids for the step: one kernel serves all.


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))  # at most 1: nothing overflows
    far = (1 - e) / (1 + e)
    # Near 0 the difference 1 - e loses digits, so take the first terms of the series there.
    s = x * x
    series = -929569 / 638512875 + s * (6404582 / 10854718875)
    series = 62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075 + s * series))
    series = s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * series)))
    t = tl.where(s < 0.04, tl.abs(x) * (1 + series), far)
    return tl.where(x < 0, -t, t)


@triton.jit(do_not_specialize=["t"])
def step_kernel(
    gates_ptr,  # (T, B, 4, H): their arguments, replaced by their values
    h_ptr,  # (T + 1, B, H): row t is the state before step t
    c_ptr,
    masked_ptr,  # (G, B, H): the input of the next product
    lengths_ptr,
    t,
    n_sequences,
    n_units,
    threshold,
    scale: tl.float64,
    seed_ptr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < n_units
    active = unit < tl.where(t < tl.load(lengths_ptr + sequence), n_units, 0)
    before = (t * n_sequences + sequence) * n_units + unit
    after = ((t + 1) * n_sequences + sequence) * n_units + unit

    c = tl.load(c_ptr + before, mask=active, other=0.0)  # float32 or float64
    gate = gates_ptr + 4 * (before - unit) + unit
    i = tl.sigmoid(tl.load(gate, mask=active, other=0.0).to(c.dtype))
    f = tl.sigmoid(tl.load(gate + n_units, mask=active, other=0.0).to(c.dtype))
    g = tanh(tl.load(gate + 2 * n_units, mask=active, other=0.0).to(c.dtype))
    o = tl.sigmoid(tl.load(gate + 3 * n_units, mask=active, other=0.0).to(c.dtype))
    tl.store(gate, i, mask=inside)
    tl.store(gate + n_units, f, mask=inside)
    tl.store(gate + 2 * n_units, g, mask=inside)
    tl.store(gate + 3 * n_units, o, mask=inside)

    c = f * c + i * g
    h = o * tanh(c)
    tl.store(c_ptr + after, c, mask=inside)
    tl.store(h_ptr + after, h, mask=inside)

    words = tl.randint4x(tl.load(seed_ptr), (sequence << 32) | unit)
    if c.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    for k in tl.static_range(G):
        kept = tl.where(words[k].to(tl.int64) >= threshold, h * scale, 0.0)
        place = (k * n_sequences + sequence) * n_units + unit
        tl.store(masked_ptr + place, kept, mask=inside)


# %%
# For a finished sequence all loads give 0, so i = f = o = 1/2 and g = c = 0, hence h = 0. No other
# line has to know about lengths. c is float32 even when all else is bfloat16, because it sums over
# all steps. (The hyperbolic tangent is written out, because Triton's interpreter has none. Made from
# a sigmoid it would be short, but near 0 it would lose all its digits.)
#
# The backward pass of a step
# ---------------------------
#
# Run the loop from the end. The gradient of h has two parts: from the output, and from the next
# step's product, which arrives once for each mask and goes through that mask again. From there it
# is the chain rule through the formulas above. The kernel leaves the gradients of the gates'
# arguments, from which one product makes those of the masked state, and so on to the first step.


@triton.jit(do_not_specialize=["t"])
def step_backward_kernel(
    d_gates_ptr,  # (T, B, 4, H): the gradients of the gates' arguments
    d_cell_ptr,  # (B, H): the gradient of c, carried from step to step
    d_masked_ptr,  # (G, B, H): the gradient of the masked state
    dh_ptr,  # (T + 1, B, H): gradients of the outputs, dc_ptr likewise
    dc_ptr,
    gates_ptr,
    c_ptr,
    lengths_ptr,
    t,
    n_sequences,
    n_units,
    threshold,
    scale: tl.float64,
    seed_ptr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < n_units
    active = unit < tl.where(t < tl.load(lengths_ptr + sequence), n_units, 0)
    before = (t * n_sequences + sequence) * n_units + unit
    after = ((t + 1) * n_sequences + sequence) * n_units + unit
    d_cell_ptr += sequence * n_units + unit

    dc = tl.load(d_cell_ptr, mask=active, other=0.0)  # float32 or float64
    dc += tl.load(dc_ptr + after, mask=active, other=0.0)
    dh = tl.load(dh_ptr + after, mask=active, other=0.0).to(dc.dtype)
    words = tl.randint4x(tl.load(seed_ptr), (sequence << 32) | unit)
    if dc.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    for k in tl.static_range(G):
        place = (k * n_sequences + sequence) * n_units + unit
        d_masked = tl.load(d_masked_ptr + place, mask=active, other=0.0)
        dh += tl.where(words[k].to(tl.int64) >= threshold, d_masked * scale, 0.0)

    gate = 4 * (before - unit) + unit
    i = tl.load(gates_ptr + gate, mask=inside).to(dc.dtype)
    f = tl.load(gates_ptr + gate + n_units, mask=inside).to(dc.dtype)
    g = tl.load(gates_ptr + gate + 2 * n_units, mask=inside).to(dc.dtype)
    o = tl.load(gates_ptr + gate + 3 * n_units, mask=inside).to(dc.dtype)
    c_before = tl.load(c_ptr + before, mask=active, other=0.0)
    tanh_c = tanh(tl.load(c_ptr + after, mask=inside))

    dc += dh * o * (1 - tanh_c * tanh_c)
    d_gate = d_gates_ptr + gate
    tl.store(d_gate, dc * g * i * (1 - i), mask=inside)
    tl.store(d_gate + n_units, dc * c_before * f * (1 - f), mask=inside)
    tl.store(d_gate + 2 * n_units, dc * i * (1 - g * g), mask=inside)
    tl.store(d_gate + 3 * n_units, dh * tanh_c * o * (1 - o), mask=inside)
    tl.store(d_cell_ptr, dc * f, mask=inside)


# %%
# The same mask, outside the loop
# -------------------------------
#
# Three places outside the loop need the masks, too: the inputs before the first product, the first
# state, and the states once more for the gradient of U. One small kernel multiplies (G, T, B,
# units) by a mask (G, 1, B, units), and since that is linear, it is its own backward pass. G
# copies of one tensor come as an ``expand``, with a stride of 0, and are read from where they are.


@triton.jit
def gate_dropout_kernel(
    y_ptr,
    x_ptr,
    gate_stride,
    n_rows,
    n_sequences,
    n_units,
    threshold,
    scale: tl.float64,
    seed_ptr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < n_units
    words = tl.randint4x(tl.load(seed_ptr), (row % n_sequences << 32) | unit)
    if x_ptr.dtype.element_ty != tl.float64:
        scale = tl.cast(scale, tl.float32)
    for k in tl.static_range(G):
        x = tl.load(x_ptr + row * n_units + unit, mask=inside)
        kept = tl.where(words[k].to(tl.int64) >= threshold, x * scale, 0.0)
        tl.store(y_ptr + (k * n_rows + row) * n_units + unit, kept, mask=inside)
        x_ptr += gate_stride


BLOCK = 128


def threshold_and_scale(p):
    return round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0


def launch_gate_dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Multiply (G, T, B, units) by a mask (G, 1, B, units) that is drawn from the seed."""
    if x.dim() != 4 or not 1 <= len(x) <= 4 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"x must be floating-point, (1 to 4, T, B, units), got {got}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != x.device:
        got = f"{tuple(seed.shape)} of {seed.dtype} on {seed.device}"
        raise ValueError(f"seed must be one int64 on {x.device}, got {got}")
    G, n_steps, n_sequences, n_units = x.shape
    if x.stride()[1:] != (n_sequences * n_units, n_units, 1):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        rows = n_steps * n_sequences
        with torch.cuda.device_of(x):
            gate_dropout_kernel[rows, triton.cdiv(n_units, BLOCK)](
                y, x, x.stride(0), rows, n_sequences, n_units,
                *threshold_and_scale(p), seed, G, BLOCK,
            )  # fmt: skip
    return y


gate_dropout_op = torch.library.custom_op(
    "fast_and_right::gate_dropout", launch_gate_dropout, mutates_args=()
)
gate_dropout_op.register_fake(lambda x, p, seed: x.new_empty(x.shape))


class GateDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed):
        compiling = torch.compiler.is_compiling()
        return (gate_dropout_op if compiling else launch_gate_dropout)(x, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, gradient):
        return GateDropout.apply(gradient, ctx.p, *ctx.saved_tensors), None, None


gate_dropout = GateDropout.apply

# %%
# The loop
# --------
#
# Now run all steps. U comes as (G, 4H/G, H): as four matrices for four masked
# states, or as one. The product is a batched one, added in place to what the inputs gave.


def launch_steps(
    from_input: torch.Tensor,
    weight: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    lengths: torch.Tensor,
    p: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_steps, n_sequences, _, n_units = from_input.shape
    G, n_real = len(weight), h0.shape[1]
    gates = from_input.clone(memory_format=torch.contiguous_format)
    gates[..., n_real:] = 0  # units that fill up a row; an infinite input made them NaN
    h = gates.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    h[0], c[0] = (pad(state, (0, n_units - n_real)) for state in (h0, c0))
    masked = launch_gate_dropout(h[:1].expand(G, -1, -1, -1), p, seed)[:, 0]
    grid = n_sequences, triton.cdiv(n_units, BLOCK)
    sizes = n_sequences, n_units, *threshold_and_scale(p)
    with torch.cuda.device_of(h):
        for t in range(n_steps if n_sequences > 0 else 0):
            by_mask = gates[t].view(n_sequences, G, -1).transpose(0, 1)
            by_mask.baddbmm_(masked, weight.mT)
            step_kernel[grid](gates, h, c, masked, lengths, t, *sizes, seed, G, BLOCK)
    return h, c, gates


# %%
# Back through the steps. After the loop, the gradient of U is one product over all steps at once,
# and the masked states it needs are drawn again rather than kept.


def launch_steps_backward(
    dh: torch.Tensor,
    dc: torch.Tensor,
    gates: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    lengths: torch.Tensor,
    n_real: int,
    p: float,
    seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n_steps, n_sequences, _, n_units = gates.shape
    G = len(weight)
    dh, dc = dh.contiguous(), dc.contiguous()
    d_gates = torch.empty_like(gates)
    d_cell = torch.zeros_like(c[0])
    d_masked = h.new_zeros(G, n_sequences, n_units)
    grid = n_sequences, triton.cdiv(n_units, BLOCK)
    sizes = n_sequences, n_units, *threshold_and_scale(p)
    tensors = d_gates, d_cell, d_masked, dh, dc, gates, c, lengths
    with torch.cuda.device_of(h):
        for t in reversed(range(n_steps if n_sequences > 0 else 0)):
            step_backward_kernel[grid](*tensors, t, *sizes, seed, G, BLOCK)
            by_mask = d_gates[t].view(n_sequences, G, -1).transpose(0, 1)
            torch.bmm(by_mask, weight, out=d_masked)
    masked = launch_gate_dropout(h[:-1].expand(G, -1, -1, -1), p, seed).flatten(1, 2)
    by_mask = d_gates.view(n_steps * n_sequences, G, weight.shape[1])
    d_weight = torch.bmm(by_mask.permute(1, 2, 0), masked)
    dh0 = launch_gate_dropout(d_masked[:, None], p, seed).sum(dim=0)[0] + dh[0]
    dc0 = d_cell + dc[0]
    return d_gates, d_weight, dh0[:, :n_real].clone(), dc0[:, :n_real].clone()


# %%
# Autograd gets both as one ``Function``, and ``torch.compile`` gets an operator for each;
# :ref:`operators` explains why.

lstm_steps_op = torch.library.custom_op(
    "fast_and_right::lstm_steps", launch_steps, mutates_args=()
)
lstm_steps_backward_op = torch.library.custom_op(
    "fast_and_right::lstm_steps_backward", launch_steps_backward, mutates_args=()
)


@lstm_steps_op.register_fake
def _(from_input, weight, h0, c0, lengths, p, seed):
    n_steps, n_sequences, _, n_units = from_input.shape
    h = from_input.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    return h, c, from_input.new_empty(from_input.shape)


@lstm_steps_backward_op.register_fake
def _(dh, dc, gates, weight, h, c, lengths, n_real, p, seed):
    states = h[0, :, :n_real], c[0, :, :n_real]
    return tuple(t.new_empty(t.shape) for t in (gates, weight, *states))


class LSTMStepsBackward(torch.autograd.Function):
    @staticmethod
    def forward(dh, dc, gates, weight, h, c, lengths, n_real, p, seed):
        compiling = torch.compiler.is_compiling()
        run = lstm_steps_backward_op if compiling else launch_steps_backward
        return run(dh, dc, gates, weight, h, c, lengths, n_real, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("LSTM has no second derivatives")


class LSTMSteps(torch.autograd.Function):
    @staticmethod
    def forward(from_input, weight, h0, c0, lengths, p, seed):
        run = lstm_steps_op if torch.compiler.is_compiling() else launch_steps
        return run(from_input, weight, h0, c0, lengths, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, h0, _, lengths, ctx.p, seed = inputs
        h, c, gates = output
        ctx.n_real = h0.shape[1]
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(gates, weight, h, c, lengths, seed)

    @staticmethod
    def backward(ctx, dh, dc, _):
        *saved, seed = ctx.saved_tensors
        arguments = dh, dc, *saved, ctx.n_real, ctx.p, seed
        return *LSTMStepsBackward.apply(*arguments), None, None, None


# %%
# The module
# ----------
#
# It takes its arguments, its parameters' names and its results from ``torch.nn.LSTM``, so that a
# state dict goes from one to the other, and the rates from Keras. The seeds are drawn on the GPU
# by PyTorch's own generator: ``torch.manual_seed`` governs them, and ``checkpoint`` replays them.


class LSTM(torch.nn.Module):
    """One layer of ``torch.nn.LSTM`` with Keras's ``dropout`` and ``recurrent_dropout``.

    In training, each call draws masks of shape (G, batch, units) for inputs and state, which
    hold for all steps and are scaled by 1 / (1 - p). Nothing is dropped in evaluation.

    Parameters
    ----------
    input_size, hidden_size : int
        The numbers of input features and of units.
    dropout, recurrent_dropout : float
        The probability of dropping an input, and a unit of the state, in [0, 1].
    implementation : int
        1: each gate has masks of its own (G = 4). 0 or 2: the gates share them (G = 1).
    batch_first : bool
        Whether input and output are (batch, time, features), not (time, batch, features).

    Raises
    ------
    TypeError, ValueError
        If an argument has another type, or is out of range.

    References
    ----------
    Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", 2016; Keras's ``LSTM``.
    """

    def __init__(
        self,
        input_size,
        hidden_size,
        *,
        dropout=0.0,
        recurrent_dropout=0.0,
        implementation=2,
        batch_first=False,
    ):
        super().__init__()
        for name, size in [("input_size", input_size), ("hidden_size", hidden_size)]:
            if not isinstance(size, numbers.Integral) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        for name, p in [("dropout", dropout), ("recurrent_dropout", recurrent_dropout)]:
            if not isinstance(p, numbers.Real):
                raise TypeError(f"{name} must be a number, got {type(p).__name__}")
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {p}")
        if implementation not in (0, 1, 2):
            raise ValueError(f"implementation must be 0, 1 or 2, got {implementation!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.dropout, self.recurrent_dropout = float(dropout), float(recurrent_dropout)
        self.implementation, self.batch_first = implementation, batch_first
        shapes = {
            "weight_ih_l0": (4 * hidden_size, input_size),
            "weight_hh_l0": (4 * hidden_size, hidden_size),
            "bias_ih_l0": (4 * hidden_size,),
            "bias_hh_l0": (4 * hidden_size,),
        }
        for name, shape in shapes.items():
            bound = hidden_size**-0.5
            parameter = torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self.register_parameter(name, parameter)

    def forward(self, input, hx=None, lengths=None):
        """Run the sequences.

        Parameters
        ----------
        input : torch.Tensor or PackedSequence
            (time, batch, input_size), or (batch, time, input_size) if ``batch_first``;
            float16, bfloat16, float32 or float64. There may be no steps: the state stays.
        hx : pair of torch.Tensor, optional
            The first state h and c, each (1, batch, hidden_size). Zeros if absent.
        lengths : list of int or torch.Tensor, optional
            On the CPU, the length of each sequence of a padded batch, from 0 to time. What
            follows a sequence's end is ignored, and the output there is 0.

        Returns
        -------
        output, (h_n, c_n)
            As from ``torch.nn.LSTM``: all outputs, in the layout of the input, and the state
            at each sequence's end. The backward pass reads the outputs: don't change them
            in place before it.
        """
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None:
            if lengths is not None:
                raise ValueError(
                    "lengths must be None for a PackedSequence, which has its own"
                )
            x, lengths = pad_packed_sequence(packed)
        elif isinstance(input, torch.Tensor):
            x = input
        else:
            got = type(input).__name__
            raise TypeError(f"input must be a tensor or a PackedSequence, got {got}")
        if x.dim() != 3 or x.shape[2] != self.input_size:
            wanted = f"(time, batch, {self.input_size})"
            if self.batch_first:
                wanted = f"(batch, time, {self.input_size})"
            raise ValueError(f"input must be {wanted}, got shape {tuple(x.shape)}")
        if self.batch_first and packed is None:
            x = x.transpose(0, 1)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=getattr(lengths, "device", "cpu"))
            if lengths.numel() and lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
            lengths = lengths.long()

        h, c = self.states(x, hx, lengths)
        output = h[1:]
        if lengths is None:
            state = h[-1:].clone(), c[-1:].clone()
        else:
            ends = lengths[None], torch.arange(x.shape[1], device=lengths.device)[None]
            state = h[ends], c[ends]
        if packed is not None:
            order = packed.sorted_indices
            ordered = output if order is None else output[:, order]
            data = pack_padded_sequence(
                ordered, lengths.sort(descending=True).values
            ).data
            return PackedSequence(data, *packed[1:]), state
        return output.transpose(0, 1) if self.batch_first else output, state

    def states(self, x, hx, lengths):
        """h and c before the first step and after each, (T + 1, batch, hidden_size)."""
        n_steps, n_sequences, _ = x.shape
        if x.device.type != DEVICE:
            raise ValueError(
                f"input must be on device type {DEVICE!r}, got {x.device.type!r}"
            )
        shape = 1, n_sequences, self.hidden_size
        if hx is None:
            hx = x.new_zeros(shape), x.new_zeros(shape)
        elif (
            not isinstance(hx, tuple | list | torch.Tensor)
            or len(hx) != 2
            or not all(isinstance(part, torch.Tensor) for part in hx)
        ):
            raise TypeError("hx must be None or a pair of tensors")
        h0, c0 = hx
        if h0.shape != shape or c0.shape != shape:
            got = tuple(h0.shape), tuple(c0.shape)
            raise ValueError(f"hx must be two tensors of shape {shape}, got {got}")
        for state in hx:
            if state.device != x.device:
                raise ValueError(
                    f"hx must be on {x.device}, as input, got {state.device}"
                )
            if not torch.is_autocast_enabled(DEVICE) and state.dtype != x.dtype:
                raise TypeError(f"hx must be {x.dtype}, as input, got {state.dtype}")
        weight = self.weight_hh_l0
        if not torch.is_autocast_enabled(DEVICE) and weight.dtype != x.dtype:
            raise TypeError(
                f"input must be {weight.dtype}, as the weights, got {x.dtype}"
            )
        if lengths is None:
            lengths = torch.full((n_sequences,), n_steps, device=x.device)
        else:
            if lengths.device.type != "cpu" or lengths.shape != (n_sequences,):
                got = f"shape {tuple(lengths.shape)} on {lengths.device}"
                raise ValueError(f"lengths must be {n_sequences} on the CPU, got {got}")
            if n_sequences > 0 and not 0 <= lengths.min() <= lengths.max() <= n_steps:
                raise ValueError(
                    f"lengths must be from 0 to {n_steps}, got {lengths.tolist()}"
                )
            lengths = lengths.to(x.device)
            steps = torch.arange(n_steps, device=x.device)[:, None, None]
            x = x.masked_fill(steps >= lengths[:, None], 0)  # padding may hold NaN

        seeds = torch.zeros(2, dtype=torch.int64, device=x.device)
        if self.training:
            seeds = torch.randint(2**62, (2,), device=x.device)
        rates = self.dropout, self.recurrent_dropout
        dropout, recurrent_dropout = rates if self.training else (0.0, 0.0)
        G = 4 if self.implementation == 1 else 1

        # Products are fastest when rows start at multiples of 16 bytes: add units that stay 0.
        H, extra = self.hidden_size, -self.hidden_size % 8
        weight_ih = pad(self.weight_ih_l0.view(4, H, -1), (0, 0, 0, extra))
        weight_hh = pad(self.weight_hh_l0.view(4, H, H), (0, extra, 0, extra))
        bias = pad((self.bias_ih_l0 + self.bias_hh_l0).view(4, H), (0, extra))

        masked = gate_dropout(x.expand(G, -1, -1, -1), dropout, seeds[:1]).flatten(1, 2)
        weight_ih = weight_ih.view(G, -1, self.input_size)
        gates = torch.baddbmm(bias.view(G, 1, -1), masked, weight_ih.mT)
        gates = gates.view(G, n_steps, n_sequences, 4 // G, H + extra).permute(
            1, 2, 0, 3, 4
        )
        h, c, _ = LSTMSteps.apply(
            gates.flatten(2, 3),
            weight_hh.to(gates.dtype).view(G, -1, H + extra),
            h0[0].to(gates.dtype),
            c0[0].to(torch.promote_types(gates.dtype, torch.float32)),
            lengths,
            recurrent_dropout,
            seeds[1:],
        )
        h, c = h[..., :H], c[..., :H]
        return h, c.to(h.dtype)


# %%
# Is it right?
# ------------
#
# With nothing dropped it must agree with ``torch.nn.LSTM``, and with dropout with the loop, given
# the same masks. To see the masks, pass ones through ``gate_dropout`` with the seeds that the
# module is going to draw. All in float64, so that the comparison is sharp, and with the gradients
# of everything.


def loop_like(lstm, x):
    """What ``lstm.train()(x)`` is about to compute, by the plain loop."""
    G = 4 if lstm.implementation == 1 else 1
    seeds = torch.randint(2**62, (2,), device=DEVICE)

    def masks(n_units, p, seed):
        return gate_dropout(x.new_ones(G, 1, x.shape[1], n_units), p, seed)[:, 0]

    return lstm_loop(
        x, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0,
        *x.new_zeros(2, x.shape[1], lstm.hidden_size),
        masks(lstm.input_size, lstm.dropout, seeds[:1]),
        masks(lstm.hidden_size, lstm.recurrent_dropout, seeds[1:]),
    )[0]  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, device=DEVICE, dtype=torch.float64, requires_grad=True)
    reference = torch.nn.LSTM(4, 7).to(DEVICE, torch.float64)
    lstm = LSTM(4, 7, dropout=0.3, recurrent_dropout=0.3).to(DEVICE, torch.float64)
    lstm.load_state_dict(reference.state_dict())
    torch.testing.assert_close(lstm.eval()(x), reference(x))

    for lstm.implementation in (1, 2):
        results = []
        for run in (lambda x: lstm.train()(x)[0], lambda x: loop_like(lstm, x)):
            torch.manual_seed(1)
            y = run(x)
            inputs = [x, *lstm.parameters()]
            results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
        torch.testing.assert_close(*results)
        error = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
        print(f"implementation {lstm.implementation}: all gradients within {error:.0e}")

# %%
# Sequences of different lengths, packed or padded, come out as they would alone. A length of 0
# leaves the state as it was; ``torch.nn.LSTM`` refuses it.

if __name__ == "__main__":
    lengths = [5, 0, 2]
    output, (h_n, _) = lstm.eval()(x, lengths=lengths)
    for b, length in enumerate(lengths):
        alone, (h_alone, _) = lstm(x[:length, b : b + 1])
        torch.testing.assert_close(output[:length, b : b + 1], alone)
        torch.testing.assert_close(h_n[:, b : b + 1], h_alone)
        assert not output[length:, b].any()

    packed = pack_padded_sequence(x, [5, 3, 2])
    torch.testing.assert_close(lstm(packed)[0].data, reference(packed)[0].data)

# %%
# Take the CPU out of the loop
# ----------------------------
#
# Every launch costs the CPU time, and a launch from Triton costs more than one of PyTorch's own
# operators. We launch only twice a step. But if the GPU finishes a step before the CPU has launched
# the next, it has to wait: the loop is CPU-bound.
#
# A *CUDA graph* helps. You *capture* the launches once, and then one call replays all of them.
# ``torch.cuda.make_graphed_callables`` captures the forward and the backward pass of a module. From
# then on the module takes inputs of the captured shape only, and each replay overwrites the output
# of the one before.
#
# A replay repeats the same launches with the same arguments. If the seed were an argument, each
# replay would draw the same masks. But our kernels *load* the seed from memory, and the launch that
# draws a new one is part of the graph. PyTorch moves its generator on with every replay.

if __name__ == "__main__" and not INTERPRET:
    graphed = LSTM(4, 7, recurrent_dropout=0.3).to(DEVICE)
    x = torch.randn(5, 3, 4, device=DEVICE, requires_grad=True)
    torch.cuda.make_graphed_callables(graphed, (torch.randn_like(x).requires_grad_(),))

    first, second = graphed(x)[0].clone(), graphed(x)[0].clone()
    assert not torch.equal(first, second)
    print("two replays draw two masks")
    torch.manual_seed(2)
    first = graphed(x)[0].clone()
    torch.manual_seed(2)
    assert torch.equal(graphed(x)[0], first)
    print("the same seed, the same masks")

# %%
# How fast is it?
# ---------------
#
# The size of AWD-LSTM's layers: 70 steps, batch 80, 400 inputs, and more or fewer units than its
# 1150. Forward and backward together. The lines are this module with implementation 2, cuDNN's
# LSTM, which can drop nothing of its state, and the plain loop with one mask: each captured in a
# CUDA graph (solid or dashed), and ours and cuDNN's also launched as usual (dotted). The limit is
# the matrix products alone, captured, with nothing in between.
#
# In float32 mind the precision. cuDNN's LSTM rounds the inputs of its products to TF32 unless you
# tell it otherwise, and PyTorch's products do not unless you tell them to. (TF32 keeps 10 of the 23
# fraction bits of a float32, so that tensor cores can take it.) In the figure all use TF32.


class Loop(LSTM):
    """The plain loop with the masks from ``F.dropout``, as one would write it."""

    def forward(self, x):
        ones = x.new_ones(1, x.shape[1], self.input_size)
        states = x.new_ones(1, x.shape[1], self.hidden_size)
        zeros = torch.zeros_like(states[0])
        return lstm_loop(
            x,
            self.weight_ih_l0,
            self.weight_hh_l0,
            self.bias_ih_l0 + self.bias_hh_l0,
            zeros,
            zeros,
            torch.nn.functional.dropout(ones, self.dropout),
            torch.nn.functional.dropout(states, self.recurrent_dropout),
        )


def products_alone(n_units, dtype):
    """A call that replays the matrix products of a forward and a backward pass."""
    H = n_units + -n_units % 8
    sizes = (5600, 400), (5600, H), (5600, 4 * H), (4 * H, 400), (4 * H, H)
    x, h, d, W, U = (torch.randn(size, device=DEVICE, dtype=dtype) for size in sizes)

    def run():
        linear(x, W)
        for _ in range(70):
            linear(h[:80], U)
        for _ in range(70):
            d[:80] @ U
        return d.T @ h, d.T @ x, d @ W

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_of(line, n_units, dtype):
    """Milliseconds of a forward and a backward pass."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    name, *captured = line.split(", ")
    if name == "products":
        step = products_alone(n_units, dtype)
        return triton.testing.do_bench(step, return_mode="median")
    rates = {"dropout": 0.3, "recurrent_dropout": 0.3}
    module = {
        "ours": lambda: LSTM(400, n_units, **rates),
        "implementation 1": lambda: LSTM(400, n_units, **rates, implementation=1),
        "cuDNN": lambda: torch.nn.LSTM(400, n_units),
        "loop": lambda: Loop(400, n_units, **rates),
    }[name]().to(DEVICE, dtype)
    x = torch.randn(70, 80, 400, device=DEVICE, dtype=dtype, requires_grad=True)
    if captured:
        gc.collect()  # to free an earlier graph in the middle of a capture would spoil it
        torch.cuda.make_graphed_callables(module, (torch.randn_like(x).requires_grad_(),))
    gradient = torch.randn(70, 80, n_units, device=DEVICE, dtype=dtype)
    inputs = [x, *module.parameters()]

    def step():
        torch.autograd.grad(module(x)[0], inputs, gradient)

    return triton.testing.do_bench(step, return_mode="median")


LINES = {
    "ours, captured": ("fused, captured", "#d55e00", "-"),
    "implementation 1, captured": ("fused, implementation 1, captured", "#d55e00", "--"),
    "ours": ("fused", "#d55e00", ":"),
    "cuDNN, captured": ("cuDNN, no recurrent dropout, captured", "#0072b2", "-"),
    "cuDNN": ("cuDNN, no recurrent dropout", "#0072b2", ":"),
    "loop, captured": ("plain loop, captured", "#cc79a7", "-"),
    "products": ("matrix products alone, captured", "#555555", "--"),
}


@triton.testing.perf_report(
    [
        triton.testing.Benchmark(
            x_names=["n_units"], x_vals=[256, 512, 1024, 1150, 1152, 2048],
            line_arg="line", line_vals=list(LINES),
            line_names=[name for name, *_ in LINES.values()],
            styles=[style for _, *style in LINES.values()],
            xlabel=f"units, {dtype}\n{MACHINE}", y_log=True, ylabel="ms",
            plot_name=f"fused-lstm-{dtype}", args={"dtype": getattr(torch, dtype)},
        )
        for dtype in ("float32", "bfloat16")
    ]
)  # fmt: skip
def benchmark(line, n_units, dtype):
    return time_of(line, n_units, dtype)


if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    for dtype, times in zip(
        ("TF32", "bfloat16"), benchmark.run(show_plots=True, return_df=True), strict=True
    ):
        n_units, ours, _, called, cudnn, cudnn_called, loop, products = times.T.values
        rows = [
            n_units, ours / cudnn, called / cudnn_called, ours / loop, ours / products,
        ]  # fmt: skip
        headers = [
            "units",
            "cuDNN's, captured",
            "cuDNN's, called",
            "the loop's, captured",
        ]
        headers += ["the products'"]
        print(f"{dtype}: our time as a multiple of")
        layout = {"floatfmt": ("", ".2f", ".2f", ".2f", ".2f")}
        print(tabulate(zip(*rows, strict=True), headers, **layout), "\n")

# %%
# The first two columns compare the fused loop *with* recurrent dropout with cuDNN without, once both
# captured and once both called from Python. Look at the called ones first: there cuDNN is far
# ahead, because it launches once for the whole sequence, and we launch twice a step from Python.
# Captured, neither waits for the CPU. On an H100, where the units are a multiple of 128, cuDNN is
# then somewhat faster in bfloat16, and we are in TF32. At 1150 units cuDNN is slow: its rows then
# begin at no multiple of 16 bytes. Ours do, because the module adds units that stay 0. So don't take
# 1150 for the rule.
#
# The last column is the price of everything between the products. Implementation 1 makes four
# products in the place of one, with the same arithmetic. Whether that takes longer depends on the
# kernels that the library picks for them. The captured plain loop still runs a dozen small
# operators a step, each of which reads and writes its tensors.
#
# Exercises
# ---------
#
# 1. Remove the line that adds units until they are a multiple of 8, and measure 1150 units again.
# 2. Draw the recurrent mask anew at each step. Which number has to enter the counter, and which
#    other kernel must draw it likewise?
# 3. Give the module Semeniuta's dropout, which multiplies g alone, anew at each step. A few lines
#    of either kernel change.
# 4. Let one launch run all steps: programs that stay on the GPU, each with its columns of U on the
#    chip, and a barrier after each step. What must a program read from the others at each step,
#    and what would it save?
#
# .. note::
#    Try it first.
#
#    1. The results stay the same. But 1150 numbers of 2 or of 4 bytes are no multiple of 16 bytes,
#       so rows begin anywhere, and the products have to load them in smaller pieces. Expect the
#       products to take longer, and the kernel of the step as long as before.
#
#       .. code-block:: diff
#
#          -        H, extra = self.hidden_size, -self.hidden_size % 8
#          +        H, extra = self.hidden_size, 0
#
#    2. The number of the step that reads the state: step t masks what step t + 1 multiplies. The
#       backward kernel has to draw the same, and so has the gradient of U, which masks all states
#       at once: for it, take all steps for one step with T times the sequences.
#
#       .. code-block:: diff
#
#          @@ in step_kernel and in step_backward_kernel
#          -    words = tl.randint4x(tl.load(seed_ptr), (sequence << 32) | unit)
#          +    row = (t + 1) * n_sequences + sequence
#          +    words = tl.randint4x(tl.load(seed_ptr), (row << 32) | unit)
#          @@ in launch_steps_backward
#          -    masked = launch_gate_dropout(h[:-1].expand(G, -1, -1, -1), p, seed).flatten(1, 2)
#          +    states = h[:-1].view(1, 1, -1, n_units).expand(G, -1, -1, -1)
#          +    masked = launch_gate_dropout(states, p, seed)[:, 0]
#
#    3. Where g is used, it is masked, in the forward kernel once, in the backward kernel twice;
#       where h was masked, it no longer is. With implementation 2, ``recurrent_dropout`` is now
#       Semeniuta's rate, and the mask is drawn at each step. Outside the loop, the state is dropped
#       at a rate of 0.
#
#       .. code-block:: diff
#
#          @@ in step_kernel
#          -    c = f * c + i * g
#          +    row = t * n_sequences + sequence
#          +    word = tl.randint(tl.load(seed_ptr), (row << 32) | unit).to(tl.int64)
#          +    c = f * c + i * tl.where(word >= threshold, g * tl.cast(scale, c.dtype), 0.0)
#          @@
#          -        kept = tl.where(words[k].to(tl.int64) >= threshold, h * scale, 0.0)
#          +        kept = h
#          @@ in step_backward_kernel
#          -        dh += tl.where(words[k].to(tl.int64) >= threshold, d_masked * scale, 0.0)
#          +        dh += d_masked
#          @@
#          -    tl.store(d_gate, dc * g * i * (1 - i), mask=inside)
#          +    row = t * n_sequences + sequence
#          +    word = tl.randint(tl.load(seed_ptr), (row << 32) | unit).to(tl.int64)
#          +    factor = tl.where(word >= threshold, scale, 0.0).to(dc.dtype)
#          +    tl.store(d_gate, dc * factor * g * i * (1 - i), mask=inside)
#          @@
#          -    tl.store(d_gate + 2 * n_units, dc * i * (1 - g * g), mask=inside)
#          +    tl.store(d_gate + 2 * n_units, dc * factor * i * (1 - g * g), mask=inside)
#          @@ in launch_steps
#          -    masked = launch_gate_dropout(h[:1].expand(G, -1, -1, -1), p, seed)[:, 0]
#          +    masked = launch_gate_dropout(h[:1].expand(G, -1, -1, -1), 0.0, seed)[:, 0]
#          @@ in launch_steps_backward
#          -    masked = launch_gate_dropout(h[:-1].expand(G, -1, -1, -1), p, seed).flatten(1, 2)
#          +    masked = launch_gate_dropout(h[:-1].expand(G, -1, -1, -1), 0.0, seed).flatten(1, 2)
#          @@
#          -    dh0 = launch_gate_dropout(d_masked[:, None], p, seed).sum(dim=0)[0] + dh[0]
#          +    dh0 = launch_gate_dropout(d_masked[:, None], 0.0, seed).sum(dim=0)[0] + dh[0]
#
#    4. The states of all units, batch × H numbers, since every column of the product needs all of
#       them, and each program computes only its own. They pass through memory or L2, and the
#       barrier keeps anyone from reading too early. It saves the launches, and the reading of U at
#       every step, which doesn't change from step to step. For the barrier all programs must be on
#       the GPU at the same time, and U must fit into their registers and shared memory.
#
# References
# ----------
#
# - Y. Gal and Z. Ghahramani, `A theoretically grounded application of dropout in recurrent neural networks <https://arxiv.org/abs/1512.05287>`_,
#   2016.
# - Keras's documentation of its `LSTM <https://keras.io/api/layers/recurrent_layers/lstm/>`_.
# - J. Appleyard, T. Kociský and P. Blunsom, `Optimizing performance of recurrent neural networks on GPUs <https://arxiv.org/abs/1604.01946>`_,
#   2016: how cuDNN's got fast.
# - PyTorch's documentation of `CUDA graphs <https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs>`_.
