"""`judge calibrate`: fits a judge's probabilities to labelled requests."""

from __future__ import annotations

import argparse
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..judges.protocol import Verdict
from ..terminal import Console, format_table
from .judging import Line, check_judge, load_judge, read_lines
from .outputs import check_file
from .parser import STDOUT
from .runtime import write_json

if TYPE_CHECKING:
    from ..judges import Judge
    from ..judges.fitting import Fit
    from ..judges.metrics import Bin, Quality


def run_calibrate(args: argparse.Namespace, console: Console) -> None:
    """Judge every labelled request, fit, tell what it brings, and write the calibration and the diagram."""
    check_judge(args)
    if args.calibration is not None:
        raise ConfigError("--calibration: a calibration is fitted to the judge as it is; leave it out")
    if args.dry_run:
        raise ConfigError("--dry-run: price the job with `judge --jsonl FILE --dry-run`; the labels may stay in it")
    lines = read_lines(args.data, "--data", labelled=True)
    for option, target in (("--save", args.save), ("--plot", args.plot)):
        if target is not None:
            check_file(option, target)
    if args.plot is not None:
        _pyplot()  # missing? Then before the work
    judge = load_judge(args, console)
    verdicts = _judge(lines, judge, args.batch_size, console)
    from ..judges.fitting import fit_calibration

    fit = fit_calibration(
        verdicts,
        [line.label == "unsafe" for line in lines],
        judge=judge.name,
        version=getattr(judge, "version", None),
        threshold=args.threshold,
    )
    Path(args.save).parent.mkdir(parents=True, exist_ok=True)
    fit.calibration.save(args.save)
    if args.json != STDOUT:
        console.result(_report(fit, args.save))
    if args.json:
        write_json(args.json, _as_dict(fit), console)
    if args.plot is not None:
        draw_reliability(fit, args.plot)
        console.note(f"wrote {args.plot}")


def _judge(lines: list[Line], judge: Judge, batch_size: int, console: Console) -> list[Verdict]:
    verdicts: list[Verdict] = []
    with console.counting("verdicts") as counter:
        for start in range(0, len(lines), batch_size):
            verdicts += judge.judge_many([line.request() for line in lines[start : start + batch_size]])
            counter(len(verdicts), len(lines), "")
    return verdicts


def _report(fit: Fit, target: str) -> str:
    fitted = fit.calibration
    rows = [["accuracy", "accuracy"], ["ROC-AUC", "auc"], ["ECE", "ece"], ["precision", "precision"]]
    rows.append(["recall", "recall"])
    table = [[title, _rate(getattr(fit.before, name)), _rate(getattr(fit.after, name))] for title, name in rows]
    counts = ", ".join(f"{count} {name}" for name, count in fit.before.outcomes.items())
    reliability = [
        [f"{b.low:.1f} - {b.high:.1f}", str(b.n), _rate(b.mean_p), _rate(b.unsafe), str(a.n), _rate(a.unsafe)]
        for b, a in zip(fit.table_before, fit.table_after, strict=True)
    ]
    return "\n\n".join(
        [
            f"{fit.before.n} labelled requests: {counts}",
            format_table(("at the threshold", "before", "after"), table),
            format_table(("probability", "before: n", "mean p", "unsafe", "after: n", "unsafe"), reliability),
            "After: each fifth of the requests judged with a fit to the others.",
            f"scale {fitted.scale:.3f}, bias {fitted.bias:+.3f}, threshold {fitted.threshold:g}: {target}",
        ]
    )


def _rate(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"


def _as_dict(fit: Fit) -> dict[str, object]:
    def bins(table: list[Bin]) -> list[dict[str, float]]:
        return [vars(b) for b in table]

    def rates(quality: Quality) -> dict[str, object]:
        return quality.as_dict()

    return {
        "calibration": vars(fit.calibration),
        "before": rates(fit.before) | {"reliability": bins(fit.table_before)},
        "after": rates(fit.after) | {"reliability": bins(fit.table_after)},
    }


def _pyplot() -> object:
    from ..extras import optional_imports

    with optional_imports():
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    return pyplot


def draw_reliability(fit: Fit, target: str) -> None:
    """Draw how often requests of each probability are unsafe, before and after, to a file."""
    pyplot: object = _pyplot()
    figure, axes = pyplot.subplots(figsize=(5, 5))  # type: ignore[attr-defined]
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="as it should be")
    for name, table, quality in (("before", fit.table_before, fit.before), ("after", fit.table_after, fit.after)):
        full = [b for b in table if b.n]
        label = f"{name}, ECE {quality.ece:.3f}"
        axes.plot([b.mean_p for b in full], [b.unsafe for b in full], marker="o", label=label)
    axes.set(xlabel="probability of unsafe", ylabel="share that is unsafe", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, bbox_inches="tight")
    pyplot.close(figure)  # type: ignore[attr-defined]
