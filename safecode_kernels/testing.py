"""Cases and comparison rules that tests and benchmarks share: what "the same result" means between back ends.

Everything is compared with the float64 oracle, which is the eager reference in another compute dtype. Two honest back
ends may differ where float32 rounding decides: by an ulp in a score, hence in which of two nearly equal tokens wins or
which side of a cut a token falls. Such rows are recognised by disturbing the oracle's input by as much, and are capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import eager
from .bitmask import pack_masks
from .contract import DrawKey, RefusalMask, Rows, Status, StepResult, StepScores
from .ops import PreparedStep, decode_scores, decode_step, prepare_step
from .params import StepParams, resolve_rows

# A float32 score is the difference of two products and one sum: three roundings of numbers below 64, half an ulp each.
SCORE_ATOL = 1e-5
# A log-probability adds the rounding of the division by the temperature and of the mass.
LOGPROB_ATOL = 5e-5
# Relative size of the disturbance that stands for float32 rounding (4 ulp), and how often it is tried.
ROUNDING = 2.0**-21
ROUNDING_TRIALS = 24
# The mass before a token is a sum of up to V float64 shares, in an order that is each back end's own.
MASS_ROUNDING = 2.0**-40
# At most this share of the rows of a comparison may be decided by rounding.
MAX_AMBIGUOUS_SHARE = 0.02
# A fixed-seed chi-square test fails below this p; a correct sampler does so for one seed in a thousand.
CHI_SQUARE_MIN_P = 1e-3
# Bins expecting fewer draws are merged: below, the statistic is not chi-square distributed.
CHI_SQUARE_MIN_EXPECTED = 5.0

LOGIT_SIGMA = 2.5
NOISE_SIGMA = 1.0


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of one decode_step call: clean, noised [B, V]; mask words [M, W]; mask_id, seeds, stream int64 [B]."""

    clean: Tensor
    noised: Tensor | None
    params: StepParams
    refusal_mask: Tensor | None
    mask_id: Tensor | None
    seeds: Tensor
    stream: Tensor
    step: int

    @property
    def batch(self) -> int:
        """Number of rows B."""
        return self.clean.shape[0]

    def run(self, backend: str = "auto") -> StepResult:
        """Return decode_step of this case."""
        return decode_step(
            self.clean,
            self.noised,
            self.params,
            refusal_mask=self.refusal_mask,
            mask_id=self.mask_id,
            seeds=self.seeds,
            stream=self.stream,
            step=self.step,
            backend=backend,
        )

    def prepare(self, backend: str = "auto", **options: Any) -> PreparedStep:
        """Return prepare_step of this case; `options` override its arguments."""
        arguments = {
            "batch": self.batch,
            "vocab_size": self.clean.shape[1],
            "device": self.clean.device,
            "dtype": self.clean.dtype,
            "refusal_mask": self.refusal_mask,
            "seeds": self.seeds,
            "stream": self.stream,
        }
        return prepare_step(self.params, backend=backend, **{**arguments, **options})

    def run_scores(self, backend: str = "auto") -> StepScores:
        """Return decode_scores of this case."""
        return decode_scores(
            self.clean,
            self.noised,
            self.params,
            refusal_mask=self.refusal_mask,
            mask_id=self.mask_id,
            backend=backend,
        )

    def to(self, device: torch.device | str) -> Case:
        """Return the case with its tensors on `device`."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def select(self, rows: Sequence[int]) -> Case:
        """Return the case of some of the rows, in the given order."""
        index = torch.tensor(rows, dtype=torch.int64)
        values = {name: self.params.per_row(name, self.batch) for name in self.params.__dataclass_fields__}
        return replace(
            self,
            clean=self.clean[index],
            noised=None if self.noised is None else self.noised[index],
            params=StepParams(**{name: [value[row] for row in rows] for name, value in values.items()}),
            mask_id=None if self.mask_id is None else self.mask_id[index],
            seeds=self.seeds[index],
            stream=self.stream[index],
        )


def make_case(
    seed: int,
    *,
    batch: int,
    vocab_size: int,
    params: StepParams | None = None,
    dtype: torch.dtype = torch.float32,
    n_masks: int = 3,
    tokens_per_mask: int = 200,
    excluded_share: float = 0.0,
) -> Case:
    """Return a random case: clean ~ N(0, 2.5), noised = clean + N(0, 1), each mask half of it from the best tokens.

    Args:
        seed: of the generator; the same seed gives the same case on every machine.
        batch: B.
        vocab_size: V.
        params: None draws every parameter per row, over the whole of its useful range.
        dtype: of the logits.
        n_masks: M; each row gets one of them or none.
        tokens_per_mask: at most so many tokens in a mask.
        excluded_share: share of logits that are -inf, drawn for clean and noised apart.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(batch, vocab_size, generator=generator)

    clean = LOGIT_SIGMA * normal()
    noised = clean + NOISE_SIGMA * normal()
    best = clean[:1].topk(min(tokens_per_mask // 2, vocab_size)).indices.flatten().tolist() if batch else []
    masks = [
        best + torch.randint(vocab_size, (tokens_per_mask // 2,), generator=generator).tolist() for _ in range(n_masks)
    ]
    for logits in (clean, noised):
        logits[torch.rand(batch, vocab_size, generator=generator) < excluded_share] = -torch.inf
    return Case(
        clean=clean.to(dtype),
        noised=noised.to(dtype),
        params=_random_params(batch, generator) if params is None else params,
        refusal_mask=pack_masks(masks, vocab_size),
        mask_id=torch.randint(-1, n_masks, (batch,), generator=generator),
        seeds=torch.randint(2**62, (batch,), generator=generator),
        stream=torch.randint(4, (batch,), generator=generator),
        step=int(torch.randint(100, (1,), generator=generator)),
    )


def _random_params(batch: int, generator: torch.Generator) -> StepParams:
    def pick(values: Sequence[float]) -> list[float]:
        index = torch.randint(len(values), (batch,), generator=generator)
        return [values[i] for i in index.tolist()]

    return StepParams(
        contrast_weight=pick([0.0, 0.25, 0.43, 1.0]),
        plausibility_beta=pick([0.0, 0.01, 0.1, 0.5]),
        refusal_bias=pick([-6.0, -1.0, 0.0, 0.7, 6.0]),
        bias_scope=[int(scope) for scope in pick([0, 1, 20])],
        temperature=pick([0.6, 1.0, 1.7]),
        top_k=[int(k) for k in pick([0, 0, 3, 50])],
        top_p=pick([0.31, 0.87, 1.0]),
        min_p=pick([0.0, 0.03, 0.3]),
        greedy=[choice == 0 for choice in pick([0, 1, 1])],
    )


def oracle_step(case: Case) -> StepResult:
    """Return the result of the float64 oracle; `logprob` is float64."""
    key = DrawKey(case.seeds, case.stream, case.step)
    return eager.step(case.clean, case.noised, _oracle_rows(case), _mask(case), key)


def oracle_scores(case: Case) -> StepScores:
    """Return the scores of the float64 oracle; floating tensors are float64."""
    return eager.scores(case.clean, case.noised, _oracle_rows(case), _mask(case))


def assert_step_matches_oracle(case: Case, actual: StepResult) -> int:
    """Raise AssertionError unless `actual` is the oracle's result up to float32 rounding; return the ambiguous rows."""
    expected = oracle_step(case)
    actual = StepResult(*(tensor.cpu() for tensor in actual))
    _assert_equal("status", actual.status, expected.status)
    wrong = (actual.token != expected.token) | (actual.n_kept != expected.n_kept)
    rows = wrong.nonzero().flatten().tolist()
    if rows:
        ambiguous = _decided_by_rounding(case.select(rows))
        clear = [row for row, excused in zip(rows, ambiguous, strict=True) if not excused]
        if clear:
            row = clear[0]
            raise AssertionError(
                f"rows {clear} differ from the oracle; row {row}: token {int(actual.token[row])}, n_kept "
                f"{int(actual.n_kept[row])}, oracle {int(expected.token[row])}, {int(expected.n_kept[row])}"
            )
        allowed = max(1, int(MAX_AMBIGUOUS_SHARE * case.batch))
        assert len(rows) <= allowed, f"{len(rows)} of {case.batch} rows are decided by rounding; allowed: {allowed}"
    fine = ~wrong & (expected.status == Status.OK)
    error = (actual.logprob.double() - expected.logprob)[fine].abs()
    assert (error <= LOGPROB_ATOL).all(), f"logprob is off by {error.max():.2e}; allowed: {LOGPROB_ATOL}"
    return len(rows)


def assert_step_equals(case: Case, actual: StepResult, expected: StepResult) -> int:
    """Raise AssertionError unless two back ends agree: equal but for a nucleus that rounding decides; return how many.

    Args:
        case: what both were run on.
        actual, expected: their results.
    """
    _assert_equal("status", actual.status, expected.status)
    wrong = (actual.token != expected.token) | (actual.n_kept != expected.n_kept)
    rows = wrong.nonzero().flatten().tolist()
    clear = [row for row, excused in zip(rows, _excuses(case, rows), strict=True) if not excused]
    assert not clear, f"rows {clear} differ: tokens {actual.token[clear].tolist()}, {expected.token[clear].tolist()}"
    allowed = max(1, int(MAX_AMBIGUOUS_SHARE * case.batch))
    assert len(rows) <= allowed, f"{len(rows)} of {case.batch} rows are decided by rounding; allowed: {allowed}"
    fine = ~wrong & (expected.status == Status.OK)
    error = (actual.logprob - expected.logprob)[fine].abs()
    assert (error <= LOGPROB_ATOL).all(), f"logprob differs by {error.max():.2e}; allowed: {LOGPROB_ATOL}"
    return len(rows)


def _excuses(case: Case, rows: list[int]) -> list[bool]:
    """Return for each row whether rounding may decide it: only the mass of a nucleus is no exact float32 arithmetic."""
    if not rows:
        return []
    top_p, greedy = case.params.per_row("top_p", case.batch), case.params.per_row("greedy", case.batch)
    by_rounding = _decided_by_rounding(case.select(rows))
    return [excused and top_p[row] < 1 and not greedy[row] for row, excused in zip(rows, by_rounding, strict=True)]


def assert_scores_match_oracle(case: Case, actual: StepScores) -> None:
    """Raise AssertionError unless `actual` is the oracle's scores up to float32 rounding."""
    expected = oracle_scores(case)
    actual = StepScores(*(tensor.cpu() for tensor in actual))
    _assert_equal("status", actual.status, expected.status)
    for name in ("scores", "biased_clean"):
        ours, truth = getattr(actual, name).double(), getattr(expected, name)
        _assert_equal(f"which {name} are finite", ours.isfinite(), truth.isfinite())
        error = (ours - truth)[truth.isfinite()].abs()
        assert (error <= SCORE_ATOL).all(), f"{name} is off by {error.max():.2e}; allowed: {SCORE_ATOL}"
    differing = int((actual.keep != expected.keep).sum())
    allowed = MAX_AMBIGUOUS_SHARE * case.batch
    assert differing <= allowed, f"keep differs for {differing} tokens; allowed: {allowed:g}"


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test; bins that expect few draws are merged into one.

    Args:
        counts: [K], how often each outcome was drawn.
        probabilities: float64 [K], sums to 1. An outcome of probability 0 that was drawn gives p = 0.
    """
    observed = counts.double()
    if bool((observed[probabilities == 0] > 0).any()):
        return 0.0
    expected = probabilities.double() * observed.sum()
    large = expected >= CHI_SQUARE_MIN_EXPECTED
    if not bool(large.all()):
        observed = torch.cat([observed[large], observed[~large].sum().reshape(1)])
        expected = torch.cat([expected[large], expected[~large].sum().reshape(1)])
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) < 2:
        raise ValueError("chi-square needs at least two bins that expect 5 draws: draw more")
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def _oracle_rows(case: Case) -> Rows:
    return resolve_rows(case.params, batch=case.batch, device=case.clean.device, dtype=torch.float64)


def _mask(case: Case) -> RefusalMask | None:
    if case.refusal_mask is None or case.mask_id is None:
        return None
    return RefusalMask(case.refusal_mask, case.mask_id)


def _decided_by_rounding(case: Case) -> list[bool]:
    """Return per row whether the oracle changes its answer when its logits and top_p move by as much as rounding."""
    expected = oracle_step(case)
    generator = torch.Generator().manual_seed(0)
    changed = torch.zeros(case.batch, dtype=torch.bool)

    def disturbed(logits: Tensor) -> Tensor:
        noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return logits.double() * (1 + ROUNDING * noise)

    for trial in range(ROUNDING_TRIALS):
        noised = None if case.noised is None else disturbed(case.noised)
        moved = 1 + MASS_ROUNDING * (-1) ** trial
        top_p = [p if p == 1 else min(p * moved, 1.0) for p in case.params.per_row("top_p", case.batch)]
        params = replace(case.params, top_p=top_p)
        other = oracle_step(replace(case, clean=disturbed(case.clean), noised=noised, params=params))
        changed |= (other.token != expected.token) | (other.n_kept != expected.n_kept)
    return changed.tolist()


def _assert_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    differing = (actual != expected).nonzero().tolist()
    assert not differing, f"{what} differs from the oracle at {differing[:5]} ({len(differing)} places)"
