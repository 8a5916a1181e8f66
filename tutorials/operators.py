"""
.. _operators:

From a kernel to an operator
============================

PyTorch has five ways to call your kernel, and they differ in what works and in what a call costs.
A bare launch is fast, but autograd does not see it, ``torch.compile`` may trip over it, and nothing
says so. In this lesson you make one kernel callable in each way, run the same checks on all of
them, and time a call. At the end you know which way to take, and how to carry a lesson's function
into a project of your own.

You will learn

- what ``torch.autograd.Function``, ``custom_op``, ``triton_op`` and ``Library`` each give you;
- how to find out by running, rather than by reading, what works with an operator;
- what a call costs the CPU, and when that matters.

Needs: PyTorch, and :ref:`seeded dropout`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/operator_layers.svg'
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
# A bare launch
# -------------
#
# The kernel is the one of :ref:`seeded dropout`. It is a good example because its gradient is the
# same kernel again: nothing else distracts from how it is called.


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


def bare(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """A launch and its allocation, for 0 <= p < 1."""
    x = x.contiguous()
    y = torch.empty_like(x)
    arguments = (y, x, x.numel(), round(p * 2**32), 1 / (1 - p), seed, 1024)
    with torch.cuda.device_of(x):
        seeded_dropout4x_kernel[(triton.cdiv(x.numel(), 1024),)](*arguments)
    return y


# %%
# ``device_of`` matters as soon as a machine has more than one GPU. Triton launches on PyTorch's
# *current* device and on its current stream. The stream is the one that your caller chose, so it
# is right as it is; the device need not be the one that holds ``x``, and then the kernel would
# be handed addresses of another GPU's memory.
#
# What is wrong with a bare launch? Ask for a gradient:

if __name__ == "__main__":
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    print("the result requires a gradient:", bare(x, 0.5, 7).requires_grad)

# %%
# Autograd records what PyTorch's own operators do. A launch writes into memory behind its back, so
# the result looks like a constant, and a network trained with it would train without this layer's
# gradient, silently.
#
# With a gradient
# ---------------
#
# ``torch.autograd.Function`` is the plain answer: two static methods, of which the first computes,
# and the second says how the gradient flows. ``backward`` calls ``apply`` again rather than
# ``bare``, so that a gradient of the gradient is recorded, too.


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return bare(x, p, seed)

    @staticmethod
    def backward(ctx, gradient):
        return Function.apply(gradient, ctx.p, ctx.seed), None, None


# %%
# With a name
# -----------
#
# ``torch.library`` makes an *operator* of a function: PyTorch knows it by a name, and
# ``torch.compile`` puts a call of that name into its graph without looking inside. For that it has
# to know the shape and dtype of the result, which the *fake* version tells without computing
# anything. ``register_autograd`` adds the gradient.


def fake(x, p, seed):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


custom = torch.library.custom_op("operators_lesson::custom", bare, mutates_args=())
custom.register_fake(fake)


def keep_p_and_seed(ctx, inputs, output):
    _, ctx.p, ctx.seed = inputs


custom.register_autograd(
    lambda ctx, gradient: (custom(gradient, ctx.p, ctx.seed), None, None),
    setup_context=keep_p_and_seed,
)

# %%
# ``triton_op`` is the same for functions that launch Triton kernels, and lets the compiler look
# inside: it sees the allocation and the launch, which ``wrap_triton`` marks, and can put the
# launch among the kernels that it generates itself. A fake version is not needed, since the
# compiler runs the function with fake tensors.


@torch.library.triton_op("operators_lesson::traced", mutates_args=())
def traced(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    arguments = (y, x, x.numel(), round(p * 2**32), 1 / (1 - p), seed, 1024)
    kernel = torch.library.wrap_triton(seeded_dropout4x_kernel)
    kernel[(triton.cdiv(x.numel(), 1024),)](*arguments)
    return y


traced.register_autograd(
    lambda ctx, gradient: (traced(gradient, ctx.p, ctx.seed), None, None),
    setup_context=keep_p_and_seed,
)

# %%
# Below both lies ``torch.library.Library``, the table from which PyTorch's dispatcher takes its
# functions: one for each device, one for shapes ("Meta"), one for autograd. You fill in the
# entries yourself, and skip the checks that the two functions above make on every call.

library = torch.library.Library("operators_lesson", "FRAGMENT")
library.define("listed(Tensor x, float p, int seed) -> Tensor")
library.impl("listed", bare, "CPU" if INTERPRET else "CUDA")
library.impl("listed", fake, "Meta")
listed = torch.ops.operators_lesson.listed
torch.library.register_autograd(
    "operators_lesson::listed",
    lambda ctx, gradient: (listed(gradient, ctx.p, ctx.seed), None, None),
    setup_context=keep_p_and_seed,
    lib=library,
)

# %%
# (PyTorch calls the device "CUDA" for AMD's GPUs as well.)
#
# The best of two
# ---------------
#
# An operator's name is useful to a compiler, and a program that is not compiled pays for it on
# every call. So the lessons take a ``Function``, which is cheap, and hand the compiler the
# operator: ``is_compiling`` is true while ``torch.compile`` or ``torch.export`` traces the line,
# and false otherwise. The operator needs no gradient of its own, because the ``Function`` has it.


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return (custom if torch.compiler.is_compiling() else bare)(x, p, seed)

    @staticmethod
    def backward(ctx, gradient):
        return Both.apply(gradient, ctx.p, ctx.seed), None, None


WAYS = {
    "bare": bare,
    "Function": Function.apply,
    "custom_op": custom,
    "triton_op": traced,
    "Library": listed,
    "both": Both.apply,
}

# %%
# .. image:: /_static/operator_layers.svg
#    :alt: Six columns, one for each way to call the kernel. A bare launch goes straight to the kernel. Function adds autograd. custom_op, triton_op and Library go through PyTorch's dispatcher, then autograd. The last, both, goes through autograd to the kernel, and through the dispatcher only while torch.compile traces it.
#
# What works?
# -----------
#
# Reading the documentation of six ways takes a day, and tells what they were meant to do. Trying
# takes a second. Each of these functions uses a way ``call`` in one manner, and compares what
# comes out with the bare launch, which is right where it works at all.


def gradient(call):
    x = torch.ones(99, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(call(x, 0.5, 7).sum(), x)
    return torch.equal(found, bare(torch.ones(99, device=DEVICE), 0.5, 7))


def second_gradient(call):
    x = torch.randn(5, device=DEVICE, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradgradcheck(lambda x: call(x, 0.5, 7), x)


def forward_mode(call):
    x = torch.ones(99, device=DEVICE)
    with torch.autograd.forward_ad.dual_level():
        y = call(torch.autograd.forward_ad.make_dual(x, x), 0.5, 7)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    return tangent is not None and torch.equal(tangent, bare(x, 0.5, 7))


def compiled(call):
    torch.compiler.reset()
    backend = "aot_eager" if INTERPRET else "inductor"
    f = torch.compile(lambda x: call(2 * x, 0.5, 7) + 1, backend=backend, fullgraph=True)
    x = torch.ones(99, device=DEVICE, requires_grad=True)
    y = f(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    expected = bare(2 * x.detach(), 0.5, 7)
    return torch.equal(y, expected + 1) and torch.equal(found, expected)


def exported(call):
    class Module(torch.nn.Module):
        def forward(self, x):
            return call(x, 0.5, 7)

    x = torch.ones(99, device=DEVICE)
    return torch.equal(torch.export.export(Module(), (x,)).module()(x), bare(x, 0.5, 7))


def under_vmap(call):
    x = torch.ones(3, 99, device=DEVICE)
    rows = torch.vmap(lambda row: call(row, 0.5, 7))(x)
    return torch.equal(rows, torch.stack([bare(row, 0.5, 7) for row in x]))


def captured(call):
    x, graph = torch.ones(99, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, 0.5, 7)
    graph.replay()
    return torch.equal(y, bare(x, 0.5, 7))


CHECKS = [gradient, second_gradient, forward_mode, compiled, exported, under_vmap]
CHECKS += [] if INTERPRET else [captured]


def outcome(check, call):
    """``yes``, ``NO`` for a silently wrong result, or ``error``."""
    try:
        return "yes" if check(call) else "NO"
    except Exception:
        return "error"


# %%
# Any exception counts as an error here, because that is what a user of the operator would meet.

if __name__ == "__main__":
    import logging
    from tabulate import tabulate

    logging.disable(logging.WARNING)  # the compiler's, about what is meant to fail
    rows = [
        [
            check.__name__.replace("_", " "),
            *(outcome(check, call) for call in WAYS.values()),
        ]
        for check in CHECKS
    ]
    logging.disable(logging.NOTSET)
    print(tabulate(rows, ["does it work?", *WAYS]))

# %%
# Look for ``NO`` first. An error can be read and mended; a silently wrong result is found months
# later. ``forward_mode`` computes derivatives along with the function, from the inputs on. The
# three ways through the dispatcher lose them without a word, because ``register_autograd``
# concerns the other direction only. A ``Function`` without a method ``jvp`` says that it has none.
# (The bare launch fails in ``gradient`` because nothing else here requires one. In a network with
# other layers there would be no error.)
#
# ``under_vmap`` works for the three because PyTorch falls back to a loop over the rows. The loop
# is slow, and every row gets the same mask, which may not be what you want of dropout. A
# ``Function`` would need a method ``vmap`` that says what is meant.
#
# In the interpreter a kernel is ordinary Python on NumPy arrays, and a compiler that looks inside
# fails there: compare the columns ``Function`` and ``triton_op`` with those of a run on a GPU.
#
# PyTorch has a checker of its own. ``opcheck`` tests what an operator promises: that it changes
# none of its inputs, that the fake version agrees with the real one, that autograd is registered
# in a way that the compiler understands. Run it on each operator that you register.

if __name__ == "__main__":
    for name in ("custom_op", "Library"):
        operator = WAYS[name] if name == "custom_op" else listed.default
        x = torch.ones(99, device=DEVICE, requires_grad=True)
        print(
            f"{name} passed:", *torch.library.opcheck(operator, (x, 0.5, 7)), sep="\n  "
        )

# %%
# What does a call cost?
# ----------------------
#
# A GPU takes a microsecond or two for a small tensor, and the CPU takes longer to ask for it. So
# in a program of many small calls the CPU decides. Time the CPU alone: many calls in a row, on a
# tensor so small that the GPU is always done first. The smallest of several repetitions is the one
# that was disturbed least.


def microseconds(call, x):
    """Of the CPU, for one call."""
    import timeit

    times = timeit.repeat(lambda: call(x, 0.5, 7), number=1000, repeat=7)
    return min(times) / 1000 * 1e6


if __name__ == "__main__" and not INTERPRET:
    rows = []
    ways = {"F.dropout": lambda x, p, seed: torch.nn.functional.dropout(x, p)} | WAYS
    for name, call in ways.items():
        x = torch.ones(1024, device=DEVICE)
        plain = microseconds(call, x)
        recorded = "" if name == "bare" else microseconds(call, x.requires_grad_())
        rows.append([name, plain, recorded])
    headers = ["microseconds of the CPU", "no gradient", "with a gradient"]
    print(tabulate(rows, headers, floatfmt=".0f"))

# %%
# The difference between a row and ``bare`` is the price of that way. A ``Function`` adds little.
# ``custom_op`` runs checks in Python on each call, and more when a gradient is recorded;
# ``Library`` skips some of them. ``F.dropout`` is written in C++ from end to end, which is out of
# reach for a launch from Python. The numbers are of one CPU: on a busy or slower one all of them
# grow, and their order stays.
#
# Does the price matter? Compare it with the time that the GPU needs for the same call in your
# program. Where the GPU takes longer, the CPU runs ahead of it, and its time is hidden. Where the
# CPU takes longer, three things help: ``torch.compile``, which launches without Python in between;
# a CUDA graph, which launches everything at once; and larger tensors.
#
# What the compiler makes of it
# -----------------------------
#
# For the last question, count kernels. The compiled function computes ``call(2 * x) + 1``, and
# PyTorch's own dropout would become one kernel with its neighbours. Here the kernel is yours, and
# the compiler cannot put a multiplication into it: it launches one before and one after.

if __name__ == "__main__" and not INTERPRET:
    from torch.profiler import ProfilerActivity, profile

    for name, call in ways.items():
        if name in ("bare", "Function"):
            continue
        torch.compiler.reset()
        f = torch.compile(lambda x, call=call: call(2 * x, 0.5, 7) + 1, dynamic=False)
        x = torch.ones(2**20, device=DEVICE)
        try:
            f(x), f(x)
        except Exception as error:
            print(f"{name}: not compiled, {type(error).__name__}")
            continue
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            f(x)
            torch.cuda.synchronize()
        kernels = [e for e in trace.events() if "triton" in e.name or "kernel" in e.name]
        print(f"{name}: {len(kernels)} kernels")

# %%
# Each extra kernel is a trip to memory and back. If your kernel stands between element-wise
# operators, and the tensors are large, that trip can cost more than a better kernel saves; then
# put the neighbours into your kernel, as the fused lessons do.
#
# Which way when
# --------------
#
# - **For yourself, not compiled:** ``autograd.Function``. It has the least code and the lowest
#   cost.
# - **For a project that others compile or export:** ``Function`` with a ``custom_op`` for the
#   compiler, as in ``Both``. All lessons of this course do this.
# - **Where others need the name**, say for selective checkpointing, for another backend or for a
#   subclass of ``torch.Tensor``: ``custom_op``, or ``Library`` where its cost hurts.
# - **Where the compiler should see the launch**: ``triton_op``, if all who use it have a GPU.
#
# Take it home
# ------------
#
# To use a function of this course in a project of your own:
#
# 1. Copy the lesson's file, with its name, into your package. Importing it defines functions and
#    does nothing else; the demonstrations run only when the file is run as a script. Keep the line
#    of the licence (MIT) with it.
# 2. Call the public function, the one under *As a public function*. It checks its arguments, takes
#    any strides, and picks the device of its input, so several GPUs and streams of your own work.
# 3. Change the ``fast_and_right`` in the operators' names to the name of your package: a name can
#    be registered only once in a process.
# 4. Copy the lesson's tests, too. They compare with float64 and try the shapes that break kernels.
#
# Exercises
# ---------
#
# 1. Give ``Both`` the method ``jvp``, so that forward mode works. Which check fails now, and what
#    does that tell you about the order of your priorities?
# 2. The check ``gradient`` passes a gradient of ones, which is contiguous. Write a check that
#    passes a transposed one, and one that passes an expanded one. Which line of ``bare`` makes
#    them pass?
#
# .. note::
#    Try it first.
#
#    1. Dropout is linear in x, so its derivative in a direction is dropout of that direction, with
#       the same seed. ``forward_mode`` passes then, and ``compiled`` fails: the compiler refuses a
#       ``Function`` with a ``jvp``, at least up to PyTorch 2.13. Most training is compiled more often than
#       differentiated forward, so the lessons leave it out.
#
#       .. code-block:: python
#
#          class WithForwardMode(Both):
#              @staticmethod
#              def jvp(ctx, tangent, *_):
#                  return bare(tangent, ctx.p, ctx.seed)
#
#    2. ``x.contiguous()``: the gradient becomes the ``x`` of the backward launch. Without the line the
#       kernel would read the elements in the order in which they lie in memory.
#
#       .. code-block:: python
#
#          def any_gradient(call):
#              x = torch.ones(33, 31, device=DEVICE, requires_grad=True)
#              y = call(x, 0.5, 7)
#              incoming = torch.randn(31, 33, device=DEVICE).T
#              (found,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
#              (spread,) = torch.autograd.grad(y, x, torch.ones(1, 1, device=DEVICE).expand(33, 31))
#              mask = bare(torch.ones(33, 31, device=DEVICE), 0.5, 7)
#              return torch.equal(found, incoming * mask) and torch.equal(spread, mask)
#
# References
# ----------
#
# - The `PyTorch guide to custom operators <https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html>`_.
# - PyTorch's notes on `extending torch.autograd <https://docs.pytorch.org/docs/stable/notes/extending.html>`_.
# - `Using user-defined Triton kernels with torch.compile <https://docs.pytorch.org/tutorials/recipes/torch_compile_user_defined_triton_kernel_tutorial.html>`_.
