"""The answers that are folded below the exercises: their code runs, and is right."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from itertools import count
from pathlib import Path

import pytest
import seeded_dropout
import softmax_tiles
import torch
from fused_softmax import DEVICE

TUTORIALS = Path(__file__).parent.parent / "tutorials"
LESSONS = sorted(path.stem for path in TUTORIALS.glob("*.py"))
numbers = count()


def exercises_and_answers(lesson):
    """Two dicts, of the exercises and of their answers, by number, in reST."""
    source = (TUTORIALS / f"{lesson}.py").read_text()
    prose = re.sub("^# ?", "", source[source.index("# Exercises") :], flags=re.MULTILINE)
    exercises, answers = prose.split(".. note::\n   Try it first.\n")
    exercises = re.split(r"^\n\n", exercises, maxsplit=1, flags=re.MULTILINE)[0]
    answers = textwrap.dedent(answers[: answers.index("\nReferences\n")])
    lists = []
    for part in (exercises, answers):
        _, *items = re.split(r"^(\d)\. ", part, flags=re.MULTILINE)
        lists.append(
            {int(n): item for n, item in zip(items[::2], items[1::2], strict=True)}
        )
    return lists


def code(lesson, number, language="python"):
    """The one block of code in an answer."""
    answer = exercises_and_answers(lesson)[1][number]
    block = rf"^ *\.\. code-block:: {language}\n\n((?: {{6}}.*\n|\n)+)"
    (code,) = re.findall(block, answer, flags=re.MULTILINE)
    return textwrap.dedent(code)


def run(source, folder):
    """Import the source as a module of its own: Triton wants to see it in a file."""
    name = f"solution_{next(numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def solve(tmp_path):
    """Run the code of an answer with the lesson's names at hand, and return the module."""

    def solve(lesson, number, before="", after=""):
        names = f"from {lesson} import *\n\n{before}\n\n"
        return run(names + code(lesson, number) + after, tmp_path)

    return solve


@pytest.fixture
def changed(tmp_path):
    """The lesson up to a section, with an answer's changes made, as a module."""

    def changed(lesson, number, until):
        source = (TUTORIALS / f"{lesson}.py").read_text()
        source = source[: source.index(f"\n# {until}\n")]
        for hunk in re.split("^@@.*\n", code(lesson, number, "diff"), flags=re.MULTILINE):
            lines = [(line[:1], line[1:]) for line in hunk.splitlines(keepends=True)]
            old = "".join(line for sign, line in lines if sign != "+")
            new = "".join(line for sign, line in lines if sign != "-")
            assert old in source
            source = source.replace(old, new) if old else source
        # PyTorch knows the operators of the lesson itself under the other name.
        source = source.replace("fast_and_right::", f"changed{next(numbers)}::")
        return run(source, tmp_path)

    return changed


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_exercise_has_an_answer(lesson):
    exercises, answers = exercises_and_answers(lesson)
    assert list(exercises) == list(answers) == list(range(1, len(answers) + 1))


def test_a_mask_of_bits(solve, randn):
    solution = solve("baseline_dropout", 1)
    x = randn(3, 1001)
    x_keep = randn(3, 1001) > 0
    y = solution.bit_dropout(x, solution.pack(x_keep), 0.3)
    assert torch.equal(y, solution.dropout(x, x_keep, 0.3))
    assert solution.pack(x_keep).nbytes == 376


def test_the_gradient_of_dropout_with_a_mask(solve, randn):
    before = "x, x_keep = torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE) > 0"
    dropout = solve("baseline_dropout", 2, before).MaskedDropout.apply
    x, x_keep = randn(4, 5, dtype=torch.float64).requires_grad_(), randn(4, 5) > 0
    assert torch.autograd.gradcheck(lambda x: dropout(x, x_keep, 0.3), x)


def test_log_softmax(solve):
    solve("fused_softmax", 1)


@pytest.mark.parametrize("piece", [512, 4096])
def test_other_pieces(randn, piece):
    x = randn(3, 5001)
    y = softmax_tiles.launch_tile_softmax(x, tile=piece)
    torch.testing.assert_close(y, torch.softmax(x, dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_without_tickets(changed, randn, dtype):
    lesson = changed("softmax_slices", 1, "Is it right?")
    for n_cols in (20_001, 20_008):
        x, dy = randn(2, 3, n_cols, dtype=dtype)
        y = lesson.launch_slice_softmax(x)
        torch.testing.assert_close(y, torch.softmax(x, dim=-1))
        expected = torch._softmax_backward_data(dy, y, -1, dtype)
        torch.testing.assert_close(lesson.launch_slice_backward(dy, y), expected)


def test_triton_s_own_philox_draws_the_same_mask(changed, randn):
    x = randn(5000)
    lesson = changed("seeded_dropout", 2, until="As a public function")
    for seed in (7, -5, 2**40):
        right = seeded_dropout.launch_seeded_dropout4x(x, 0.3, seed)
        assert torch.equal(lesson.launch_seeded_dropout4x(x, 0.3, seed), right)


def test_a_seed_that_is_drawn_before_the_checkpoint_replays(solve, randn):
    drawn_before = solve("checkpointed_dropout", 1).drawn_before
    x, w = randn(1000), torch.ones(1000, device=DEVICE, requires_grad=True)
    y = drawn_before(x, w)
    y.sum().backward()
    assert torch.equal(w.grad, y)


TILES = """

@triton.jit
def kernel(mask_ptr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    for batch in range(2):
        for head in range(3):
            keep = keep_tile(7, 0.5, batch, head, queries, keys, 3, 40, 50)
            place = ((batch * 3 + head) * 40 + queries[:, None]) * 50 + keys[None, :]
            inside = (queries < 40)[:, None] & (keys < 50)[None, :]
            tl.store(mask_ptr + place, keep.to(tl.int32), mask=inside)
"""


def test_a_mask_of_attention_does_not_depend_on_the_tiles(solve):
    kernel = solve("checkpointed_dropout", 2, after=TILES).kernel
    masks = []
    for queries, keys in ((16, 16), (8, 64)):
        mask = torch.zeros(2, 3, 40, 50, dtype=torch.int32, device=DEVICE)
        kernel[-(-40 // queries), -(-50 // keys)](mask, queries, keys)
        masks.append(mask)
    assert torch.equal(*masks)
    assert not torch.equal(mask[0, 0], mask[0, 1]) and not torch.equal(mask[0], mask[1])


def test_the_block_replays_only_with_its_state(solve):
    solution = solve("checkpointed_dropout", 3)
    x = torch.randn(10, 2, 64, device=DEVICE)
    assert not solution.replays(solution.block, x, preserve_rng_state=False)


@pytest.mark.parametrize(
    ("lesson", "number"),
    [
        ("matrix_dropout", 1),
    ],
)
def test_answers_pass_the_checks_of_their_lesson(solve, lesson, number, capsys):
    solve(lesson, number)
    assert capsys.readouterr().out.endswith("right\n")


def test_matrix_dropout_of_sequences(changed, randn):
    lesson = changed("matrix_dropout", 2, "The masks follow the rows")
    x = randn(7, 5, 6)  # time, sequences, features
    sequences = x.transpose(0, 1)
    seeds = torch.arange(5, device=DEVICE)
    y = torch.empty(5, 42, device=DEVICE)
    lesson.matrix_dropout_kernel[(3,)](
        y, sequences, seeds, 5, 42, *sequences.stride(), 6, 2**31, 2.0, 2, 64, 1
    )
    from matrix_dropout import matrix_dropout

    assert torch.equal(y, matrix_dropout(sequences.flatten(1), 0.5, seeds))


def test_which_layouts_flatten_without_a_copy():
    x = torch.zeros(8, 5, 4)
    for view in (x, x[::3], x[2:]):
        assert view.flatten(1).data_ptr() == view.data_ptr()
    for view in (x.transpose(0, 1), x[:, :, :3]):
        assert view.flatten(1).data_ptr() != view.data_ptr()


def test_a_projection_with_one_bit_an_entry(solve, randn):
    solution = solve("sparse_johnson_lindenstrauss", 1)
    project = solution.sign_projection
    R, x = project(torch.eye(300, device=DEVICE), 80, 5), randn(3, 300)
    torch.testing.assert_close(project(x, 80, 5), x @ R, rtol=1e-4, atol=1e-4)
    assert not torch.equal(R, project(torch.eye(300, device=DEVICE), 80, 6))


def test_the_variance_of_a_projection(solve):
    found = solve("sparse_johnson_lindenstrauss", 2).found
    assert len(found) == 6
    for variance, expected in found:
        assert abs(variance - expected) < 0.25 * expected + 1e-5


def test_the_variance_of_a_count_sketch(solve):
    sketch = solve("very_sparse_projection", 1).count_sketch
    x = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.5]], device=DEVICE)
    n, k = 200, 4
    lengths = torch.cat([sketch(x, k, seed).square().sum(1) for seed in range(n)])
    ratios = lengths / x.square().sum()
    share = (x**4).sum() / x.square().sum() ** 2
    assert abs(ratios.mean() - 1) < 5 * (2 / k / n) ** 0.5
    torch.testing.assert_close(ratios.var(), 2 / k * (1 - share), rtol=0.4, atol=0)
    alone = torch.zeros(1, 5, device=DEVICE)
    alone[0, 2] = 3
    assert sketch(alone, k, 0).abs().sum() == 3


def test_lookup_drops_the_same_words_as_the_module(solve, randn):
    solution = solve("recurrent_dropout", 1)
    table = torch.nn.Embedding(11, 300).to(DEVICE)
    words = torch.arange(22, device=DEVICE).view(2, 11) * 7 % 11
    torch.manual_seed(3)
    expected = solution.EmbeddingDropout(table, 0.4)(words)
    torch.manual_seed(3)
    seed = solution.draw_seed(words.device)
    assert torch.equal(solution.lookup(table.weight.detach(), words, 0.4, seed), expected)
    assert (expected == 0).all(dim=-1).any()


def test_shared_dropout_shares_among_steps_and_sequences(solve, randn):
    x = randn(5, 3, 40)
    shared = solve("recurrent_dropout", 2).BatchDropout(0.5)
    mask = shared(torch.ones_like(x))
    assert torch.equal(mask, mask[:1, :1].expand_as(x))
    assert set(mask.unique().tolist()) == {0, 2}
    assert shared.eval()(x) is x


def test_zoneout(solve, randn):
    zoneout_loop = solve("recurrent_dropout", 3).zoneout_loop
    lstm = torch.nn.LSTM(4, 6).to(DEVICE, torch.float64)
    x, h, c = (randn(*shape).double() for shape in ((5, 3, 4), (3, 6), (3, 6)))
    weights = lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0
    expected, (_, last) = lstm(x, (h[None], c[None]))
    torch.testing.assert_close(zoneout_loop(x, *weights, h, c, 0, 0), (expected, last[0]))
    outputs, last = zoneout_loop(x, *weights, h, c, 1, 1)
    assert torch.equal(outputs, h.expand(5, -1, -1)) and torch.equal(last, c)


def test_variational_weight_drop_trains(changed):
    model = changed("language_model", 1, "The text").LanguageModel(7, 4, 4, weight=0.5)
    assert all(lstm.variational for lstm in model.lstms)
    words = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    model.to(DEVICE)(words)[0].sum().backward()
    for lstm in model.lstms:
        dropped = (lstm.module.weight_hh_l0.grad == 0).all(dim=1).sum()
        assert dropped >= 1  # of 16 rows, all but surely: 2^-16 is the chance of none


def test_the_full_recipe_without_one_of_its_masks(changed):
    lesson = changed("language_model", 2, "What may you conclude?")
    full = lesson.VARIANTS["all together"]
    less = list(lesson.VARIANTS.values())[-3:]
    assert all(rates.items() < full.items() for rates in less)
    assert len({frozenset(rates) for rates in less}) == 3
    text = torch.arange(2 * lesson.STREAMS) % 3
    assert len(lesson.held_out_losses("no words", 0, text, text, 3)) == lesson.EPOCHS


def loop_with_masks(lesson, lstm, x, mask_of):
    """The plain loop in which ``mask_of(step)`` multiplies the state (h) and g."""
    h, c = x.new_zeros(2, x.shape[1], lstm.hidden_size)
    outputs = []
    for t, step in enumerate(x):
        state_mask, g_mask = mask_of(t)
        gates = step @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        parts = zip(state_mask, lstm.weight_hh_l0.chunk(len(state_mask)), strict=True)
        gates = gates + torch.cat([(h * mask) @ part.T for mask, part in parts], dim=-1)
        i, f, g, o = gates.chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh() * g_mask
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def compare_with_loop(lesson, G, masks, masks_of):
    """The launches of the lesson, forward and backward, against a loop with these masks."""
    T, B, H = len(masks) - 1, 3, 16
    lstm = torch.nn.LSTM(4, H).to(DEVICE, torch.float64)
    x = torch.randn(T, B, 4, device=DEVICE, dtype=torch.float64)
    y = loop_with_masks(lesson, lstm, x, masks_of)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (lstm.weight_hh_l0, lstm.bias_hh_l0), dy)
    with torch.no_grad():
        gates = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        gates, U = gates.view(T, B, 4, H), lstm.weight_hh_l0.view(G, -1, H)
        lengths, zeros = torch.full((B,), T, device=DEVICE), x.new_zeros(B, H)
        h, c, gates = lesson.launch_steps(gates, U, zeros, zeros, lengths, masks)
        dh = torch.cat([torch.zeros_like(dy[:1]), dy])
        d_gates, d_weight, _, _ = lesson.launch_steps_backward(
            dh, torch.zeros_like(c), gates, U, h, c, lengths, masks
        )
    torch.testing.assert_close(h[1:], y)
    torch.testing.assert_close(d_weight.flatten(0, 1), wanted[0])
    torch.testing.assert_close(d_gates.sum((0, 1)).flatten(), wanted[1])


@pytest.mark.parametrize("G", [1, 4])
def test_zoneout_in_one_launch(changed, G):
    """For h and c apart, anew at each step; ends of sequences as before."""
    lesson = changed("sequence_lstm", 1, "Is it right?")
    T, B, H = 5, 19, 16 if DEVICE == "cpu" else 128
    like = {"device": DEVICE, "dtype": torch.float64}
    torch.manual_seed(0)
    x, weight = torch.randn(T, B, 4, H, **like), torch.randn(G, 4 * H // G, H, **like)
    h, c = torch.randn(2, B, H, **like)
    ends = torch.arange(B, device=DEVICE) % (T + 1)
    stays = torch.rand(T, 2, B, H, device=DEVICE) < 0.4
    got, cells, _ = lesson.launch_sequence(x, weight, h, c, ends, stays.to(x))

    for t, step in enumerate(x):
        gates = step + torch.cat([h @ part.T for part in weight], dim=1).view(B, 4, H)
        i, f, g, o = gates.unbind(1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * new_c.tanh()
        c = torch.where(stays[t, 0], c, new_c)
        h = torch.where(stays[t, 1], h, new_h)
        running = (t < ends)[:, None]
        h, c = h * running, c * running
        torch.testing.assert_close((got[t + 1], cells[t + 1]), (h, c))


def test_both_directions(solve):
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    solution = solve("lstm_module", 1)
    x, lengths = torch.randn(5, 3, 4, device=DEVICE, dtype=torch.float64), [5, 3, 2]
    reference = torch.nn.LSTM(4, 7, bidirectional=True).to(x)
    both = [solution.LSTM(4, 7).to(x) for _ in range(2)]
    for lstm, suffix in zip(both, ("", "_reverse"), strict=True):
        for name, parameter in lstm.named_parameters():
            parameter.data.copy_(getattr(reference, name + suffix))
    got = solution.both_directions(*both, x, lengths)
    expected, _ = pad_packed_sequence(reference(pack_padded_sequence(x, lengths))[0])
    torch.testing.assert_close(got, expected)


def masks(*shape):
    ones = torch.ones(shape, device=DEVICE, dtype=torch.float64)
    return torch.nn.functional.dropout(ones, 0.4)


@pytest.mark.parametrize("G", [1, 4])
def test_a_new_recurrent_mask_at_each_step(changed, G):
    lesson, rows = changed("fused_lstm", 1, "Is it right?"), masks(6, G, 3, 16)
    compare_with_loop(lesson, G, rows, lambda t: (rows[t], 1))


def test_semeniutas_dropout(changed):
    lesson, rows = changed("fused_lstm", 2, "Is it right?"), masks(6, 3, 16)
    ones = torch.ones_like(rows[:1])
    compare_with_loop(lesson, 1, rows, lambda t: (ones, rows[t]))


def test_spills_with_sixteen_warps(solve):
    assert solve("inside_a_kernel", 1).first == 65536


def test_load_instructions_of_float16(solve):
    loads = solve("inside_a_kernel", 2).loads
    assert loads == [["ld.global.v4.b32"], ["ld.global.b16"], ["ld.global.b16"]]


def test_times_of_tiles(solve, randn):
    x, results = randn(40, 256, dtype=torch.bfloat16), []
    times = solve("inside_a_kernel", 3).times_of_tiles(
        x, time=lambda run: results.append(run()) or len(results)
    )
    assert sorted(times.values()) == list(range(1, len(times) + 1)) and 4096 in times
    assert all(torch.equal(y, results[0]) for y in results)


def test_what_a_launch_wrote(solve):
    solution = solve("debugging", 1)

    def launch(programs, mask_store=True):
        x = torch.ones(1000, device=DEVICE)
        return lambda y: solution.copy_kernel[(programs,)](y, x, 1000, 256, mask_store)

    assert solution.writes_only(launch(4), 1000)
    assert not solution.writes_only(launch(3), 1000)
    assert not solution.writes_only(launch(4, mask_store=False), 1000)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_softmax_that_overflows(solve):
    solution = solve("debugging", 2)
    x = torch.zeros(3, 781, device=DEVICE)
    x[1, 0], x[2, 0] = 80, 100
    y = torch.empty_like(x)
    solution.unshifted_kernel[(3,)](y, x, 781, 1024)
    assert y.isnan().any(1).tolist() == [False, False, True]


def test_a_function_with_a_forward_mode(solve):
    solution = solve("operators", 1)
    found = [
        solution.outcome(check, solution.WithForwardMode.apply)
        for check in (solution.gradient, solution.forward_mode, solution.compiled)
    ]
    assert found == ["yes", "yes", "error"]


def test_incoming_gradients_of_any_layout(solve):
    solution = solve("operators", 2)
    for name, call in solution.WAYS.items():
        if name != "bare":
            assert solution.any_gradient(call)


def test_the_seed_of_a_block_in_memory(changed, randn):
    from block_dropout import block_dropout

    launch = changed("block_dropout", 1, "Three ways, drawn").launch_block_dropout
    x, seed = randn(3, 5), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for number in (7, -(2**63)):
        seed.fill_(number)
        y = launch(x, 0.3, seed, [6, 8], [2, 1])
        assert torch.equal(y, block_dropout(x, 0.3, number, (6, 8), (2, 1)))


def test_ranks_with_different_seeds_are_noticed(solve):
    import torch.distributed as dist

    check = solve("sharded_dropout", 1).check_same_seed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(7), check(-(2**62))
    finally:
        dist.destroy_process_group()


# The lesson's worker on one rank, and another one on four, which are forks of one process.
TWO_RUNS = """
import sys
import ranks
ranks.fork(1, ranks.train, 0, 3, "", "one.pt")
print(flush=True)
ranks.lesson.WORKER = open("worker.py").read()
ranks.fork(4, ranks.train, 0, 3, "", "four.pt")
"""


def test_samples_that_are_divided_as_well_change_no_loss(tmp_path):
    import sharded_dropout

    worker = sharded_dropout.WORKER
    diff = code("sharded_dropout", 2, "diff").splitlines()
    old = [line[1:] for line in diff if line.startswith("-")]
    new = [line[1:] for line in diff if line.startswith("+")]
    for before, after in zip(old, new, strict=True):
        assert before in worker
        worker = worker.replace(before, after)
    (tmp_path / "worker.py").write_text(worker)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", TWO_RUNS],
        cwd=tmp_path,
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert not result.returncode, result.stderr
    losses = [[float(loss) for loss in run.split()] for run in result.stdout.splitlines()]
    one, four = torch.tensor(losses)
    assert len(one) == 3
    torch.testing.assert_close(four, one, rtol=2e-5, atol=2e-5)
