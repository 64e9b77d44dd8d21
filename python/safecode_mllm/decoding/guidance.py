"""What each row is steered with: contrast, plausibility, the bias its verdict gives, and where it is in the phrases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_kernels import StepParams
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.window import Window
from safecode_mllm.judges.bias import verdict_bias
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.refusal import ENDED, RefusalTokens

# Mask id of a row without a bias; the kernels' own convention.
NO_MASK = -1


class Guidance:
    """Steering state of R rows over one generation.

    Args:
        config: the configuration, the same for all rows.
        steered: for each row whether it is steered at all; the others decode as without this package.
        refusal: the refusal tokens; None when no verdict is used.
    """

    def __init__(self, config: SafeCoDeConfig, steered: Sequence[bool], refusal: RefusalTokens | None = None):
        self.config = config
        self.steered = list(steered)
        self.refusal = refusal
        self.bias = [0.0] * len(self.steered)
        self.states = [NO_MASK] * len(self.steered)
        self.window = Window(config.steps, self.steered)

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return len(self.steered)

    @property
    def uses_contrast(self) -> bool:
        """Whether any row needs a noised branch."""
        return self.config.uses_contrast and any(self.steered)

    @property
    def changes_logits(self) -> bool:
        """Whether a guided step can differ from an unsteered one for any row."""
        return self.uses_contrast or self._cuts or any(self.bias)

    @property
    def _cuts(self) -> bool:
        return self.config.plausibility_beta > 0 and any(self.steered)

    def set_verdicts(self, verdicts: Sequence[Verdict | None]) -> None:
        """Turn one verdict per row into its bias; None means no bias."""
        if len(verdicts) != self.rows:
            raise ValueError(f"verdicts must hold one entry per row: got {len(verdicts)} for {self.rows} rows")
        for row, verdict in enumerate(verdicts):
            if verdict is not None and self.steered[row] and self.refusal is not None:
                self.bias[row] = verdict_bias(verdict, self.config)
                self.states[row] = self.refusal.start if self.bias[row] else NO_MASK

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place ([A, B] becomes [A, A, B, B])."""
        for name in ("steered", "bias", "states"):
            setattr(self, name, [value for value in getattr(self, name) for _ in range(times)])
        self.window.expand(times)

    def step_params(self, *, guided: bool, greedy: bool, warpers: dict[str, Any]) -> StepParams:
        """Return the parameters of a decode step for all rows, inside or after the guided window."""
        if not guided:
            return StepParams(contrast_weight=0.0, plausibility_beta=0.0, greedy=greedy, **warpers)
        scales = self.score_scales()
        temperature = warpers.get("temperature", 1.0)
        warpers = dict(warpers, temperature=[temperature * scale for scale in scales])
        return StepParams(
            contrast_weight=self._per_row(self.config.contrast_weight),
            plausibility_beta=self.betas(),
            refusal_bias=self._now([bias * scale for bias, scale in zip(self.bias, scales, strict=True)]),
            bias_scope=self.config.bias_scope,
            greedy=greedy,
            **warpers,
        )

    def score_scales(self) -> list[float]:
        """Return each row's factor 1 + a between our scores and the paper's, z - alpha n = [(1 + a) z - a n] / (1 + a).

        It is 1 on the scale of the clean logits, and for a row that is not steered.
        """
        scale = 1.0 + self.config.contrast_weight if self.config.contrast_scale == "paper" else 1.0
        return [scale if guided else 1.0 for guided in self.window.guided_rows()]

    def betas(self) -> list[float]:
        """Return the plausibility beta of each row."""
        return self._per_row(self.config.plausibility_beta)

    @property
    def watches(self) -> bool:
        """Whether the tokens of guided steps have to be observed: for the place in a phrase, or for the window."""
        return self.window.adaptive or self.masks() is not None

    def masks(self) -> Tensor | None:
        """Return the table of refusal masks, int32 [M, ceil(V/32)], or None when no row has a bias."""
        return self.refusal.masks if self.refusal is not None and any(self.bias) else None

    def mask_ids(self) -> Tensor | None:
        """Return for each row the mask it is biased with now, int64 [R], NO_MASK for none."""
        return torch.tensor(self.states, dtype=torch.int64) if self.masks() is not None else None

    def observe(self, tokens: Sequence[int], step: int) -> None:
        """Advance each row's place in the refusal phrases by the token it chose at `step`."""
        for row, token in enumerate(tokens):
            complete = False
            if self.states[row] != NO_MASK and self.refusal is not None:
                complete = self.window.adaptive and self.refusal.completes(self.states[row], token)
                self.states[row] = self.refusal.next_state(self.states[row], token)
            self.window.observe(row, step, in_phrase=self.states[row] not in (NO_MASK, ENDED), complete=complete)

    def _per_row(self, value: float) -> list[float]:
        return self._now([value] * self.rows)

    def _now(self, values: Sequence[float]) -> list[float]:
        """Return the values of the rows that are guided now, 0 for the others."""
        return [value if guided else 0.0 for value, guided in zip(values, self.window.guided_rows(), strict=True)]
