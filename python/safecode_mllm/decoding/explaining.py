"""A refusal with its reason: a logits processor that lets the model say what in the scene is dangerous."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.reasons import reason_opening
from safecode_mllm.refusal import starts_with_refusal

# A refusal whose first sentence is longer than this gets its reason all the same.
MAX_REFUSAL_TOKENS = 48
_SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_CLOSING = "\"')*\u201d\u2019 \n"

Phase = Literal["refusing", "opening", "reason", "done"]


@dataclass
class _Row:
    """Where one row is."""

    phase: Phase = "refusing"
    opening: list[int] = field(default_factory=list)
    written: int = 0


class ReasonProcessor:
    """Lets a refusal that the verdict asked for be followed by the model's own reason.

    When the first sentence of such a refusal is complete, the words of `reason_opening` follow, and the model ends the
    sentence from what it sees. The reason ends with the model, with a sentence from half its budget on, or with the
    budget. Rows that don't refuse keep their own limit, and no other row changes.

    Args:
        tokenizer: the model's tokenizer.
        end_ids: ids that end a row; without any, only the generation's own limit ends a reason.
        verdicts: called at the first token: one verdict per row, None for a row that has none.
        prompt_length: number of columns before the first token.
        budget: longest reason, tokens.
        limits: for each row the longest answer without a reason, tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int],
        verdicts: Callable[[], Sequence[Verdict | None]],
        prompt_length: int,
        budget: int,
        limits: Sequence[int],
    ) -> None:
        self._tokenizer, self._end_ids, self._verdicts = tokenizer, list(end_ids), verdicts
        self._prompt_length, self._budget, self._limits = prompt_length, budget, limits
        self._rows: list[_Row] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [R, V] in which a row that must go on in a certain way can do nothing else."""
        if not self._rows:
            self._rows = [self._start(verdict) for verdict in self._verdicts()]
        written = input_ids[:, self._prompt_length :]
        changed = scores.clone()
        for row, state in enumerate(self._rows):
            forced = self._next(state, written[row].tolist(), self._limits[row])
            if forced == _NOT_THE_END:
                changed[row, self._end_ids] = -torch.inf
            elif forced is not None:
                allowed = scores.new_full(scores.shape[1:], -torch.inf)
                allowed[forced] = 0.0
                changed[row] = allowed
        return changed

    def _start(self, verdict: Verdict | None) -> _Row:
        if verdict is None or not verdict.asks_for_refusal:
            return _Row("done")
        opening = self._tokenizer(reason_opening(verdict), add_special_tokens=False)["input_ids"]
        return _Row("refusing", list(opening))

    def _next(self, state: _Row, ids: list[int], limit: int) -> list[int] | int | None:
        """Move a row on by the tokens it has written; returns the ids to choose from, _NOT_THE_END, or None for any."""
        if ids and ids[-1] in self._end_ids:
            return None
        if state.phase == "refusing":
            self._look_at_refusal(state, ids)
        elif state.phase == "opening":
            state.written += 1
            if state.written == len(state.opening):
                state.phase, state.written = "reason", 0
        elif state.phase == "reason":
            state.written += 1
            return self._end_ids or None if self._reason_is_over(state, ids) else None
        if state.phase == "opening":
            return [state.opening[state.written]]
        if state.phase == "refusing" and self._end_ids and starts_with_refusal(self._text(ids)):
            return _NOT_THE_END
        is_over = state.phase == "done" and len(ids) >= limit
        return self._end_ids or None if is_over else None

    def _look_at_refusal(self, state: _Row, ids: list[int]) -> None:
        text = self._text(ids)
        if not text.strip() or not (_ends_sentence(text) or len(ids) >= MAX_REFUSAL_TOKENS):
            return
        state.phase = "opening" if starts_with_refusal(text) else "done"

    def _reason_is_over(self, state: _Row, ids: list[int]) -> bool:
        ends = state.written >= self._budget // 2 and _ends_sentence(self._text(ids[-state.written :]))
        return ends or state.written >= self._budget

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


# Any token but those that end the row.
_NOT_THE_END = -1


def _ends_sentence(text: str) -> bool:
    return text.rstrip(_CLOSING).endswith(_SENTENCE_ENDS)
