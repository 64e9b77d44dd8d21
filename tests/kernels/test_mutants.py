"""A test of the tests: a kernel with one rule broken must not pass the grid.

Each mutant is the eager reference with one deliberate mistake; the grid's own cases and comparison must find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kernels import test_grid as grid
from safecode_kernels import StepResult
from safecode_kernels.backends import eager
from safecode_kernels.testing import Case, assert_step_equals, make_case

Mutant = Callable[[Case, pytest.MonkeyPatch], StepResult]


def sign_of_the_contrast(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    """(1 - a) z + a n: what a wrong sign makes of s = (1 + a) z - a n."""
    noised = 2 * case.clean.float() - case.noised.float()
    return replace(case, clean=case.clean.float(), noised=noised).run("eager")


def rows_swapped(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    return replace(case, clean=case.noised, noised=case.clean).run("eager")


def neighbours_noised_row(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    return replace(case, noised=case.noised.roll(1, 0)).run("eager")


def cut_without_the_bias(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    score = eager._score

    def unbiased(z, n, refusal, bias, gathered, rows, status):
        s, _, status = score(z, n, refusal, bias, gathered, rows, status)
        return s, z, status

    patch.setattr(eager, "_score", unbiased)
    return case.run("eager")


def seed_plus_row(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    return replace(case, seeds=case.seeds + torch.arange(case.batch)).run("eager")


def step_ignored(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    return replace(case, step=0).run("eager")


def mask_of_another_row(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    return replace(case, mask_id=case.mask_id.roll(1)).run("eager")


def ties_to_the_highest_id(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    """The race and the best of a greedy row, taken from the end of the row."""
    argmax = torch.Tensor.argmax

    def last(x: torch.Tensor, *dims: int, keepdim: bool = False) -> torch.Tensor:
        return x.shape[-1] - 1 - argmax(x.flip(-1), -1, keepdim=keepdim)

    patch.setattr(torch.Tensor, "argmax", last)
    return case.run("eager")


def multiplied_by_the_reciprocal_temperature(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    temperatures = [t * 1.01 for t in case.params.per_row("temperature", case.batch)]
    return replace(case, params=replace(case.params, temperature=temperatures)).run("eager")


def top_k_drops_ties(case: Case, patch: pytest.MonkeyPatch) -> StepResult:
    at_least = eager._at_least

    def above(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        return at_least(x, floor) & ((x > floor) | (floor == x.amax(-1, keepdim=True)) | floor.isinf())

    patch.setattr(eager, "_at_least", above)
    return case.run("eager")


MUTANTS: tuple[Mutant, ...] = (
    sign_of_the_contrast,
    rows_swapped,
    neighbours_noised_row,
    cut_without_the_bias,
    seed_plus_row,
    step_ignored,
    mask_of_another_row,
    ties_to_the_highest_id,
    multiplied_by_the_reciprocal_temperature,
    top_k_drops_ties,
)


def grid_cases() -> list[Case]:
    """Small cells of the grid: random parameters per row, and rows with ties."""
    cases = [make_case(3, batch=64, vocab_size=vocab_size) for vocab_size in (31, 1023)]
    return [*cases, *(kind(make_case(1023, batch=24, vocab_size=1023)) for kind in (grid.ties, grid.all_equal))]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_grid_finds_the_mutant(mutant):
    found = []
    for case in grid_cases():
        expected = case.run("eager")
        with pytest.MonkeyPatch.context() as patch:
            mutated = mutant(case, patch)
        try:
            assert_step_equals(case, mutated, expected)
        except AssertionError:
            found.append(case)
    assert found, "the grid accepts a kernel with this mistake"


def test_grid_accepts_the_kernel_without_a_mistake():
    for case in grid_cases():
        assert assert_step_equals(case, case.run("eager"), case.run("eager")) == 0
