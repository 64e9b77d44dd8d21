"""Choosing sigma, contrast weight and lambda, on validation scenes only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SafeCoDeConfig
from .arms import ON_UNKNOWN, Arm
from .bench import DEFAULT_BATCH_SIZE, Progress, make_bench
from .paths import TUNED_FILE
from .statistics import rates

SIGMAS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.4)
CONTRAST_WEIGHTS = (0.43, 0.8, 1.2)
LAMBDAS = (0.5, 1.0, 1.5)
DEFAULT_VALIDATION_N = 240
# Apart from every seed of a test evaluation only for clarity: the splits differ anyway.
VALIDATION_SEED = 1


@dataclass(frozen=True)
class SweepPoint:
    """Balanced accuracy of one setting on validation."""

    noise_sigma: float
    contrast_weight: float
    strength: float
    balanced_accuracy: float

    def config(self) -> SafeCoDeConfig:
        """Return the setting as a configuration; boost and suppression get the same strength."""
        return SafeCoDeConfig(
            noise_sigma=self.noise_sigma,
            contrast_weight=self.contrast_weight,
            lambda_boost=self.strength,
            lambda_supp=self.strength,
            on_unknown=ON_UNKNOWN,
        )


@dataclass(frozen=True)
class Sweep:
    """A whole sweep.

    Attributes:
        sigmas: one point per sigma, everything else at its default.
        grid: one point per contrast weight and lambda, at the best sigma.
        best_sigma: sigma of the best point of `sigmas`; ties go to the first in SIGMAS, the smallest.
        best: best point of `grid`; ties go to the first: the smaller contrast weight, then the smaller lambda.
    """

    sigmas: list[SweepPoint]
    grid: list[SweepPoint]
    best_sigma: float
    best: SweepPoint


def tune(
    model: Any,
    processor: Any,
    *,
    n: int = DEFAULT_VALIDATION_N,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress | None = None,
) -> Sweep:
    """Sweep sigma at the default settings, then contrast weight and lambda at the best sigma.

    Args:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        n: number of validation scenes.
        batch_size: requests per forward pass.
        progress: called with (settings done, settings in all, label).
    """
    bench = make_bench(model, processor, n=n, seed=VALIDATION_SEED, split="val", batch_size=batch_size)
    default = SafeCoDeConfig()
    total = len(SIGMAS) + len(CONTRAST_WEIGHTS) * len(LAMBDAS)
    done = 0

    def measure(sigma: float, weight: float, strength: float) -> SweepPoint:
        nonlocal done
        config = SweepPoint(sigma, weight, strength, 0.0).config()
        score = rates(bench.outcomes(Arm("sweep", config)), bench.unsafe).balanced_accuracy
        done += 1
        if progress is not None:
            progress(done, total, f"sigma {sigma:g}, contrast {weight:g}, lambda {strength:g}")
        return SweepPoint(sigma, weight, strength, score)

    sigmas = [measure(sigma, default.contrast_weight, default.lambda_boost) for sigma in SIGMAS]
    best_sigma = max(sigmas, key=lambda point: point.balanced_accuracy).noise_sigma
    grid = [measure(best_sigma, weight, strength) for weight in CONTRAST_WEIGHTS for strength in LAMBDAS]
    return Sweep(sigmas, grid, best_sigma, max(grid, key=lambda point: point.balanced_accuracy))


def save_tuned(sweep: Sweep, folder: str | Path) -> None:
    """Write the chosen settings beside a model's weights."""
    chosen = sweep.best.config().overrides()
    (Path(folder) / TUNED_FILE).write_text(json.dumps(chosen, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tuned(folder: str | Path) -> SafeCoDeConfig | None:
    """Return the settings chosen for the model of a folder, None if none were saved."""
    path = Path(folder) / TUNED_FILE
    if not path.is_file():
        return None
    return SafeCoDeConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
