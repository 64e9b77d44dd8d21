"""A bias that does not end with the guided window but fades: a logits processor for the free run."""

from __future__ import annotations

from torch import Tensor

from safecode_kernels.bitmask import unpack_mask
from safecode_mllm.decoding.guidance import NO_MASK, Guidance
from safecode_mllm.refusal import ENDED

# Below this no token's probability changes by more than five per cent: the rest of the tail is not worth a step.
SMALLEST_BIAS = 0.05


class LingeringBias:
    """Goes on with a row's bias where its window ends, smaller by a factor at every token.

    The bias is on the tokens that begin a refusal, or go on with one that has begun: towards a refusal that is not
    taken back, away from one that comes late. Against models whose safety is a matter of the first tokens.

    Args:
        guidance: the rows' steering state; verdicts are set before the first token.
        decay: factor per token, in (0, 1).
        prompt_length: number of columns before the first token.
    """

    def __init__(self, guidance: Guidance, decay: float, prompt_length: int) -> None:
        self._guidance, self._decay, self._prompt_length = guidance, decay, prompt_length
        self._masks: Tensor | None = None
        self._states: list[int] = []
        self._bias: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [R, V] with the fading bias of the rows whose window has ended."""
        guidance = self._guidance
        step = input_ids.shape[1] - self._prompt_length
        if guidance.refusal is None or not any(guidance.bias):
            return scores
        if self._masks is None:
            self._masks = unpack_mask(guidance.refusal.masks, scores.shape[1]).to(scores.device)
            self._states = [NO_MASK] * guidance.rows
            self._bias = list(guidance.bias)
        guided = guidance.window.guided_rows(step)
        rows = [row for row, g in enumerate(guided) if not g and abs(self._bias[row]) * self._decay >= SMALLEST_BIAS]
        if not rows:
            return scores
        changed, last = scores.clone(), input_ids[:, -1].tolist()
        for row in rows:
            self._advance(row, last[row])
            self._bias[row] *= self._decay
            changed[row] += self._bias[row] * self._masks[self._states[row]]
        return changed

    def _advance(self, row: int, token: int) -> None:
        """Follow a phrase that goes on; wherever none does, one may begin."""
        refusal = self._guidance.refusal
        assert refusal is not None
        state = self._guidance.states[row] if self._states[row] == NO_MASK else self._states[row]
        moved = refusal.next_state(state, token) if self._states[row] != NO_MASK else state
        self._states[row] = refusal.start if moved == ENDED else moved
