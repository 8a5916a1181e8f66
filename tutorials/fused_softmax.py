"""
.. _fused softmax:

Fused softmax
=============

You write a GPU kernel for softmax that reads each number once and writes each result once, where
five PyTorch operators go to memory again and again. You count the bytes first, so that you know
how fast it could be. Then you check it against PyTorch, and measure it beside a plain copy of the
same bytes, which is about as fast as the memory allows. No CUDA is needed.

You will learn

- how to count the bytes that an operation moves, and to read the count as a limit on its speed;
- how to write a kernel in Triton, also for rows whose length is not a power of two;
- how to check a kernel, and how to measure it so that the figure means something.

Needs: PyTorch.
"""

# %%
# Setting up
# ----------
#
# A *kernel* is a function that runs on the GPU, and *Triton* lets you write one in Python. If there
# is a GPU, Triton compiles the kernels for it. If there is none, Triton's *interpreter* runs the
# same kernels on the CPU, with NumPy. That is slow, but the results are the same up to rounding, so
# you can follow everything except the measurements on any computer with Linux.
#
# Every lesson starts with these lines. They set ``DEVICE``, where the tensors go, and
# ``INTERPRET``, true if there is no GPU. Triton reads ``TRITON_INTERPRET`` while it is imported, so
# the variable has to be set before. The code under ``if __name__ == "__main__":`` runs on this
# page, in the notebook and in the script, but not when you import a function of the lesson.

# sphinx_gallery_thumbnail_path = '_static/softmax_traffic.svg'
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
# Counting the bytes
# ------------------
#
# Softmax turns each row of a matrix into positive numbers that add up to one:
#
# .. math:: y_{j} = \frac{e^{x_{j} - m}}{\sum_{k} e^{x_{k} - m}}, \qquad m = \max_{k} x_{k}
#
# Subtracting the row's maximum :math:`m` does not change the result, because it scales the
# numerator and the denominator by the same factor. It keeps the exponentials from overflowing: in
# float32, ``exp(89)`` is already infinite.
#
# Here is softmax as five PyTorch operators. Each of them runs a kernel of its own, which reads its
# inputs from the GPU's memory and writes its result back there. The comments count the elements
# for a matrix of M rows and N columns.


def naive_softmax(x):
    """Softmax over the last dimension of ``x``, one PyTorch operator at a time."""
    x_max = torch.amax(x, dim=-1, keepdim=True)  # reads MN, writes M
    z = x - x_max  # reads MN + M, writes MN
    numerator = torch.exp(z)  # reads MN, writes MN
    denominator = torch.sum(numerator, dim=-1, keepdim=True)  # reads MN, writes M
    return numerator / denominator  # reads MN + M, writes MN
    # In total: reads 5MN + 2M, writes 3MN + 2M.


# %%
# The result only needs every element to be read once and written once: :math:`MN` in and
# :math:`MN` out. The five operators move :math:`8MN + 4M` elements, about four times as many. So a
# kernel that reads a row, computes everything on the chip, and writes the result should be about
# four times as fast, as long as the arithmetic takes less time than moving the bytes. Putting
# several operators into one kernel is called *fusion*.
#
# .. image:: /_static/softmax_traffic.svg
#    :alt: Above: five operators, each with arrows to and from the GPU's memory, eight MN in all. Below: one fused kernel with one arrow in and one arrow out, two MN in all.
#
# Where the bytes are
# -------------------
#
# A GPU has a hundred or so small processors, called *multiprocessors*, and one large memory that
# they share. A multiprocessor runs many *threads* at the same time, and each thread keeps the
# values that it works on in *registers*. Reaching a register costs next to nothing. Reaching the
# memory takes hundreds of times as long, and all multiprocessors together can move only so many
# bytes in a second. In between there are *caches*, which keep what was used last. The largest is
# *L2*. The threads of a multiprocessor exchange data through *shared memory*; Triton does that for
# you.
#
# .. image:: /_static/memory_hierarchy.svg
#    :alt: From top to bottom: registers, 256 KiB in each of 132 multiprocessors of an H100; shared memory and L1, 256 KiB in each; L2, 50 MiB for all of them; memory, 80 GB. The further down, the larger and the slower.
#
# You write a Triton kernel for one *program*. To *launch* the kernel is to start many programs,
# which the multiprocessors run side by side, in any order. Each program asks ``tl.program_id`` for
# its number, which tells it what part of the data is its own. In this kernel, program i computes
# row i. Triton divides the elements of the row among the threads for you.
#
# A row and its block
# -------------------
#
# A tensor that you pass to a kernel arrives as a *pointer*: the address of its first element. A
# pointer plus 3 is the address of the element three places further on. A program works on *blocks*
# of numbers. ``tl.arange(0, BLOCK)`` is the block 0, 1, ..., ``BLOCK - 1``, the numbers of the
# columns. We add them to ``x_ptr + row * x_row_stride``, the address at which the row begins:
# ``x_row_stride`` is the number of elements from one row to the next. That gives a block of
# addresses, one for each element of the row, and ``tl.load`` fetches what is stored there.
#
# The size of a block must be a power of two, but a row can have any length. So we take the next
# power of two, and a *mask* says which elements exist. ``tl.load`` does not read the others, and
# puts ``other`` in their place. Here that is ``-inf``. It does not change the maximum, and its
# exponential, 0, does not change the sum.
#
# .. image:: /_static/row_block.svg
#    :alt: A row of 5 elements in a block of 8. The mask is true for columns 0 to 4. The last three elements of the block are minus infinity and are neither read nor written.
#
# The kernel
# ----------


@triton.jit
def softmax_kernel(y_ptr, x_ptr, x_row_stride, n_cols, BLOCK: tl.constexpr):
    # A tensor can have more than 2^31 elements, so positions are computed in 64 bits.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=-float("inf"))
    # A sum in float16 or bfloat16 would lose too many digits.
    if x.dtype.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    numerator = tl.exp(x - tl.max(x, axis=0))
    denominator = tl.sum(numerator, axis=0)
    tl.store(y_ptr + row * n_cols + cols, numerator / denominator, mask=mask)


# %%
# These are the five steps of the naive version. But ``x``, ``numerator`` and ``denominator`` stay
# in registers, and only ``tl.load`` and ``tl.store`` go to memory. ``tl.store`` turns the numbers
# into the dtype of ``y``.
#
# - ``@triton.jit`` makes a kernel of the function. Triton compiles it when you first call it.
# - ``BLOCK`` is a ``tl.constexpr``: the compiler knows its value. For each new value Triton
#   compiles the kernel once more, and keeps the result.
# - The ``if`` is decided by the compiler as well, because it knows the dtype of ``x``. The
#   compiled kernel contains one of the two cases, and no test.
# - ``tl.exp`` is fast because it is approximate. Its last few bits may differ from those of a
#   carefully rounded exponential. The check below prints how much that changes the result. All
#   functions of ``tl`` are listed in Triton's documentation of `triton.language
#   <https://triton-lang.org/main/python-api/triton.language.html>`_.
#
# Launch it
# ---------
#
# ``softmax_kernel[grid](...)`` launches the kernel. The *grid* says how many programs to start;
# here it is one for each row. (A grid can have up to three dimensions. ``tl.program_id(0)`` asks
# for the number along the first.) The arguments follow as in any call, and ``num_warps`` says how
# many threads a program gets: a *warp* is a group of 32 threads, or 64 on some of AMD's GPUs.
#
# How many warps are right? Without ``num_warps`` a program gets four. With few warps, each thread
# holds many elements. Those that don't fit into its registers *spill*: they are stored in memory
# and read again. With many warps, each thread has little to do, and more time goes into combining
# the threads' results. A good start is 64 bytes of the row for each thread; :ref:`inside a kernel`
# tries the alternatives.


# The threads of a warp. No program has more than 1024 threads.
WARP = 32 if INTERPRET else triton.runtime.driver.active.get_current_target().warp_size


def launch_row_softmax(x):
    """Softmax of the rows of a matrix, each by a program of its own."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n_rows, n_cols = x.shape
    BLOCK = triton.next_power_of_2(n_cols)
    num_warps = min(max(BLOCK * x.element_size() // (WARP * 64), 1), 1024 // WARP)
    softmax_kernel[(n_rows,)](y, x, x.stride(0), n_cols, BLOCK, num_warps=num_warps)
    return y


# %%
# Is it right?
# ------------
#
# Choose a shape that a careless kernel gets wrong. 781 is not a power of two, so the mask matters.
#
# ``assert_close`` raises an error, and so stops this page from being built, if an element differs
# by more than rounding explains. By default it also accepts an absolute error of 1e-5, which is a
# lot for elements of about 1/781. With ``atol=0`` only the relative error counts. (For float16 and
# bfloat16, which round more, the defaults are larger.)

if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(1823, 781, device=DEVICE)
    y, reference = launch_row_softmax(x), torch.softmax(x, dim=-1)
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=0)

    exact = torch.softmax(x.double(), dim=-1)
    print(f"largest error of this kernel:   {(y - exact).abs().max():.1e}")
    print(f"largest error of torch.softmax: {(reference - exact).abs().max():.1e}")

# %%
# The errors are differences from softmax in float64. Both have the size of float32's rounding. On a
# GPU, ours includes the error of the approximate exponential. The interpreter uses NumPy's
# exponential.
#
# Is it fast?
# -----------
#
# It is easy to time a GPU wrongly. A launch returns before the kernel has run, the first call
# compiles, and data that was used a moment ago is still in a cache. ``triton.testing.do_bench``
# takes care of all three: it warms up, clears the L2 cache before each run, and lets the GPU itself
# measure the time. We use the median of many runs.
#
# ``perf_report`` turns a function into a figure: it calls it for each size and each line. The lines
# are this kernel, ``torch.softmax``, the naive version, the naive version as it is fused by
# TorchScript, PyTorch's older compiler, and a copy. The copy also reads and writes each element
# once, but computes nothing, so we use it as the limit. (This is a measured limit. The data sheet
# of an H100 promises 3.35 terabytes a second, which a copy does not reach.)
#
# The scale is in GB/s: the bytes that *must* move, :math:`2MN` elements, divided by the time. So a
# version that moves more bytes than it must is lower in the figure.

from functools import cache


@cache
def scripted_naive():
    """``naive_softmax`` as TorchScript, or None where PyTorch no longer has it."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that it is deprecated
            return torch.jit.script(naive_softmax)
    except (AttributeError, RuntimeError, NotImplementedError):
        print("This PyTorch has no TorchScript, so its line is left out.")


def speed_of(run, n_bytes):
    """GB/s of ``run()`` if it moved ``n_bytes``."""
    milliseconds = triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")
    return n_bytes / milliseconds / 1e6


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_cols"], x_vals=[128 * i for i in range(2, 100)],
        line_arg="line", line_vals=["fused", "torch", "jit", "eager", "copy"],
        line_names=["this kernel", "torch.softmax", "naive, torch.jit.script",
                    "naive, eager", "copy"],
        styles=[("#d55e00", "-"), ("#0072b2", "-"), ("#cc79a7", "-"), ("#cc79a7", ":"),
                ("#555555", "--")],
        xlabel=f"columns of 4096 rows, float32\n{MACHINE}", ylabel="GB/s",
        plot_name="softmax", args={"n_rows": 4096},
    )
)  # fmt: skip
def benchmark(n_rows, n_cols, line):
    x = torch.randn(n_rows, n_cols, device=DEVICE)
    run = {
        "fused": launch_row_softmax,
        "torch": lambda x: torch.softmax(x, dim=-1),
        "jit": scripted_naive() if line == "jit" else None,
        "eager": naive_softmax,
        "copy": torch.clone,
    }[line]
    return speed_of(lambda: run(x), 2 * x.nbytes) if run else float("nan")


# %%
# The interpreter's time says nothing about the kernel, so this runs on a GPU only.

if __name__ == "__main__" and not INTERPRET:
    from tabulate import tabulate

    layout = {"floatfmt": ".0f", "showindex": False, "maxheadercolwidths": 16}
    speed = benchmark.run(show_plots=True, return_df=True)
    print(tabulate(speed[speed.n_cols % 1536 == 0], "keys", **layout))
    n_cols, fused, torch_softmax, scripted, eager, copy = speed.iloc[-1]
    print(
        f"\nAt {n_cols:.0f} columns this kernel reaches {fused / copy:.0%} of the copy: "
        f"{fused / torch_softmax:.2f} times torch.softmax,\n"
        f"{fused / eager:.2f} times the naive version, {fused / scripted:.2f} times its TorchScript."
    )
    behind = speed[speed.iloc[:, 1] < 0.98 * speed.iloc[:, 2]]
    print(
        f"It is more than 2% behind torch.softmax at {len(behind)} of {len(speed)} widths."
    )

# %%
# "Eager" is the naive version as PyTorch runs it, one operator after another. It moves :math:`8MN`
# elements instead of :math:`2MN`, so the count predicts a quarter of the copy's speed. Wide rows
# reach about a fifth, so the count explains most of the time. TorchScript fuses some of the five
# operators, and is faster. The distance from our kernel up to the copy is all that a better kernel
# could still gain. (A line can lie a little above the copy, because PyTorch's copy is not perfect.)
#
# On the left of the figure all lines are low. The matrix is small there, and a kernel needs a few
# millionths of a second to start and to end, however little it moves. You will see this on the left
# of every figure. A program with many such kernels has another cost: the CPU often takes longer to
# launch a kernel than the GPU takes to run it, and then the GPU waits. The program is *CPU-bound*.
# ``do_bench`` does not show that, because the CPU launches your kernel while the GPU is still
# clearing the cache. :ref:`operators` measures it.
#
# Where it loses
# --------------
#
# The figure shows one dtype and a narrow range of widths. The next one adds bfloat16, which has
# half the bytes for each element, and goes from 256 to 131072 columns. The matrix always has 2^28
# elements, so no run is short. The scale is now the share of the copy's speed.


@triton.testing.perf_report(
    triton.testing.Benchmark(
        x_names=["n_cols"], x_log=True,
        x_vals=[256, 512, 1024, 2048, 4096, 5000, 8192, 16384, 32768, 65536, 131072],
        line_arg="dtype", line_vals=[torch.float32, torch.bfloat16],
        line_names=["float32", "bfloat16"], styles=[("#d55e00", "-"), ("#d55e00", ":")],
        xlabel=f"columns, one row a program\n{MACHINE}", ylabel="% of a copy",
        plot_name="softmax-row", args={"n_elements": 2**28},
    )
)  # fmt: skip
def row_benchmark(n_elements, n_cols, dtype):
    x = torch.randn(n_elements // n_cols, n_cols, device=DEVICE, dtype=dtype)
    copy = speed_of(lambda: x.clone(), 2 * x.nbytes)
    return 100 * speed_of(lambda: launch_row_softmax(x), 2 * x.nbytes) / copy


if __name__ == "__main__" and not INTERPRET:
    share = row_benchmark.run(show_plots=True, return_df=True)
    for dtype in (torch.float32, torch.bfloat16):
        spills = []
        for n in map(int, share.n_cols):
            x = torch.empty(n, device=DEVICE, dtype=dtype)
            block = triton.next_power_of_2(n)
            compiled = softmax_kernel[(1,)](x, x, n, n, block, num_warps=1024 // WARP)
            spills.append(compiled.n_spills)
        share[f"spills, {str(dtype)[6:]}"] = spills
    print(tabulate(share, "keys", **layout))

# %%
# Three things go wrong, and later lessons mend them.
#
# - **Narrow rows.** A row of 256 columns in bfloat16 has 512 bytes. A program that loads so little
#   spends much of its time on starting and ending. :ref:`softmax tiles` gives a program several
#   rows.
# - **Rows of unknown alignment.** A thread can load 16 bytes with one instruction, but only if the
#   compiler knows that they begin at a multiple of 16. For 5000 columns it does not know that,
#   because 5000 is not a multiple of 16, so each element is loaded by itself. :ref:`softmax tiles`
#   tells the compiler more.
# - **Wide rows.** The last columns of the table count the registers that each thread spills to
#   memory, with the 32 warps that wide rows get. A row of 65536 float32 numbers would take all of a
#   multiprocessor's 256 KiB of registers, and so would one in bfloat16, because the kernel widens
#   it to float32. :ref:`softmax slices` lets several programs share a row.
#
# As a public function
# --------------------
#
# The launch above takes a matrix in which the elements of a row are neighbours in memory. A
# function that others call should take any tensor, or say what is wrong with it. This one has no
# gradient; :ref:`softmax tiles` adds it.


def row_softmax(x):
    """Softmax over the last dimension, each row by a program of its own.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., columns), any strides, on the GPU (on the CPU when Triton
        interprets); float16, bfloat16, float32 or float64. Up to 2^17 columns.

    Returns
    -------
    torch.Tensor
        Contiguous, with the shape and dtype of ``x``. Sums are formed in float32
        (float64 for float64). As with ``torch.softmax``, a row that holds a NaN or
        +inf, or nothing but -inf, becomes NaN.

    Raises
    ------
    TypeError
        If ``x`` is not a tensor of one of these dtypes.
    ValueError
        If ``x`` has no dimension or too many columns, is on another device, or requires
        a gradient, which this kernel does not compute.
    """
    if not isinstance(x, torch.Tensor) or x.is_nested or x.layout != torch.strided:
        got = getattr(x, "layout", type(x).__name__)
        raise TypeError(f"x must be a dense tensor, not nested, got {got}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    if x.shape[-1] > 2**17:
        raise ValueError(
            f"x must have at most 2^17 columns, got {x.shape[-1]}; slice_softmax, of the "
            "lesson on rows that no program can hold, takes more"
        )
    if x.device.type != DEVICE:
        raise ValueError(f"x must be on device type {DEVICE!r}, got {x.device.type!r}")
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent  # set in forward mode only
    if (x.requires_grad and torch.is_grad_enabled()) or tangent is not None:
        raise ValueError(
            "x requires a gradient, which row_softmax does not compute; use tile_softmax, "
            "of the lesson on softmax in tiles, or pass x.detach()"
        )
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x.resolve_neg()  # apply a negation that PyTorch has put off, as in z.conj().imag
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    with torch.cuda.device_of(x):  # with several GPUs, launch on the one that holds x
        return launch_row_softmax(rows).view(x.shape)


# %%
# What happens to a row of nothing but ``-inf``? An attention mask that hides every key makes such
# rows. Their maximum is ``-inf``, and ``-inf - -inf`` is NaN, here as in PyTorch:

if __name__ == "__main__":
    no_choice = torch.full((1, 4), -float("inf"), device=DEVICE)
    print("a row of -inf here:    ", row_softmax(no_choice).tolist())
    print("a row of -inf in torch:", torch.softmax(no_choice, dim=-1).tolist())

# %%
# Exercises
# ---------
#
# 1. Write ``log_softmax``. Which of the kernel's values do you need for it? Check it against
#    ``torch.log_softmax`` on rows that hold 1e4 and -1e4.
# 2. Write the kernel for another row-wise operator on your own, root mean square normalization:
#    each row is divided by the square root of the mean of its squares plus 1e-6. How many elements
#    must it move, and how many does a version made of PyTorch operators move?
# 3. Remove ``other=-float("inf")`` and run the check with several widths. Where does it still pass?
#
# .. note::
#    Try it first.
#
#    1. You need the maximum m and the sum s: the logarithm of y is x - m - log(s). The logarithm of
#       the finished softmax would be wrong: in a row that holds 1e4, the softmax of -1e4 is rounded
#       to 0, and log(0) is -inf. (Like the launch above, this takes rows whose elements are
#       neighbours in memory.)
#
#       .. code-block:: python
#
#          @triton.jit
#          def log_softmax_kernel(y_ptr, x_ptr, x_row_stride, n_cols, BLOCK: tl.constexpr):
#              row = tl.program_id(0).to(tl.int64)
#              cols = tl.arange(0, BLOCK)
#              mask = cols < n_cols
#              x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=-float("inf"))
#              x = x.to(tl.float32)
#              x -= tl.max(x, axis=0)
#              y = x - tl.log(tl.sum(tl.exp(x), axis=0))
#              tl.store(y_ptr + row * n_cols + cols, y, mask=mask)
#
#
#          def log_softmax(x):
#              y = torch.empty_like(x)
#              BLOCK = triton.next_power_of_2(x.shape[1])
#              log_softmax_kernel[(len(x),)](y, x, x.stride(0), x.shape[1], BLOCK)
#              return y
#
#
#          x = torch.randn(5, 781, device=DEVICE)
#          x[:, 0], x[1:, 1] = -1e4, 1e4
#          torch.testing.assert_close(log_softmax(x), torch.log_softmax(x, dim=-1))
#
#    2. It must move 2MN elements, like softmax. With PyTorch,
#       ``x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()`` moves 2MN for the square, MN for
#       the mean and 2MN for the division, and a few times M: 2.5 times as many. In the kernel,
#       padding with 0 adds nothing to the sum, but the mean has to divide by the true number of
#       columns.
#
#       .. code-block:: python
#
#          @triton.jit
#          def rms_norm_kernel(y_ptr, x_ptr, x_row_stride, n_cols, eps, BLOCK: tl.constexpr):
#              row = tl.program_id(0).to(tl.int64)
#              cols = tl.arange(0, BLOCK)
#              mask = cols < n_cols
#              x = tl.load(x_ptr + row * x_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
#              y = x * tl.rsqrt(tl.sum(x * x, axis=0) / n_cols + eps)
#              tl.store(y_ptr + row * n_cols + cols, y, mask=mask)
#
#
#          def rms_norm(x, eps=1e-6):
#              y = torch.empty_like(x)
#              BLOCK = triton.next_power_of_2(x.shape[1])
#              rms_norm_kernel[(len(x),)](y, x, x.stride(0), x.shape[1], eps, BLOCK)
#              return y
#
#    3. At powers of two, where nothing is padded. At all others the padding has no defined value.
#       If it happens to be 0, each padded element adds exp(0 - m) to the sum. :ref:`debugging` does
#       this on purpose.
#
# References
# ----------
#
# - M. Milakov and N. Gimelshein, `Online normalizer calculation for softmax <https://arxiv.org/abs/1805.02867>`_,
#   2018: how the bytes of a softmax are counted.
# - P. Tillet, H. T. Kung and D. Cox, `Triton: an intermediate language and compiler for tiled neural network computations <https://doi.org/10.1145/3315508.3329973>`_,
#   2019: why programs work on blocks.
# - The `documentation of Triton <https://triton-lang.org>`_, whose own tutorials take the same
#   example.
