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
- how to predict the time of a new kernel from one that you have measured.

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

from torch.nn.functional import linear, pad

Tensor = torch.Tensor


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
    words = tl.randint4x(tl.load(seed_ptr), row % n_sequences << 32 | unit)
    if x_ptr.dtype.element_ty != tl.float64:
        scale = tl.cast(scale, tl.float32)
    for k in tl.static_range(G):
        x = tl.load(x_ptr + row * n_units + unit, mask=inside)
        kept = tl.where(words[k].to(tl.int64) >= threshold, x * scale, 0.0)
        tl.store(y_ptr + (k * n_rows + row) * n_units + unit, kept, mask=inside)
        x_ptr += gate_stride


BLOCK = 128


def threshold_and_scale(p):
    return (round(p * 2**32), 1 / (1 - p) if p < 1 else 0.0)


def launch_gate_dropout(x, p, seed):
    G, n_steps, n_sequences, n_units = x.shape
    if x.stride()[1:] != (n_sequences * n_units, n_units, 1):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        rows = n_steps * n_sequences
        with torch.cuda.device_of(x):
            gate_dropout_kernel[rows, triton.cdiv(n_units, BLOCK)](
                y,
                x,
                x.stride(0),
                rows,
                n_sequences,
                n_units,
                *threshold_and_scale(p),
                seed,
                G,
                BLOCK,
            )
    return y


@triton.jit
def arrive(arrived_ptr):
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")


@triton.jit
def wait(arrived_ptr, n_arrivals):
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < n_arrivals:
        pass


@triton.jit(do_not_specialize=["n_steps", "n_sequences", "rows", "first_block"])
def sequence_kernel(
    gates_ptr,
    h_ptr,
    c_ptr,
    masked_ptr,
    weight_ptr,
    lengths_ptr,
    n_steps,
    n_sequences,
    n_units,
    threshold,
    scale: tl.float64,
    seed_ptr,
    arrived_ptr,
    rows,
    first_block,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    block = first_block + tl.program_id(0)
    sequence = block.to(tl.int64) * rows + row
    exists = sequence < tl.minimum((block + 1) * rows, n_sequences)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    length = tl.load(lengths_ptr + sequence, mask=exists, other=0)
    words = tl.randint4x(tl.load(seed_ptr), sequence << 32 | unit)
    state = sequence * n_units + unit
    plane = n_sequences.to(tl.int64) * n_units
    c = tl.load(c_ptr + state, mask=exists, other=0.0)
    if c.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    k = tl.arange(0, K)
    column = tl.arange(0, 4 * UNITS)[None, :]
    owner = tl.program_id(1) * UNITS + column // 4
    row_of_u = (column % 4).to(tl.int64) * n_units + owner
    u_ptr = weight_ptr + row_of_u * n_units + k[:, None]
    x_ptr = masked_ptr + sequence * n_units + k[None, :]
    arrived_ptr += block
    for t in range(n_steps):
        gate = gates_ptr + (t * n_sequences + sequence) * 4 * n_units + unit
        from_i = tl.load(gate, mask=exists, other=0.0)
        from_f = tl.load(gate + n_units, mask=exists, other=0.0)
        from_g = tl.load(gate + 2 * n_units, mask=exists, other=0.0)
        from_o = tl.load(gate + 3 * n_units, mask=exists, other=0.0)
        wait(arrived_ptr, t * tl.num_programs(1))
        product = tl.zeros((ROWS, 4 * UNITS), c.dtype)
        for part in tl.static_range(G):
            part_ptr = x_ptr + (t % 2 * G + part) * plane
            for first in range(0, n_units, K):
                x = tl.load(part_ptr + first, exists, 0.0, cache_modifier=".cg")
                if G == 1:
                    u = tl.load(u_ptr + first)
                else:
                    u = tl.load(u_ptr + first, mask=column % 4 == part, other=0.0)
                product = tl.dot(x, u, product, PRECISION, out_dtype=c.dtype)
        even, odd = tl.split(tl.reshape(product, (ROWS, UNITS, 2, 2)))
        i, g = tl.split(even)
        f, o = tl.split(odd)
        active = exists & (t < length)
        i = tl.sigmoid(tl.where(active, i + from_i, 0.0))
        f = tl.sigmoid(tl.where(active, f + from_f, 0.0))
        g = tanh(tl.where(active, g + from_g, 0.0))
        o = tl.sigmoid(tl.where(active, o + from_o, 0.0))
        c = tl.where(active, f * c + i * g, 0.0)
        h = o * tanh(c)
        for part in tl.static_range(G):
            kept = tl.where(words[part].to(tl.int64) >= threshold, h * scale, 0.0)
            next_ptr = masked_ptr + ((t + 1) % 2 * G + part) * plane
            tl.store(next_ptr + state, kept, mask=exists)
        arrive(arrived_ptr)
        tl.store(gate, i, mask=exists)
        tl.store(gate + n_units, f, mask=exists)
        tl.store(gate + 2 * n_units, g, mask=exists)
        tl.store(gate + 3 * n_units, o, mask=exists)
        tl.store(c_ptr + (t + 1) * plane + state, c, mask=exists)
        tl.store(h_ptr + (t + 1) * plane + state, h, mask=exists)


TILES = [
    (16, 2, 16, 4, 3),
    (64, 1, 16, 8, 3),
    (32, 2, 16, 4, 3),
    (64, 1, 32, 8, 4),
    (64, 1, 64, 8, 2),
]


def blocks_for(tiles, n_sequences, n_units, device):
    if INTERPRET:
        return (16, n_units, triton.cdiv(n_sequences, 16), 1, {})
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for tile, programs, units, warps, stages in tiles:
        row_blocks = triton.cdiv(n_sequences, tile)
        at_once = programs * processors // (n_units // units)
        options = dict(num_warps=warps, num_stages=stages, launch_cooperative_grid=True)
        if row_blocks <= at_once:
            break
    if at_once == 0:
        fit = processors * units
        raise ValueError(f"at most {fit} units fit this GPU, got {n_units}")
    return (tile, units, row_blocks, at_once, options)


def launch_all_steps(kernel, tiles, h, p, seed, G, *tensors, early=0):
    n_steps, n_sequences, n_units = (len(h) - 1, *h.shape[1:])
    if n_steps == 0 or n_sequences == 0:
        return
    tile, units, row_blocks, at_once, options = blocks_for(tiles, *h.shape[1:], h.device)
    rows, K = (
        triton.cdiv(n_sequences, row_blocks),
        min(n_units, 256 // h.element_size()),
    )
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 and h.dtype == torch.float32 else "ieee"
    arrived = torch.full((row_blocks,), early, dtype=torch.int32, device=h.device)
    widen = INTERPRET and h.dtype == torch.bfloat16
    work = [t.float() if widen and t.dtype == h.dtype else t for t in tensors]
    with torch.cuda.device_of(h):
        for first in range(0, row_blocks, at_once):
            kernel[min(at_once, row_blocks - first), n_units // units](
                *work,
                n_steps,
                n_sequences,
                n_units,
                *threshold_and_scale(p),
                seed,
                arrived,
                rows,
                first,
                G,
                tile,
                units,
                K,
                precision,
                **options,
            )
    if widen:
        torch._foreach_copy_(tensors[:2], work[:2])


def launch_sequence(
    from_input: Tensor,
    weight: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor,
    p: float,
    seed: Tensor,
    early: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    n_steps, n_sequences, _, n_units = from_input.shape
    G, n_real = (len(weight), h0.shape[1])
    gates = from_input.clone(memory_format=torch.contiguous_format)
    gates[..., n_real:] = 0
    h = gates.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    h[0], c[0] = (pad(state, (0, n_units - n_real)) for state in (h0, c0))
    masked = h.new_empty(2, G, n_sequences, n_units)
    masked[0] = launch_gate_dropout(h[:1].expand(G, -1, -1, -1), p, seed)[:, 0]
    tensors = (gates, h, c, masked, weight.contiguous(), lengths)
    launch_all_steps(sequence_kernel, TILES, h, p, seed, G, *tensors, early=early)
    return (h, c, gates)


def plain_loop(from_input, weight, h, c, masks):
    outputs = []
    for step in from_input:
        product = torch.bmm(masks * h, weight.mT).transpose(0, 1)
        i, f, g, o = (step + product.reshape(step.shape)).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


# %%
# What travels back
# -----------------
#
# The forward pass kept h, c and the values of the gates i, f, g, o of each step. Write
# :math:`\delta_t` for the gradients of the gates' arguments (the sums inside σ and tanh) at step t,
# four numbers a unit, and dh for the gradient of h. With the mask :math:`m` on the state, and the
# output :math:`y_t` at step t, the chain rule gives:
#
# .. math::
#
#    dh_t = dy_t + m \cdot U^\top \delta_{t+1}, \qquad
#    dc_t = f_{t+1} \cdot dc_{t+1} + dh_t \cdot o_t \, (1 - \tanh^2 c_t)
#
# .. math::
#
#    \delta_t = \left(dc_t \, g \, i (1 - i), \; dc_t \, c_{t-1} \, f (1 - f), \;
#    dc_t \, i \, (1 - g^2), \; dh_t \tanh(c_t) \, o (1 - o)\right)
#
# Only the product :math:`U^\top \delta_{t+1}` mixes units. So :math:`dc` stays in the registers of
# the program that owns the unit, and :math:`\delta` has to travel:
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
# In the forward pass, a program with R sequences and N units read R × H numbers of the state and
# 4N × H of U. Now it reads R × 4H numbers of :math:`\delta` and 4N × H of U. With R = 40 and N = 16
# that is 224 × H instead of 104 × H. The barrier and the number of multiplications are the same as
# before. How much longer will a step take?
#
# The kernel
# ----------
#
# The kernel is built like the forward kernel: before ``wait`` it loads what depends on no other
# program. This time the others read all that a step stores, so no store comes after ``arrive``.


@triton.jit(do_not_specialize=["n_steps", "n_sequences", "rows", "first_block"])
def sequence_backward_kernel(
    d_gates_ptr,  # (T + 1, B, 4, H): the gradients of the gates' arguments; row T is 0
    d_cell_ptr,  # (B, H): the gradient of c before the first step
    dh_ptr, dc_ptr,  # (T + 1, B, H): gradients of the outputs
    gates_ptr, c_ptr,
    weight_ptr,  # (H, 4, H): U transposed, so row u is the column of unit u
    lengths_ptr, n_steps, n_sequences, n_units, threshold, scale: tl.float64, seed_ptr,
    arrived_ptr, rows, first_block,
    G: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    block = first_block + tl.program_id(0)
    sequence = block.to(tl.int64) * rows + row
    exists = sequence < tl.minimum((block + 1) * rows, n_sequences)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    length = tl.load(lengths_ptr + sequence, mask=exists, other=0)
    words = tl.randint4x(tl.load(seed_ptr), (sequence << 32) | unit)
    state = sequence * n_units + unit
    plane = n_sequences.to(tl.int64) * n_units
    d_cell = tl.zeros((ROWS, UNITS), c_ptr.dtype.element_ty)
    if d_cell.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
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
            kept = words[part].to(tl.int64) >= threshold
            from_next += tl.where(kept, product * scale, 0.0)

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
        d_cell *= f
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


def launch_sequence_backward(
    dh: Tensor, dc: Tensor, gates: Tensor, weight: Tensor, h: Tensor, c: Tensor,
    lengths: Tensor, n_real: int, p: float, seed: Tensor, early: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of ``from_input``, ``weight``, ``h0`` and ``c0``."""
    n_steps, n_sequences, _, n_units = gates.shape
    G, U = len(weight), weight.reshape(4 * n_units, n_units)
    d_gates = gates.new_empty(n_steps + 1, n_sequences, 4, n_units)
    d_gates[n_steps] = 0  # no step comes after the last one
    d_cell = torch.zeros_like(c[0])
    gradients = d_gates, d_cell, dh.contiguous(), dc.contiguous()
    tensors = *gradients, gates, c, U.T.contiguous(), lengths
    how = sequence_backward_kernel, BACKWARD_TILES, h, p, seed, G
    launch_all_steps(*how, *tensors, early=early)
    by_mask = d_gates.view(n_steps + 1, n_sequences, G, 4 * n_units // G)
    masked = launch_gate_dropout(h[:-1].expand(G, -1, -1, -1), p, seed).flatten(1, 2)
    d_weight = torch.bmm(by_mask[:-1].flatten(0, 1).permute(1, 2, 0), masked)
    d_masked = torch.bmm(by_mask[0].transpose(0, 1), weight)
    dh0 = launch_gate_dropout(d_masked[:, None], p, seed).sum(dim=0)[0] + dh[0]
    dc0 = d_cell + dc[0]
    return d_gates[:-1], d_weight, dh0[:, :n_real].clone(), dc0[:, :n_real].clone()


# %%
# Is it right?
# ------------
#
# Compare with PyTorch's gradients of the plain loop, in float64.

if __name__ == "__main__":
    torch.manual_seed(0)
    T, B, H, p = 4, 35, 16 if INTERPRET else 128, 0.3
    seed, lengths = torch.tensor([7], device=DEVICE), torch.full((B,), T, device=DEVICE)
    for G in (4, 1):
        sizes = (T, B, 4, H), (G, 4 * H // G, H), (B, H), (B, H)
        inputs = [torch.randn(size, device=DEVICE, dtype=torch.float64) for size in sizes]
        masks = launch_gate_dropout(inputs[0].new_ones(G, 1, B, H), p, seed)[:, 0]
        _, pull_back = torch.func.vjp(lambda *x: plain_loop(*x, masks), *inputs)
        h, c, gates = launch_sequence(*inputs, lengths, p, seed)
        dh = torch.randn_like(h)
        dh[0] = 0  # the state before the first step is no output
        saved = gates, inputs[1], h, c, lengths, H, p, seed
        gradients = launch_sequence_backward(dh, torch.zeros_like(c), *saved)
        wanted = pull_back(dh[1:])
        torch.testing.assert_close(gradients, wanted)
        error = max((a - b).abs().max() for a, b in zip(gradients, wanted, strict=True))
        print(f"{G} masks: gradients within {error:.0e} of the loop's")

# %%
# Was the prediction right?
# -------------------------
#
# Time a step of either pass, with 70 steps and a batch of 80, captured in a CUDA graph. The
# backward pass includes the large product for the gradient of U, and so does the line of the
# products alone.

LINES = {
    "backward": ("#d55e00", "-"),
    "backward, nobody waits": ("#d55e00", ":"),
    "forward": ("#d55e00", "-."),
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
    x = torch.randn(70, 80, 4, n_units, **like)
    U = torch.randn(4 * n_units, n_units, **like) / 30
    state, lengths = x.new_zeros(80, n_units), torch.full((80,), 70, device=DEVICE)
    rest = lengths, 0.3, torch.tensor([7], device=DEVICE)
    h, c, gates = launch_sequence(x, U[None], state, state.float(), *rest)
    saved = gates, U[None], h, c, lengths, n_units, *rest[1:]
    dh, dc, d = torch.randn_like(h), torch.zeros_like(c), x.flatten(0, 1).flatten(1)
    run = dict(zip(LINES, (
        lambda: launch_sequence_backward(dh, dc, *saved),
        lambda: launch_sequence_backward(dh, dc, *saved, early=10**9),
        lambda: launch_sequence(x, U[None], state, state.float(), *rest),
        lambda: (*(linear(d[:80], U.T) for _ in range(70)), d.T @ h[1:].flatten(0, 1)),
    ), strict=True))[line]  # fmt: skip
    run()
    gc.collect()  # freeing an earlier graph during a capture would spoil it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, return_mode="median") / 70 * 1e3


if __name__ == "__main__" and not INTERPRET:
    times = benchmark.run(show_plots=True, return_df=True)
    for n, backward, _, forward, products in times.values:
        print(f"{n:.0f} units: {backward / forward:.2f} times the forward pass,", end="")
        print(f" {backward / products:.2f} times the products alone")

# %%
# Compare your prediction with the first printed ratio. It is more than 1, since more numbers are
# read, but below 224 / 104, since the rest of a step costs the same as before. With many units the
# dotted line comes close to the solid one: the time goes into reading, not into waiting.
#
# Could the kernel read less? A program that kept its columns of U on the chip would read only
# :math:`\delta`. Persistent kernels in CUDA do that (see the references). A Triton kernel can't say
# what stays in registers from one step to the next.
#
# As a public function
# --------------------
#
# A ``Function`` makes both launches known to autograd, and custom operators make them known to
# ``torch.compile``; see :ref:`operators`. Second derivatives and forward mode raise errors.
# :ref:`lstm module` adds what a module needs, checks its arguments, and compares it with cuDNN's
# LSTM.

lstm_sequence_op = torch.library.custom_op(
    "fast_and_right::lstm_sequence", launch_sequence, mutates_args=()
)
lstm_sequence_backward_op = torch.library.custom_op(
    "fast_and_right::lstm_sequence_backward", launch_sequence_backward, mutates_args=()
)


@lstm_sequence_op.register_fake
def _(from_input, weight, h0, c0, lengths, p, seed, early=0):
    n_steps, n_sequences, _, n_units = from_input.shape
    h = from_input.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    return h, c, from_input.new_empty(from_input.shape)


@lstm_sequence_backward_op.register_fake
def _(dh, dc, gates, weight, h, c, lengths, n_real, p, seed, early=0):
    states = h[0, :, :n_real], c[0, :, :n_real]
    return tuple(t.new_empty(t.shape) for t in (gates, weight, *states))


class LSTMSequenceBackward(torch.autograd.Function):
    @staticmethod
    def forward(dh, dc, gates, weight, h, c, lengths, n_real, p, seed):
        compiling = torch.compiler.is_compiling()
        run = lstm_sequence_backward_op if compiling else launch_sequence_backward
        return run(dh, dc, gates, weight, h, c, lengths, n_real, p, seed)

    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("LSTM has no second derivatives")


class LSTMSequence(torch.autograd.Function):
    @staticmethod
    def forward(from_input, weight, h0, c0, lengths, p, seed):
        run = lstm_sequence_op if torch.compiler.is_compiling() else launch_sequence
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
        return *LSTMSequenceBackward.apply(*arguments), None, None, None


# %%
# Exercises
# ---------
#
# 1. The forward kernel uses two buffers in turn for the masked state. Would one be enough? And why
#    does the backward kernel need none?
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
#    2. ``launch_gate_dropout`` masks h again, with the same seed. If the forward pass kept the masked
#       states, they would take G times the memory of h until the backward pass. Drawn again, they
#       exist only while the product runs.
#
# References
# ----------
#
# - P. J. Werbos, `Backpropagation through time: what it does and how to do it <https://doi.org/10.1109/5.58337>`_,
#   1990.
# - G. Diamos et al., `Persistent RNNs: stashing recurrent weights on-chip <https://proceedings.mlr.press/v48/diamos16.html>`_,
#   2016.
# - J. Appleyard, T. Kociský and P. Blunsom, `Optimizing performance of recurrent neural networks on GPUs <https://arxiv.org/abs/1604.01946>`_,
#   2016.
