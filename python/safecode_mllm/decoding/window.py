"""How long each row is guided: a fixed number of steps, all of them, or until its opening is settled."""

from __future__ import annotations

import math
from collections.abc import Sequence

from safecode_mllm.config import DEFAULT_STEPS

# An answer that has left all refusal phrases is under way after the window that a fixed one would have.
ADAPTIVE_ANSWER_STEPS = DEFAULT_STEPS
# No refusal phrase has so many tokens, in any tokenizer that writes words.
ADAPTIVE_MAX_STEPS = 32


class Window:
    """Which rows are guided at a step.

    "adaptive" guides a row until its refusal phrase is complete, or until it has left all phrases for as many tokens as
    the default window has. A row's window depends on its own tokens alone, never on the batch.

    Args:
        steps: number of guided steps, "all", or "adaptive".
        steered: for each row whether it is steered at all.

    Attributes:
        adaptive: whether rows have windows of their own.
    """

    def __init__(self, steps: int | str, steered: Sequence[bool]) -> None:
        self.adaptive = steps == "adaptive"
        self._steps = ADAPTIVE_MAX_STEPS if steps == "adaptive" else math.inf if steps == "all" else int(steps)
        self.rows = list(steered)
        self._open = [True] * len(self.rows)

    def guides(self, step: int) -> bool:
        """Whether any row is guided at this step."""
        if not self.adaptive:
            return step < self._steps
        return step < self._steps and any(s and o for s, o in zip(self.rows, self._open, strict=True))

    def guided_rows(self) -> list[bool]:
        """For each row whether it is guided now."""
        return [steered and is_open for steered, is_open in zip(self.rows, self._open, strict=True)]

    def observe(self, row: int, step: int, *, in_phrase: bool, complete: bool) -> None:
        """Take in where a row's token at `step` has brought it: inside a refusal phrase, or at the end of one."""
        if self.adaptive and (complete or (not in_phrase and step + 1 >= ADAPTIVE_ANSWER_STEPS)):
            self._open[row] = False

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place."""
        self.rows = [value for value in self.rows for _ in range(times)]
        self._open = [value for value in self._open for _ in range(times)]
