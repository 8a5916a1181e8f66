"""The mistakes of the lesson are mistakes: each shows where it says, and only there."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton
from debugging import (
    DEVICE,
    copy_kernel,
    count_kernel,
    look,
    offset_kernel,
    padded_softmax_kernel,
    run_script,
)

ROOT = Path(__file__).parent.parent


def test_a_block_that_is_no_power_of_two_is_refused():
    x = torch.ones(1000, device=DEVICE)
    with pytest.raises(Exception, match=r"power of 2|ERROR|error"):
        copy_kernel[(1,)](torch.empty_like(x), x, 1000, 1000, True)


@pytest.mark.parametrize("n", [1, 255, 256, 1000])
def test_poison_shows_what_was_not_written(n):
    x = torch.ones(n, device=DEVICE)
    for programs in range(triton.cdiv(n, 256) + 1):
        y = torch.full((n,), math.nan, device=DEVICE)
        if programs:
            copy_kernel[(programs,)](y, x, n, 256, True)
        assert y.isnan().sum() == max(n - 256 * programs, 0)


@pytest.mark.parametrize("n", [1, 1000, 1024])
@pytest.mark.parametrize("mask_store", [True, False])
def test_a_store_without_a_mask_writes_up_to_the_end_of_its_block(n, mask_store):
    x = torch.ones(n, device=DEVICE)
    room = torch.full((2048,), 7.0, device=DEVICE)
    copy_kernel[(triton.cdiv(n, 256),)](room[:n], x, n, 256, mask_store)
    overwritten = (room[n:] != 7).sum()
    assert overwritten == (0 if mask_store else -n % 256)


@pytest.mark.parametrize("n_cols", [1, 781, 1024])
def test_a_wrong_filling_shows_only_where_something_is_filled_up(n_cols):
    x = torch.ones(2, n_cols, device=DEVICE)
    y = torch.empty_like(x)
    padded_softmax_kernel[(2,)](y, x, n_cols, 0.0, 1024)
    expected = n_cols / (n_cols + (1024 - n_cols) / math.e)
    torch.testing.assert_close(y.sum(1), torch.full((2,), expected, device=DEVICE))
    padded_softmax_kernel[(2,)](y, x, n_cols, -float("inf"), 1024)
    torch.testing.assert_close(y.sum(1), torch.ones(2, device=DEVICE))


@pytest.mark.filterwarnings("ignore:overflow")
def test_offsets_wrap_in_32_bits():
    offsets = torch.empty(2, dtype=torch.int64, device=DEVICE)
    offset_kernel[(1,)](offsets, 40_000, 65_536)
    assert offsets.tolist() == [40_000 * 65_536 - 2**32, 40_000 * 65_536]


def test_atomic_additions_are_complete():
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    count_kernel[(50,)](out, True)
    assert out.item() == 50


def test_print_and_breakpoint_show_whole_blocks():
    script = look(['print("x is", x)', "breakpoint()"], "cpu")
    output = run_script(script, typed="p x\nc\n" * 2, TRITON_INTERPRET="1")
    assert re.findall(r"\[.*?\]", output)[:4] == [
        "[1. 2. 3. 4.]", "[1., 2., 3., 4.]", "[1. 2. 3. 0.]", "[1., 2., 3., 0.]"
    ]  # fmt: skip


def test_a_script_that_fails_says_so():
    assert "ZeroDivisionError" in run_script("print(1 / 0)")


@pytest.mark.gpu
def test_device_print_and_device_assert():
    lines = ['tl.device_print("x", x)', 'tl.device_assert(x > 0, "x is not positive")']
    script = look(lines, DEVICE)
    output = run_script(script, TRITON_INTERPRET="0", TRITON_DEBUG="1")
    assert len(set(re.findall("pid.*x: +[1-4]", output))) >= 4
    assert "Assertion `x is not positive` failed" in output
    assert "Assertion" not in run_script(script, TRITON_INTERPRET="0", TRITON_DEBUG="0")


@pytest.mark.gpu
def test_do_bench_is_between_the_launch_and_memory():
    from debugging import benchmark, clock_around, fair

    n = 2**26
    assert benchmark.fn(n, clock_around) > 2 * benchmark.fn(n, fair)


@pytest.mark.gpu
def test_the_race_loses_additions():
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    count_kernel[(100_000,)](out, False)
    assert out.item() < 100_000


def test_two_threads_in_the_interpreter_need_a_lock():
    """What the install page says of them, and that its advice works."""
    page = " ".join((ROOT / "docs/install.md").read_text().split())
    assert (
        '"Did you forget to add @triton.jit?". Use processes, or hold a `threading.Lock`'
        in page
    )
    x, lock = torch.ones(1000, device=DEVICE), threading.Lock()

    def copies(_):
        y = torch.zeros_like(x)
        for _ in range(20):
            with lock:
                copy_kernel[(4,)](y, x, 1000, 256, True)
        return bool((y == x).all())

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(copies, range(2))) == [True, True]
