"""
.. _sequence backward:

Back through the whole sequence
===============================

You run the backward pass of an LSTM in one launch, too, from the last step to the first. Gradients
travel from program to program as the state did, but there are four numbers for each unit instead of
one.

You will learn

- how to write the backward pass of a recurrent network as a loop of its own;
- what must stay in that loop, and what one large product does after it;
- how to predict the time of a new kernel from the bytes that it reads.

Needs: PyTorch, and :ref:`sequence lstm`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/sequence_backward.svg'
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
# Repeated
# --------
#
# The functions of :ref:`sequence lstm` that this lesson needs, so that its notebook runs alone. You
# have read them.

import gc

from torch.nn.functional import dropout


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    s = x * x
    series = -929569 / 638512875 + s * (6404582 / 10854718875)
    series = 62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075 + s * series))
    series = s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * series)))
    t = tl.where(s < 0.04, tl.abs(x) * (1 + series), far)
    return tl.where(x < 0, -t, t)


@triton.jit
def arrive(arrived_ptr):
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")


@triton.jit
def wait(arrived_ptr, n_arrivals):
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < n_arrivals:
        pass


def blocks_for(tiles, n_sequences, n_units, device):
    if INTERPRET:
        return 16, n_units, triton.cdiv(n_sequences, 16), 1, {}
    gpu = torch.cuda.get_device_properties(device)
    processors, shared = gpu.multi_processor_count, 2**16
    shared = getattr(gpu, "shared_memory_per_block_optin", shared)
    for tile, programs, units, warps, stages in tiles:
        row_blocks = triton.cdiv(n_sequences, tile)
        at_once = programs * processors // (n_units // units)
        stages = min(stages, 1 + shared // (256 * (tile + 4 * units)))
        options = dict(num_warps=warps, num_stages=stages, launch_cooperative_grid=True)
        if row_blocks <= at_once:
            break
    if at_once == 0:
        fit = processors * units
        raise ValueError(f"at most {fit} units fit this GPU, got {n_units}")
    return tile, units, row_blocks, at_once, options


def launch_all_steps(kernel, tiles, h, G, *tensors, early=0):
    n_steps, n_sequences, n_units = len(h) - 1, *h.shape[1:]
    if n_steps == 0 or n_sequences == 0:
        return
    tile, units, row_blocks, at_once, options = blocks_for(tiles, *h.shape[1:], h.device)
    rows, K = triton.cdiv(n_sequences, row_blocks), min(n_units, 256 // h.element_size())
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 and h.dtype == torch.float32 else "ieee"
    arrived = torch.full((row_blocks,), early, dtype=torch.int32, device=h.device)

    widen = INTERPRET and h.dtype == torch.bfloat16
    work = [t.float() if widen and t.dtype == h.dtype else t for t in tensors]
    with torch.cuda.device_of(h):
        for first in range(0, row_blocks, at_once):
            kernel[min(at_once, row_blocks - first), n_units // units](
                *work, n_steps, n_sequences, n_units, arrived, rows, first,
                G, tile, units, K, precision, **options,
            )  # fmt: skip
    if widen:
        torch._foreach_copy_(tensors[:2], work[:2])


# %%
# What travels back
# -----------------
#
# The forward pass kept h, c and the values of the gates i, f, g, o of each step. Write
# :math:`\delta_t` for the gradients of the gates' arguments (the sums inside σ and tanh) at step t,
# four numbers a unit, and :math:`h'_t` and :math:`c'_t` for the gradients of h and c. The kernel is
# given ``dh`` and ``dc``, the parts of these that come from the outputs. With the mask :math:`m` on
# the state, and gates without an index taken at step t, the chain rule gives:
#
# .. math::
#
#    h'_t = dh_t + m \cdot U^\top \delta_{t+1}, \qquad
#    c'_t = dc_t + f_{t+1} \cdot c'_{t+1} + h'_t \cdot o \, (1 - \tanh^2 c_t)
#
# .. math::
#
#    \delta_t = \left(c'_t \, g \, i (1 - i), \; c'_t \, c_{t-1} \, f (1 - f), \;
#    c'_t \, i \, (1 - g^2), \; h'_t \tanh(c_t) \, o (1 - o)\right)
#
# If each gate has its own mask, the product is a sum over the gates. Only this product mixes units.
# So :math:`c'`, in the code ``d_cell``, stays in the registers of the program that owns the unit,
# and :math:`\delta` has to travel:
#
# .. image:: /_static/sequence_backward.svg
#    :alt: A program reads row t + 1 of delta from L2, four numbers for each unit, multiplies with its columns of U, and writes its own units of row t. The gradient of c stays in its registers.
#
# All the rest leaves the loop. The gradient of U is the sum over all steps of :math:`\delta_{t+1}`
# times the masked :math:`h_t`, so it becomes one large product after the loop. The gradient of
# ``from_input``, the inputs' share of the arguments, is :math:`\delta` itself. So the kernel keeps
# :math:`\delta` of all steps, each in its own row. One more row, of zeros, stands for the step
# after the last.
#
# Predict it first
# ----------------
#
# In the forward pass, a program with R sequences and N units reads R × H numbers of the state and
# 4N × H of U. Now it reads R × 4H numbers of :math:`\delta` and 4N × H of U. On an H100, with 1024
# units and 80 sequences, there are 5 × 32 programs of 16 sequences and 32 units. Together they read
# 31.5 million numbers a step, where the forward pass reads 13.6 million. In bfloat16 a number has 2
# bytes, and :ref:`sequence lstm` printed the rate in TB/s. If that stays the same, how long will a
# step take now?
#
# The kernel
# ----------
#
# The kernel is built like the forward kernel: before ``wait`` it loads what depends on no other
# program. This time the others read all that a step stores, so no store comes after ``arrive``. The
# product for one mask uses only the ``width`` numbers of :math:`\delta` that belong to its gates.


@triton.jit(do_not_specialize=["n_steps", "n_sequences", "rows", "first_block"])
def sequence_backward_kernel(
    d_gates_ptr,  # (T + 1, B, 4, H): the gradients of the gates' arguments; row T is 0
    d_cell_ptr,  # (B, H): the gradient of c before the first step
    dh_ptr, dc_ptr,  # (T + 1, B, H): gradients of the outputs
    gates_ptr, c_ptr, masks_ptr,
    weight_ptr,  # (H, 4, H): U transposed, so row u is the column of unit u
    lengths_ptr, n_steps, n_sequences, n_units, arrived_ptr, rows, first_block,
    G: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    block = first_block + tl.program_id(0)
    sequence = block.to(tl.int64) * rows + row
    exists = sequence < tl.minimum((block + 1) * rows, n_sequences)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    length = tl.load(lengths_ptr + sequence, mask=exists, other=0)
    state = sequence * n_units + unit
    plane = n_sequences.to(tl.int64) * n_units
    d_cell = tl.zeros((ROWS, UNITS), c_ptr.dtype.element_ty)
    keep = ()
    for part in tl.static_range(G):
        keep += (tl.load(masks_ptr + part * plane + state, mask=exists, other=0.0),)
    width = 4 * n_units // G
    k = tl.arange(0, K)
    u_ptr = weight_ptr + unit.to(tl.int64) * 4 * n_units + k[:, None]
    arrived_ptr += block
    for s in range(n_steps):
        t = n_steps - 1 - s
        gate = (t * n_sequences + sequence) * 4 * n_units + unit
        after = (t + 1) * plane + state
        dh = tl.load(dh_ptr + after, mask=exists, other=0.0)
        dc = tl.load(dc_ptr + after, mask=exists, other=0.0)
        i = tl.load(gates_ptr + gate, mask=exists, other=0.0)
        f = tl.load(gates_ptr + gate + n_units, mask=exists, other=0.0)
        g = tl.load(gates_ptr + gate + 2 * n_units, mask=exists, other=0.0)
        o = tl.load(gates_ptr + gate + 3 * n_units, mask=exists, other=0.0)
        c_before = tl.load(c_ptr + after - plane, mask=exists, other=0.0)
        c_after = tl.load(c_ptr + after, mask=exists, other=0.0)
        wait(arrived_ptr, s * tl.num_programs(1))
        next_step = ((t + 1) * n_sequences + sequence) * 4 * n_units
        d_ptr = d_gates_ptr + next_step + k[None, :]
        from_next = tl.zeros((ROWS, UNITS), d_cell.dtype)
        for part in tl.static_range(G):
            product = tl.zeros((ROWS, UNITS), d_cell.dtype)
            for first in range(part * width, (part + 1) * width, K):
                d = tl.load(d_ptr + first, exists, 0.0, cache_modifier=".cg")
                u = tl.load(u_ptr + first)
                product = tl.dot(d, u, product, PRECISION, out_dtype=d_cell.dtype)
            from_next += product * keep[part]

        active = exists & (t < length)
        i, f, g, o = i.to(dc.dtype), f.to(dc.dtype), g.to(dc.dtype), o.to(dc.dtype)
        tanh_c = tanh(c_after)
        dh = tl.where(active, dh + from_next, 0.0)
        d_cell = tl.where(active, d_cell + dc + dh * o * (1 - tanh_c * tanh_c), 0.0)
        d_gate = d_gates_ptr + gate
        tl.store(d_gate, d_cell * g * i * (1 - i), mask=exists)
        tl.store(d_gate + n_units, d_cell * c_before * f * (1 - f), mask=exists)
        tl.store(d_gate + 2 * n_units, d_cell * i * (1 - g * g), mask=exists)
        tl.store(d_gate + 3 * n_units, dh * tanh_c * o * (1 - o), mask=exists)
        arrive(arrived_ptr)
        d_cell *= f  # for the step before
    tl.store(d_cell_ptr + state, d_cell, mask=exists)


# %%
# The launch
# ----------
#
# U is transposed once, so that each of its columns lies in one piece. After the launch, products
# give the gradients of U and of the first state. The block sizes were measured, as before.

BACKWARD_TILES = [
    (16, 2, 32, 4, 4),
    (64, 1, 16, 4, 4),
    (32, 2, 32, 4, 4),
    (64, 1, 32, 8, 4),
    (64, 1, 64, 8, 3),
]


def launch_sequence_backward(dh, dc, gates, weight, h, c, lengths, masks, early=0):
    """The gradients of ``from_input``, ``weight``, ``h0`` and ``c0``."""
    n_steps, n_sequences, _, n_units = gates.shape
    G, U = len(weight), weight.reshape(4 * n_units, n_units)
    d_gates = gates.new_empty(n_steps + 1, n_sequences, 4, n_units)
    d_gates[n_steps] = 0  # no step comes after the last one
    d_cell = torch.zeros_like(c[0])
    gradients = d_gates, d_cell, dh.contiguous(), dc.contiguous()
    tensors = *gradients, gates, c, masks, U.T.contiguous(), lengths
    launch_all_steps(
        sequence_backward_kernel, BACKWARD_TILES, h, G, *tensors, early=early
    )
    by_mask = d_gates.view(n_steps + 1, n_sequences, G, 4 * n_units // G)
    masked = torch.mul(h[:-1], masks[:, None], out=h.new_empty(G, *h[:-1].shape))
    by_row = by_mask[:-1].flatten(0, 1).permute(1, 2, 0)
    d_weight = torch.bmm(by_row, masked.flatten(1, 2))
    d_masked = torch.bmm(by_mask[0].transpose(0, 1), weight)
    dh0 = dh[0] + (d_masked * masks).sum(dim=0).to(dh.dtype)
    return d_gates[:-1], d_weight, dh0, d_cell + dc[0]


# %%
# Is it right?
# ------------
#
# A plain loop keeps all states and gates. Compare our gradients with those that PyTorch computes
# for the loop, in float64.


def plain_loop(from_input, weight, h0, c0, masks):
    """h and c before each step and after the last, and the gates' values."""
    h, c, gates = [h0], [c0], []
    for step in from_input:
        product = torch.bmm(masks * h[-1], weight.mT).transpose(0, 1)
        i, f, g, o = (step + product.reshape(step.shape)).unbind(1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c.append(f * c[-1] + i * g)
        h.append(o * c[-1].tanh())
        gates.append(torch.stack([i, f, g, o], dim=1))
    return torch.stack(h), torch.stack(c), torch.stack(gates)


if __name__ == "__main__":
    torch.manual_seed(0)
    T, B, H = 4, 35, 16 if INTERPRET else 128
    lengths = torch.full((B,), T, device=DEVICE)
    for G in (4, 1):
        sizes = (T, B, 4, H), (G, 4 * H // G, H), (B, H), (B, H)
        inputs = [torch.randn(size, device=DEVICE, dtype=torch.float64) for size in sizes]
        masks = dropout(inputs[0].new_ones(G, B, H), 0.3)
        loop = lambda *inputs: plain_loop(*inputs, masks)  # noqa: E731
        (h, c, gates), pull_back = torch.func.vjp(loop, *inputs)
        dh, dc = torch.randn_like(h), torch.randn_like(c)
        saved = gates, inputs[1], h, c, lengths, masks
        gradients = launch_sequence_backward(dh, dc, *saved)
        wanted = pull_back((dh, dc, torch.zeros_like(gates)))
        torch.testing.assert_close(gradients, wanted)
        error = max((a - b).abs().max() for a, b in zip(gradients, wanted, strict=True))
        print(f"G = {G}: gradients within {error:.0e} of the loop's")

# %%
# Was the prediction right?
# -------------------------
#
# Time a step, with 70 steps and a batch of 80, captured in a CUDA graph. As before, a second line
# shows the same launch when no program waits. Both include the large product for the gradient of U,
# and so does the line of the products alone.

LINES = {
    "backward": ("#d55e00", "-"),
    "backward, nobody waits": ("#d55e00", ":"),
    "products alone, backward": ("#555555", "--"),
}


@triton.testing.perf_report(triton.testing.Benchmark(
    x_names=["n_units"], x_vals=[128, 256, 512, 1024, 1152, 2048], line_arg="line",
    line_vals=list(LINES), line_names=list(LINES), styles=list(LINES.values()),
    xlabel=f"units, one of 70 steps, batch 80, bfloat16\n{MACHINE}", ylabel="µs",
    plot_name="sequence-backward-step", args={},
))  # fmt: skip
@torch.no_grad()
def benchmark(n_units, line):
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    gates, U = (
        torch.rand(70, 80, 4, n_units, **like),
        torch.randn(4 * n_units, n_units, **like),
    )
    h, dh = torch.randn(2, 71, 80, n_units, **like)
    c, dc, masks = h.float(), dh.float(), dropout(torch.ones_like(h[:1].float()), 0.3)
    lengths, d = torch.full((80,), 70, device=DEVICE), gates.flatten(0, 1).flatten(1)
    saved = dh, dc, gates, U[None], h, c, lengths, masks
    run = dict(zip(LINES, (
        lambda: launch_sequence_backward(*saved),
        lambda: launch_sequence_backward(*saved, early=10**9),
        lambda: ([d[:80] @ U for _ in range(70)], d.T @ h[1:].flatten(0, 1)),
    ), strict=True))[line]  # fmt: skip
    run()
    gc.collect()  # freeing an earlier graph during a capture would spoil it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, return_mode="median") / 70 * 1e3


if __name__ == "__main__" and not INTERPRET:
    times = benchmark.run(show_plots=True, return_df=True)
    for n, backward, busy, products in times.values:
        tile, units, row_blocks, *_ = blocks_for(BACKWARD_TILES, 80, int(n), DEVICE)
        n_bytes = row_blocks * (n // units) * (320 / row_blocks + 4 * units) * n * 2
        print(f"{n:.0f} units: {n_bytes / 2**20:.1f} MiB a step,", end="")
        print(f" read at {n_bytes / busy / 1e6:.1f} TB/s if nobody waits;", end="")
        print(f" {backward / products:.2f} times the products alone")

# %%
# Compare the printed rates with those of the forward pass. At 1024 and 1152 units, on an H100 and
# on an H200, the two rates differ by less than a tenth, so the bytes predict the time. At 2048
# units a step takes about a quarter longer than predicted. The large product, which both of our
# lines include, explains part of that. As in the forward pass, the programs hardly wait for each
# other.
#
# Could the kernel read less? A program that kept its columns of U on the chip would read only
# :math:`\delta`. Persistent kernels in CUDA do that (see the references). Triton has no way to keep
# so large a block on the chip from one step to the next.
#
# :ref:`lstm module` makes both launches known to autograd and to ``torch.compile``, adds what a
# module needs, and compares it with cuDNN's LSTM.
#
# Exercises
# ---------
#
# 1. The forward kernel uses two buffers in turn for the masked state. Would one be enough? And why
#    doesn't the backward kernel need two?
# 2. The gradient of U needs the masked states of all steps. Where do they come from, and what would
#    it cost to keep them?
#
# .. note::
#    Try it first.
#
#    1. No. A fast program could finish its step while a slower one still reads, and would overwrite
#       what that one is reading. With two buffers, it overwrites what was read one step earlier.
#       All programs have arrived since then, so they have finished reading that. The backward
#       kernel writes a new row of :math:`\delta` in each step.
#    2. h and the masks are kept, so h is masked again, for all steps at once. If the forward pass
#       kept the masked states, they would take G times the memory of h until the backward pass.
#       Now they exist only while the product runs.
#
# References
# ----------
#
# - P. J. Werbos, `Backpropagation through time: what it does and how to do it <https://doi.org/10.1109/5.58337>`_,
#   1990.
# - G. Diamos et al., `Persistent RNNs: stashing recurrent weights on-chip <https://proceedings.mlr.press/v48/diamos16.html>`_,
#   2016.
# - J. Appleyard, T. Kočiský and P. Blunsom, `Optimizing performance of recurrent neural networks on GPUs <https://arxiv.org/abs/1604.01946>`_,
#   2016.
