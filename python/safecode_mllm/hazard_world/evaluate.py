"""The whole evaluation: arms, controls, strata, intervals and paired comparisons, on fresh scenes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import SafeCoDeConfig
from ..judges.protocol import Verdict
from .arms import ON_UNKNOWN, PLAIN, Arm, make_arms, make_controls
from .bench import DEFAULT_BATCH_SIZE, Bench, Progress, make_bench
from .comparisons import Comparison, compare
from .paths import WEIGHTS
from .scenes import STRATA, Stratum
from .score import Outcome, classify, is_right
from .splits import Split
from .statistics import DEFAULT_RESAMPLES, Interval, Metric, Rates, intervals, rates
from .tuning import load_tuned

DEFAULT_N = 480
SAFECODE = "safecode"
JUDGE_ALONE = "judge_alone"
# Scenes of the contact sheet are drawn apart from those of any evaluation a person is likely to run.
_DEMO_SEED = 2_000


@dataclass(frozen=True)
class MethodResult:
    """One arm or control.

    Attributes:
        overall: rates over all scenes.
        strata: rates per stratum.
        intervals: 95 % bootstrap interval per metric, over all scenes.
        outcomes: per scene, in the order of the scenes.
        seconds: wall-clock seconds of decoding.
    """

    overall: Rates
    strata: dict[Stratum, Rates]
    intervals: dict[Metric, Interval]
    outcomes: list[Outcome]
    seconds: float

    def as_dict(self, *, with_intervals: bool) -> dict[str, Any]:
        """Return plain JSON types."""
        values: dict[str, Any] = self.overall.as_dict()
        values["strata"] = {name: result.as_dict() for name, result in self.strata.items()}
        if with_intervals:
            values["intervals"] = {metric: list(bounds) for metric, bounds in self.intervals.items()}
        return values


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation found.

    Attributes:
        methods: result per arm.
        controls: result per control; empty if none were run.
        comparisons: paired comparisons on the same scenes.
        judge_accuracy: share of right verdicts per stratum.
        tuned: the settings of arm safecode_tuned; None if nothing was tuned for this model, and the arm is left out.
        split: where the scenes come from.
        seed: seed of the scenes.
        n: number of scenes.
        seconds: wall-clock seconds in all.
    """

    methods: dict[str, MethodResult]
    controls: dict[str, MethodResult]
    comparisons: list[Comparison]
    judge_accuracy: dict[Stratum, float]
    tuned: SafeCoDeConfig | None
    split: Split
    seed: int
    n: int
    seconds: float

    def as_dict(self, *, with_intervals: bool = False) -> dict[str, Any]:
        """Return plain JSON types: the methods, and with intervals also controls, comparisons and the judge."""
        values: dict[str, Any] = {
            "methods": {name: m.as_dict(with_intervals=with_intervals) for name, m in self.methods.items()},
            "split": self.split,
            "split_seed": self.seed,
            "n": self.n,
        }
        if with_intervals:
            values["controls"] = {name: c.as_dict(with_intervals=True) for name, c in self.controls.items()}
            values["comparisons"] = [comparison.as_dict() for comparison in self.comparisons]
            values["judge_accuracy"] = dict(self.judge_accuracy)
            values["tuned"] = None if self.tuned is None else self.tuned.overrides()
            values["seconds"] = round(self.seconds, 1)
        return values


@dataclass(frozen=True)
class DemoScene:
    """One row of the contact sheet.

    Attributes:
        image: the picture, 48 x 48.
        request: what was asked.
        unsafe: the truth.
        stratum: which designed error the scene probes.
        verdict: the self-judge's verdict.
        plain: plain answer.
        safecode: answer with preset `safecode`.
        plain_right: whether the plain answer fits the truth.
        safecode_right: whether the steered one does.
    """

    image: Image.Image
    request: str
    unsafe: bool
    stratum: Stratum
    verdict: Verdict
    plain: str
    safecode: str
    plain_right: bool
    safecode_right: bool


def run_evaluation(
    model: Any,
    processor: Any,
    *,
    n: int = DEFAULT_N,
    seed: int = 0,
    split: Split = "test",
    controls: bool = False,
    only: Sequence[str] | None = None,
    tuned: SafeCoDeConfig | None = None,
    weights: str | Path | None = None,
    priors: bool = True,
    batch_size: int = DEFAULT_BATCH_SIZE,
    resamples: int = DEFAULT_RESAMPLES,
    progress: Progress | None = None,
) -> Evaluation:
    """Draw fresh scenes, decode every arm through the pipeline and score whole generations.

    Args:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        n: number of scenes, at least 2; even numbers are half safe, half unsafe.
        seed: seed of the scenes, of noise and of bootstraps, >= 0.
        split: "test" for anything that is reported.
        controls: run the controls too.
        only: names of arms and controls to keep; None keeps all.
        tuned: settings of arm safecode_tuned; None reads those saved beside the weights.
        weights: the model's folder; None is the model that ships with the package.
        priors: False for the control world without priors: its one expectation is tested instead.
        batch_size: requests per forward pass.
        resamples: bootstrap samples.
        progress: called with (requests done, requests in all, arm).

    Returns:
        Results per arm and control, and the comparisons whose arms were run.

    Raises:
        ValueError: n, seed or a name in `only` is out of range.
    """
    start = time.perf_counter()
    settings = tuned or load_tuned(weights or WEIGHTS)
    arms, extra = make_arms(settings), make_controls() if controls else []
    _check_names(only, [arm.name for arm in (*arms, *extra)])
    bench = make_bench(model, processor, n=n, seed=seed, split=split, batch_size=batch_size)
    chosen = [arm for arm in (*arms, *extra) if only is None or arm.name in only]
    results = _run_arms(bench, chosen, resamples, progress)
    outcomes = {name: result.outcomes for name, result in results.items()}
    control_names = [arm.name for arm in extra]
    broken = {name: result for name, result in results.items() if name in control_names}
    if controls:
        broken[JUDGE_ALONE] = _score(bench, bench.judge_alone(), resamples, seconds=0.0)
    return Evaluation(
        methods={name: result for name, result in results.items() if name not in control_names},
        controls=broken,
        comparisons=compare(outcomes, bench.unsafe, bench.strata, seed, priors=priors, resamples=resamples),
        judge_accuracy=bench.judge_accuracy(),
        tuned=settings,
        split=split,
        seed=seed,
        n=n,
        seconds=time.perf_counter() - start,
    )


def demo_scenes(
    model: Any, processor: Any, *, n: int = 12, seed: int = _DEMO_SEED, batch_size: int = DEFAULT_BATCH_SIZE
) -> list[DemoScene]:
    """Return scenes with their plain and steered answers, drawn from the test split and not picked by outcome.

    Args:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        n: number of scenes, at least 2.
        seed: seed of the scenes, >= 0.
        batch_size: requests per forward pass.
    """
    bench = make_bench(model, processor, n=n, seed=seed, batch_size=batch_size)
    plain, steered = bench.decode(Arm(PLAIN, None)), bench.decode(Arm(SAFECODE, SafeCoDeConfig(on_unknown=ON_UNKNOWN)))
    return [
        DemoScene(
            image=bench.images[row],
            request=item.request,
            unsafe=item.scene.unsafe,
            stratum=item.scene.stratum,
            verdict=bench.verdicts[row],
            plain=plain[row],
            safecode=steered[row],
            plain_right=is_right(classify(plain[row]), item.scene.unsafe),
            safecode_right=is_right(classify(steered[row]), item.scene.unsafe),
        )
        for row, item in enumerate(bench.items)
    ]


def _run_arms(bench: Bench, arms: Sequence[Arm], resamples: int, progress: Progress | None) -> dict[str, MethodResult]:
    results: dict[str, MethodResult] = {}
    for index, arm in enumerate(arms):
        start = time.perf_counter()
        outcomes = bench.outcomes(arm, _share_of(progress, index, len(arms), arm.name))
        results[arm.name] = _score(bench, outcomes, resamples, time.perf_counter() - start)
    return results


def _score(bench: Bench, outcomes: list[Outcome], resamples: int, seconds: float) -> MethodResult:
    unsafe, strata = bench.unsafe, bench.strata
    by_stratum: dict[Stratum, Rates] = {}
    for stratum in STRATA:
        rows = [row for row, s in enumerate(strata) if s == stratum]
        if rows:
            by_stratum[stratum] = rates([outcomes[row] for row in rows], [unsafe[row] for row in rows])
    bounds = intervals(outcomes, unsafe, bench.seed, resamples)
    return MethodResult(rates(outcomes, unsafe), by_stratum, bounds, outcomes, seconds)


def _share_of(progress: Progress | None, index: int, arms: int, label: str) -> Callable[[int, int], None] | None:
    """Turn progress within one arm into progress over all of them."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, arms * total, label)


def _check_names(only: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise ValueError(f"only={unknown!r} names no arm or control; known: {list(known)}")
