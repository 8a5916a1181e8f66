"""For each lesson calls of its functions that launch all its kernels.

``tests/targets.py`` makes the lessons believe that the CPU is a GPU, and compiles what they launch
instead of running it. So only types, shapes and strides matter here, and every tensor is empty.
Shapes with the largest blocks should be among them, because those need most registers.
"""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def floats(*shape, dtypes=FLOATS):
    """A tensor of each dtype, which asks for a gradient."""
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for dtype in dtypes]


def both_ways(y):
    """Launch the kernels of the backward pass as well."""
    y.backward(torch.empty_like(y))


def fused_softmax(lesson):
    for x in floats(4, 781) + floats(4, 4096):
        lesson.row_softmax(x.detach())
    lesson.row_softmax(torch.empty(4, 16384))


def baseline_dropout(lesson):
    for x in floats(5000):
        lesson.dropout(x.detach(), torch.empty(5000) > 0, 0.5)


def seeded_dropout(lesson):
    for x in floats(5000):
        lesson.seeded_dropout(x.detach(), 0.5, 123)
        both_ways(lesson.seeded_dropout4x(x, 0.5, 123))
    for words in (1, 4):
        lesson.draw_kernel[(1,)](torch.empty(4096, dtype=torch.int32), 123, words, 1024)


def softmax_tiles(lesson):
    for x in floats(100, 256) + floats(100, 781) + floats(100, 8192):
        both_ways(lesson.tile_softmax(x))
    for x in floats(4, 16384, dtypes=[torch.float32, torch.bfloat16]):
        both_ways(lesson.tile_softmax(x))


def softmax_slices(lesson):
    for n_cols in (50257, 131072):
        for x in floats(4, n_cols):
            both_ways(lesson.slice_softmax(x))


def inside_a_kernel(lesson):
    for warps in (1, 8, 16):
        lesson.softmax_with_warps(torch.empty(4, 4096), warps)


def debugging(lesson):
    x, y = torch.empty(2, 1000)
    integers = torch.empty(2, dtype=torch.int64)
    lesson.copy_kernel[(4,)](y, x, 1000, 256, True)
    lesson.padded_softmax_kernel[(3,)](y, x, 300, 0.0, 1024)
    lesson.offset_kernel[(1,)](integers, 40_000, 65_536)
    for atomic in (False, True):
        lesson.count_kernel[(4,)](integers, atomic)


def operators(lesson):
    for x in floats(5000):
        both_ways(lesson.Both.apply(x, 0.5, 7))


def checkpointed_dropout(lesson):
    seed = torch.zeros(1, dtype=torch.int64)
    for x in floats(5000):
        both_ways(lesson.replayed_dropout(x, 0.5, seed))


def matrix_dropout(lesson):
    seeds = torch.zeros(1000, dtype=torch.int64)
    for n_cols in (3, 200, 5000):
        for x in floats(1000, n_cols):
            both_ways(lesson.matrix_dropout(x, 0.5, seeds))
            lesson.matrix_dropout(torch.empty_like(x.T).T, 0.5, seeds)


def sparse_johnson_lindenstrauss(lesson):
    for n_vectors in (4, 100, 300):
        for x in floats(n_vectors, 5000):
            both_ways(lesson.sparse_jl(x, 1000, 7, density=1 / 3))
    y, x, R = floats(64, 64, dtypes=[torch.float32] * 3)
    lesson.product_kernel[(2, 1)](y, x, R, 512, 64, OUT=32, IN=64, VECTORS=32)


def recurrent_dropout(lesson):
    seed = torch.zeros(1, dtype=torch.int64)
    for x in floats(7, 20, 1000):
        both_ways(lesson.shared_dropout(x, 0.5, seed))


def very_sparse_projection(lesson):
    for n_vectors in (4, 100, 300):
        for x in floats(n_vectors, 5000):
            both_ways(lesson.very_sparse_jl(x, 1000, 7, density=1 / 200))


def language_model(lesson):
    for x in floats(7, 20, 1000):
        both_ways(lesson.shared_dropout(x, 0.5))


def fused_lstm(lesson):
    for dtype in FLOATS:
        for arguments in sequences(lesson, dtype, [(3, 200)]):
            h, c, gates = lesson.launch_steps(*arguments)
            _, weight, *_, lengths, masks = arguments
            lesson.launch_steps_backward(h, c, gates, weight, h, c, lengths, masks)


def sequences(lesson, dtype, sizes):
    """Arguments of a launch of all steps, with one mask and with four."""
    for G in (1, 4):
        for n_sequences, n_units in sizes:
            x = torch.empty(3, n_sequences, 4, n_units, dtype=dtype)
            weight = torch.empty(G, 4 * n_units // G, n_units, dtype=dtype)
            states = torch.empty(2, n_sequences, n_units, dtype=dtype)
            wide = torch.promote_types(dtype, torch.float32)
            masks = torch.empty(G, n_sequences, n_units, dtype=wide)
            yield x, weight, *states, torch.full((n_sequences,), 3), masks


# On a GPU of 100 multiprocessors, each for a block of another size.
BLOCKS = [(1, 128), (80, 768), (80, 1024), (80, 1152), (80, 2048)]


def sequence_lstm(lesson):
    for dtype in FLOATS:
        for arguments in sequences(
            lesson, dtype, BLOCKS[: 1 if dtype == torch.float64 else 5]
        ):
            lesson.launch_sequence(*arguments)
    lesson.launch_barriers(8)


def sequence_backward(lesson):
    for dtype in FLOATS:
        for arguments in sequences(
            lesson, dtype, BLOCKS[: 1 if dtype == torch.float64 else 5]
        ):
            gates, weight, h0, _, lengths, masks = arguments
            h = h0.expand(4, -1, -1)
            c = h.to(masks.dtype)
            saved = gates, weight, h, c, lengths, masks
            lesson.launch_sequence_backward(h, c, *saved)


def lstm_module(lesson):
    for dtype in FLOATS:
        for implementation in (1, 2):
            lstm = lesson.LSTM(
                30, 200, recurrent_dropout=0.5, implementation=implementation
            )
            both_ways(lstm.to(dtype)(torch.empty(2, 4, 30, dtype=dtype))[0])


def block_dropout(lesson):
    for x in floats(99, 1000):
        both_ways(lesson.block_dropout(x, 0.5, 7, (200, 2000), (4, 4)))
        both_ways(lesson.block_dropout(x, 0.5, 7, (201, 2001), (3, 5)))
    for x in floats(9, 4, 3):
        lesson.block_dropout(x, 0.5, 7, (20, 8, 9), (1, 1, 1))


def sharded_dropout(lesson):
    for x in floats(99, 1000):
        both_ways(lesson.BlockDropout.apply(x, 0.5, 7, [200, 2000], [4, 4]))


NOT_LESSONS = (floats, both_ways, sequences)
CALLS = {
    name: call
    for name, call in globals().items()
    if callable(call) and call.__module__ == __name__ and call not in NOT_LESSONS
}
