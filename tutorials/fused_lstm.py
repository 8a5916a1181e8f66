"""
.. _fused lstm:

A fused LSTM: the step as one kernel
====================================

You write the step of an LSTM as one kernel, with recurrent dropout inside. Recurrent dropout masks
the *state*, which each step hands to the next, so it belongs inside the loop over time. cuDNN,
NVIDIA's library behind ``torch.nn.LSTM``, has no place for it there, so Keras and others fall back
on a loop of small operators. Here you keep the loop, but with only two launches a step in each
pass, and you measure what slows it down.

You will learn

- how Keras's ``dropout`` and ``recurrent_dropout`` are defined, and what ``implementation``
  changes;
- what can leave the loop over time, and what must stay;
- how to fuse a step of a recurrent network, forward and backward, around a matrix product.

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
# At step t, an LSTM computes four *gates* from the input :math:`x_t` and the state :math:`h_{t-1}`,
# its output one step before. With them it updates its memory, the *cell* :math:`c_t`. Each gate, c
# and h have one number for each of H *units*. W, U and b hold the parameters of the four gates, one
# gate after another, and σ is the sigmoid:
#
# .. math::
#
#    i, f, g, o = \sigma, \sigma, \tanh, \sigma \;\text{of}\; W x_t + U h_{t-1} + b, \qquad
#    c_t = f \cdot c_{t-1} + i \cdot g, \qquad h_t = o \cdot \tanh c_t
#
# Keras's LSTM takes two rates: ``dropout`` for the input, ``recurrent_dropout`` for the state. Both
# masks are drawn once a call and used in all steps, as Gal and Ghahramani derived. What is kept is
# scaled by 1 / (1 - p). ``implementation`` says whether the gates share a mask:
#
# - **1**: each gate has a mask of its own, in the order i, f, g, o. (Keras's name for g is c.)
# - **2** and **0**: the four gates share one.
#
# (Today's Keras takes implementation 1 whenever ``recurrent_dropout`` is above 0. Here you choose.)
#
# This is the plain loop. The state's masks have shape (G, batch, units), with G = 4 or 1 masks.

import gc

from torch.nn.functional import dropout, linear, pad


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
# What must stay in the loop?
# ---------------------------
#
# Step t needs the output of step t - 1, so the loop over time stays. Each step must multiply the
# masked state (batch × H) by the transpose of U (H × 4H), and do some arithmetic on batch × H
# numbers. Everything that does not depend on the step before can leave the loop: the products with
# the inputs become one large product before it, and the gradients of both weights become large
# products after it. Two things are left:
#
# .. image:: /_static/fused_lstm.svg
#    :alt: A chain of steps. In each, a matrix product with U, then one kernel with gates, cell and mask, whose masked output enters the product of the next step.
#
# That is two launches a step, where the plain loop has a dozen, and two in the backward pass. The
# product is PyTorch's, and the other launch is ours.
#
# One kernel for a step
# ---------------------
#
# A gate's *argument* is the sum inside its σ or tanh. This is what the kernel of a step reads and
# writes:
#
# .. image:: /_static/lstm_buffers.svg
#    :alt: Step t reads row t of c and the gates' arguments. It writes row t + 1 of h and c, the gates' values in the place of their arguments, and the masked state, which the product with U adds to the arguments of step t + 1.
#
# Each program takes one sequence and a block of units. It reads the gates' arguments, computes the
# gates, and writes c, h and, for the next product, the *masked* h, once for each mask. It stores
# the gates' values in place of their arguments, because the backward pass needs them.
#
# A mask holds 0 for a unit that is dropped, and 1 / (1 - p) for one that is kept. It is drawn before
# the loop and kept in memory. One mask serves all steps, so it is only as large as the state of one
# step, and drawing it from a seed, as in :ref:`seeded dropout`, would save next to nothing.
#
# Sequences may differ in length: after the end of a sequence, no unit is active, and the kernel
# takes 0 for c and the gates' arguments.
#
# A step number t of 1 or a multiple of 16 would make Triton compile the kernel once more;
# ``do_not_specialize`` prevents that. The compiler unrolls the loop over ``tl.static_range``.


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))  # at most 1: nothing overflows
    far = (1 - e) / (1 + e)  # tanh of |x|
    # Near 0 the difference 1 - e loses digits, so take the first terms of the series there.
    s = x * x
    series = -929569 / 638512875 + s * (6404582 / 10854718875)
    series = 62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075 + s * series))
    series = s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * series)))
    t = tl.where(s < 0.04, tl.abs(x) * (1 + series), far)
    return tl.where(x < 0, -t, t)


@triton.jit(do_not_specialize=["t"])
def step_kernel(
    gates_ptr,  # (T, B, 4, H): the gates' arguments, replaced by their values
    h_ptr, c_ptr,  # (T + 1, B, H): row t is the state before step t
    masked_ptr,  # (G, B, H): the input of the next product
    masks_ptr,  # (G, B, H)
    lengths_ptr, t, n_sequences, n_units, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < n_units
    active = unit < tl.where(t < tl.load(lengths_ptr + sequence), n_units, 0)
    before = (t * n_sequences + sequence) * n_units + unit
    after = ((t + 1) * n_sequences + sequence) * n_units + unit

    c = tl.load(c_ptr + before, mask=active, other=0.0)  # float32 or float64
    gate = gates_ptr + 4 * (before - unit) + unit  # the next gate is n_units further on
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

    for k in tl.static_range(G):
        place = (k * n_sequences + sequence) * n_units + unit
        keep = tl.load(masks_ptr + place, mask=inside)
        tl.store(masked_ptr + place, h * keep, mask=inside)


# %%
# For a finished sequence, i = f = o = 1/2 and g = c = 0, hence h = 0. The cell is float32 even when
# all else is bfloat16, because it adds up over all steps. (``tanh`` is written out because Triton's
# interpreter has none. Computed from a sigmoid, it would lose digits near 0.)
#
# The backward pass of a step
# ---------------------------
#
# Run the loop from the end. The gradient of h has two parts. One comes from the output. The other
# comes from the next step's product, once for each mask, and is multiplied by that mask. The rest
# is the chain rule through the formulas above, with the derivatives :math:`i (1 - i)` of a sigmoid
# and :math:`1 - g^2` of a tanh. The kernel stores the gradients of the gates' arguments. Multiplied
# by U, they give the gradient of the masked state for the step before.


@triton.jit(do_not_specialize=["t"])
def step_backward_kernel(
    d_gates_ptr,  # (T, B, 4, H): the gradients of the gates' arguments
    d_cell_ptr,  # (B, H): the gradient of c, carried from step to step
    d_masked_ptr,  # (G, B, H): the gradient of the masked state
    dh_ptr, dc_ptr,  # (T + 1, B, H): gradients of the outputs
    gates_ptr, c_ptr, masks_ptr, lengths_ptr,
    t, n_sequences, n_units, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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
    for k in tl.static_range(G):
        place = (k * n_sequences + sequence) * n_units + unit
        keep = tl.load(masks_ptr + place, mask=active, other=0.0)
        dh += tl.load(d_masked_ptr + place, mask=active, other=0.0) * keep

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
# The loop
# --------
#
# Now run all steps. ``weight`` is U in shape (G, 4H/G, H), one matrix for each mask, and
# ``by_mask`` views the gates' arguments of a step as (G, B, 4H/G). ``baddbmm_`` multiplies each
# masked state by its matrix and adds the products, in place, to what the inputs gave.

BLOCK = 128


def launch_steps(from_input, weight, h0, c0, lengths, masks):
    """h and c before each step and after the last, and the gates' values."""
    n_steps, n_sequences, _, n_units = from_input.shape
    G = len(weight)
    gates = from_input.clone(memory_format=torch.contiguous_format)
    h = gates.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    h[0], c[0] = h0, c0
    masked = (h0 * masks).to(h.dtype)
    grid = n_sequences, triton.cdiv(n_units, BLOCK)
    sizes = n_sequences, n_units, G, BLOCK
    with torch.cuda.device_of(h):
        for t in range(n_steps if n_sequences > 0 else 0):
            by_mask = gates[t].view(n_sequences, G, -1).transpose(0, 1)
            by_mask.baddbmm_(masked, weight.mT)
            step_kernel[grid](gates, h, c, masked, masks, lengths, t, *sizes)
    return h, c, gates


# %%
# Now go back through the steps. The gradient of U is one product over all steps, after the loop. It
# needs the masked states. They were not kept, so h is masked again.


def launch_steps_backward(dh, dc, gates, weight, h, c, lengths, masks):
    """The gradients of ``from_input``, ``weight``, ``h0`` and ``c0``."""
    n_steps, n_sequences, _, n_units = gates.shape
    G = len(weight)
    dh, dc = dh.contiguous(), dc.contiguous()
    d_gates = torch.empty_like(gates)
    d_cell = torch.zeros_like(c[0])
    d_masked = h.new_zeros(G, n_sequences, n_units)
    grid = n_sequences, triton.cdiv(n_units, BLOCK)
    sizes = n_sequences, n_units, G, BLOCK
    tensors = d_gates, d_cell, d_masked, dh, dc, gates, c, masks, lengths
    with torch.cuda.device_of(h):
        for t in reversed(range(n_steps if n_sequences > 0 else 0)):
            step_backward_kernel[grid](*tensors, t, *sizes)
            by_mask = d_gates[t].view(n_sequences, G, -1).transpose(0, 1)
            torch.bmm(by_mask, weight, out=d_masked)
    masked = (h[:-1] * masks[:, None]).to(h.dtype).flatten(1, 2)
    by_mask = d_gates.view(n_steps * n_sequences, G, weight.shape[1])
    d_weight = torch.bmm(by_mask.permute(1, 2, 0), masked)
    dh0 = dh[0] + (d_masked * masks).sum(dim=0).to(dh.dtype)
    return d_gates, d_weight, dh0, d_cell + dc[0]


# %%
# Is it right?
# ------------
#
# Give the plain loop the same masks, and compare outputs and gradients in float64. PyTorch's
# dropout turns a tensor of ones into a mask. The identity takes the place of W, so the loop's input
# is our ``from_input``, and their gradients can be compared. ``pad`` adds a row of zeros for h0.

if __name__ == "__main__":
    torch.manual_seed(0)
    T, B, H = 5, 3, 7
    lengths = torch.full((B,), T, device=DEVICE)
    x, U, h, c = (
        torch.randn(size, device=DEVICE, dtype=torch.float64, requires_grad=True)
        for size in ((T, B, 4 * H), (4 * H, H), (B, H), (B, H))
    )
    identity, ones = torch.eye(4 * H).to(x), x.new_ones(4, B, 4 * H)
    for G in (4, 1):
        masks = dropout(x.new_ones(G, B, H), 0.3)
        y, _ = lstm_loop(x, identity, U, 0, h, c, ones[:G], masks)
        dy = torch.randn_like(y)
        wanted = [y, *torch.autograd.grad(y, (x, U, h, c), dy)]
        with torch.no_grad():
            inputs = x.view(T, B, 4, H), U.view(G, -1, H)
            states, cells, gates = launch_steps(*inputs, h, c, lengths, masks)
            gradients = launch_steps_backward(
                pad(dy, (0, 0, 0, 0, 1, 0)), torch.zeros_like(cells),
                gates, inputs[1], states, cells, lengths, masks,
            )  # fmt: skip
        pairs = zip((states[1:], *gradients), wanted, strict=True)
        got = [result.view_as(expected) for result, expected in pairs]
        torch.testing.assert_close(got, wanted)
        error = max((a - b).abs().max().item() for a, b in zip(got, wanted, strict=True))
        print(f"G = {G}: outputs and gradients within {error:.0e} of the loop's")

# %%
# What slows it down?
# -------------------
#
# Every launch takes CPU time, however little the GPU has to do. If the GPU finishes a step before
# the CPU has launched the next, the GPU waits. A *CUDA graph* shows for how long the GPU waits: you
# *capture* the launches once, and one call then replays all of them without Python. We time the
# forward pass of 70 steps, batch 80, 400 inputs. No version can be faster than its matrix products,
# so we time those alone, too.


def replay_of(run):
    """A call that replays what ``run`` launches."""
    run()
    gc.collect()  # freeing an earlier graph during a capture would spoil it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


LINES = {
    "two launches a step, captured": ("#d55e00", "-"),
    "two launches a step, called": ("#d55e00", ":"),
    "plain loop, captured": ("#cc79a7", "-"),
    "plain loop, called": ("#cc79a7", ":"),
    "matrix products, captured": ("#555555", "--"),
}


@triton.testing.perf_report(triton.testing.Benchmark(
    x_names=["n_units"], x_vals=[256, 512, 1024, 1536, 2048], line_arg="line",
    line_vals=list(LINES), line_names=list(LINES), styles=list(LINES.values()),
    xlabel=f"units, 70 steps, batch 80, bfloat16\n{MACHINE}", ylabel="ms", y_log=True,
    plot_name="fused-lstm-steps", args={},
))  # fmt: skip
@torch.no_grad()
def benchmark(n_units, line):
    H, like = n_units, {"device": DEVICE, "dtype": torch.bfloat16}
    x, state = torch.randn(70, 80, 400, **like), torch.zeros(80, H, **like)
    W, U = (torch.randn(4 * H, n, **like) / n**0.5 for n in (400, H))
    lengths = torch.full((80,), 70, device=DEVICE)
    masks = dropout(torch.ones(1, 80, H, device=DEVICE), 0.3)
    shape, rest = (70, 80, 4, H), (U[None], state, state.float(), lengths, masks)
    runs = {
        "two launches a step": lambda: launch_steps(linear(x, W).view(shape), *rest),
        "plain loop": lambda: lstm_loop(x, W, U, 0, state, state, [1], masks.to(x.dtype)),
        "matrix products": lambda: (linear(x, W), *(linear(state, U) for _ in range(70))),
    }
    run = runs[line.split(", ")[0]]
    run = replay_of(run) if "captured" in line else run
    return triton.testing.do_bench(run, return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    times = benchmark.run(show_plots=True, return_df=True)
    for n, ours, called, *_, products in times.values:
        waits, ratio = 1 - ours / called, ours / products
        print(f"{n:.0f} units: if called, the GPU waits {waits:.0%} of the time;")
        print(f"captured, the steps take {ratio:.2f} times as long as the products")

# %%
# Where a dotted line is flat, it shows the CPU's time. Fewer launches make the loop faster, but
# where our dotted line is flat, launching still takes most of the time. A graph is one way out, but
# it takes inputs of one shape only. Another is to launch once for all steps: :ref:`sequence lstm`.
#
# Exercises
# ---------
#
# 1. Draw the recurrent mask anew at each step: let ``masks`` have shape (T + 1, G, B, H), with a row
#    for each state. Which row does each kernel need?
# 2. Build in the dropout of Semeniuta et al., which masks g alone, with a new mask at each step.
#    Let ``masks`` have shape (T, B, H).
#
# .. note::
#    Try it first.
#
#    1. Row t for the state before step t. Step t writes the masked state for step t + 1, and its
#       backward pass gets the gradient of that, so both read row t + 1. The masks now take as much
#       memory as all masked states. A kernel that draws them from a seed, as in
#       :ref:`seeded dropout`, would need none.
#
#       .. code-block:: diff
#
#          @@ in step_kernel and in step_backward_kernel
#          -    for k in tl.static_range(G):
#          +    masks_ptr += G * (after - sequence * n_units - unit)  # row t + 1
#          +    for k in tl.static_range(G):
#          @@ in launch_steps
#          -    masked = (h0 * masks).to(h.dtype)
#          +    masked = (h0 * masks[0]).to(h.dtype)
#          @@ in launch_steps_backward
#          -    masked = (h[:-1] * masks[:, None]).to(h.dtype).flatten(1, 2)
#          +    masked = (h[:-1] * masks[:-1].transpose(0, 1)).to(h.dtype).flatten(1, 2)
#          @@
#          -    dh0 = dh[0] + (d_masked * masks).sum(dim=0).to(dh.dtype)
#          +    dh0 = dh[0] + (d_masked * masks[0]).sum(dim=0).to(dh.dtype)
#
#    2. Mask g wherever it is used: once in the forward kernel, twice in the backward kernel. Do not
#       mask h any more. Row t of the masks begins where row t of h does, so ``before`` finds it.
#
#       .. code-block:: diff
#
#          @@ in step_kernel
#          -    c = f * c + i * g
#          +    c = f * c + i * g * tl.load(masks_ptr + before, mask=inside)
#          @@
#          -        keep = tl.load(masks_ptr + place, mask=inside)
#          -        tl.store(masked_ptr + place, h * keep, mask=inside)
#          +        tl.store(masked_ptr + place, h, mask=inside)
#          @@ in step_backward_kernel
#          -        keep = tl.load(masks_ptr + place, mask=active, other=0.0)
#          -        dh += tl.load(d_masked_ptr + place, mask=active, other=0.0) * keep
#          +        dh += tl.load(d_masked_ptr + place, mask=active, other=0.0)
#          @@
#          -    tl.store(d_gate, dc * g * i * (1 - i), mask=inside)
#          +    keep = tl.load(masks_ptr + before, mask=inside)
#          +    tl.store(d_gate, dc * keep * g * i * (1 - i), mask=inside)
#          @@
#          -    tl.store(d_gate + 2 * n_units, dc * i * (1 - g * g), mask=inside)
#          +    tl.store(d_gate + 2 * n_units, dc * keep * i * (1 - g * g), mask=inside)
#          @@ in launch_steps
#          -    masked = (h0 * masks).to(h.dtype)
#          +    masked = h0.to(h.dtype).repeat(G, 1, 1)
#          @@ in launch_steps_backward
#          -    masked = (h[:-1] * masks[:, None]).to(h.dtype).flatten(1, 2)
#          +    masked = h[:-1].expand(G, -1, -1, -1).flatten(1, 2)
#          @@
#          -    dh0 = dh[0] + (d_masked * masks).sum(dim=0).to(dh.dtype)
#          +    dh0 = dh[0] + d_masked.sum(dim=0)
#
# References
# ----------
#
# - Y. Gal and Z. Ghahramani, `A theoretically grounded application of dropout in recurrent neural networks <https://arxiv.org/abs/1512.05287>`_,
#   2016.
# - S. Semeniuta, A. Severyn and E. Barth, `Recurrent dropout without memory loss <https://arxiv.org/abs/1603.05118>`_,
#   2016.
# - Keras's documentation of its `LSTM <https://keras.io/api/layers/recurrent_layers/lstm/>`_.
