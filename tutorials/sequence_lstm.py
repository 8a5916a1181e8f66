"""
.. _sequence lstm:

The whole sequence in one launch
================================

You run all steps of an LSTM in one launch, with recurrent dropout inside. The programs stay on the
GPU from the first step to the last, hand each other the state through L2, the cache that all share,
and wait for each other after each step. Python launches only once, so no step waits for Python.

You will learn

- how programs of one launch exchange data, and wait for each other at a barrier that never hangs;
- which parts the time of a step has, and how to measure each alone;
- why the order of loads, stores and waiting matters.

Needs: PyTorch, :ref:`fused lstm`, and :ref:`softmax slices`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/lstm_sequence.svg'
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
# This is the one function of :ref:`fused lstm` that this lesson needs, so that its notebook runs
# alone.

import gc

from torch.nn.functional import dropout, linear


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


# %%
# Programs that stay
# ------------------
#
# In :ref:`fused lstm`, each step was two launches: a product, and a kernel. Now each program takes
# some sequences and some units, for all steps, and keeps their cells c and masks in its registers.
#
# Only h has to travel. The product for one unit needs the masked state of *all* units of a
# sequence, and other programs have computed most of those. So each program writes its part of the
# masked state, and in the next step reads all parts. The parts travel through L2.
#
# .. image:: /_static/lstm_sequence.svg
#    :alt: Three programs, each with its units and its rows of U. In each step a program reads the masked state of all units from L2, multiplies, and writes its own part of the next state. A counter in L2 is the barrier: each program adds 1 when its part is written, and waits until all have.
#
# Between writing and reading comes a *barrier*, which no program passes until all have reached it.
# A program that has written its part adds 1 to a counter: it *arrives*. Before it reads, it *waits*
# until the counter shows that all programs have arrived. There are two buffers for the masked
# state, one for even and one for odd steps, so that no program overwrites what another is still
# reading: whoever passes the barrier knows that all have finished the step before. Programs with
# different sequences need nothing from each other, so each block of sequences has a counter of its
# own.


@triton.jit
def arrive(arrived_ptr):
    """Say that this program has stored what the others wait for."""
    tl.debug_barrier()  # one thread adds, so first all threads must have stored
    tl.atomic_add(arrived_ptr, 1, sem="release")


@triton.jit
def wait(arrived_ptr, n_arrivals):
    """Wait for the others to arrive; then this program sees what they stored."""
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < n_arrivals:  # reads it in L2
        pass


# %%
# ``release`` and ``acquire`` belong together. If one program adds with ``release``, and another
# reads the new count with ``acquire``, then the second also sees everything that the first stored
# before.
#
# The barrier would hang if the waiting programs filled the GPU, and the one that they wait for
# couldn't start. So all programs of a launch must be on the GPU at the same time. A *cooperative
# launch* guarantees that: the GPU starts all of them, or refuses with an error. The option is
# ``launch_cooperative_grid``. (In Triton's interpreter one program takes all units, and waits for
# no other.)
#
# What does a step cost?
# ----------------------
#
# For a program with R sequences, N units and one mask, a step has three parts:
#
# - the *barrier*: an addition has to reach L2, and the counter's value has to come back;
# - the *bytes*: the program reads R × H numbers of the state and 4N × H numbers of U. U is read
#   again in each step, because it is too large for the registers;
# - the *product*: R × H × 4N multiplications, on tensor cores, the GPU's circuits for products.
#
# For example, on an H100, with 1024 units and 80 sequences, there are 2 × 64 programs of 40
# sequences and 16 units. Together they read 128 × (40 + 64) × 1024, or 13.6 million numbers a step,
# though U has only 4.2 million. Larger blocks would read less, but then fewer multiprocessors would
# have work.
#
# Everything else should happen while the programs wait for each other. So the kernel loads what
# came from the input *before* it waits, and it arrives *before* it stores what no other program
# waits for.
#
# The number of rows in a block, ``ROWS``, is a power of two, and the program's sequences are its
# first ``rows``. Column 4u + j of the block of U holds gate j of unit u, so one product does all
# gates. After it, ``tl.split`` halves the last axis: first it separates gates 0 and 2 from 1 and 3.


@triton.jit(do_not_specialize=["n_steps", "n_sequences", "rows", "first_block"])
def sequence_kernel(
    gates_ptr,  # (T, B, 4, H): what the inputs gave, replaced by the gates' values
    h_ptr, c_ptr,  # (T + 1, B, H): row t is the state before step t
    masked_ptr,  # (2, G, B, H): the masked state, for even and for odd steps
    masks_ptr,  # (G, B, H)
    weight_ptr,  # (4, H, H)
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
    c = tl.load(c_ptr + state, mask=exists, other=0.0)  # float32 or float64
    keep = ()
    for part in tl.static_range(G):
        keep += (tl.load(masks_ptr + part * plane + state, mask=exists, other=0.0),)

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
                # .cg: from L2; a multiprocessor's own cache, L1, may hold an old value
                x = tl.load(part_ptr + first, exists, 0.0, cache_modifier=".cg")
                if G == 1:
                    u = tl.load(u_ptr + first)
                else:  # 0 in place of the other gates' columns
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
            next_ptr = masked_ptr + ((t + 1) % 2 * G + part) * plane
            tl.store(next_ptr + state, h * keep[part], mask=exists)
        arrive(arrived_ptr)
        tl.store(gate, i, mask=exists)
        tl.store(gate + n_units, f, mask=exists)
        tl.store(gate + 2 * n_units, g, mask=exists)
        tl.store(gate + 3 * n_units, o, mask=exists)
        tl.store(c_ptr + (t + 1) * plane + state, c, mask=exists)
        tl.store(h_ptr + (t + 1) * plane + state, h, mask=exists)


# %%
# The launch
# ----------
#
# The block sizes in ``TILES`` were found by measuring. ``blocks_for`` takes the first entry whose
# programs all fit on the GPU at once. If there are too many sequences even for the last entry, they
# go into several launches. ``n_units`` must be a multiple of 128, so no load needs a mask on units.
# (:ref:`lstm module` adds units that stay 0.) ``PRECISION`` says whether products in float32 use
# TF32, which rounds their inputs to fewer bits and is faster.

# Each entry: how many sequences a program takes at most, how many programs run on a multiprocessor,
# how many units a program takes, num_warps, and num_stages (how far a loop loads ahead).
TILES = [
    (16, 2, 16, 4, 3),
    (64, 1, 16, 8, 3),
    (32, 2, 16, 4, 3),
    (64, 1, 32, 8, 4),
    (64, 1, 64, 8, 2),
]


def blocks_for(tiles, n_sequences, n_units, device):
    """Sequences and units a program, number of blocks, how many fit at once, options."""
    if INTERPRET:  # one program
        return 16, n_units, triton.cdiv(n_sequences, 16), 1, {}
    gpu = torch.cuda.get_device_properties(device)
    processors, shared = gpu.multi_processor_count, 2**16  # AMD's have 64 KiB
    shared = getattr(gpu, "shared_memory_per_block_optin", shared)
    for tile, programs, units, warps, stages in tiles:
        row_blocks = triton.cdiv(n_sequences, tile)
        at_once = programs * processors // (n_units // units)
        stages = min(stages, 1 + shared // (256 * (tile + 4 * units)))  # as many as fit
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
    # The interpreter's tl.dot mistakes bfloat16 for integers.
    widen = INTERPRET and h.dtype == torch.bfloat16
    work = [t.float() if widen and t.dtype == h.dtype else t for t in tensors]
    with torch.cuda.device_of(h):
        for first in range(0, row_blocks, at_once):
            kernel[min(at_once, row_blocks - first), n_units // units](
                *work, n_steps, n_sequences, n_units, arrived, rows, first,
                G, tile, units, K, precision, **options,
            )  # fmt: skip
    if widen:
        torch._foreach_copy_(tensors[:2], work[:2])  # what the kernels return


def launch_sequence(from_input, weight, h0, c0, lengths, masks, early=0):
    """h and c before each step and after the last, and the gates' values."""
    n_steps, n_sequences, _, n_units = from_input.shape
    gates = from_input.clone(memory_format=torch.contiguous_format)
    h = gates.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    masked = h.new_empty(2, *masks.shape)
    h[0], c[0], masked[0] = h0, c0, h0 * masks
    tensors = gates, h, c, masked, masks, weight.contiguous(), lengths
    launch_all_steps(sequence_kernel, TILES, h, len(masks), *tensors, early=early)
    return h, c, gates


# %%
# Is it right?
# ------------
#
# Compare with the plain loop, in float64. 35 sequences make more than one block. Then run it again:
# if the barrier failed now and then, some bits would change.


def plain_loop(from_input, weight, h, c, masks):
    outputs = []
    for step in from_input:
        product = torch.bmm(masks * h, weight.mT).transpose(0, 1)
        i, f, g, o = (step + product.reshape(step.shape)).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


if __name__ == "__main__":
    torch.manual_seed(0)
    T, B, H = 4, 35, 16 if INTERPRET else 128
    lengths = torch.full((B,), T, device=DEVICE)
    for G in (4, 1):
        sizes = (T, B, 4, H), (G, 4 * H // G, H), (B, H), (B, H)
        inputs = [torch.randn(size, device=DEVICE, dtype=torch.float64) for size in sizes]
        masks = dropout(inputs[0].new_ones(G, B, H), 0.3)
        h, _, _ = launch_sequence(*inputs, lengths, masks)
        wanted = plain_loop(*inputs, masks)
        torch.testing.assert_close(h[1:], wanted)
        assert torch.equal(h, launch_sequence(*inputs, lengths, masks)[0])
        error = (h[1:] - wanted).abs().max()
        print(f"G = {G}: outputs within {error:.0e} of the loop's; twice the same bits")

# %%
# Each part alone
# ---------------
#
# Now measure these parts, per step, with everything captured in a CUDA graph. A kernel that only
# waits and arrives gives the time of the barrier. For everything but the waiting, the counter
# starts at a billion (``early``), so no program ever waits. (The results are wrong, of course.)
# PyTorch computes the product alone. cuDNN runs the same steps without recurrent dropout; it gets
# only 8 inputs, so that its product with W hardly counts.


@triton.jit
def barrier_kernel(arrived_ptr, n_steps):
    for t in range(n_steps):
        wait(arrived_ptr, t * tl.num_programs(0))
        arrive(arrived_ptr)


def launch_barriers(n_programs):
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    barrier_kernel[(n_programs,)](arrived, 70, launch_cooperative_grid=True)


LINES = {
    "whole sequence": ("#d55e00", "-"),
    "whole sequence, nobody waits": ("#d55e00", ":"),
    "barrier alone": ("#d55e00", "-."),
    "product with U alone": ("#555555", "--"),
    "cuDNN, no recurrent dropout": ("#0072b2", "-"),
}


@triton.testing.perf_report(triton.testing.Benchmark(
    x_names=["n_units"], x_vals=[128, 256, 512, 1024, 1152, 2048], line_arg="line",
    line_vals=list(LINES), line_names=list(LINES), styles=list(LINES.values()),
    xlabel=f"units, one of 70 steps, batch 80, bfloat16\n{MACHINE}", ylabel="µs",
    plot_name="sequence-lstm-step", args={},
))  # fmt: skip
@torch.no_grad()
def benchmark(n_units, line):
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(70, 80, 4, n_units, **like)
    U = torch.randn(4 * n_units, n_units, **like) / 30
    state, lengths = x.new_zeros(80, n_units), torch.full((80,), 70, device=DEVICE)
    masks = dropout(state.float(), 0.3)[None]
    sequence = x, U[None], state, state.float(), lengths, masks
    lstm, inputs = torch.nn.LSTM(8, n_units).to(**like), torch.randn(70, 80, 8, **like)
    run = dict(zip(LINES, (
        lambda: launch_sequence(*sequence), lambda: launch_sequence(*sequence, early=10**9),
        lambda: launch_barriers(n_units // 16),
        lambda: [linear(state, U) for _ in range(70)], lambda: lstm(inputs),
    ), strict=True))[line]  # fmt: skip
    run()
    gc.collect()  # freeing an earlier graph during a capture would spoil it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return triton.testing.do_bench(graph.replay, return_mode="median") / 70 * 1e3


if __name__ == "__main__" and not INTERPRET:
    times = benchmark.run(show_plots=True, return_df=True)
    for n, _, busy, *_ in times.values:
        tile, units, row_blocks, *_ = blocks_for(TILES, 80, int(n), DEVICE)
        n_bytes = row_blocks * (n // units) * (80 / row_blocks + 4 * units) * n * 2
        print(f"{n:.0f} units: {n_bytes / 2**20:.1f} MiB a step,", end="")
        print(f" read at {n_bytes / busy / 1e6:.1f} TB/s if nobody waits")

# %%
# The dotted line is close to the solid line of its colour, so the programs hardly wait for each
# other. The barrier alone takes longer than the difference, because most of it is the way to L2 and
# back, and the dotted line contains that, too. With few units this is a large part of a step. With
# many units the bytes count: they grow with the square of the units.
#
# Then compare the whole sequence with the products alone, one launch a step. On an H100 and an
# H200, up to 256 units, a whole step takes no longer than PyTorch's product alone, which pays for a
# launch in every step, even in a graph. With 512 units or more, PyTorch's products are faster. The
# backward pass is the same loop from the end: :ref:`sequence backward`.
#
# Exercises
# ---------
#
# 1. Replace recurrent dropout by zoneout (Krueger et al., 2017): at each step, a unit keeps its old
#    c with probability p. A second, independent draw decides the same for h. Let ``masks`` have
#    shape (T, 2, B, H), with 1 where the old value stays.
# 2. Move ``arrive`` below the stores of the gates, of c and of h, and measure. Then move the four
#    loads of the gates below ``wait``. Why does the order matter?
#
# .. note::
#    Try it first.
#
#    1. A program has to keep its old h, too. The state that enters the product is no longer masked.
#
#       .. code-block:: diff
#
#          @@ in sequence_kernel
#          -    keep = ()
#          -    for part in tl.static_range(G):
#          -        keep += (tl.load(masks_ptr + part * plane + state, mask=exists, other=0.0),)
#          +    h = tl.load(h_ptr + state, mask=exists, other=0.0).to(c.dtype)
#          @@
#          -        c = tl.where(active, f * c + i * g, 0.0)
#          -        h = o * tanh(c)
#          +        zoned = masks_ptr + t * 2 * plane + state
#          +        new = f * c + i * g
#          +        c = tl.where(tl.load(zoned, mask=exists, other=0) != 0, c, new)
#          +        h = tl.where(tl.load(zoned + plane, mask=exists, other=0) != 0, h, o * tanh(new))
#          +        c, h = tl.where(active, c, 0.0), tl.where(active, h, 0.0)
#          @@
#          -            tl.store(next_ptr + state, h * keep[part], mask=exists)
#          +            tl.store(next_ptr + state, h, mask=exists)
#          @@ in launch_sequence
#          -    masked = h.new_empty(2, *masks.shape)
#          -    h[0], c[0], masked[0] = h0, c0, h0 * masks
#          +    masked = h.new_empty(2, len(weight), *h0.shape)
#          +    h[0], c[0], masked[0] = h0, c0, h0
#          @@
#          -    launch_all_steps(sequence_kernel, TILES, h, len(masks), *tensors, early=early)
#          +    launch_all_steps(sequence_kernel, TILES, h, len(weight), *tensors, early=early)
#
#    2. The results stay the same, and each step takes longer. The other programs wait for
#       everything before ``arrive``, and loads after ``wait`` begin only when it ends. Both add to
#       the time from one step to the next. In the lesson's order, these loads and stores overlap
#       with the waiting.
#
# References
# ----------
#
# - J. Appleyard, T. Kočiský and P. Blunsom, `Optimizing performance of recurrent neural networks on
#   GPUs <https://arxiv.org/abs/1604.01946>`_, 2016: how cuDNN's LSTM became fast.
# - G. Diamos et al., `Persistent RNNs: stashing recurrent weights on-chip <https://proceedings.mlr.press/v48/diamos16.html>`_,
#   2016.
# - D. Krueger et al., `Zoneout: regularizing RNNs by randomly preserving hidden activations <https://arxiv.org/abs/1606.01305>`_,
#   2017.
# - `FlashRNN <https://github.com/NX-AI/flashrnn>`_ by NX-AI, and `Haste <https://github.com/lmnt-com/haste>`_ by LMNT: both run a whole
#   sequence on the GPU, with kernels in CUDA.
