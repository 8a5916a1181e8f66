"""
.. _baseline dropout:

Dropout with a mask
===================

You write dropout the textbook way, with a stored mask that says which elements are dropped, and
add up what the mask costs. Dropout sets random elements of a tensor to zero while a network trains,
and its mask has as many elements as the tensor. The next lesson, :ref:`seeded dropout`, shows how
to do without the mask.

You will learn

- why the elements that stay are scaled, and by how much;
- how a Triton kernel combines two tensors element by element, whatever their size;
- what a mask costs in memory and in bytes moved, and why it makes a computation hard to repeat.

Needs: PyTorch, and :ref:`fused softmax`.
"""

# %%
# Setting up
# ----------
#
# The same lines start every lesson: with no GPU, Triton's interpreter runs the kernels on the CPU.
# :ref:`fused softmax` explains them.

# sphinx_gallery_thumbnail_path = '_static/dropout_mask.svg'
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
# Why scale what stays
# --------------------
#
# A network that trains with dropout can't rely on any single unit, because that unit may be gone
# in the next step. It has to spread what it knows, and overfits less (Srivastava et al., 2014).
# With probability :math:`p` an element is dropped; otherwise it is kept and divided by
# :math:`1 - p`:
#
# .. math:: y_{i} = \frac{k_{i}\, x_{i}}{1 - p}, \qquad k_{i} = 0 \text{ with probability } p, \text{ else } 1
#
# The division keeps the sums right. On average :math:`k_{i}` is :math:`1 - p`, so on average
# :math:`y_{i}` is :math:`x_{i}`: the next layer sees inputs of the usual size while it trains, and
# at test time dropout is simply left out.
#
# .. image:: /_static/dropout_mask.svg
#    :alt: A row of ten inputs, below it a mask of zeros and ones, below it the output: zero under each zero of the mask, the input doubled under each one.
#
# The kernel
# ----------
#
# A program handles ``BLOCK`` consecutive elements. The last program may reach past the end of the
# tensor, so loads and stores get a mask, ``inside``. Don't confuse it with dropout's mask, which is
# a tensor of its own. The loads have no ``other``, so what they return for elements past the end is
# undefined, but those elements are never stored.
#
# ``tl.where`` chooses between the scaled element and 0. Multiplying by the mask would be wrong: an
# infinite element times 0 is NaN, and a dropped element should become 0 whatever it was.


@triton.jit
def dropout_kernel(
    y_ptr, x_ptr, x_keep_ptr, n_elements, scale: tl.float64, BLOCK: tl.constexpr
):
    # In 64 bits, because a tensor of more than 2^31 elements has positions that 32 can't hold.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=inside)
    x_keep = tl.load(x_keep_ptr + offsets, mask=inside)
    # Unless annotated, a Python float arrives as float32, too coarse for float64. All other
    # dtypes take float32, in which the product is computed, too.
    if x.dtype != tl.float64:
        scale = tl.cast(scale, tl.float32)
    tl.store(y_ptr + offsets, tl.where(x_keep != 0, x * scale, 0.0), mask=inside)


# %%
# The launch starts one program for every 1024 elements.


def launch_dropout(x, x_keep, p):
    """Drop where ``x_keep`` is 0, for contiguous tensors and p < 1."""
    y = torch.empty_like(x)
    BLOCK = 1024
    grid = (triton.cdiv(x.numel(), BLOCK),)
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        dropout_kernel[grid](y, x, x_keep, x.numel(), 1 / (1 - p), BLOCK)
    return y


# %%
# Ten elements
# ------------
#
# The numbers are drawn on the CPU, so that this table is the same on every machine.

if __name__ == "__main__":
    from tabulate import tabulate

    torch.manual_seed(0)
    p = 0.5
    x = torch.randn(10)
    x_keep = torch.rand(10) > p
    output = launch_dropout(x.to(DEVICE), x_keep.to(DEVICE), p)
    table = {
        "input": x.tolist(),
        "keep mask": x_keep.int().tolist(),
        "output": output.tolist(),
    }
    print(tabulate(table, headers="keys", floatfmt=".4f"))

# %%
# Where the mask is 1 the output is twice the input, because :math:`1 / (1 - p)` is 2.
#
# Is it right?
# ------------
#
# Try an odd number of elements and masks of several dtypes, and drop an infinity and a NaN. The
# reference is computed in float64.

if __name__ == "__main__":
    x = torch.randn(53 * 77, device=DEVICE)
    x[0], x[1] = float("inf"), float("nan")
    x_keep = torch.rand(53 * 77, device=DEVICE) > 0.1
    x_keep[:2] = False
    expected = torch.where(x_keep, x.double() / (1 - 0.1), 0.0).float()
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        torch.testing.assert_close(launch_dropout(x, x_keep.to(dtype), 0.1), expected)
    print(f"{x.numel()} elements agree, {(~x_keep).sum()} of them dropped")

# %%
# What the mask costs
# -------------------
#
# **Memory.** The backward pass multiplies the incoming gradient by the same mask, so the mask is
# kept from the forward pass until then. Here is how much that is for the activations of one layer:

if __name__ == "__main__":
    # A tensor on the device "meta" has a shape, but no data.
    activations = torch.empty(8, 2048, 4096, dtype=torch.bfloat16, device="meta")
    rows = [["the activations themselves", "bfloat16", activations.nbytes / 2**20]]
    for dtype in (torch.bool, torch.int32):
        mask = activations.to(dtype)
        rows.append(
            ["their mask", str(dtype).removeprefix("torch."), mask.nbytes / 2**20]
        )
    print(tabulate(rows, headers=["", "dtype", "MiB"], floatfmt=".0f"))

# %%
# An int32 mask is twice as large as the activations that it masks. Even PyTorch's mask, which has a
# byte for each element, is half as large as they are. Of the 8 or 32 bits for each element, one
# carries information.
#
# **Bytes moved.** Dropout reads :math:`x` and writes :math:`y`, and it reads the mask as well.
# Predict before you look: what share of the copy's speed should this kernel reach for a large
# tensor in float32, with a bool mask and with an int32 mask? And what share should the two PyTorch
# operators in ``x * x_keep / (1 - p)`` reach? As before, the scale counts only the bytes that must
# move, :math:`x` and :math:`y`, and the copy is the limit.


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_elements"],
        x_vals=[2**i for i in range(12, 28)],
        x_log=True,
        line_arg="implementation",
        line_vals=["bool", "int32", "torch", "copy"],
        line_names=[
            "this kernel, bool mask",
            "this kernel, int32 mask",
            "x * x_keep / (1 - p)",
            "copy",
        ],
        styles=[
            ("#d55e00", "-"),
            ("#d55e00", ":"),
            ("#cc79a7", "-"),
            ("#555555", "--"),
        ],
        xlabel=f"elements, float32\n{MACHINE}",
        ylabel="GB/s",
        plot_name="baseline-dropout",
        args={"p": 0.5},
    )
)
def benchmark(n_elements, p, implementation):
    x = torch.randn(n_elements, device=DEVICE)
    x_keep = torch.rand(n_elements, device=DEVICE) > p
    x_keep_int32 = x_keep.int()
    run = {
        "bool": lambda: launch_dropout(x, x_keep, p),
        "int32": lambda: launch_dropout(x, x_keep_int32, p),
        "torch": lambda: x * x_keep / (1 - p),
        "copy": lambda: x.clone(),
    }[implementation]
    milliseconds = triton.testing.do_bench(run, return_mode="median")
    return 2 * x.nbytes / milliseconds / 1e6  # bytes per ms, as GB/s


if __name__ == "__main__" and not INTERPRET:
    speed = benchmark.run(show_plots=True, return_df=True)
    layout = {"floatfmt": ".0f", "showindex": False, "maxheadercolwidths": 14}
    print(tabulate(speed[::3], "keys", **layout))

    small, large = speed.iloc[0], speed.iloc[-1]
    rows = []
    for i, n_bytes in enumerate([9, 12, 17, 8], start=1):  # moved for each element
        microseconds = 8 * small.iloc[0] / small.iloc[i] / 1e3  # bytes / (GB/s) are ns
        name, share = (
            speed.columns[i].removesuffix(" (GB/s)"),
            large.iloc[i] / large.iloc[-1],
        )
        rows.append([name, 8 / n_bytes, share, microseconds])
    n_small, n_large = f"{small.iloc[0]:.0f} elements", f"{large.iloc[0]:.0f} elements"
    headers = ["", "share of the copy, predicted", f"measured, {n_large}"]
    headers += [f"microseconds, {n_small}"]
    layout = {"floatfmt": ("", ".0%", ".0%", ".1f"), "maxheadercolwidths": 18}
    print("\n" + tabulate(rows, headers, **layout))

    x = torch.randn(2**27, device=DEVICE)
    x_keep = x > 0
    copy = triton.testing.do_bench(x.clone, return_mode="median") / 8
    for name, run, n_bytes in [
        ("x * x_keep", lambda: x * x_keep, 9),
        ("x / (1 - p)", lambda: x / (1 - 0.5), 8),
    ]:
        time = triton.testing.do_bench(run, return_mode="median") / n_bytes
        print(f"{name:11} alone: its bytes move at {copy / time:.0%} of the copy's speed")

# %%
# Dropout without a mask moves 8 bytes for each element in float32. A bool mask adds 1, an int32
# mask adds 4, and the two operators move 17 in all, because the product goes to memory and comes
# back. So the kernel should reach 8/9 or 8/12 of the copy's speed, and the operators 8/17.
#
# Compare the two columns of the second table. For our kernel the count is confirmed with both
# masks: a large tensor takes as long as its bytes take. The operators stay below their count, so
# bytes do not explain all of their time. The two lines below the table time each operator alone. If
# a line is well below 100%, that operator spends time on something other than moving bytes.
# Counting does not tell you on what; :ref:`inside a kernel` shows how to look further.
#
# For small tensors the count explains nothing. At the smallest size the bytes would take a small
# part of a microsecond, but each version takes several. That is the time for starting a kernel and
# ending it. The two operators take about twice as long as the copy, because they are two kernels.
#
# Besides, somebody had to draw the mask and write it to memory. This figure does not count that.
#
# **Trouble with repetition.** Drawing the mask changes the state of a random number generator. If
# the computation is run again, it draws another mask, unless somebody saved that state and put it
# back:

if __name__ == "__main__":
    first = torch.rand(10) > 0.5
    again = torch.rand(10) > 0.5
    print("the same mask twice?", torch.equal(first, again))

# %%
# Activation checkpointing runs parts of the forward pass a second time, to save memory. If dropout
# then draws another mask, the gradients are wrong, and there is no error. That is why
# ``torch.utils.checkpoint`` saves the generator's state each time, and puts it back. The lesson
# :ref:`checkpointed dropout` shows the failure, and a dropout that cannot fail in this way.
#
# All three costs have one cause: the mask is *data*, which has to be stored and kept. In the next
# lesson, :ref:`seeded dropout`, a function computes it whenever it is needed.
#
# As a public function
# --------------------
#
# ``dropout`` takes tensors of any shape and strides, and says what is wrong with other arguments.
# It has no gradient; the second exercise adds it.

import numbers

MASK_DTYPES = [torch.bool]
MASK_DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64]
MASK_DTYPES += [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


def dropout(x, x_keep, p):
    """Drop elements of ``x`` where ``x_keep`` is 0; scale the others by 1 / (1 - p).

    Parameters
    ----------
    x : torch.Tensor
        Any shape and strides, on the GPU (on the CPU when Triton interprets); float16,
        bfloat16, float32 or float64.
    x_keep : torch.Tensor
        The mask: same shape and device as ``x``; bool or an integer dtype of 8 to 64
        bits. 0 drops, anything else keeps.
    p : float
        The probability of dropping that the mask was drawn with, in [0, 1]. With 1 the
        result is 0 everywhere, whatever the mask.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. A dropped inf or NaN becomes 0.

    Raises
    ------
    TypeError
        If an argument has another type or dtype.
    ValueError
        If shapes or devices do not match, ``p`` is outside [0, 1], or ``x`` requires a
        gradient, which this kernel does not compute.

    References
    ----------
    Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting", 2014.
    """
    for name, t in [("x", x), ("x_keep", x_keep)]:
        if not isinstance(t, torch.Tensor) or t.is_nested or t.layout != torch.strided:
            got = getattr(t, "layout", type(t).__name__)
            raise TypeError(f"{name} must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x_keep.dtype not in MASK_DTYPES:
        raise TypeError(f"x_keep must be bool or an integer dtype, got {x_keep.dtype}")
    if not isinstance(p, numbers.Real):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if x_keep.shape != x.shape:
        raise ValueError(
            f"x_keep must have x's shape, {tuple(x.shape)}, got {tuple(x_keep.shape)}"
        )
    if x.device.type != DEVICE or x_keep.device != x.device:
        raise ValueError(
            f"x and x_keep must be on one device of type {DEVICE!r}, "
            f"got {x.device} and {x_keep.device}"
        )
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent  # set in forward mode only
    if (x.requires_grad and torch.is_grad_enabled()) or tangent is not None:
        raise ValueError(
            "x requires a gradient, which dropout does not compute; pass x.detach()"
        )
    p = float(p)
    if x.numel() == 0 or p == 1:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)

    x = x.resolve_neg().contiguous()  # apply a negation that PyTorch has put off
    return launch_dropout(x, x_keep.contiguous(), p)


if __name__ == "__main__":
    x, x_keep = torch.randn(77, 53, device=DEVICE).T, torch.rand(53, 77) > 0.1
    x_keep = x_keep.to(DEVICE)
    y = dropout(x, x_keep, 0.1)
    torch.testing.assert_close(y, torch.where(x_keep, x / (1 - 0.1), 0.0))
    print("a transposed tensor agrees")

# %%
# Exercises
# ---------
#
# 1. Store the mask as bits, for 8 elements in each byte. What share of the copy's speed should the
#    kernel reach then, and what does it reach?
# 2. Write the backward pass. Which kernel do you need for it?
#
# .. note::
#    Try it first.
#
#    1. For an element of float32, 8 bytes of x and y move, and an eighth of a byte of the mask. So
#       the limit is 64/65 of the copy's speed. Eight neighbours load the same byte, but memory
#       delivers it once. Make ``bit_dropout`` a line of the benchmark: it should come closer to the
#       copy than the kernel with the bool mask.
#
#       .. code-block:: python
#
#          def pack(x_keep):
#              """A bit for each element of a mask, in uint8; the first is the lowest."""
#              keep = torch.nn.functional.pad(x_keep.flatten() != 0, (0, -x_keep.numel() % 8))
#              bits = 2 ** torch.arange(8, device=keep.device)
#              return (keep.view(-1, 8) * bits).sum(1).to(torch.uint8)
#
#
#          @triton.jit
#          def bit_dropout_kernel(y_ptr, x_ptr, bits_ptr, n_elements, scale, BLOCK: tl.constexpr):
#              offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
#              inside = offsets < n_elements
#              x = tl.load(x_ptr + offsets, mask=inside)
#              byte = tl.load(bits_ptr + offsets // 8, mask=inside).to(tl.int32)
#              keep = (byte >> (offsets % 8).to(tl.int32)) & 1
#              tl.store(y_ptr + offsets, tl.where(keep != 0, x * scale, 0.0), mask=inside)
#
#
#          def bit_dropout(x, bits, p):
#              """As dropout, for a contiguous float32 tensor and p < 1."""
#              y = torch.empty_like(x)
#              grid = (triton.cdiv(x.numel(), 1024),)
#              bit_dropout_kernel[grid](y, x, bits, x.numel(), 1 / (1 - p), 1024)
#              return y
#
#    2. The kernel that you have is enough. Dropout multiplies each element by 0 or by 1 / (1 - p),
#       so the gradient is multiplied by the same. Run the kernel on the gradient, with the mask
#       kept from the forward pass.
#
#       .. code-block:: python
#
#          class MaskedDropout(torch.autograd.Function):
#              @staticmethod
#              def forward(ctx, x, x_keep, p):
#                  ctx.save_for_backward(x_keep)
#                  ctx.p = p
#                  return dropout(x, x_keep, p)
#
#              @staticmethod
#              def backward(ctx, gradient):
#                  (x_keep,) = ctx.saved_tensors
#                  return dropout(gradient, x_keep, ctx.p), None, None
#
#
#          y = MaskedDropout.apply(x.requires_grad_(), x_keep, 0.1)
#
# References
# ----------
#
# - N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever and R. Salakhutdinov, `Dropout: a simple way to prevent neural networks from overfitting <https://jmlr.org/papers/v15/srivastava14a.html>`_,
#   2014.
