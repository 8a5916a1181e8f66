"""
.. _operators:

From a kernel to an operator
============================

PyTorch has five ways to call your kernel, and they differ in what works and in what a call costs.
A bare launch is fast, but autograd does not see it, and nothing says so. In this lesson you make one
kernel callable in each way, run the same checks on all of them, and time a call. At the end you
know which way to take, and how to use a lesson's function in a project of your own.

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
# The kernel draws the masks of :ref:`seeded dropout`, with Triton's own Philox. Its gradient is the
# same kernel again, so nothing distracts from how it is called.


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


def numbers(x, p, seed):
    # A signed number with the threshold's 32 bits: triton_op, below, needs it.
    threshold = round(p * 2**32) - (2**32 if p >= 0.5 else 0)
    return x.numel(), threshold, 1 / (1 - p), seed, 1024


def bare(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """A launch and its allocation, for 0 <= p < 1."""
    x = x.contiguous()
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(x.numel(), 1024),)
        seeded_dropout4x_kernel[grid](y, x, *numbers(x, p, seed))
    return y


# %%
# Triton launches on PyTorch's current stream and on its *current* device. The device need not be
# the one that holds ``x``, and then the kernel would get addresses in another GPU's memory.
# ``device_of`` makes the device of ``x`` the current one.
#
# What is wrong with a bare launch? Ask for a gradient:

if __name__ == "__main__":
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    print("the result requires a gradient:", bare(x, 0.5, 7).requires_grad)

# %%
# Autograd records what PyTorch's own operators do, and does not see a launch. So the result looks
# like a constant, and the layers before it would get no gradient, silently.
#
# With a gradient
# ---------------
#
# A ``torch.autograd.Function`` has two static methods. ``forward`` computes, and ``backward`` says how
# the gradient flows. Here it calls ``apply`` again rather than ``bare``, so that a gradient of the
# gradient is recorded, too.


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
# ``torch.library`` turns a function into an *operator*, which PyTorch knows by a name.
# ``torch.compile`` puts a call of that name into its graph without looking inside. For that it has
# to know the shape and dtype of the result, and the *fake* version tells it, without computing
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
# ``triton_op`` is the same for functions that launch Triton kernels, but lets the compiler look
# inside. It sees the allocation and the launch, which ``wrap_triton`` marks. A fake version is not
# needed, because the compiler runs the function itself with fake tensors. But PyTorch 2.11 can't
# compile a launch with an integer of more than 31 bits. So ``numbers`` makes the threshold a signed
# number, and compiling ``traced`` with a large seed fails.


@torch.library.triton_op("operators_lesson::traced", mutates_args=())
def traced(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    kernel = torch.library.wrap_triton(seeded_dropout4x_kernel)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(x.numel(), 1024),)](y, x, *numbers(x, p, seed))
    return y


traced.register_autograd(
    lambda ctx, gradient: (traced(gradient, ctx.p, ctx.seed), None, None),
    setup_context=keep_p_and_seed,
)

# %%
# ``custom_op`` and ``triton_op`` fill in a table from which PyTorch's dispatcher takes its
# functions: one for each device ("CUDA" stands for AMD's GPUs, too), one for shapes ("Meta"), one
# for autograd. With ``torch.library.Library`` you fill it in yourself, and skip the checks that the
# two make on every call.

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
# The best of two
# ---------------
#
# An operator's name is useful to a compiler, and a program that is not compiled pays for it on
# every call. So the lessons take a ``Function``, which is cheap, and hand the compiler the
# operator: ``is_compiling`` is true while ``torch.compile`` or ``torch.export`` traces the line,
# and false otherwise. The operator needs no gradient of its own, because the ``Function`` has it.
#
# This ``Function`` has a third method, ``setup_context``, which keeps what ``backward`` needs. With
# it, ``torch.func.grad`` works as well. But then ``Both.apply`` is slow: it looks up the names of
# ``forward``'s arguments on every call. The ``apply`` that ``torch.autograd.Function`` itself
# inherits skips this lookup. It is enough unless a compiler or a transform of ``torch.func`` is at
# work. (This goes below PyTorch's public interface, so test it with each new version.)


class Both(torch.autograd.Function):
    @staticmethod
    def forward(x, p, seed):
        return (custom if torch.compiler.is_compiling() else bare)(x, p, seed)

    setup_context = staticmethod(keep_p_and_seed)

    @staticmethod
    def backward(ctx, gradient):
        return both(gradient, ctx.p, ctx.seed), None, None


quick_apply = super(torch.autograd.Function, Both).apply


def both(*arguments):
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Both.apply(*arguments)
    return quick_apply(*arguments)


WAYS = {
    "bare": bare,
    "Function": Function.apply,
    "custom_op": custom,
    "triton_op": traced,
    "Library": listed,
    "both": both,
}

# %%
# .. image:: /_static/operator_layers.svg
#    :alt: Six columns, one for each way to call the kernel. A bare launch goes straight to the kernel. Function adds autograd. custom_op, triton_op and Library go through PyTorch's dispatcher, then autograd. The last, both, goes through autograd to the kernel, and through the dispatcher only while torch.compile traces it.
#
# What works?
# -----------
#
# Try it. Each function takes one of the ways as ``call`` and uses it. Most compare the result with
# the bare launch. ``fullgraph=True`` turns a graph break into an error.


def gradient(call):
    x = torch.ones(99, device=DEVICE, requires_grad=True)
    (found,) = torch.autograd.grad(call(x, 0.5, 7).sum(), x)
    return torch.equal(found, bare(torch.ones(99, device=DEVICE), 0.5, 7))


def second_gradient(call):
    x = torch.randn(5, device=DEVICE, dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradgradcheck(lambda x: call(x, 0.5, 7), x)


def torch_func(call):
    x = torch.ones(99, device=DEVICE)
    found = torch.func.grad(lambda x: call(x, 0.5, 7).sum())(x)
    return torch.equal(found, bare(x, 0.5, 7))


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


def passes_opcheck(call):
    operator = custom if call is both else call  # which both uses when compiled
    x = torch.ones(99, device=DEVICE, requires_grad=True)
    return bool(torch.library.opcheck(operator, (x, 0.5, 7)))


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


CHECKS = [gradient, second_gradient, torch_func, forward_mode, passes_opcheck]
CHECKS += [compiled, exported, under_vmap] + ([] if INTERPRET else [captured])


def outcome(check, call):
    """``yes``, ``NO`` for a silently wrong result, or ``error``."""
    try:
        return "yes" if check(call) else "NO"
    except Exception:
        return "error"


if __name__ == "__main__":
    import logging
    import warnings
    from tabulate import tabulate

    logging.disable()  # the compiler's messages: some checks are meant to fail
    rows = []
    for check in CHECKS:
        with warnings.catch_warnings(action="ignore"):
            found = [outcome(check, call) for call in WAYS.values()]
        rows.append([check.__name__.replace("_", " "), *found])
    logging.disable(logging.NOTSET)
    print(tabulate(rows, ["does it work?", *WAYS]))

# %%
# Look for ``NO`` first. An error can be read and mended; a silently wrong result is found months
# later. Forward mode computes derivatives together with the function, from inputs to outputs. The
# bare launch and the three ways through the dispatcher lose them silently. (``register_autograd``
# is for the backward direction only.) A ``Function`` without a method ``jvp`` raises an error. (The
# bare launch raises one in the row "gradient", because nothing else there requires a gradient. In a
# network with other layers it would be silent.)
#
# ``torch.func.grad`` works only for the ``Function`` with ``setup_context``. ``vmap`` works for the
# three operators because PyTorch falls back to a loop over the rows. The loop is slow, and every row gets the same
# mask. A ``Function`` would need a method ``vmap`` that says what is meant.
#
# For ``bare``, ``Function`` and ``triton_op`` the compiler looks at the launch itself. That needs a
# GPU: in Triton's interpreter a kernel is ordinary Python on NumPy arrays, and the compiler gives
# up. On a GPU it depends on PyTorch's version: in the first two, 2.11 breaks the graph at
# ``device_of``. ``custom_op``, ``Library`` and ``both`` hide the launch behind a name, and work in
# each case.
#
# ``opcheck`` is PyTorch's own checker, for operators only. It tests that an operator changes none of
# its inputs, that the fake version agrees with the real one, and that the compiler understands the
# gradient. Run it on each operator that you register.
#
# What does a call cost?
# ----------------------
#
# The CPU asks the GPU to run a kernel, and goes on without waiting for it. If the CPU takes longer
# to ask than the GPU takes to run, the GPU waits: the program is *CPU-bound*. So call a way many
# times in a row, and let a clock run until the GPU is done. The limit, "the GPU alone", is the
# kernel's time from ``do_bench``.


def microseconds(call, x):
    """For each of many calls in a row."""
    import timeit

    def calls():
        for _ in range(100):
            call(x, 0.5, 7)
        torch.accelerator.synchronize()

    calls()
    return min(timeit.repeat(calls, number=1, repeat=7)) / 100 * 1e6


def torch_dropout(x, p, seed):
    return torch.nn.functional.dropout(x, p)


LINES = {"both": both, "bare": bare, "custom_op": custom, "F.dropout": torch_dropout}


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_elements"], x_vals=[2**i for i in range(10, 29, 2)], x_log=True, y_log=True,
        line_arg="line", line_vals=[*LINES, "GPU"], line_names=[*LINES, "the GPU alone"],
        styles=[("#d55e00", "-"), ("#d55e00", ":"), ("#cc79a7", "-"), ("#0072b2", "-"),
                ("#555555", "--")],
        xlabel=f"elements, float32\n{MACHINE}", ylabel="µs",
        plot_name="call-cost", args={},
    )
)  # fmt: skip
def benchmark(n_elements, line):
    x = torch.ones(n_elements, device=DEVICE)
    if line != "GPU":
        return microseconds(LINES[line], x)
    return 1000 * triton.testing.do_bench(lambda: bare(x, 0.5, 7), return_mode="median")


if __name__ == "__main__" and not INTERPRET:
    costs = benchmark.run(show_plots=True, return_df=True)
    calls = {"F.dropout": torch_dropout, **WAYS, "Both.apply": Both.apply}
    rows = []
    for name, call in calls.items():
        x = torch.ones(1024, device=DEVICE)
        plain = microseconds(call, x)
        recorded = "" if name == "bare" else microseconds(call, x.requires_grad_())
        rows.append([name, plain, recorded])
    headers = ["microseconds, 1024 elements", "no gradient", "with a gradient"]
    print(tabulate(rows, headers, floatfmt=".0f"))

# %%
# On the left of the figure the lines are level: that is the CPU's time. On the right the GPU takes
# longer, so our three ways meet, and the price of a call no longer matters.
#
# In the table, the difference between a row and ``bare`` is the price of that way. A ``Function``
# adds little, and so does ``both``; ``Both.apply`` shows what the lookup of names would cost. The
# three operators go through PyTorch's dispatcher and back into Python, and with a gradient several
# times. ``F.dropout`` is all C++, and a launch from Python can't be as cheap. These are the times
# of one CPU: on a slower or a busy one they grow.
#
# If that matters in your program, three things help: larger tensors, ``torch.compile``, and a CUDA
# graph, which launches many kernels at once.
#
# What the compiler makes of it
# -----------------------------
#
# In ``call(2 * x) + 1`` the compiler can fuse PyTorch's own dropout with the multiplication and the
# addition. It can't change what is inside your kernel, so it launches one kernel before yours and
# one after. Count them:

if __name__ == "__main__" and not INTERPRET:
    from torch.profiler import ProfilerActivity, profile

    for name in ("F.dropout", "custom_op", "triton_op", "both"):
        torch.compiler.reset()
        f = torch.compile(
            lambda x, call=calls[name]: call(2 * x, 0.5, 7) + 1, dynamic=False
        )
        x = torch.ones(2**20, device=DEVICE)
        try:
            f(x), f(x)
        except Exception as error:
            print(f"{name}: not compiled, {type(error).__name__}")
            continue
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
            f(x)
            torch.cuda.synchronize()
        kernels = [e for e in trace.events() if "triton" in e.name or "kernel" in e.name]
        print(f"{name}: {len(kernels)} kernels")

# %%
# Each extra kernel is a trip to memory and back. Between element-wise operators on large tensors
# these trips can cost more than a better kernel saves. Then put these operators into your kernel.
#
# Which way when
# --------------
#
# - **For yourself, not compiled:** ``autograd.Function``. It takes the least code, and a call costs
#   little.
# - **For a project that others compile or export:** a ``Function`` with a ``custom_op`` for the
#   compiler, as in ``both``. The lessons of this course do this.
# - **If others need the operator's name**, for selective checkpointing, another device or a subclass
#   of ``torch.Tensor``: ``custom_op``, or ``Library`` if its cost is too high. Neither has forward
#   mode: make sure that nobody needs it.
# - **If the compiler should see the launch:** ``triton_op``, provided that all who use it have a GPU.
#
# Take it home
# ------------
#
# To use a function of this course in a project of your own:
#
# 1. Copy the lesson's file into your package, together with the licence (MIT). Importing it defines
#    and registers functions, and runs no kernel.
# 2. Call the public function, the one under *As a public function*. It checks its arguments and takes
#    any strides. It launches on the GPU that holds its input and on your current stream.
# 3. Change the ``fast_and_right`` in the operators' names to the name of your package, because a name
#    can be registered only once in a process.
# 4. Copy the lesson's tests, too. They compare with float64 and try the shapes that break kernels.
#
# Exercises
# ---------
#
# 1. Give ``Both`` the method ``jvp``, so that forward mode works. Which check fails now?
# 2. In ``gradient``, the incoming gradient is an expanded 1. Write a check with a transposed
#    gradient as well. Which line of ``bare`` makes it right?
#
# .. note::
#    Try it first.
#
#    1. Dropout is linear in x, so its derivative in a direction is dropout of that direction, with
#       the same seed. ``forward_mode`` passes then, and ``compiled`` fails: the compiler refuses a
#       ``Function`` with a ``jvp``, at least up to PyTorch 2.13. Training is compiled more often than
#       it needs forward mode, so the lessons leave ``jvp`` out.
#
#       .. code-block:: python
#
#          class WithForwardMode(Both):
#              @staticmethod
#              def jvp(ctx, tangent, *_):
#                  return bare(tangent, ctx.p, ctx.seed)
#
#    2. ``x.contiguous()``: the gradient becomes the ``x`` of the backward launch. Without the line
#       the kernel would take the elements in the order in which they lie in memory, and each would
#       get another one's decision.
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
