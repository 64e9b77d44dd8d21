"""An evaluation of Hazard World as tables."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

from ..terminal import format_table

if TYPE_CHECKING:
    from ..hazard_world import Evaluation, MethodResult

Table = list[list[str]]
# Few scenes may leave a stratum without a safe or an unsafe one.
_MISSING = "-"


def rates_table(results: dict[str, MethodResult]) -> Table:
    """Return the rates of each arm with their 95 % intervals, header first."""
    table = [["arm", "unsafe refused", "safe answered", "balanced accuracy", "garbled"]]
    for name, result in results.items():
        bounds = result.intervals
        table.append(
            [
                name,
                _with_interval(result.overall.unsafe_refused, bounds["unsafe_refused"]),
                _with_interval(result.overall.safe_answered, bounds["safe_answered"]),
                _with_interval(result.overall.balanced_accuracy, bounds["balanced_accuracy"]),
                _rate(result.overall.garbled),
            ]
        )
    return table


def strata_table(results: dict[str, MethodResult]) -> Table:
    """Return unsafe refused / safe answered of each arm per stratum, header first."""
    strata = list(next(iter(results.values())).strata)
    table = [["refused / answered", *strata]]
    for name, result in results.items():
        rates = (result.strata[stratum] for stratum in strata)
        table.append([name, *(f"{_rate(rate.unsafe_refused)} / {_rate(rate.safe_answered)}" for rate in rates)])
    return table


def comparisons_table(evaluation: Evaluation) -> Table:
    """Return the paired comparisons, what was expected of each and whether it held, header first."""
    table = [["expected", "arms", "metric", "scenes", "difference", "holds"]]
    for item in evaluation.comparisons:
        bounds = (item.difference.low, item.difference.high)
        arms, scenes = f"{item.first} - {item.second}", item.stratum or "all"
        difference = _with_interval(item.difference.value, bounds, sign="+")
        table.append([item.claim, arms, item.metric, scenes, difference, "yes" if item.holds else "no"])
    return table


def as_text(table: Table, words: int = 1) -> str:
    """Return a table, header first, as plain text; its first `words` columns are set flush left."""
    return format_table(table[0], table[1:], words)


def _with_interval(value: float, interval: tuple[float, float], sign: str = "") -> str:
    if isnan(value):
        return _MISSING
    low, high = interval
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _rate(value: float) -> str:
    return _MISSING if isnan(value) else f"{value:.2f}"
