"""A judge's probabilities turned into frequencies: a scale and a bias on its log-odds, fitted once, kept in a file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.protocol import Label

DEFAULT_THRESHOLD = 0.5
# Probabilities of exactly 0 and 1 have no finite log-odds; float32 softmax reaches them.
_SMALLEST = 1e-7


@dataclass(frozen=True)
class Calibration:
    """p' = sigmoid(scale * logit(p) + bias), Platt's scaling on log-odds.

    Attributes:
        scale: > 0, so that the order of requests stays.
        bias: any finite number.
        threshold: "unsafe" from this calibrated probability on, in (0, 1).
        judge: name of the judge that it was fitted to.
        version: that judge's version; another one needs a fit of its own.
        n: how many labelled requests it was fitted to.
    """

    scale: float = 1.0
    bias: float = 0.0
    threshold: float = DEFAULT_THRESHOLD
    judge: str | None = None
    version: str | None = None
    n: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale={self.scale!r} must be a finite number above 0: else the order would turn round")
        if not math.isfinite(self.bias):
            raise ConfigError(f"bias={self.bias!r} must be a finite number")
        check_threshold(self.threshold)

    def apply(self, p: float) -> float:
        """Return the calibrated probability of `p` in [0, 1]."""
        return sigmoid(self.scale * logit(p) + self.bias)

    def check(self, judge: str, version: str | None) -> None:
        """Raise ConfigError if this was fitted to another judge, or to another version of it."""
        if (self.judge, self.version) != (None, None) and (self.judge, self.version) != (judge, version):
            raise ConfigError(
                f"this calibration was fitted to judge {self.judge!r} version {self.version!r} and not to "
                f"{judge!r} version {version!r}: fit one with `judge calibrate`"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ConfigError: there is no such file, or it holds no calibration.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            known = {field.name for field in fields(cls)}
            if not isinstance(values, dict) or not {"scale", "bias"} <= set(values) <= known:
                raise ValueError("it has no scale and bias, or fields of something else")
            return cls(
                **{name: _number(values[name]) for name in ("scale", "bias", "threshold") if name in values},
                judge=_text_or_none(values.get("judge")),
                version=_text_or_none(values.get("version")),
                n=int(_number(values.get("n", 0))),
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"calibration {os.fspath(path)!r} cannot be used: {error}") from error


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def check_threshold(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is in (0, 1)."""
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold={threshold!r} must lie in (0, 1)")


def logit(p: float) -> float:
    """Return the log-odds of `p`, finite also at 0 and 1."""
    p = min(max(p, _SMALLEST), 1.0 - _SMALLEST)
    return math.log(p / (1.0 - p))


def sigmoid(x: float) -> float:
    """Return the probability of log-odds `x`, without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def decide(
    label: Label, p: float | None, threshold: float, calibration: Calibration | None
) -> tuple[Label, float | None, float]:
    """Return label, probability and threshold that agree with each other.

    Args:
        label: what the judge said in words; it stands where there is no probability.
        p: what its tokens say, uncalibrated; dropped if it contradicts the words.
        threshold: the judge's threshold, unless a calibration brings its own.
        calibration: applied to `p`; None applies none.
    """
    if label == "unknown" or p is None or (p >= DEFAULT_THRESHOLD) != (label == "unsafe"):
        return label, None, threshold
    return from_probability(p, threshold, calibration)


def from_probability(p: float, threshold: float, calibration: Calibration | None) -> tuple[Label, float, float]:
    """Return label, probability and threshold of a judge that gives probabilities alone."""
    if calibration is not None:
        p, threshold = calibration.apply(p), calibration.threshold
    return ("unsafe" if p >= threshold else "safe"), p, threshold
