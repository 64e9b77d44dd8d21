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
        config: the configuration of all rows, or one per row; those of one generation agree in refusal_tokens,
            refusal_style, reason_tokens and bias_decay.
        steered: for each row whether it is steered at all; the others decode as without this package.
        refusal: the refusal tokens; None when no verdict is used.
    """

    def __init__(
        self,
        config: SafeCoDeConfig | Sequence[SafeCoDeConfig],
        steered: Sequence[bool],
        refusal: RefusalTokens | None = None,
    ):
        self.configs = [config] * len(steered) if isinstance(config, SafeCoDeConfig) else list(config)
        if len(self.configs) != len(steered):
            raise ValueError(f"config holds {len(self.configs)} configurations for {len(steered)} rows")
        self.steered = list(steered)
        self.refusal = refusal
        self.bias = [0.0] * len(self.steered)
        self.states = [NO_MASK] * len(self.steered)
        self.window = Window([row.steps for row in self.configs], self.steered)

    @property
    def config(self) -> SafeCoDeConfig:
        """A configuration with what all rows agree in."""
        return self.configs[0]

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return len(self.steered)

    @property
    def uses_contrast(self) -> bool:
        """Whether any row needs a noised branch."""
        return any(row.uses_contrast and steered for row, steered in zip(self.configs, self.steered, strict=True))

    @property
    def changes_logits(self) -> bool:
        """Whether a guided step can differ from an unsteered one for any row."""
        return self.uses_contrast or self._cuts or any(self.bias)

    @property
    def _cuts(self) -> bool:
        rows = zip(self.configs, self.steered, strict=True)
        return any(row.plausibility_beta > 0 and steered for row, steered in rows)

    def set_verdicts(self, verdicts: Sequence[Verdict | None]) -> None:
        """Turn one verdict per row into its bias; None means no bias."""
        if len(verdicts) != self.rows:
            raise ValueError(f"verdicts must hold one entry per row: got {len(verdicts)} for {self.rows} rows")
        for row, verdict in enumerate(verdicts):
            if verdict is not None and self.steered[row] and self.refusal is not None:
                self.bias[row] = verdict_bias(verdict, self.configs[row])
                self.states[row] = self.refusal.start if self.bias[row] else NO_MASK

    def expand(self, times: int) -> None:
        """Repeat each row `times` times in place ([A, B] becomes [A, A, B, B])."""
        for name in ("configs", "steered", "bias", "states"):
            setattr(self, name, [value for value in getattr(self, name) for _ in range(times)])
        self.window.expand(times)

    def step_params(self, step: int, *, guided: bool, greedy: bool, warpers: dict[str, Any]) -> StepParams:
        """Return the parameters of decode step `step` for all rows; `guided` says whether any row is guided there."""
        if not guided:
            return StepParams(contrast_weight=0.0, plausibility_beta=0.0, greedy=greedy, **warpers)
        scales = self.score_scales(step)
        temperature = warpers.get("temperature", 1.0)
        warpers = dict(warpers, temperature=[temperature * scale for scale in scales])
        return StepParams(
            contrast_weight=self._now([row.contrast_weight for row in self.configs], step),
            plausibility_beta=self.betas(step),
            refusal_bias=self._now([bias * scale for bias, scale in zip(self.bias, scales, strict=True)], step),
            bias_scope=[row.bias_scope for row in self.configs],
            greedy=greedy,
            **warpers,
        )

    def score_scales(self, step: int) -> list[float]:
        """Return each row's factor 1 + a between our scores and the paper's, z - alpha n = [(1 + a) z - a n] / (1 + a).

        It is 1 on the scale of the clean logits, and for a row that is not guided at this step.
        """
        scales = [1.0 + row.contrast_weight if row.contrast_scale == "paper" else 1.0 for row in self.configs]
        guided = self.window.guided_rows(step)
        return [scale if is_guided else 1.0 for scale, is_guided in zip(scales, guided, strict=True)]

    def betas(self, step: int) -> list[float]:
        """Return the plausibility beta of each row at a step."""
        return self._now([row.plausibility_beta for row in self.configs], step)

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

    def _now(self, values: Sequence[float], step: int) -> list[float]:
        """Return the values of the rows that are guided at a step, 0 for the others."""
        guided = self.window.guided_rows(step)
        return [value if is_guided else 0.0 for value, is_guided in zip(values, guided, strict=True)]
