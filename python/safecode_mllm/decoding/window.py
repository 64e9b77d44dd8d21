"""How long each row is guided: a fixed number of steps, all of them, or until its opening is settled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from safecode_mllm.config import DEFAULT_STEPS

# An answer that has left all refusal phrases is under way after the window that a fixed one would have.
ADAPTIVE_ANSWER_STEPS = DEFAULT_STEPS
# No refusal phrase has so many tokens, in any tokenizer that writes words.
ADAPTIVE_MAX_STEPS = 32

Steps = int | Literal["all", "adaptive"]


class Window:
    """Which rows are guided at a step.

    "adaptive" guides a row until its refusal phrase is complete, or until it has left all phrases for as many tokens as
    the default window has. A row's window depends on its own tokens alone, never on the batch.

    Args:
        steps: for each row its number of guided steps, "all", or "adaptive".
        steered: for each row whether it is steered at all.

    Attributes:
        adaptive: whether the tokens decide about any row's window.
    """

    def __init__(self, steps: Sequence[Steps], steered: Sequence[bool]) -> None:
        self._adaptive = [kind == "adaptive" for kind in steps]
        self._limits = [_limit(kind) if is_steered else 0 for kind, is_steered in zip(steps, steered, strict=True)]
        self._open = [True] * len(self._limits)

    @property
    def adaptive(self) -> bool:
        """Whether the tokens decide about any row's window."""
        return any(self._adaptive)

    @property
    def limits(self) -> list[float]:
        """For each row the step before which its window ends at the latest; infinite for "all"."""
        return list(self._limits)

    def guides(self, step: int) -> bool:
        """Whether any row is guided at this step."""
        return any(self.guided_rows(step))

    def guided_rows(self, step: int) -> list[bool]:
        """For each row whether it is guided at this step."""
        return [step < limit and is_open for limit, is_open in zip(self._limits, self._open, strict=True)]

    def observe(self, row: int, step: int, *, in_phrase: bool, complete: bool) -> None:
        """Take in where a row's token at `step` has brought it: inside a refusal phrase, or at the end of one."""
        if self._adaptive[row] and (complete or (not in_phrase and step + 1 >= ADAPTIVE_ANSWER_STEPS)):
            self._open[row] = False

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place."""
        for name in ("_adaptive", "_limits", "_open"):
            setattr(self, name, [value for value in getattr(self, name) for _ in range(times)])


def _limit(steps: Steps) -> float:
    return {"adaptive": ADAPTIVE_MAX_STEPS, "all": math.inf}[steps] if isinstance(steps, str) else steps
