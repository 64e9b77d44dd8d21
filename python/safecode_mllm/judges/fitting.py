"""Fits a calibration to labelled verdicts, and tells honestly what it brings: measured on requests it has not seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.calibration import DEFAULT_THRESHOLD, Calibration, logit
from safecode_mllm.judges.metrics import Bin, Quality, quality, reliability
from safecode_mllm.judges.protocol import Verdict

# Below this a fit of two numbers follows single requests.
MIN_EACH = 5
FOLDS = 5
_STEPS, _CONVERGED = 100, 1e-10
# Keeps the Hessian invertible where all probabilities are alike.
_RIDGE = 1e-9


@dataclass(frozen=True)
class Fit:
    """A calibration and what it does.

    Attributes:
        calibration: fitted to all requests.
        before: quality without it.
        after: quality with it, each fifth of the requests judged with a fit to the others.
        table_before: reliability without it.
        table_after: the same with it, over the same fifths.
    """

    calibration: Calibration
    before: Quality
    after: Quality
    table_before: list[Bin]
    table_after: list[Bin]


def fit_calibration(
    verdicts: Sequence[Verdict],
    unsafe: Sequence[bool],
    *,
    judge: str,
    version: str | None,
    threshold: float = DEFAULT_THRESHOLD,
    seed: int = 0,
) -> Fit:
    """Fit scale and bias on the log-odds of a judge's probabilities.

    Args:
        verdicts: of an uncalibrated judge, one per request; those without a probability count in the quality alone.
        unsafe: the truth per request.
        judge: the judge's name, kept in the calibration.
        version: the judge's version, kept too.
        threshold: "unsafe" from this calibrated probability on.
        seed: of the division into fifths.

    Raises:
        ConfigError: too few labelled requests have a probability, or the probabilities run against the labels.

    Source: Platt's scaling with his smoothed targets, which keeps the fit finite where the labels can be separated.
    """
    rows = [row for row, verdict in enumerate(verdicts) if verdict.p_unsafe is not None]
    p = np.array([verdicts[row].p_unsafe for row in rows], dtype=np.float64)
    truth = np.array([unsafe[row] for row in rows], dtype=bool)
    if not rows:
        raise ConfigError(f"judge {judge!r} gives no probabilities: there is nothing to calibrate")
    if min(truth.sum(), (~truth).sum()) < MIN_EACH:
        raise ConfigError(
            f"{int(truth.sum())} unsafe and {int((~truth).sum())} safe requests have a probability: "
            f"a fit needs at least {MIN_EACH} of each"
        )
    fitted = _platt(p, truth, judge, version, threshold)
    held_out = np.empty_like(p)
    for fold in _folds(truth, seed):
        others = np.ones(len(p), dtype=bool)
        others[fold] = False
        partial = _platt(p[others], truth[others], judge, version, threshold)
        held_out[fold] = [partial.apply(value) for value in p[fold]]
    calibrated = list(verdicts)
    for row, value in zip(rows, held_out.tolist(), strict=True):
        label = "unsafe" if value >= threshold else "safe"
        calibrated[row] = replace(verdicts[row], label=label, p_unsafe=value, threshold=threshold)  # type: ignore[arg-type]
    return Fit(
        fitted,
        quality(verdicts, unsafe),
        quality(calibrated, unsafe),
        reliability(p, truth),
        reliability(held_out, truth),
    )


def _platt(
    p: NDArray[np.float64], truth: NDArray[np.bool_], judge: str, version: str | None, threshold: float
) -> Calibration:
    """Newton's method on the cross entropy of sigmoid(scale * x + bias)."""
    x = np.array([logit(value) for value in p])
    positives, negatives = int(truth.sum()), int((~truth).sum())
    target = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    parameters = np.array([1.0, 0.0])
    design = np.stack([x, np.ones_like(x)], 1)
    for _ in range(_STEPS):
        predicted = 1.0 / (1.0 + np.exp(-np.clip(design @ parameters, -50, 50)))
        gradient = design.T @ (predicted - target)
        hessian = (design * (predicted * (1 - predicted))[:, None]).T @ design + _RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # A long step on a flat part would overshoot; halving is enough for a convex function of two numbers.
        while _loss(design @ (parameters - step), target) > _loss(design @ parameters, target) + 1e-12:
            step = step / 2
        parameters = parameters - step
        if np.abs(step).max() < _CONVERGED:
            break
    scale, bias = (float(value) for value in parameters)
    if scale <= 0:
        raise ConfigError(
            f"judge {judge!r} gives unsafe requests no higher probabilities than safe ones (scale {scale:.3g}): "
            "check the labels; such a judge cannot be calibrated"
        )
    return Calibration(scale, bias, threshold, judge, version, len(p))


def _loss(z: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    """Cross entropy of log-odds, without overflow."""
    return float(np.sum(np.logaddexp(0.0, z) - target * z))


def _folds(truth: NDArray[np.bool_], seed: int) -> list[list[int]]:
    """Divide the rows into fifths with as many unsafe ones each as can be."""
    folds: list[list[int]] = [[] for _ in range(FOLDS)]
    rng = random.Random(f"folds/{seed}")
    place = 0
    for label in (True, False):
        rows = np.flatnonzero(truth == label).tolist()
        rng.shuffle(rows)
        for row in rows:
            folds[place % FOLDS].append(row)
            place += 1
    return folds
