"""The CUDA kernels, emulated on a CPU, against the eager back end: every form of launch, every way through a row."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import safecode_kernels as sk
from kernels import test_grid as grid
from kernels.emulated_cuda import PLANS, THREADS, forced_plan, same
from kernels.fuzz import fuzz_cases
from safecode_kernels import Status, StepParams
from safecode_kernels.testing import Case, assert_step_equals, make_case

NAME = "native_cuda"
SAMPLER = StepParams(greedy=False, temperature=0.8, top_k=50, top_p=0.9)
# The dense way compares exact sums with top_p; eager adds up and may be off at ties. More would mean another reason.
MAX_AMBIGUOUS_SHARE = 0.02
FUZZ_CASES = 120
SCORE_RTOL = 1e-6


def check(case: Case) -> None:
    grid.assert_equals_eager(case, NAME)
    grid.assert_scores_as_good_as_eager(case, NAME)


def check_awkward(gpu, kind, dtype, plan, seed) -> None:
    gpu.set_schedule(seed)
    with forced_plan(plan):
        for vocab_size in (31, 1023, 9001):
            check(kind(make_case(vocab_size, batch=12, vocab_size=vocab_size, dtype=dtype)))


CELLS = list(itertools.product(grid.KINDS, grid.DTYPES))


def id_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


# Each cell of the grid with one of the plans, and each plan with several cells; all of them are the slow test below.
@pytest.mark.parametrize(
    ("kind", "dtype", "plan"), [(*cell, PLANS[i % len(PLANS)]) for i, cell in enumerate(CELLS)], ids=id_of
)
def test_awkward_rows(gpu, kind, dtype, plan):
    check_awkward(gpu, kind, dtype, plan, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=id_of)
@pytest.mark.parametrize("dtype", grid.DTYPES, ids=str)
@pytest.mark.parametrize("kind", grid.KINDS, ids=id_of)
def test_awkward_rows_by_every_plan(gpu, kind, dtype, plan):
    for seed in (0, 2, 3):
        check_awkward(gpu, kind, dtype, plan, seed)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocab_size", [1, 31, 1023, 32_000])
def test_random_parameters_per_row_by_the_chosen_plan(gpu, vocab_size, capability):
    gpu.set_device(capability=capability, multiprocessors=200)  # many: rows are split as far as their size allows
    for batch, dtype in ((1, torch.bfloat16), (9, torch.float32)):
        check(make_case(3, batch=batch, vocab_size=vocab_size, dtype=dtype, excluded_share=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [151_936, 152_065])
@pytest.mark.parametrize("params", [None, SAMPLER])
def test_real_vocabularies(gpu, vocab_size, params):
    gpu.set_device(multiprocessors=132)
    case = make_case(4, batch=16, vocab_size=vocab_size, dtype=torch.bfloat16, params=params)
    grid.assert_equals_eager(case, NAME)


def test_every_plan_and_every_order_gives_the_same_bits(gpu):
    case = make_case(11, batch=24, vocab_size=3001, dtype=torch.bfloat16)
    crowded = replace(case, clean=case.clean * 0.5, noised=case.noised * 0.5)  # about as many candidates as threads
    for rows in (case, crowded):
        expected = rows.run(NAME), rows.run_scores(NAME)
        assert_step_equals(rows, expected[0], rows.run("eager"))
        for seed, plan in enumerate(PLANS[1:], start=1):
            gpu.set_schedule(seed)
            with forced_plan(plan):
                assert same(rows.run(NAME), expected[0])
                assert same(rows.run_scores(NAME), expected[1])


def with_candidates(counts: list[int], vocab_size: int) -> Case:
    """Rows with so many tokens near the best, at random places; all others are far below."""
    case = make_case(2, batch=len(counts), vocab_size=vocab_size, params=StepParams(greedy=False, top_p=0.9))
    generator = torch.Generator().manual_seed(5)
    clean = case.clean - 100
    for row, count in enumerate(counts):
        places = torch.randperm(vocab_size, generator=generator)[:count]
        clean[row, places] = torch.rand(count, generator=generator)
    return replace(case, clean=clean)


@pytest.mark.parametrize("plan", [(True, 1), (True, 2), (False, 1), (False, 3)], ids=str)
def test_rows_around_the_size_of_every_buffer(gpu, plan):
    """As many candidates as threads go the short way, one more the dense one; a scan holds four times as many."""
    counts = [1, THREADS - 1, THREADS, THREADS + 1, 4 * THREADS - 1, 4 * THREADS, 4 * THREADS + 1, 8 * THREADS + 1]
    with forced_plan(plan):
        case = with_candidates(counts, 4000)
        check(case)
        assert int(case.run(NAME).n_kept.min()) == 1


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rows_with_more_candidates_than_any_buffer(gpu, beta):
    grid.test_rows_with_more_candidates_than_any_buffer(NAME, beta)


@pytest.mark.parametrize("dtype", grid.DTYPES, ids=str)
def test_rows_that_begin_at_any_address(gpu, dtype):
    """Every offset from a 16-byte boundary, odd strides, and vocabularies shorter than a vector."""
    for vocab_size, offset in itertools.product((1, 3, 8, 33, 777), range(8)):
        case = make_case(offset, batch=3, vocab_size=vocab_size, dtype=dtype)
        memory = torch.full((2, 3, vocab_size + 9), math.nan, dtype=dtype)
        rows = memory[:, :, offset : offset + vocab_size]
        rows[0], rows[1] = case.clean, case.noised
        moved = replace(case, clean=rows[0], noised=rows[1])
        assert same(moved.run(NAME), case.run(NAME))
        grid.assert_equals_eager(moved, NAME)


@pytest.mark.parametrize(
    "plan", [(True, 3), *(pytest.param(plan, marks=pytest.mark.slow) for plan in (None, (False, 1)))], ids=str
)
def test_draws(gpu, plan):
    with forced_plan(plan):
        grid.test_draw_of_processed_scores(NAME)


def test_many_races(gpu):
    """Over a row with many likely tokens, and one where a single token has half of the mass: there bounds are loose."""
    for likeliest in (4.0, 6.5):
        case = make_case(6, batch=1, vocab_size=300, params=StepParams(plausibility_beta=0, greedy=False))
        clean = case.clean.clamp(max=3.0)
        clean[0, 77] = likeliest
        many = replace(case, clean=clean).select([0] * 800)
        grid.assert_equals_eager(replace(many, seeds=torch.arange(800) * 2**40, stream=torch.arange(800)), NAME)


def test_a_race_that_ends_in_a_tie_goes_to_the_lowest_id(gpu):
    """Scores so large that no handicap changes them: few tokens, and more than go the short way."""
    for vocab_size in (THREADS // 2, 5 * THREADS):
        clean = torch.full((20, vocab_size), 1e30)
        params = StepParams(contrast_weight=0, plausibility_beta=0, greedy=False)
        result = sk.decode_step(clean, None, params, seeds=list(range(20)), backend=NAME)
        assert result.token.tolist() == [0] * 20


def fuzz(gpu, seed: int) -> None:
    """Random calls by random plans in random orders. Rows are compared one by one: ties with top_p may fill a batch."""
    ambiguous = rows = 0
    for number, case in enumerate(fuzz.case for fuzz in fuzz_cases(seed, FUZZ_CASES, ("any",))):
        gpu.set_schedule(seed * FUZZ_CASES + number)
        with forced_plan(PLANS[number % len(PLANS)]):
            result, scores = case.run(NAME), case.run_scores(NAME)
            drawn = sk.draw(case.clean, seeds=case.seeds, stream=case.stream, step=case.step, backend=NAME)
        assert ((result.token >= 0) & (result.token < case.clean.shape[1])).all()
        expected = case.run("eager")
        for row in range(case.batch):
            one = [sk.StepResult(*(t[row : row + 1] for t in r)) for r in (result, expected)]
            ambiguous += assert_step_equals(case.select([row]), *one)
        rows += case.batch
        reference = case.run_scores("eager")
        assert scores.status.equal(reference.status)
        assert scores.keep.equal(reference.keep)
        fine = scores.status == Status.OK
        for name in ("scores", "biased_clean"):
            a, b = getattr(scores, name)[fine], getattr(reference, name)[fine]
            torch.testing.assert_close(a, b, atol=0, rtol=SCORE_RTOL)
        reference = sk.draw(case.clean, seeds=case.seeds, stream=case.stream, step=case.step, backend="eager")
        assert drawn.token.equal(reference.token)
        assert drawn.status.equal(reference.status)
    assert ambiguous <= MAX_AMBIGUOUS_SHARE * rows, f"rounding decided {ambiguous} of {rows} rows"


def test_random_calls(gpu):
    fuzz(gpu, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 30))
def test_more_random_calls(gpu, seed):
    fuzz(gpu, seed)
