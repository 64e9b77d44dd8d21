"""decode_step and decode_scores against the token-by-token implementation, over every rule at once."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import safecode_kernels as sk
from kernels import naive_step
from safecode_kernels.testing import LOGPROB_ATOL, Case, oracle_scores, oracle_step

# Quarters are exact in every dtype, so equal logits stay equal and ties are frequent.
GRID = [x / 4 for x in range(-24, 25)]
SPECIAL = [-math.inf, -math.inf, -math.inf, math.inf, math.nan, -3.3e38, 3.3e38]
# Each value is as likely as the others; top_p avoids masses that equal weights could hit exactly.
FIELDS = {
    "contrast_weight": [0.0, 0.43, 1.0, 2.5],
    "plausibility_beta": [0.0, 0.001, 0.1, 0.5, 1.0],
    "refusal_bias": [-6.0, -0.3, 0.0, 0.3, 6.0],
    "bias_scope": [0, 0, 1, 3, 20],
    "temperature": [0.5, 1.0, 1.7],
    "top_k": [0, 0, 1, 3, 50],
    "top_p": [0.137, 0.481, 0.887, 1.0],
    "min_p": [0.0, 0.05, 0.5, 1.0],
    "greedy": [True, False, False],
}


@st.composite
def cases(draw, special_share: float) -> Case:
    """A case of 1 to 4 rows and 1 to 70 tokens with ties, excluded tokens and, by the share, illegal logits."""
    batch, vocab_size = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    random = draw(st.randoms(use_true_random=False))
    spread = draw(st.sampled_from([1, 4, 24]))

    def logits() -> torch.Tensor:
        def one() -> float:
            if random.random() < special_share:
                return random.choice(SPECIAL)
            return random.choice(GRID[24 - spread : 25 + spread])

        return torch.tensor([[one() for _ in range(vocab_size)] for _ in range(batch)])

    n_masks = draw(st.integers(1, 3))
    masks = [[v for v in range(vocab_size) if random.random() < 0.3] for _ in range(n_masks)]
    return Case(
        clean=logits(),
        noised=logits() if draw(st.booleans()) else None,
        params=sk.StepParams(
            **{name: [random.choice(values) for _ in range(batch)] for name, values in FIELDS.items()}
        ),
        refusal_mask=sk.pack_masks(masks, vocab_size),
        mask_id=torch.tensor([random.randrange(-1, n_masks) for _ in range(batch)]),
        seeds=torch.tensor([random.randrange(2**63) for _ in range(batch)]),
        stream=torch.tensor([random.randrange(2**32) for _ in range(batch)]),
        step=random.choice([0, 1, 7, 2**32, 2**62]),
    )


def naive_rows(case: Case, kind: type) -> list[naive_step.RowResult]:
    results = []
    sets = sk.unpack_mask(case.refusal_mask, case.clean.shape[1])
    for row in range(case.batch):
        mask_id = int(case.mask_id[row])
        params = naive_step.RowParams(**{name: case.params.per_row(name, case.batch)[row] for name in FIELDS})
        results.append(
            naive_step.decode_row(
                case.clean[row].tolist(),
                None if case.noised is None else case.noised[row].tolist(),
                params,
                set(sets[mask_id].nonzero().flatten().tolist()) if mask_id >= 0 else None,
                int(case.seeds[row]),
                int(case.stream[row]),
                case.step,
                kind,
            )
        )
    return results


def assert_equal_rows(
    naive: list[naive_step.RowResult], step: sk.StepResult, scores: sk.StepScores, atol: float
) -> None:
    assert step.status.tolist() == [row.status for row in naive]
    assert step.token.tolist() == [row.token for row in naive]
    assert step.n_kept.tolist() == [row.n_kept for row in naive]
    assert step.logprob.tolist() == pytest.approx([row.logprob for row in naive], abs=atol)
    for row, expected in enumerate(naive):
        if (
            int(scores.status[row]) == 0
        ):  # a step can still fail where scores cannot: only it divides by the temperature
            if expected.status == 0:
                assert scores.scores[row].tolist() == expected.scores
                assert scores.keep[row].tolist() == expected.keep
        else:
            assert int(scores.status[row]) == expected.status
            assert not scores.keep[row].any()
            assert (scores.scores[row] == -math.inf).all()


@pytest.mark.parametrize("special_share", [0.0, 0.04, 0.5])
@settings(max_examples=150)
@given(data=st.data())
def test_decode_step_equals_naive_bit_for_bit(backend, data, special_share):
    case = data.draw(cases(special_share))
    assert_equal_rows(naive_rows(case, np.float32), case.run(backend), case.run_scores(backend), LOGPROB_ATOL)


@settings(max_examples=100)
@given(case=cases(special_share=0.04))
def test_oracle_equals_naive_in_float64(case):
    assert_equal_rows(naive_rows(case, np.float64), oracle_step(case), oracle_scores(case), 1e-12)
