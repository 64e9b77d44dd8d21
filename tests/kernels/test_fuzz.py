"""The native entry points against the eager reference on random calls; nothing may crash, hang or differ.

The seeds are a committed list, so that a failure names a case that everybody can make again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import safecode_kernels as sk
from kernels.conftest import usable_or_skip
from kernels.fuzz import FuzzCase, fuzz_cases
from kernels.test_native_cpu import INSTRUCTION_SETS
from safecode_kernels import Status
from safecode_kernels.testing import assert_step_equals

SEEDS = [int(line) for line in (Path(__file__).parents[1] / "data" / "fuzz_seeds.txt").read_text().split()]
CASES_PER_SEED = 500
SEEDS_IN_MAKE_TEST = 40
# Rows whose token or count rounding decides (see testing.py): more would mean that it is not rounding.
MAX_AMBIGUOUS_SHARE = 0.005
SCORE_RTOL = 1e-6


@pytest.fixture(autouse=True)
def native():
    """The compiled module, with its own choice of loops afterwards."""
    usable_or_skip("native_cpu")
    from safecode_kernels import _native

    before = _native.loops()
    yield _native
    assert _native.use_loops(before)


def check(fuzz: FuzzCase, native) -> int:
    """Compare every entry point; returns how many rows rounding decided."""
    case = fuzz.case
    assert native.use_loops(fuzz.loops)
    torch.set_num_threads(fuzz.threads)
    result = case.run("native_cpu")
    prepared = case.prepare("native_cpu")
    again = prepared(case.clean, case.noised, mask_id=case.mask_id, step=case.step)
    scores = case.run_scores("native_cpu")
    drawn = sk.draw(case.clean, seeds=case.seeds, stream=case.stream, step=case.step, backend="native_cpu")
    torch.set_num_threads(1)
    assert all(a.equal(b) for a, b in zip(result, again, strict=True)), "the prepared step differs"
    assert ((result.token >= 0) & (result.token < case.clean.shape[1])).all(), "an illegal token"
    ambiguous = assert_step_equals(case, result, case.run("eager"))
    expected = case.run_scores("eager")
    assert scores.status.equal(expected.status)
    assert scores.keep.equal(expected.keep)
    assert scores.scores[scores.status != Status.OK].isneginf().all()
    fine = scores.status == Status.OK
    for name in ("scores", "biased_clean"):
        torch.testing.assert_close(getattr(scores, name)[fine], getattr(expected, name)[fine], atol=0, rtol=SCORE_RTOL)
    reference = sk.draw(case.clean, seeds=case.seeds, stream=case.stream, step=case.step, backend="eager")
    assert drawn.token.equal(reference.token)
    assert drawn.status.equal(reference.status)
    assert (drawn.n_kept == reference.n_kept)[drawn.status == Status.OK].all()
    return ambiguous


def run_seed(seed: int, native) -> None:
    usable = tuple(name for name in INSTRUCTION_SETS if native.use_loops(name))
    ambiguous = rows = 0
    for number, fuzz in enumerate(fuzz_cases(seed, CASES_PER_SEED, usable)):
        try:
            ambiguous += check(fuzz, native)
        except Exception as error:
            shape, params = list(fuzz.case.clean.shape), fuzz.case.params
            error.add_note(f"seed {seed}, case {number}: {shape} {fuzz.case.clean.dtype} {fuzz.loops} {params}")
            raise
        rows += fuzz.case.batch
    assert ambiguous <= MAX_AMBIGUOUS_SHARE * rows, f"seed {seed}: rounding decided {ambiguous} of {rows} rows"


@pytest.mark.parametrize("seed", SEEDS[:SEEDS_IN_MAKE_TEST])
def test_random_calls(seed, native):
    run_seed(seed, native)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS[SEEDS_IN_MAKE_TEST:])
def test_more_random_calls(seed, native):
    run_seed(seed, native)


def test_the_list_is_long_enough():
    assert len(set(SEEDS)) == len(SEEDS)
    assert SEEDS_IN_MAKE_TEST * CASES_PER_SEED >= 20_000
    assert len(SEEDS) * CASES_PER_SEED >= 100_000
