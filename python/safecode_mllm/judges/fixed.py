"""A judge that always says the same: for tests, ablations and people who know the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.protocol import JudgeRequest, Verdict

FixedLabel = Literal["safe", "unsafe"]
FIXED_LABELS: tuple[FixedLabel, ...] = get_args(FixedLabel)


class FixedJudge:
    """Gives every request the same verdict.

    Args:
        label: "safe" or "unsafe".
        p_unsafe: probability in [0, 1] to report, >= 0.5 exactly if the label is "unsafe"; None reports none.

    Raises:
        ConfigError: the label is neither, or p_unsafe contradicts it.
    """

    name = "fixed"
    version = "1"

    def __init__(self, label: FixedLabel, p_unsafe: float | None = None) -> None:
        if label not in FIXED_LABELS:
            raise ConfigError(f'label={label!r} is not legal: it must be "safe" or "unsafe"')
        legal = "[0.5, 1]" if label == "unsafe" else "[0, 0.5)"
        in_range = p_unsafe is None or (0.0 <= p_unsafe <= 1.0 and (p_unsafe >= 0.5) == (label == "unsafe"))
        if not in_range:
            raise ConfigError(f"p_unsafe={p_unsafe!r} is not legal: with label={label!r} it must be in {legal}")
        self._verdict = Verdict(label=label, p_unsafe=p_unsafe, threshold=0.5, judge=self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """What it always says."""
        return {"label": self._verdict.label, "p_unsafe": self._verdict.p_unsafe}

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return the fixed verdict once per request."""
        return [self._verdict] * len(requests)

    def __repr__(self) -> str:
        return f"FixedJudge({self._verdict.label!r}, p_unsafe={self._verdict.p_unsafe!r})"
