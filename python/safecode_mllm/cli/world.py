"""`world`: trains and evaluates the Hazard World model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..terminal import Console
from .parser import STDOUT
from .runtime import one_thread, quiet_transformers, write_json
from .tables import as_text, comparisons_table, rates_table, strata_table

if TYPE_CHECKING:
    from ..hazard_world import Evaluation


def run_train(args: argparse.Namespace, console: Console) -> None:
    """Train a model from a seed, choose its settings on validation scenes, and save both."""
    quiet_transformers(console)
    from ..hazard_world import load_world
    from ..hazard_world.training import train
    from ..hazard_world.tuning import save_tuned, tune

    with console.counting("training") as counter:
        report = train(args.seed, args.out, lambda done, total, loss: counter(done, total, f"loss {loss:.2f}"))
    console.note(f"trained in {report.seconds:.0f} s")
    if args.tune:
        with one_thread(), console.counting("tuning") as counter:
            sweep = tune(*load_world(args.out), progress=counter)
        save_tuned(sweep, args.out)
    console.result(f"model: {args.out}")


def run_eval(args: argparse.Namespace, console: Console) -> None:
    """Evaluate every arm on fresh scenes, with --controls the controls too, and print the comparisons."""
    quiet_transformers(console)
    from ..hazard_world import WEIGHTS, load_world, run_evaluation

    weights = Path(args.model) if args.model else WEIGHTS
    try:
        model, processor = load_world(weights)
    except FileNotFoundError as error:
        raise ConfigError(f"--model {weights}: {error}") from error
    with one_thread(), console.counting("scenes") as counter:
        evaluation = run_evaluation(
            model,
            processor,
            n=args.n,
            seed=args.split_seed,
            controls=args.controls,
            weights=weights,
            progress=counter,
        )
    if args.json:
        write_json(args.json, evaluation.as_dict(with_intervals=True), console)
    if args.json != STDOUT:
        console.result(_report(evaluation))


def _report(evaluation: Evaluation) -> str:
    parts = [as_text(rates_table(evaluation.methods)), as_text(strata_table(evaluation.methods))]
    if evaluation.controls:
        parts.append(as_text(rates_table(evaluation.controls)))
    parts.append(as_text(comparisons_table(evaluation), words=4))
    return "\n\n".join(parts)
