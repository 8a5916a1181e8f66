"""
.. _lstm module:

An LSTM module with recurrent dropout
=====================================

You make a module that takes the place of a one-layer ``torch.nn.LSTM`` and has Keras's recurrent
dropout. It takes padded and packed batches, and runs under ``torch.compile`` and in a CUDA graph.
You compare it with cuDNN's LSTM, which has no dropout on its state.

You will learn

- what a module needs besides its kernels: masks, lengths, and added units;
- why every replay of a CUDA graph still draws new masks;
- how to compare two modules under the same conditions.

Needs: PyTorch, and :ref:`sequence backward`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/lstm_module.svg'
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
# The kernels and launches of :ref:`sequence lstm` and :ref:`sequence backward`, so that the notebook
# runs alone. You have read them.


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


@triton.jit(do_not_specialize=["n_steps", "n_sequences", "rows", "first_block"])
def sequence_kernel(
    gates_ptr,
    h_ptr, c_ptr,
    masked_ptr,
    masks_ptr,
    weight_ptr,
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
    c = tl.load(c_ptr + state, mask=exists, other=0.0)
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
            next_ptr = masked_ptr + ((t + 1) % 2 * G + part) * plane
            tl.store(next_ptr + state, h * keep[part], mask=exists)
        arrive(arrived_ptr)
        tl.store(gate, i, mask=exists)
        tl.store(gate + n_units, f, mask=exists)
        tl.store(gate + 2 * n_units, g, mask=exists)
        tl.store(gate + 3 * n_units, o, mask=exists)
        tl.store(c_ptr + (t + 1) * plane + state, c, mask=exists)
        tl.store(h_ptr + (t + 1) * plane + state, h, mask=exists)


@triton.jit(do_not_specialize=["n_steps", "n_sequences", "rows", "first_block"])
def sequence_backward_kernel(
    d_gates_ptr,
    d_cell_ptr,
    dh_ptr, dc_ptr,
    gates_ptr, c_ptr, masks_ptr,
    weight_ptr,
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
        d_cell *= f
    tl.store(d_cell_ptr + state, d_cell, mask=exists)


TILES = [
    (16, 2, 16, 4, 3),
    (64, 1, 16, 8, 3),
    (32, 2, 16, 4, 3),
    (64, 1, 32, 8, 4),
    (64, 1, 64, 8, 2),
]
BACKWARD_TILES = [
    (16, 2, 32, 4, 4),
    (64, 1, 16, 4, 4),
    (32, 2, 32, 4, 4),
    (64, 1, 32, 8, 4),
    (64, 1, 64, 8, 3),
]


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


def launch_sequence(from_input, weight, h0, c0, lengths, masks, early=0):
    n_steps, n_sequences, _, n_units = from_input.shape
    gates = from_input.clone(memory_format=torch.contiguous_format)
    h = gates.new_empty(n_steps + 1, n_sequences, n_units)
    c = torch.empty_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    masked = h.new_empty(2, *masks.shape)
    h[0], c[0], masked[0] = h0, c0, h0 * masks
    tensors = gates, h, c, masked, masks, weight.contiguous(), lengths
    launch_all_steps(sequence_kernel, TILES, h, len(masks), *tensors, early=early)
    return h, c, gates


def launch_sequence_backward(dh, dc, gates, weight, h, c, lengths, masks, early=0):
    n_steps, n_sequences, _, n_units = gates.shape
    G, U = len(weight), weight.reshape(4 * n_units, n_units)
    d_gates = gates.new_empty(n_steps + 1, n_sequences, 4, n_units)
    d_gates[n_steps] = 0
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
# What a module needs
# -------------------
#
# The launches do the steps. The module does the rest:
#
# .. image:: /_static/lstm_module.svg
#    :alt: x passes dropout, one product with W, and all steps in one launch, to h and c. A mask enters the dropout; another mask and the lengths enter the steps.
#
# - **Masks.** Each call in training draws them with PyTorch's dropout. So ``torch.manual_seed``
#   determines them, and ``torch.utils.checkpoint`` draws the same when it recomputes.
# - **Lengths.** In a padded batch each sequence has its own length, which the kernels read. What
#   comes after its end must not count, even if it is NaN. A packed sequence is padded first, and
#   its output is packed again.
# - **Added units.** The kernels take multiples of 128 units. The module adds units whose weights
#   are 0, so that they stay at 0, and removes them from the results.
#
# As a public function
# --------------------
#
# A custom operator makes each launch known to ``torch.compile``, and a ``torch.autograd.Function``
# to autograd, as in :ref:`operators`. The backward pass has a ``Function`` of its own, so that a
# second derivative is an error and not silently wrong. The module has the parameters and results of
# ``torch.nn.LSTM``, so a state dict fits both. ``dropout`` and ``recurrent_dropout`` mean what they
# do in Keras.

import gc
import numbers

from torch.nn.functional import dropout, linear, pad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

lstm_sequence = torch.library.custom_op(
    "fast_and_right::lstm_sequence", launch_sequence, mutates_args=(),
    schema="(Tensor from_input, Tensor weight, Tensor h0, Tensor c0, Tensor lengths, "
    "Tensor masks) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
lstm_sequence_backward = torch.library.custom_op(
    "fast_and_right::lstm_sequence_backward", launch_sequence_backward, mutates_args=(),
    schema="(Tensor dh, Tensor dc, Tensor gates, Tensor weight, Tensor h, Tensor c, "
    "Tensor lengths, Tensor masks) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@lstm_sequence.register_fake
def _(from_input, weight, h0, c0, lengths, masks):
    n_steps, n_sequences, _, n_units = from_input.shape
    h = from_input.new_empty(n_steps + 1, n_sequences, n_units)
    return (
        h,
        torch.empty_like(h, dtype=masks.dtype),
        from_input.new_empty(from_input.shape),
    )


@lstm_sequence_backward.register_fake
def _(dh, dc, gates, weight, h, c, lengths, masks):
    return tuple(t.new_empty(t.shape) for t in (gates, weight, h[0], c[0]))


class LSTMSequenceBackward(torch.autograd.Function):
    @staticmethod
    def forward(dh, dc, gates, weight, h, c, lengths, masks):
        return lstm_sequence_backward(dh, dc, gates, weight, h, c, lengths, masks)

    setup_context = staticmethod(lambda ctx, inputs, output: None)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("LSTM has no second derivatives")


class LSTMSequence(torch.autograd.Function):
    @staticmethod
    def forward(from_input, weight, h0, c0, lengths, masks):
        return lstm_sequence(from_input, weight, h0, c0, lengths, masks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, _, _, lengths, masks = inputs
        h, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(gates, weight, h, c, lengths, masks)

    @staticmethod
    def backward(ctx, dh, dc, _):
        saved = ctx.saved_tensors
        return *LSTMSequenceBackward.apply(dh, dc, *saved), None, None


class LSTM(torch.nn.Module):
    """One layer of ``torch.nn.LSTM`` with Keras's ``dropout`` and ``recurrent_dropout``.

    In training, each call draws masks of shape (G, batch, units) for inputs and state, which
    hold for all steps and are scaled by 1 / (1 - p). The rates are in [0, 1]. With
    ``implementation`` 1, each gate has masks of its own (G = 4); with 0 or 2, the gates share
    them (G = 1). With ``batch_first``, input and output are (batch, time, features).
    Differentiable once, in reverse mode; works under ``torch.compile``. Wrong arguments raise
    TypeError or ValueError.
    """

    def __init__(
        self, input_size, hidden_size, *, dropout=0.0, recurrent_dropout=0.0,
        implementation=2, batch_first=False,
    ):  # fmt: skip
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
        for name, parameter in torch.nn.LSTM(input_size, hidden_size).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, input, hx=None, lengths=None):
        """All outputs, and the state (h_n, c_n) at each sequence's end.

        ``input`` is a tensor (time, batch, input_size) or a PackedSequence, in the weights'
        dtype, float16 to float64. ``hx`` is the first h and c, each (1, batch, hidden_size);
        None means zeros. ``lengths`` is for a padded batch, and is on the CPU. Outputs after
        a sequence's end are 0. The backward pass reads the outputs: don't change them in place.
        """
        packed = isinstance(input, PackedSequence)
        if packed and lengths is not None:
            raise ValueError("lengths must be None for a PackedSequence: it has its own")
        if not isinstance(input, torch.Tensor | PackedSequence):
            got = type(input).__name__
            raise TypeError(f"input must be a tensor or a PackedSequence, got {got}")
        if getattr(input, "is_nested", False):
            raise TypeError(
                "input must be a dense tensor, got a nested one; pass lengths"
            )
        x, lengths = pad_packed_sequence(input) if packed else (input, lengths)
        if x.dim() != 3 or x.shape[2] != self.input_size:
            wanted = "(batch, time" if self.batch_first else "(time, batch"
            wanted = f"{wanted}, {self.input_size})"
            raise ValueError(f"input must be {wanted}, got shape {tuple(x.shape)}")
        if self.batch_first and not packed:
            x = x.transpose(0, 1)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=getattr(lengths, "device", "cpu"))
            if lengths.numel() and lengths.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
            lengths = lengths.long()
        h, c = self.states(x, hx, lengths)
        output, state = h[1:], (h[-1:].clone(), c[-1:].clone())
        if lengths is not None:
            ends = lengths[None], torch.arange(x.shape[1], device=lengths.device)[None]
            state = h[ends], c[ends]  # row n is the state after n steps
        if packed:
            order = input.sorted_indices
            ordered = output if order is None else output[:, order]
            sizes = lengths.sort(descending=True).values
            data = pack_padded_sequence(ordered, sizes).data
            return PackedSequence(data, *input[1:]), state
        return output.transpose(0, 1) if self.batch_first else output, state

    def states(self, x, hx, lengths):
        # h and c before the first step and after each: (time + 1, batch, hidden_size)
        n_steps, n_sequences, _ = x.shape
        if (got := x.device.type) != DEVICE:
            raise ValueError(f"input must be on device type {DEVICE!r}, got {got!r}")
        autocast, wanted = torch.is_autocast_enabled(DEVICE), self.weight_hh_l0.dtype
        if not autocast and wanted != x.dtype:
            raise TypeError(f"input must be {wanted}, as the weights, got {x.dtype}")
        shape = 1, n_sequences, self.hidden_size
        hx = [x.new_zeros(shape)] * 2 if hx is None else hx
        pair = isinstance(hx, tuple | list | torch.Tensor) and len(hx) == 2
        if not pair or not all(isinstance(part, torch.Tensor) for part in hx):
            raise TypeError("hx must be None or a pair of tensors")
        for part in hx:
            if (got := tuple(part.shape)) != shape:
                raise ValueError(f"hx must be two tensors of shape {shape}, got {got}")
            if part.device != x.device:
                raise ValueError(f"hx must be on {x.device}, as input, got {part.device}")
            if not autocast and part.dtype != x.dtype:
                raise TypeError(f"hx must be {x.dtype}, as input, got {part.dtype}")
        if lengths is None:
            lengths = torch.full((n_sequences,), n_steps, device=x.device)
        else:
            if lengths.device.type != "cpu" or lengths.shape != (n_sequences,):
                got = f"shape {tuple(lengths.shape)} on {lengths.device}"
                raise ValueError(f"lengths must be {n_sequences} on the CPU, got {got}")
            got = lengths.tolist()
            if got and not 0 <= min(got) <= max(got) <= n_steps:
                raise ValueError(f"lengths must be from 0 to {n_steps}, got {got}")
            lengths = lengths.to(x.device)
            steps = torch.arange(n_steps, device=x.device)[:, None, None]
            x = x.masked_fill(steps >= lengths[:, None], 0)  # padding may hold NaN

        G, H = 4 if self.implementation == 1 else 1, self.hidden_size
        wide = torch.promote_types(x.dtype, torch.float32)
        like = {"dtype": wide, "device": x.device}
        bias, rate = self.bias_ih_l0 + self.bias_hh_l0, self.dropout
        if self.training and rate:
            masks = dropout(torch.ones(G, 1, *x.shape[1:], **like), rate)
            x = (x * masks).to(x.dtype)
        # One product for each mask; then the order (time, batch, gate, unit).
        weight = self.weight_ih_l0.view(G, -1, self.input_size)
        x = x.expand(G, -1, -1, -1).flatten(1, 2)
        gates = torch.baddbmm(bias.view(G, 1, -1), x, weight.mT)
        gates = gates.view(G, n_steps, n_sequences, 4 // G, H)
        gates = gates.permute(1, 2, 0, 3, 4).flatten(2, 3)

        # Add units that stay 0, up to a multiple of 128 (interpreter: a power of two).
        extra = max(16, 1 << (H - 1).bit_length()) - H if INTERPRET else -H % 128
        h0, c0, U = hx[0][0], hx[1][0], self.weight_hh_l0.view(4, H, H)
        if extra:
            gates, h0, c0 = (pad(t, (0, extra)) for t in (gates, h0, c0))
            U = pad(U, (0, extra, 0, extra))
        ones = torch.ones(G, n_sequences, H + extra, **like)
        masks = dropout(ones, self.recurrent_dropout, self.training)
        U, h0 = U.to(gates.dtype).view(G, -1, H + extra), h0.to(gates.dtype)
        h, c, _ = LSTMSequence.apply(gates, U, h0, c0.to(wide), lengths, masks)
        return h[..., :H], c[..., :H].to(h.dtype)


# %%
# Is it right?
# ------------
#
# With nothing dropped the module must agree with ``torch.nn.LSTM``, all gradients included. In a
# padded batch each sequence, even an empty one, must have the same results as alone.

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, device=DEVICE, dtype=torch.float64, requires_grad=True)
    reference = torch.nn.LSTM(4, 7).to(x)
    lstm = LSTM(4, 7).to(x)
    lstm.load_state_dict(reference.state_dict())
    losses = [(m(x)[0].sin().sum(), [x, *m.parameters()]) for m in (lstm, reference)]
    torch.testing.assert_close(*(torch.autograd.grad(*loss) for loss in losses))
    packed = pack_padded_sequence(x, [5, 3, 2])
    torch.testing.assert_close(lstm(packed)[0].data, reference(packed)[0].data)
    output, (h_n, _) = lstm(x, lengths=[5, 0, 2])
    for b, length in enumerate([5, 0, 2]):
        alone, (h_alone, _) = lstm(x[:length, b : b + 1])
        got = output[:length, b : b + 1], h_n[:, b : b + 1]
        torch.testing.assert_close(got, (alone, h_alone))
    print("as torch.nn.LSTM, and as each sequence alone")

# %%
# Capture the module
# ------------------
#
# ``torch.cuda.make_graphed_callables`` captures the forward and the backward pass of a module, and
# changes it in place: from then on it takes inputs of the captured shape only. Each replay
# overwrites the output of the one before.
#
# A replay repeats the launches with their captured arguments. If a seed were one of these, each
# replay would draw the same masks. But PyTorch's dropout loads its seed from memory, and PyTorch
# advances its generator with every replay:

if __name__ == "__main__" and not INTERPRET:
    graphed = LSTM(4, 7, recurrent_dropout=0.3).to(DEVICE)
    x = torch.randn(5, 3, 4, device=DEVICE)
    torch.cuda.make_graphed_callables(graphed, (x.clone(),))
    torch.manual_seed(2)
    first, second = graphed(x)[0].clone(), graphed(x)[0].clone()
    torch.manual_seed(2)
    assert torch.equal(graphed(x)[0], first) and not torch.equal(first, second)
    print("two replays draw two masks; the same seed draws the same masks")

# %%
# How fast is it?
# ---------------
#
# We take the size of AWD-LSTM's layers (70 steps, batch 80, 400 inputs, about 1150 units), and long
# sequences (1024 steps, batch 16). We time both passes together, with implementation 2. cuDNN's
# LSTM drops nothing of its state. Both modules are captured in the same way (solid), and also
# called as usual (dotted). The dashed line is the matrix products alone, those with U step by step,
# captured. TF32 rounds the inputs of float32 products to fewer bits. cuDNN's LSTM uses it by
# default, and ours if PyTorch's products do. Here we switch it on for all.


def products_of(n_units, like, n_steps, batch):  # of a forward and a backward pass
    H, n = n_units + -n_units % 8, n_steps * batch
    sizes = (n, 400), (n, H), (n, 4 * H), (4 * H, 400), (4 * H, H)
    x, h, d, W, U = (torch.randn(size, **like) for size in sizes)
    graph = torch.cuda.CUDAGraph()
    for context in (torch.no_grad(), torch.cuda.graph(graph)):  # warm up, and capture
        with context:
            for _ in range(n_steps):
                last = linear(h[:batch], U), d[:batch] @ U
            results = last, linear(x, W), d.T @ h, d.T @ x, d @ W
    return lambda: (graph.replay(), results)


STYLES = [(c, s) for c in ("#d55e00", "#0072b2") for s in "-:"] + [("#555555", "--")]
LINES = ["recurrent dropout, captured", "recurrent dropout, called"]
LINES += ["cuDNN without, captured", "cuDNN without, called", "matrix products alone"]
SIZES = (70, 80, "float32"), (70, 80, "bfloat16"), (1024, 16, "bfloat16")


@triton.testing.perf_report([
    triton.testing.Benchmark(
        x_names=["n_units"], x_vals=[256, 512, 1024, 1150, 1152, 2048],
        line_arg="line", line_vals=LINES, line_names=LINES, styles=STYLES,
        xlabel=f"units, {n_steps} steps, batch {batch}, {dtype}\n{MACHINE}",
        ylabel="ms", y_log=True, plot_name=f"lstm-module-{n_steps}-steps-{dtype}",
        args={"n_steps": n_steps, "batch": batch, "dtype": getattr(torch, dtype)},
    )
    for n_steps, batch, dtype in SIZES
])  # fmt: skip
def benchmark(line, n_units, n_steps, batch, dtype, implementation=2):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    like = {"device": DEVICE, "dtype": dtype}
    rates = {"dropout": 0.3, "recurrent_dropout": 0.3}
    ours = LSTM(400, n_units, **rates, implementation=implementation)
    module = (ours if "dropout" in line else torch.nn.LSTM(400, n_units)).to(**like)
    x = torch.randn(n_steps, batch, 400, **like, requires_grad=True)
    gc.collect()  # freeing an earlier graph during a capture would spoil it
    if "captured" in line:
        torch.cuda.make_graphed_callables(module, (torch.randn_like(x).requires_grad_(),))
    inputs, gradient = [x, *module.parameters()], torch.randn_like(module(x)[0])
    products = products_of(n_units, like, n_steps, batch) if "products" in line else None
    train = lambda: torch.autograd.grad(module(x)[0], inputs, gradient)  # noqa: E731
    return triton.testing.do_bench(products or train, return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    results = benchmark.run(show_plots=True, return_df=True)
    for (n_steps, batch, dtype), times in zip(SIZES, results, strict=True):
        ours, called, *others = times.values.T[1:]
        for name, other, our in zip(LINES[2:], others, (ours, called, ours), strict=True):
            low, high = min(our / other), max(our / other)
            print(f"{n_steps} steps, batch {batch}, {dtype}: ", end="")
            print(f"{low:.2f} to {high:.2f} times as long as {name}")
    size = 1152, 70, 80, torch.bfloat16
    one, two = (benchmark.fn(LINES[0], *size, i) for i in (1, 2))
    print(f"implementation 1 takes {one / two:.2f} times as long as 2, at 1152 units")

# %%
# Where a ratio is below 1, our LSTM, with recurrent dropout, is faster than cuDNN's without. If
# both are captured, only the GPU's time counts. On an H100 and an H200, ours is then faster at 256
# and 512 units in all three figures, and up to 1152 units in two of them: float32, and 1024 steps.
# With 80 sequences in bfloat16, cuDNN is faster from 1024 units on, except at 1150, where cuDNN is
# slow. At these sizes our backward pass is limited by its bytes: each program reads the gradients
# of all four gates of all units. If both are called, the CPU's time counts as well, and cuDNN is
# faster only at 2048 units in bfloat16 with 80 sequences. Where the dotted lines are flat, they
# show what the CPU does, and not which kernel is better.
#
# In the forward kernel, implementation 1 multiplies each of its four masked states by all columns,
# with 0 in those of the other gates, so it does four times the work that is needed. FlashRNN runs a
# whole LSTM sequence in CUDA, without recurrent dropout. In its authors' figure, not measured here,
# cuDNN is faster than FlashRNN at 768 units.
#
# Exercises
# ---------
#
# 1. Make a bidirectional layer of two modules: the second one reads each sequence from its end. Mind
#    the padding.
#
# .. note::
#    Try it first.
#
#    1. Reverse each sequence within its own length. The same index restores the order of the
#       outputs.
#
#       .. code-block:: python
#
#          def both_directions(forward, backward, x, lengths):
#              lengths = torch.as_tensor(lengths)
#              steps = torch.arange(len(x))[:, None]
#              index = torch.where(steps < lengths, lengths - 1 - steps, steps)
#              index = index[..., None].to(x.device)
#              reversed_x = x.take_along_dim(index, dim=0)
#              there = forward(x, lengths=lengths)[0]
#              back = backward(reversed_x, lengths=lengths)[0].take_along_dim(index, dim=0)
#              return torch.cat([there, back], dim=-1)
#
# References
# ----------
#
# - Y. Gal and Z. Ghahramani, `A theoretically grounded application of dropout in recurrent neural networks <https://arxiv.org/abs/1512.05287>`_,
#   2016.
# - S. Merity, N. S. Keskar and R. Socher, `Regularizing and optimizing LSTM language models <https://arxiv.org/abs/1708.02182>`_,
#   2017: AWD-LSTM.
# - PyTorch's documentation of `CUDA graphs <https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs>`_.
# - `FlashRNN <https://github.com/NX-AI/flashrnn>`_ by NX-AI.
