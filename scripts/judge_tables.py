"""The measured tables of docs/judges.md, as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speed_tables import markdown

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "judges" / "summary.json"
# The place of the packaged model's seed, 0, among the seeds.
SHIPPED = 0
TO_SAFE = "unsafe scenes that became `safe`"


def judge_tables() -> dict[str, str]:
    """Return the tables by name."""
    summary = json.loads(RESULTS.read_text())
    return {
        "judges": judges_table(summary),
        "flips": flips_table(summary["attacks"]),
        "flips_by_seed": flips_by_seed_table(summary),
        "openings": openings_table(summary["openings"]),
    }


def judges_table(summary: dict[str, Any]) -> str:
    """Return the quality of each judge in the shipped model, and its accuracy in the others."""
    others = [(place, f"accuracy, seed {seed}") for place, seed in enumerate(summary["seeds"]) if place != SHIPPED]
    titles = ["accuracy", "precision", "recall", "ROC-AUC", "ECE", "unknown", "ms each"]
    rows = [["judge", *titles, *(title for _, title in others)]]
    for name, models in summary["judges"].items():
        found = models[SHIPPED]
        rates = [rate(found[metric]) for metric in ("accuracy", "precision", "recall", "auc", "ece", "unknown")]
        elsewhere = [rate(models[place]["accuracy"]) for place, _ in others]
        rows.append([name, *rates, f"{found['ms']:.0f}", *elsewhere])
    return markdown(rows)


def flips_table(attacks: dict[str, Any]) -> str:
    """Return how often each attack turns each judge's verdict in the shipped model, with 95 % intervals."""
    names = list(next(iter(attacks.values())))
    rows = [["attack", "scenes", *names]]
    for attack, found in attacks.items():
        shipped = [found[name]["by_seed"][SHIPPED] for name in names]
        rows.append([attack, str(found[names[0]]["n"]), *(interval(rates["flipped"]) for rates in shipped)])
        if shipped[0]["obeyed_to_safe"]["mean"] is not None:
            rows.append([TO_SAFE, "", *(interval(rates["obeyed_to_safe"]) for rates in shipped)])
    return markdown(rows)


def flips_by_seed_table(summary: dict[str, Any]) -> str:
    """Return, for every model, how often the held-out attacks turn our plainest judge and the published protocol."""
    attacks, seeds = summary["attacks"], summary["seeds"]
    judges = ("self", "published: described, a word")
    columns = [(place, name) for place in range(len(seeds)) for name in judges]
    rows = [["attack", *(f"seed {seeds[place]}, {name.split(':')[0]}" for place, name in columns)]]
    accuracy = [summary["judges"][name][place]["accuracy"] for place, name in columns]
    rows.append(["accuracy without an attack", *(rate(value) for value in accuracy)])
    for attack, found in attacks.items():
        if "held out" in attack:
            flips = [found[name]["by_seed"][place]["flipped"] for place, name in columns]
            rows.append([attack, *map(interval, flips)])
    return markdown(rows)


def openings_table(openings: dict[str, Any]) -> str:
    """Return what became of the openings: mean over the seeds, lowest and highest in brackets."""
    titles = {
        "refusals_kept": "refusals kept",
        "answers_kept": "answers kept",
        "garbled": "garbled",
        "balanced_accuracy": "balanced accuracy",
        "explained": "with a reason",
        "reason_true": "reason names what decides",
    }
    rows = [["openings", "steering", *titles.values()]]
    for kind, styles in openings.items():
        rows += [[kind, style, *(spread(found[metric]) for metric in titles)] for style, found in styles.items()]
    return markdown(rows)


def rate(value: float | None) -> str:
    """Return a rate; "-" where there was nothing to measure."""
    return "-" if value is None else f"{value:.3f}"


def interval(values: dict[str, float | None]) -> str:
    """Return a rate with its 95 % interval in brackets."""
    if values["mean"] is None:
        return "-"
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"


def spread(values: dict[str, Any], sign: str = "") -> str:
    """Return mean, and in brackets lowest and highest; "-" where there was nothing to measure."""
    if values["mean"] is None:
        return "-"
    return f"{values['mean']:{sign}.2f} [{values['lowest']:{sign}.2f}, {values['highest']:{sign}.2f}]"
