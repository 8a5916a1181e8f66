"""
.. _checkpointed dropout:

Dropout that replays
====================

You build a dropout that draws the same mask again when activation checkpointing runs a part of the
network a second time. If the second mask is another one, the gradients are wrong, and there is no
error. For this reason one training run of a large model had a loss of 2.495 instead of 2.195 (see
the references). You produce the failure, write the check that catches it, and then number the
masks, so that no layer, step or checkpoint can get a wrong one without an error.

You will learn

- what ``checkpoint`` does about random numbers, and how to check that a function replays;
- which sources of random numbers replay and which do not, by trying each;
- how to number masks, so that there is no state to restore.

Needs: PyTorch, and :ref:`seeded dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/mask_numbers.svg'
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
# The failure
# -----------
#
# PyTorch keeps the activations of the forward pass for the backward pass. ``checkpoint(function,
# x)`` keeps only ``x``. In the backward pass it runs ``function(x)`` again, and takes the
# activations from this second run. That saves memory, and costs up to one more forward pass.
#
# If the function draws random numbers, the second run has to draw the same ones. By default
# ``checkpoint`` saves the state of the random number generators before the first run, and restores
# it for the second. That takes time, and some training code switches it off with
# ``preserve_rng_state=False``. Here is what happens then. In y = dropout(x) · w the gradient of w
# is dropout(x), so it shows the mask of the second run.

from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

if __name__ == "__main__":
    import matplotlib.pyplot as plt

    x = torch.ones(24, 48, device=DEVICE)
    w = torch.ones(24, 48, device=DEVICE, requires_grad=True)
    torch.manual_seed(0)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    y = checkpoint(lambda x, w: dropout(x, 0.5) * w, x, w, **options)
    y.sum().backward()
    wrong = (y.detach() != 0) != (w.grad != 0)
    print(share := f"{wrong.float().mean():.0%} of the gradient is wrong")
    plt.subplots(figsize=(6, 3.2), subplot_kw={"xticks": [], "yticks": []})
    plt.imshow(wrong.cpu(), cmap="Reds")
    plt.title(f"{share}: the dark elements")
    plt.show()

# %%
# There was no error. ``checkpoint`` does compare the two runs, but only the shapes, dtypes and
# devices of the activations, and those agree.
#
# A check that catches it
# -----------------------
#
# Compare the values instead. This function runs yours under ``checkpoint``, makes the backward pass
# ask for the second run, and compares the two outputs.


def replays(function, *inputs, **options):
    """Whether ``function(*inputs)``, a tensor, is the same when ``checkpoint`` runs it again."""
    outputs = []
    scale = torch.ones((), device="cpu", requires_grad=True)  # so no GPU's state is saved

    def recorded(scale, *inputs):
        outputs.append(function(*inputs))
        return outputs[-1] * scale  # its backward pass needs the output

    with set_checkpoint_early_stop(False):  # run the function to its end the second time
        y = checkpoint(recorded, scale, *inputs, use_reentrant=False, **options)
        torch.autograd.grad(y.sum(), scale)
    first, second = outputs
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


# %%
# A seed in memory, and a number
# ------------------------------
#
# In :ref:`seeded dropout` the mask is a function of a seed, so there is no state to restore. We
# change two things in its kernel. It loads the seed from memory, so that the seed can change while
# a CUDA graph or a compiled function stays as it is. And it takes a *number*, so that one seed
# serves many masks. Philox encrypts counters of 128 bits, and the element's index needs only 64 of
# them:
#
# **Element i of mask n is kept when word i mod 4 of Philox, with the seed as key and the counter
# (⌊i / 4⌋, n), is at least p · 2³², rounded to an integer.** Mask 0 is that of
# ``seeded_dropout4x``.
#
# ``tl.philox`` takes the counter as four words. ``do_not_specialize`` keeps Triton from compiling
# the kernel anew for special numbers, such as 1 and multiples of 16.


@triton.jit(do_not_specialize=["number"])
def replayed_dropout_kernel(
    y_ptr, x_ptr, n_elements, threshold, scale: tl.float64, seed_ptr, number: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    counters = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    numbers = tl.zeros_like(counters) + number
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed_ptr),
        counters.to(tl.uint32), (counters >> 32).to(tl.uint32),
        numbers.to(tl.uint32), (numbers >> 32).to(tl.uint32),
    )  # fmt: skip
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    keep = words >= tl.cast(threshold, tl.uint32)

    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


def launch_replayed_dropout(
    x: torch.Tensor, p: float, seed: torch.Tensor, number: int = 0
) -> torch.Tensor:
    threshold = round(p * 2**32)
    x = x.resolve_neg().contiguous()
    if p == 0:
        return x.clone()
    if threshold == 2**32 or x.numel() == 0:
        return torch.zeros_like(x)
    y = torch.empty_like(x)
    arguments = (y, x, x.numel(), threshold, 1 / (1 - p), seed, number, 1024)
    with torch.cuda.device_of(x):
        replayed_dropout_kernel[(triton.cdiv(x.numel(), 1024),)](*arguments, num_warps=1)
    return y


# %%
# What replays?
# -------------
#
# A mask replays if the second run gets the same seed and number. Where should they come from? Try
# every source that comes to mind, with the state of PyTorch's generators preserved and without.

import itertools
import random

generator, counter = torch.Generator(DEVICE), itertools.count()


def dropout_from(generator, x):
    return 2 * x * (torch.rand(x.shape, generator=generator, device=x.device) >= 0.5)


def numbered_by(next_number):
    return lambda x, seed: launch_replayed_dropout(x, 0.5, seed, next_number())


SOURCES = {
    "torch's generator: F.dropout": lambda x, seed: dropout(x, 0.5),
    "a Generator of one's own": lambda x, seed: dropout_from(generator, x),
    "Python's random": numbered_by(lambda: random.getrandbits(62)),
    "a counter": numbered_by(lambda: next(counter)),
    "a seed passed in": numbered_by(lambda: 0),
}


if __name__ == "__main__":
    x, seed = torch.ones(256, device=DEVICE), torch.tensor(7, device=DEVICE)
    for name, source in SOURCES.items():
        yes = [
            replays(source, x, seed, preserve_rng_state=keep) for keep in (True, False)
        ]
        print(f"{name:30} replays: {yes[0]} (state preserved), {yes[1]} (not)")

# %%
# Numbers from PyTorch's own generators replay if their state is preserved, and only then. The
# states of a generator of your own and of Python's ``random`` are never saved, and a counter has
# moved on when the second run comes. A seed that is *passed in* is an argument like any other.
# ``checkpoint`` keeps it, so it always replays.
#
# Numbering the masks
# -------------------
#
# So we pass the seed in. But each mask needs a seed or a number of its own, which is easy to
# forget. A layer that is used twice, or a second batch before the optimizer's step, would repeat a
# mask, and nobody would notice. So we pass an object that counts. ``Masks`` holds the seed of one
# pass through the network, and each dropout takes the next number from it.
#
# .. image:: /_static/mask_numbers.svg
#    :alt: Dropout takes number 1, a checkpointed function number 2, and dropout in it 2.1 and 2.2 in both runs. The seed has 23 bits for the stream and 40 for the pass. The counter has 64 bits for the index and 64 for the number.
#
# In the second run of a checkpointed function that counter would have moved on. So ``checkpointed``
# takes one number for the whole function, and each run gets new ``Masks``, which count *below* that
# number: 2.1, 2.2, and so on, like the sections of a book. Each level has 12 bits.


def current_backward():
    """The number of the backward pass that is running, or -1."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def capturing():
    """Whether a CUDA graph is being captured."""
    eager = DEVICE == "cuda" and not torch.compiler.is_compiling()
    return eager and torch.cuda.is_current_stream_capturing()


class Masks:
    """Counts the masks of one pass. Take it from ``Seeds.next_pass``."""

    def __init__(self, seed, above=0):
        self.seed, self.above, self.count = seed, above, 0
        self.run, self.captured = current_backward(), capturing()

    def next_number(self):
        if self.run != current_backward():
            raise RuntimeError("masks are of the first run: use checkpointed instead")
        if capturing() and not self.captured:
            raise RuntimeError("call next_pass in the CUDA graph, or its masks repeat")
        self.count += 1
        if self.count >= 2**12 or self.above >= 2**48:
            raise RuntimeError("no number is left: take new masks from Seeds.next_pass")
        return self.above << 12 | self.count


def checkpointed(function, *inputs, masks, **options):
    """``function(*inputs, masks)`` under ``checkpoint``, each run with masks of its own."""
    number = None if masks is None else masks.next_number()

    def run(*inputs):
        return function(*inputs, masks and Masks(masks.seed, number))

    options = {"use_reentrant": False, "preserve_rng_state": False} | options
    return checkpoint(run, *inputs, **options)


# %%
# Under PyTorch's own ``checkpoint`` the second run would go on counting with the ``Masks`` of the
# first. ``next_number`` notices that they were made before this backward pass, and raises an error.
#
# As a public function
# --------------------
#
# The gradient and the operator are made as in :ref:`seeded dropout`. The ``forward`` of the module,
# ``SeededDropout``, has a second argument, the masks, so Python raises an error if you forget them.
# ``Seeds`` hands them out, with another seed for each pass.

import numbers

replayed_dropout_op = torch.library.custom_op(
    "fast_and_right::replayed_dropout", launch_replayed_dropout, mutates_args=()
)
replayed_dropout_op.register_fake(lambda x, *arguments: x.new_empty(x.shape))


class ReplayedDropout(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed, number):
        compiling = torch.compiler.is_compiling()
        run = replayed_dropout_op if compiling else launch_replayed_dropout
        return run(x, p, seed, number)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.p, seed, ctx.number = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, gradient):
        # Not the apply from below: torch.func may have wrapped the seed.
        arguments = gradient, ctx.p, *ctx.saved_tensors, ctx.number
        return ReplayedDropout.apply(*arguments), None, None, None


quick_apply = super(torch.autograd.Function, ReplayedDropout).apply


def apply(*arguments):
    # Function.apply is slow, because it looks up names for the compiler and torch.func.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return ReplayedDropout.apply(*arguments)
    return quick_apply(*arguments)


def check_number(name, value, kind, largest):
    if not isinstance(value, kind):
        what = "a number" if kind is numbers.Real else "an integer"
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
    if not 0 <= value <= largest:
        raise ValueError(f"{name} must be from 0 to {largest}, got {value}")


def replayed_dropout(x, p, seed, number=0):
    """Dropout with mask ``number``, from 0 to 2^63 - 1, of a seed in memory.

    ``x`` and ``p`` are as in ``seeded_dropout4x``, whose mask is number 0. ``seed`` is a
    tensor of one int64 on the device of ``x`` that does not change before the backward pass.
    Differentiable, also twice, in reverse mode only; works under ``torch.compile``.
    """
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        raise TypeError(
            f"x must be a dense tensor, not nested, got {getattr(x, 'layout', type(x))}"
        )
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    check_number("p", p, numbers.Real, 1)
    check_number("number", number, numbers.Integral, 2**63 - 1)
    if getattr(seed, "dtype", None) != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be a tensor of one int64, got {seed!r}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on {x.device} as x is, got {seed.device}")
    return apply(x, float(p), seed, int(number))


class SeededDropout(torch.nn.Module):
    """Dropout with probability ``p``. In evaluation ``masks`` is not used, and may be None."""

    def __init__(self, p):
        super().__init__()
        check_number("p", p, numbers.Real, 1)
        self.p = float(p)

    def forward(self, x, masks):
        if not self.training:
            return x
        if not isinstance(masks, Masks):
            raise TypeError(f"masks must come from Seeds.next_pass, got {masks!r}")
        return replayed_dropout(x, self.p, masks.seed, masks.next_number())


class Seeds(torch.nn.Module):
    """Hands out masks. Each run and each worker needs a ``stream`` of its own, 0 to 2^23 - 1."""

    def __init__(self, stream):
        super().__init__()
        check_number("stream", stream, numbers.Integral, 2**23 - 1)
        self.first = int(stream) << 40  # 2^40 passes for each stream
        self.register_buffer("passes", torch.tensor(0, device=DEVICE))

    @torch.compiler.disable
    def next_pass(self):
        if current_backward() != -1:
            raise RuntimeError("call next_pass outside of checkpoint and pass masks in")
        self.passes += 1
        return Masks(self.passes + self.first)


# %%
# Is it right?
# ------------
#
# Here is a small network whose blocks use one dropout twice.


class Block(torch.nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x, masks):
        hidden = self.dropout(torch.nn.functional.gelu(self.up(x)), masks)
        return x + self.dropout(self.down(hidden), masks)


def plain(function, *inputs, masks):
    """Give ``function`` the same numbers as ``checkpointed`` does."""
    return function(*inputs, masks and Masks(masks.seed, masks.next_number()))


def run_network(blocks, x, masks, way):
    for block in blocks:
        x = way(block, x, masks=masks)
    return x


# %%
# The gradients must be those of the plain run, bit for bit, though no state is preserved. Both
# batches go forward before the backward pass. So the first batch is run again after the second has
# taken its masks. Then we make two mistakes: we use ``checkpoint`` as it is, and we ask for a new
# pass inside of it.

from functools import partial


def gradients(blocks, x, way, run=run_network):
    blocks.zero_grad()
    seeds = Seeds(0)
    batches = [run(blocks, batch, seeds.next_pass(), way) for batch in (x, 2 * x)]
    sum(batches).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in blocks.parameters()])


def unwrapped(block, x, masks):
    return checkpoint(block, x, masks, use_reentrant=False)


def new_pass_inside(block, x, masks):
    return checkpointed(lambda x, masks: block(x, Seeds(0).next_pass()), x, masks=masks)


if __name__ == "__main__":
    blocks = torch.nn.ModuleList(Block(16, SeededDropout(0.1)) for _ in range(3))
    blocks, x = blocks.to(DEVICE), torch.randn(8, 16, device=DEVICE, requires_grad=True)
    expected = gradients(blocks, x, plain)
    for way in (checkpointed, partial(checkpointed, use_reentrant=True)):
        assert torch.equal(gradients(blocks, x, way), expected)
    compiled = torch.compile(run_network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(blocks, x, checkpointed, compiled), expected)
    print("the same gradients: bit for bit; compiled, up to rounding\n")
    for way in (unwrapped, new_pass_inside):
        try:
            gradients(blocks, x, way)
        except RuntimeError as error:
            print(f"{way.__name__}: {error}")

# %%
# A training loop calls ``model(x, seeds.next_pass())``. For another batch of the same step, call
# ``next_pass`` again. If you pass the same masks twice, they go on counting, so even then no mask
# repeats. To resume a run, save ``seeds.state_dict()``, too. In a CUDA graph of a whole step,
# ``next_pass`` is captured with the rest, so each replay has masks of its own. Masks made before
# the capture raise an error.
#
# What it costs
# -------------
#
# ``checkpointed`` calls ``checkpoint``, so it saves the same memory. What differs is the CPU's
# time. Compare it with that of ``F.dropout``.


def small_call(function, way, masks, x):
    return torch.autograd.grad(way(function, x, masks=masks).sin(), x, x)


if __name__ == "__main__" and not INTERPRET:
    import timeit

    x = torch.randn(1024, device=DEVICE, requires_grad=True)
    preserved = partial(checkpointed, preserve_rng_state=True)
    module, times = SeededDropout(0.1), []

    def torch_dropout(x, masks):
        return dropout(x, 0.1)

    for name, function, way in (
        ("F.dropout, state preserved", torch_dropout, preserved),
        ("F.dropout, not preserved", torch_dropout, checkpointed),
        ("seeded, not preserved", module, checkpointed),
    ):
        call = partial(small_call, function, way, Seeds(0).next_pass(), x)
        times.append(min(timeit.repeat(call, number=200, repeat=5)) / 200 * 1e6)
        print(f"{name}: {times[-1]:.0f} microseconds")
    print(f"seeded over F.dropout, state preserved: {times[2] / times[0]:.2f}")

# %%
# You can't choose the second line, because its gradients are wrong. The last line compares the
# other two. If it is above 1, the launch from Python costs the CPU more than saving and restoring
# the state. As long as the CPU stays ahead of the GPU, you notice neither.
#
# Exercises
# ---------
#
# 1. Does a seed that is drawn with ``torch.randint`` in the function replay? And one that is drawn
#    before the call of ``checkpoint``, and passed in?
# 2. Attention drops elements of a matrix that a fused kernel never writes to memory. From which
#    numbers would you compute an element's offset, so that the backward kernel makes the same
#    decision?
# 3. Does a block of your own model replay?
#
# .. note::
#    Try it first.
#
#    1. ``torch.randint`` draws from PyTorch's generator, so a seed that is drawn in the function
#       replays only with the state preserved. One that is drawn before is passed in, and always
#       replays.
#
#       .. code-block:: python
#
#          def drawn_before(x, w):
#              seed = torch.randint(2**62, (), device=x.device)
#              return checkpoint(
#                  lambda x, w, seed: replayed_dropout(x, 0.5, seed) * w,
#                  x,
#                  w,
#                  seed,
#                  use_reentrant=False,
#                  preserve_rng_state=False,
#              )
#
#    2. The offset is the place that the element would have if the matrix were written. It follows
#       from the element's batch, head, query and key, and from how many heads, queries and keys
#       there are. None of these depends on the tiles, which the backward kernel may cut in another
#       way. Compute it in 64 bits.
#
#       .. code-block:: python
#
#          @triton.jit
#          def keep_tile(seed, p, batch, head, queries, keys, n_heads, n_queries, n_keys):
#              matrix = tl.cast(batch, tl.int64) * n_heads + head
#              rows = matrix * n_queries + queries[:, None]
#              return tl.rand(seed, rows * n_keys + keys[None, :]) >= p
#
#    3. Leave the block in training mode, and pass the options that your training passes. This one
#       replays; with ``preserve_rng_state=False`` it does not, because it draws from PyTorch's
#       generator.
#
#       .. code-block:: python
#
#          block = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1).to(DEVICE)
#          assert replays(block, torch.randn(10, 2, 64, device=DEVICE))
#
# References
# ----------
#
# - T. Chen, B. Xu, C. Zhang and C. Guestrin, `Training deep nets with sublinear memory cost <https://arxiv.org/abs/1604.06174>`_,
#   2016.
# - PyTorch's documentation of `torch.utils.checkpoint <https://docs.pytorch.org/docs/stable/checkpoint.html>`_.
# - `Preserve RNG state across activation-checkpoint recompute when dropout is active <https://github.com/allenai/OLMo-core/pull/828>`_,
#   the pull request with which OLMo-core mended a training run, 2026.
