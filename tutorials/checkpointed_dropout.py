"""
.. _checkpointed dropout:

Dropout that replays
====================

Activation checkpointing saves memory by running parts of the network twice. Dropout in such a part
has to draw the same mask the second time, and if it does not, the gradients are wrong and nothing
complains. One training run of a large model had a loss of 2.495 that way, where 2.195 was right,
after 150 steps (see the references). In this lesson you
produce the failure, write the check that catches it, and build a dropout that cannot fail so.

You will learn

- what checkpointing saves, what it costs, and what ``preserve_rng_state`` does about randomness;
- which sources of randomness replay, and which do not, by trying each;
- how to give every layer, step and worker a random stream of its own with nothing to restore.

You need to know PyTorch. You need no CUDA.
"""

# %%
# Setting the stage
# -----------------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/seed_budget.svg'
import numbers
import os
import random
import sys
import timeit
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
# What checkpointing does
# -----------------------
#
# The backward pass needs the activations of the forward pass, so PyTorch keeps them, layer upon
# layer. ``checkpoint(function, x)`` keeps only ``x``. When the backward pass arrives, it runs
# ``function(x)`` again, and takes the activations from the second run. Memory is saved, and at most
# one forward pass is paid for it: the second run stops when it has what the backward pass needs.
#
# ``checkpoint_sequential`` does this for a chain of layers cut into segments. The last segment is
# not checkpointed: its backward pass comes first, so its activations would not be gone for long.
# Count the runs of each segment to see it.

from functools import partial
from itertools import product

import matplotlib.pyplot as plt
from tabulate import tabulate
from torch.nn.functional import dropout
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

runs = [0, 0, 0]


def counting(i):
    def layer(x):
        runs[i] += 1
        return x.sin()

    return layer


x = torch.randn(5, device=DEVICE, requires_grad=True)
chain = [counting(i) for i in range(3)]
checkpoint_sequential(chain, segments=3, input=x, use_reentrant=False).sum().backward()
print("forward runs of each segment:", runs)

# %%
# The failure
# -----------
#
# A layer with dropout draws random numbers. If the second run draws others, the backward pass works
# with the activations of a network that never computed the loss. ``checkpoint`` prevents it by
# default: with ``preserve_rng_state=True`` it saves the state of the random number generators
# before the first run, and puts it back for the second. That costs time, and some training code
# switches it off, as the run above did.
#
# Here is what happens then. In y = dropout(x) · w the gradient of w is dropout(x), element for
# element.

x = torch.ones(24, 48, device=DEVICE)
w = torch.ones(24, 48, device=DEVICE, requires_grad=True)
torch.manual_seed(0)
y = checkpoint(
    lambda x, w: dropout(x, 0.5) * w, x, w, use_reentrant=False, preserve_rng_state=False
)
y.sum().backward()
first, second = (y.detach() != 0).cpu(), (w.grad != 0).cpu()
print(f"{(first != second).float().mean():.0%} of the gradient is wrong")

figure, axes = plt.subplots(1, 3, figsize=(9, 2.2))
for axis, mask, title in zip(
    axes,
    (first, second, first != second),
    ("the loss used", "the gradient used", "wrong"),
    strict=True,
):
    axis.imshow(
        mask.numpy(),
        cmap="Reds" if title == "wrong" else "Blues",
        interpolation="nearest",
    )
    axis.set(title=title, xticks=[], yticks=[])
figure.suptitle("Dropout masks of the first and the second run")
plt.show()

# %%
# There was no error. ``checkpoint`` does compare the two runs, but only the shapes, dtypes and
# devices of what was saved, and those agree.
#
# A check that catches it
# -----------------------
#
# Compare the values instead. This function runs yours under ``checkpoint``, makes the backward pass
# ask for the second run, and compares the two outputs. Take it into your own tests.


def check_replay(function, *inputs, **options):
    """Check that ``checkpoint`` computes the same when it runs ``function`` again.

    Parameters
    ----------
    function : callable
        Takes ``inputs`` and returns one floating-point tensor.
    inputs
        What to call it with.
    options
        Passed on to ``torch.utils.checkpoint.checkpoint``, such as
        ``preserve_rng_state``.

    Raises
    ------
    AssertionError
        If an element of the second output differs from the first.
    TypeError
        If ``function`` does not return a tensor.
    """
    outputs = []
    scale = torch.ones((), device="cpu", requires_grad=True)  # adds no device to save

    def recorded(scale, *inputs):
        output = function(*inputs)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"function must return a tensor, got {type(output).__name__}")
        outputs.append(output.detach().clone())
        return output * scale  # whose backward pass needs the output

    with set_checkpoint_early_stop(False):  # run the function to its end the second time
        y = checkpoint(recorded, scale, *inputs, use_reentrant=False, **options)
        torch.autograd.grad(y.sum(), scale)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0, equal_nan=True)


check_replay(lambda x: dropout(x, 0.5), x)
try:
    check_replay(lambda x: dropout(x, 0.5), x, preserve_rng_state=False)
except AssertionError as error:
    print(error)

# %%
# Dropout with a seed
# -------------------
#
# :ref:`seeded dropout` makes the mask a function of a seed: no generator, no state, nothing to
# save. Here are its kernel and its operator again. One thing is new. The seed comes in a tensor of
# one integer, on the CPU: ``torch.compile`` compiles again for every new value of a Python number
# that a module holds, but not for what is in a tensor.


@triton.jit
def seeded_dropout4x_kernel(
    y_ptr, x_ptr, n_elements, threshold, scale: tl.float64, seed, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    counters = pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = tl.randint4x(seed, counters)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    keep = words >= tl.cast(threshold, tl.uint32)

    offsets = pid * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


@torch.library.custom_op("fast_and_right::replayed_dropout", mutates_args=())
def seeded_dropout4x(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if seed.numel() != 1 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be one int64, got {seed.numel()} of {seed.dtype}")
    threshold = round(p * 2**32)
    if p == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if threshold == 2**32 or x.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    y = torch.empty_like(x)
    BLOCK = 1024
    with torch.cuda.device_of(x):
        seeded_dropout4x_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            y, x, x.numel(), threshold, 1 / (1 - p), seed.item(), BLOCK
        )
    return y


@seeded_dropout4x.register_fake
def _(x, p, seed):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def keep_p_and_seed(ctx, inputs, output):
    _, ctx.p, seed = inputs
    ctx.seed = seed.clone()


def backward(ctx, gradient):
    return seeded_dropout4x(gradient, ctx.p, ctx.seed), None, None


seeded_dropout4x.register_autograd(backward, setup_context=keep_p_and_seed)

# %%
# What replays?
# -------------
#
# A seed helps only if the second run gets the same one. Where should it come from? Try every source
# that comes to mind: with the state preserved and without, as it is and under ``torch.compile``.
# The backend ``aot_eager`` does all of its work but the last stage, which generates code. That takes
# longest, and what replays is settled before it.


class Counter:
    calls = torch.tensor(0)

    def __call__(self, x, seed):
        self.calls += 1
        return seeded_dropout4x(x, 0.5, self.calls.clone())


generator = torch.Generator(DEVICE)


def own_generator(x, seed):
    return x * (torch.rand(x.shape, generator=generator, device=x.device) >= 0.5) * 2


def torch_randint(x, seed):
    return seeded_dropout4x(x, 0.5, torch.randint(2**62, ()))


def python_random(x, seed):
    return seeded_dropout4x(x, 0.5, torch.tensor(random.getrandbits(62)))


SOURCES = {
    "torch's generator: F.dropout": lambda x, seed: dropout(x, 0.5),
    "torch.randint, inside": torch_randint,
    "Python's random, inside": python_random,
    "a Generator of one's own": own_generator,
    "a counter in the module": Counter(),
    "a seed passed in": lambda x, seed: seeded_dropout4x(x, 0.5, seed),
}


def replays(source, preserve_rng_state, backend=None):
    """Whether the gradient of w in y = dropout(x) · w is dropout(x).

    With a backend, it is compiled.
    """

    def step(x, w, seed):
        return checkpoint(
            lambda x, w, seed: source(x, seed) * w,
            x,
            w,
            seed,
            use_reentrant=False,
            preserve_rng_state=preserve_rng_state,
        )

    if backend:
        torch.compiler.reset()
        step = torch.compile(step, backend=backend)
    x = torch.ones(256, device=DEVICE)
    w = torch.ones(256, device=DEVICE, requires_grad=True)
    y = step(x, w, torch.tensor(7))
    y.sum().backward()
    return torch.equal(w.grad, y.detach())


if __name__ == "__main__":
    rows = []
    for name, source in SOURCES.items():
        cases = product((None, "aot_eager"), (True, False))
        found = [replays(source, preserved, backend) for backend, preserved in cases]
        rows.append([name, *("yes" if yes else "NO" for yes in found)])
    headers = [
        "does it replay?",
        "preserved",
        "not",
        "compiled, preserved",
        "compiled, not",
    ]
    print(tabulate(rows, headers))

# %%
# - What torch's own generators draw replays when their state is preserved. Compiled, it replays in
#   either case, because ``torch.compile`` sees to its random numbers itself.
# - Python's ``random`` and a generator of your own are not saved, whatever you ask for.
# - A counter in the module has moved on when the second run comes.
# - A seed that is *passed in* is an argument like any other: ``checkpoint`` keeps it, and it
#   replays always.
#
# There is one more hole. ``checkpoint`` saves the state of the CPU's generator, and of the devices
# of the tensors passed in. A device that is first used inside the function is not among them:

if not INTERPRET:

    def on_the_gpu(source):
        return lambda x: source(x.cuda(), torch.tensor(7))

    for name in ("torch's generator: F.dropout", "a seed passed in"):
        try:
            check_replay(on_the_gpu(SOURCES[name]), torch.ones(256))
            print(f"moved to the GPU inside, {name}: replays")
        except AssertionError:
            print(f"moved to the GPU inside, {name}: does NOT replay, though preserved")

# %%
# A module
# --------
#
# So the seed must be known before the function runs. What identifies a mask is which run of the
# training draws it, on which worker, in which layer, at which step. Give each of these some of the
# seed's 64 bits, and no two masks share a seed. The element's index is the counter, so that even
# within a mask no two elements share a random word.
#
# .. image:: /_static/seed_budget.svg
#    :alt: The 64 bits of a seed: 8 for the run, 12 for the worker, 12 for the layer, 32 for the step. Below it the counter, the index of the element divided by four.

BITS = {"run": 8, "worker": 12, "layer": 12, "step": 32}


def seed_for(run, worker, layer, step):
    """The seed of one mask: the four numbers side by side in 64 bits.

    Each is an integer from 0 to 2^8 - 1 (run), 2^12 - 1 (worker, layer), or 2^32 - 1
    (step). Different numbers give different seeds. Raises TypeError or ValueError for
    anything else.
    """
    seed = 0
    for (name, bits), value in zip(BITS.items(), (run, worker, layer, step), strict=True):
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}")
        seed = seed << bits | int(value)
    return seed - 2**64 if seed >= 2**63 else seed  # as a signed integer of 64 bits


class SeededDropout(torch.nn.Module):
    """Dropout whose mask is a function of (run, worker, layer, step).

    The forward pass changes nothing, so it replays under any checkpointing. A training
    loop calls ``next_step(model)`` once for each step, after the backward pass; two
    calls within a step draw the same mask. The step travels with ``state_dict``,
    ``copy.deepcopy`` and pickling.

    Parameters
    ----------
    p : float
        The probability of dropping an element, in [0, 1].
    layer, worker, run : int
        What tells this module's masks from others': see ``seed_for``.

    Raises
    ------
    TypeError, ValueError
        If ``p`` or one of the integers has another type or is out of range.
    """

    def __init__(self, p, layer=0, worker=0, run=0):
        super().__init__()
        if not isinstance(p, numbers.Real):
            raise TypeError(f"p must be a number, got {type(p).__name__}")
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.p, self.layer, self.worker, self.run = float(p), layer, worker, run
        # No buffer: it stays on the CPU when the module moves, and is quick to read.
        self.seed = torch.tensor(seed_for(run, worker, layer, 0), device="cpu")

    def forward(self, x):
        return seeded_dropout4x(x, self.p, self.seed) if self.training else x

    def get_extra_state(self):  # the step, which is all that state_dict has to carry
        return self.seed.item() % 2 ** BITS["step"]

    def set_extra_state(self, step):
        self.seed.fill_(seed_for(self.run, self.worker, self.layer, step))


def next_step(model):
    """Move every ``SeededDropout`` in ``model`` on to the masks of the next step."""
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.set_extra_state(module.get_extra_state() + 1)


# %%
# Why does the module not count for itself? Because the table says so: a counter in the module has
# moved on when the second run comes. The step belongs to the training loop, and the loop says when
# it is over.
#
# Now a small network, with dropout of either kind, and each part of it checkpointed or not.


class Block(torch.nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.up, self.down = (
            torch.nn.Linear(width, 4 * width),
            torch.nn.Linear(4 * width, width),
        )
        self.dropout = dropout

    def forward(self, x):
        return x + self.down(self.dropout(torch.nn.functional.gelu(self.up(x))))


class Network(torch.nn.Module):
    """Blocks, each under ``checkpoint`` with these options, or plain if there are none."""

    def __init__(self, width, n_blocks, make_dropout, **options):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            Block(width, make_dropout(i)) for i in range(n_blocks)
        )
        self.options = options

    def forward(self, x):
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False, **self.options)
                if self.options
                else block(x)
            )
        return x


def seeded(layer):
    return SeededDropout(0.1, layer)


# %%
# Is it right?
# ------------
#
# The gradients must be those of the run without checkpointing, bit for bit, though no state is
# preserved: plainly, with the outputs of dropout kept by selective checkpointing, nested, and under
# ``checkpoint_sequential``. Compiled, they agree up to rounding.


def gradients(run, model, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


torch.manual_seed(0)
model = Network(16, 3, seeded).to(DEVICE)
x = torch.randn(8, 16, device=DEVICE)
expected = gradients(model, model, x)

once = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
operators = [torch.ops.fast_and_right.replayed_dropout.default]
selective = partial(
    once, context_fn=partial(create_selective_checkpoint_contexts, operators)
)
sequential = partial(
    checkpoint_sequential,
    list(model.blocks),
    3,
    use_reentrant=False,
    preserve_rng_state=False,
)
ways = {
    "one checkpoint": lambda x: once(model, x),
    "nested": lambda x: once(lambda x: once(model, x), x),
    "selective": lambda x: selective(model, x),
    "checkpoint_sequential": sequential,
}
for name, run in ways.items():
    assert torch.equal(gradients(run, model, x), expected)
    print(f"{name}: the gradients are the same, bit for bit")
compiled = torch.compile(ways["one checkpoint"], backend="aot_eager", fullgraph=True)
torch.testing.assert_close(gradients(compiled, model, x), expected)
print("compiled: the gradients are the same")

# %%
# Train, save, resume
# -------------------
#
# To resume with ``F.dropout`` you have to save and restore the generators of every device. Here the
# step is part of ``state_dict``, and that is all there is.

import io


def train(model, optimizer, n_steps):
    losses = []
    for _ in range(n_steps):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        next_step(model)
        losses.append(loss.item())
    return losses


def fresh():
    torch.manual_seed(1)
    model = Network(16, 2, seeded, preserve_rng_state=False).to(DEVICE)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


model, optimizer = fresh()
without_a_break = train(model, optimizer, 6)

model, optimizer = fresh()
losses = train(model, optimizer, 3)
file = io.BytesIO()
torch.save([model.state_dict(), optimizer.state_dict()], file)

model, optimizer = fresh()
file.seek(0)
for thing, state in zip((model, optimizer), torch.load(file), strict=True):
    thing.load_state_dict(state)
losses += train(model, optimizer, 3)
assert losses == without_a_break
print("losses:", *(f"{loss:.4f}" for loss in losses))
print("resumed after 3 of 6 steps: the losses are the same, bit for bit")

# %%
# What it saves and what it costs
# -------------------------------
#
# Two figures for a growing number of ``Block`` modules, 16384 tokens of width 1024 in bfloat16: the
# most memory that a training step holds beyond parameters and input, by the allocator's own count,
# and its time.


def training_step(n_blocks, implementation):
    kind, *options = implementation.split(", ")
    make = seeded if kind == "seeded" else lambda layer: torch.nn.Dropout(0.1)
    options = {"preserve_rng_state": options == ["preserved"]} if options else {}
    with torch.device(DEVICE):
        model = Network(1024, n_blocks, make, **options).to(torch.bfloat16)
        x = torch.randn(16384, 1024, dtype=torch.bfloat16)
    gradient = torch.randn_like(x)
    return lambda: torch.autograd.grad(model(x), list(model.parameters()), gradient)


IMPLEMENTATIONS = ["seeded", "torch", "seeded, checkpointed", "torch, preserved"]
BLOCKS = {
    "x_names": ["n_blocks"],
    "x_vals": list(range(1, 9)),
    "line_arg": "implementation",
    "line_vals": IMPLEMENTATIONS,
    "line_names": [
        "seeded",
        "F.dropout",
        "seeded, checkpointed",
        "F.dropout, checkpointed, state preserved",
    ],
    "styles": [("#d55e00", ":"), ("#0072b2", ":"), ("#d55e00", "-"), ("#0072b2", "-")],
    "xlabel": f"blocks\n{MACHINE}",
    "args": {},
}


@triton.testing.perf_report(
    triton.testing.Benchmark(**BLOCKS, ylabel="MiB", plot_name="checkpoint-memory")
)
def memory_benchmark(n_blocks, implementation):
    step = training_step(n_blocks, implementation)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@triton.testing.perf_report(
    triton.testing.Benchmark(**BLOCKS, ylabel="ms", plot_name="checkpoint-time")
)
def time_benchmark(n_blocks, implementation):
    step = training_step(n_blocks, implementation)
    return triton.testing.do_bench(step, return_mode="median")


if INTERPRET:
    print("No figures: speed is measured on a GPU only, and this run had none.")
elif __name__ == "__main__":
    memory = memory_benchmark.run(show_plots=True, return_df=True)
    time = time_benchmark.run(show_plots=True, return_df=True)
    for quantity, frame in (("MiB", memory), ("ms", time)):
        n_blocks, *values = frame.iloc[-1]
        print(f"{n_blocks:.0f} blocks, {quantity}:")
        for name, value in zip(BLOCKS["line_names"], values, strict=True):
            print(f"  {value:9.2f}  {name}")
        print()

# %%
# Checkpointed, each further block adds little more than its input. Plain, it adds its activations,
# and with F.dropout a mask. The second run leaves out each block's last product, whose result
# nobody asks for, so it costs less than a forward pass.
#
# What ``preserve_rng_state`` itself costs shows around small functions. It is time of the CPU, for
# each checkpointed call, forward and backward together.

if __name__ == "__main__" and not INTERPRET:
    x = torch.randn(1024, device=DEVICE, requires_grad=True)
    module = SeededDropout(0.1).train()

    def one_call(function, preserve_rng_state):
        y = checkpoint(
            function, x, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
        torch.autograd.grad(y, x, x)

    rows = []
    for name, function in [
        ("sin", torch.sin),
        ("F.dropout, then sin", lambda x: dropout(x, 0.1).sin()),
        ("seeded, then sin", lambda x: module(x).sin()),
    ]:
        row = [name]
        for preserve_rng_state in (True, False):
            call = partial(one_call, function, preserve_rng_state)
            call()
            row.append(min(timeit.repeat(call, number=200, repeat=5)) / 200 * 1e6)
        rows.append(row)
    print(tabulate(rows, ["microseconds", "state preserved", "not"], floatfmt=".0f"))

# %%
# Compare F.dropout with its state preserved, which it needs, and the seeded one without. An
# operator that is written in Python takes the CPU longer to launch, which can cost more than it
# saves. As long as the CPU stays ahead of the GPU, neither shows.
#
# Exercises
# ---------
#
# 1. Which lines of the table change if you draw the seed with ``torch.randint`` *before* the call
#    of ``checkpoint``, and pass it in?
# 2. Attention drops elements of a matrix that a fused kernel never writes to memory. From which
#    numbers would you compute the offset of one of them, so that the backward kernel finds it
#    again?
# 3. Run ``check_replay`` on a block of your own model.
#
# .. note::
#    Try it first.
#
#    1. One: the seed that was drawn inside is now a seed passed in, and replays in all four
#       columns. The others draw inside as before.
#
#       .. code-block:: python
#
#          def drawn_before(x, w):
#              seed = torch.randint(2**62, ())
#              return checkpoint(
#                  lambda x, w, seed: seeded_dropout4x(x, 0.5, seed) * w,
#                  x,
#                  w,
#                  seed,
#                  use_reentrant=False,
#                  preserve_rng_state=False,
#              )
#
#    2. From the batch's and the head's number, the query's and the key's, and the numbers of heads,
#       queries and keys: the place that the element would have if the matrix were written. None of
#       them depends on the tiles, which the backward kernel may cut in another way. Compute it in
#       64 bits. Layer and step are in the seed.
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
#       replays; with ``preserve_rng_state=False`` it does not, because it draws from torch's
#       generator.
#
#       .. code-block:: python
#
#          block = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1).to(DEVICE)
#          check_replay(block, torch.randn(10, 2, 64, device=DEVICE))
#
# References
# ----------
#
# - T. Chen, B. Xu, C. Zhang and C. Guestrin, `Training deep nets with sublinear memory cost <https://arxiv.org/abs/1604.06174>`_,
#   2016.
# - PyTorch's documentation of `torch.utils.checkpoint <https://docs.pytorch.org/docs/stable/checkpoint.html>`_.
# - `Preserve RNG state across activation-checkpoint recompute when dropout is active <https://github.com/allenai/OLMo-core/pull/828>`_,
#   the pull request with which OLMo-core mended the run above, 2026.
