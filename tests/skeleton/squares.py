"""
.. _squares:

Squares
=======

You write a kernel that squares every element of a tensor, and you see that it is as fast as a
copy. That is little, but it has all the parts of a lesson. Replace them one by one.

You will learn

- what the first thing is that a reader can do afterwards;
- what the second is;
- and the third.

Needs: PyTorch, and :ref:`fused softmax`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/favicon.svg'
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
# Each program squares a block
# ----------------------------
#
# Here a drawing shows the idea. Its alternative text says what one would see.
#
# .. image:: /_static/favicon.svg
#    :alt: The logo of the site, where the lesson's drawing will be.
#    :width: 60
#
# What has to move
# ----------------
#
# To square n elements, a kernel reads n elements and writes n. A copy does the same, so a copy is
# the limit.
#
# The kernel
# ----------
#
# A program works on ``BLOCK`` elements. The offsets are computed with 64 bits, or they would wrap
# around at 2^31 elements.


@triton.jit
def to_arithmetic(x):
    """float16 and bfloat16 are too coarse to compute with."""
    return x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x


@triton.jit
def square_kernel(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = to_arithmetic(tl.load(x_ptr + offsets, mask=mask))
    tl.store(y_ptr + offsets, x * x, mask=mask)


# %%
# Launch it
# ---------
#
# The kernel walks through memory, so the input is copied if its elements do not lie one after the
# other.


def launch_square(x: torch.Tensor) -> torch.Tensor:
    x = x.resolve_neg().contiguous()
    y = torch.empty_like(x)
    if x.numel() > 0:
        with torch.cuda.device_of(x):  # if there are several GPUs
            square_kernel[(triton.cdiv(x.numel(), 1024),)](y, x, x.numel(), BLOCK=1024)
    return y


# %%
# Is it right?
# ------------
#
# 1823 times 781 elements fill no whole number of blocks.

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(1823, 781, device=DEVICE)
    torch.testing.assert_close(launch_square(x), x * x, rtol=0, atol=0)
    print(f"{x.numel()} squares agree with PyTorch's, bit for bit")

# %%
# Is it fast?
# -----------
#
# All lines move the same bytes in the same run: this kernel, PyTorch's operator, and a copy.

LINES = {"square": ("#d55e00", "-"), "x * x": ("#0072b2", "-"), "copy": ("#555555", "--")}


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n"], x_log=True, x_vals=[2**e for e in range(16, 29, 2)],
        line_arg="line", line_vals=list(LINES), line_names=list(LINES),
        styles=list(LINES.values()),
        xlabel=f"elements, float32\n{MACHINE}", ylabel="GB/s",
        plot_name="squares", args={},
    )
)  # fmt: skip
def benchmark(n, line):
    x = torch.randn(n, device=DEVICE)
    run = {"square": launch_square, "x * x": lambda x: x * x, "copy": torch.clone}[line]
    milliseconds = triton.testing.do_bench(lambda: run(x), return_mode="median")
    return 2 * x.nbytes / milliseconds / 1e6


if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    speed = benchmark.run(show_plots=True, return_df=True)
    print(tabulate(speed, "keys", floatfmt=".0f", showindex=False, maxheadercolwidths=14))

# %%
# Here you say what the figure shows, also where it is not what you hoped for, in sentences that
# hold on every GPU. Numbers about speed come from the run or from the record.
#
# As a public function
# --------------------
#
# One late cell has what a user of the function needs and a reader of the kernel does not: checks,
# documentation, the gradient, and the operator that ``torch.compile`` takes. :ref:`operators`
# explains it.

square_op = torch.library.custom_op(
    "fast_and_right::square", launch_square, mutates_args=()
)
square_op.register_fake(lambda x: x.new_empty(x.shape))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return square_op(x) if torch.compiler.is_compiling() else launch_square(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


def square(x):
    """The square of each element of ``x``.

    ``x`` has any shape and any strides, a floating dtype, and is on the GPU (on the CPU when
    Triton interprets). Differentiable, also twice, in reverse mode; works under
    ``torch.compile``. Another dtype raises TypeError; another device raises ValueError.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"x must be a tensor of floating dtype, got {got}")
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    return Square.apply(x)


if __name__ == "__main__":
    x = torch.randn(3, 7, device=DEVICE, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(square, x)
    print("the gradient agrees with finite differences")

# %%
# Exercises
# ---------
#
# 1. Turn the kernel into one for the third power.
#
# .. note::
#    Try it first.
#
#    1. One multiplication more, and the same bytes: the figure stays as it is.
#
#       .. code-block:: diff
#
#          -    tl.store(y_ptr + offsets, x * x, mask=mask)
#          +    tl.store(y_ptr + offsets, x * x * x, mask=mask)
#
# References
# ----------
#
# - Triton's documentation, `triton.language <https://triton-lang.org/main/python-api/triton.language.html>`_.
