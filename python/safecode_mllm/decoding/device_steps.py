"""A whole step on the device: forward pass, decode step, ends of rows, places in phrases; no look at the host.

Everything that a step reads or writes is a buffer that stays where it is, so that a step can be captured into a CUDA
graph and replayed, or compiled; on a CPU the same step simply runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safecode_kernels import StepResult, pack_params
from safecode_kernels.contract import PACKED_FIELDS
from safecode_mllm.decoding.guidance import NO_MASK, Guidance
from safecode_mllm.decoding.picker import Draws
from safecode_mllm.decoding.record import GuidedToken
from safecode_mllm.decoding.static import StaticBranches
from safecode_mllm.refusal import ENDED, RefusalTokens

# A step that no row reaches.
_NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class StepPlan:
    """What is built into a step, and so into a graph of it; everything else lies in buffers.

    Attributes:
        new_tokens: N, most tokens of an answer.
        pad: what a row that has ended gets, or None to go on writing (a generation without end tokens).
        end_ids: tokens that end a row.
        banned_ids: tokens that a guided row must not write.
        temperature: of the unsteered distribution that is recorded.
        recorded: for so many steps the probabilities of guided tokens are kept.
        greedy: no row draws.
        backend: of the decode step.
    """

    new_tokens: int
    pad: int | None
    end_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    temperature: float
    recorded: int
    greedy: bool
    backend: str


class PhraseTable:
    """Where a token leads from each place in the refusal phrases, as tensors: state [R], token [R] -> state [R]."""

    def __init__(self, refusal: RefusalTokens, device: torch.device) -> None:
        moves = [list(places.items()) for places in refusal.transitions]
        width = max(map(len, moves), default=0)
        padded = [places + [(NO_MASK, ENDED)] * (width - len(places)) for places in moves]
        table = torch.tensor(padded, dtype=torch.int64, device=device).reshape(len(moves), width, 2)
        self.moves = refusal.kind == "phrase_trie"
        self._tokens, self._next = table.unbind(-1)

    def next_state(self, state: Tensor, token: Tensor) -> Tensor:
        """Return the state behind each row's token; ENDED where a phrase ends, is left, or has ended before."""
        if not self.moves:
            return state
        place = state.clamp_min(0)
        leads_on = (self._tokens[place] == token[:, None]) & (state != ENDED)[:, None]
        return torch.where(leads_on, self._next[place], ENDED).amax(-1)


class DeviceSteps:
    """The decode phase of R rows as a step that is repeated: `first` picks from the prompt's logits, then `advance`.

    Args:
        branches: over a cache of fixed size.
        guidance: verdicts set; windows of a fixed length or of all steps.
        draws: who draws; "torch" only for greedy rows.
        warpers: parameters of the decode step that stand for the processor list.
        plan: what is built into the steps.
        lengths: int64 [R], the most tokens of each row; None is N for all.

    Attributes:
        written: int64 [R, N], the tokens; what follows a row's end is padding.
        alive: bool [R].
        finished_at: int64 [R], how many tokens each ended row has.
        status, failed_at: int64 [R], the first status of a row that is not ok, and the step it was met at.
    """

    def __init__(
        self,
        branches: StaticBranches,
        guidance: Guidance,
        draws: Draws,
        warpers: dict[str, Any],
        plan: StepPlan,
        lengths: Tensor | None = None,
    ) -> None:
        self.branches, self.plan = branches, plan
        rows, device = guidance.rows, branches.tokens.device

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        self.step, self.written = empty(), empty(plan.new_tokens)
        self.alive, self.finished_at = empty(dtype=torch.bool), empty()
        self.status, self.failed_at = empty(), empty()
        # One column behind the last: what is written after the window falls there.
        self._records = empty(plan.recorded + 1, 3, dtype=torch.float32)
        self._limits, self._state, self._lengths = empty(), empty(), empty()
        self._seeds, self._stream = empty(), empty()
        self._guided = torch.empty(len(PACKED_FIELDS), rows, dtype=torch.float64, device=device)
        self._free = torch.empty_like(self._guided)
        self._end_ids = torch.tensor(plan.end_ids, dtype=torch.int64, device=device)
        self._banned = torch.tensor(plan.banned_ids, dtype=torch.int64, device=device)
        masks = guidance.masks()
        self._masks = None if masks is None else masks.to(device)
        self._phrases = None if masks is None or guidance.refusal is None else PhraseTable(guidance.refusal, device)
        self.load(guidance, draws, warpers, lengths)

    def load(self, guidance: Guidance, draws: Draws, warpers: dict[str, Any], lengths: Tensor | None = None) -> None:
        """Start over for another generation with the same plan, rows and refusal tokens."""
        device = self.step.device
        self.step.zero_()
        self.written.fill_(0 if self.plan.pad is None else self.plan.pad)
        self.alive.fill_(True)
        self.status.zero_()
        self._records.zero_()
        for steps in (self.finished_at, self.failed_at):
            steps.fill_(_NEVER)
        self._limits.copy_(torch.tensor([_as_int(limit) for limit in guidance.window.limits]))
        self._state.copy_(torch.tensor(guidance.states))
        self._lengths.copy_(torch.full_like(self._lengths, self.plan.new_tokens) if lengths is None else lengths)
        for column, values in ((self._seeds, draws.seeds), (self._stream, draws.stream)):
            column.zero_() if values is None else column.copy_(values)
        for packed, guided in ((self._guided, True), (self._free, False)):
            params = guidance.step_params(0, guided=guided, greedy=self.plan.greedy, warpers=warpers)
            packed.copy_(pack_params(params, guidance.rows, device))

    def first(self, clean: Tensor, noised: Tensor | None, *, guided: bool) -> None:
        """Write the first token of every row from the prompt's logits [R, V]."""
        self._pick(clean, noised, guided)

    def advance(self, *, guided: bool) -> None:
        """Feed what was written last and write the next token of every row."""
        self._pick(*self.branches.advance(), guided)

    def _pick(self, clean: Tensor, noised: Tensor | None, guided: bool) -> None:
        now = self.step < self._limits
        plain = self._plain(clean) if guided and self.plan.recorded else None
        if guided:
            self._ban(clean, now)
        result = self._decide(clean, noised, now, guided)
        token = result.token
        if self.plan.pad is not None:
            token = torch.where(self.alive, token, self.plan.pad)
        if plain is not None:
            self._record(result, clean, plain, now)
        if guided and self._phrases is not None:
            self._state.copy_(torch.where(now, self._phrases.next_state(self._state, token), self._state))
        self.branches.tokens.copy_(token)
        self.written.scatter_(1, self.step[:, None], token[:, None])
        self._end_rows(token, result.status)
        self.step.add_(1)

    def _decide(self, clean: Tensor, noised: Tensor | None, now: Tensor, guided: bool) -> StepResult:
        params = torch.where(now, self._guided, self._free) if guided else self._free
        masks, states = (self._masks, self._state) if guided and self._masks is not None else (None, None)
        draws = (None, None, None) if self.plan.greedy else (self._seeds, self._stream, self.step)
        call = torch.ops.safecode_kernels.decode_step
        return StepResult(*call(clean, noised, params, masks, states, *draws, self.plan.backend))

    def _ban(self, clean: Tensor, now: Tensor) -> None:
        if len(self._banned):
            kept = clean.index_select(1, self._banned)
            clean.index_copy_(1, self._banned, torch.where(now[:, None], -torch.inf, kept))

    def _plain(self, clean: Tensor) -> Tensor:
        """Return the normaliser of the unsteered distribution, [R]."""
        return (clean.float() / self.plan.temperature).logsumexp(-1)

    def _record(self, result: StepResult, clean: Tensor, plain: Tensor, now: Tensor) -> None:
        chosen = clean.gather(1, result.token[:, None])[:, 0].float() / self.plan.temperature
        row = torch.stack([result.logprob, chosen - plain, result.n_kept.float()], -1)
        last = self._records.shape[1] - 1
        place = torch.where(now & self.alive, self.step, last).clamp_max(last)
        self._records.scatter_(1, place[:, None, None].expand(-1, 1, 3), row[:, None])

    def _end_rows(self, token: Tensor, status: Tensor) -> None:
        failed = (status != 0) & (self.status == 0)
        self.status.copy_(torch.where(failed, status.long(), self.status))
        self.failed_at.copy_(torch.where(failed, self.step, self.failed_at))
        ends = (token[:, None] == self._end_ids).any(-1) | (self.status != 0)
        self.end(ends | (self.step + 1 >= self._lengths))

    def end(self, ends: Tensor) -> None:
        """End rows, bool [R], with the token that was written last."""
        just_ended = self.alive & ends
        self.finished_at.copy_(torch.where(just_ended, self.step + 1, self.finished_at))
        self.alive.logical_and_(~ends)

    def end_before_the_first(self, rows: Sequence[int]) -> None:
        """End rows that get no token at all."""
        if rows:
            self.alive[list(rows)] = False
            self.finished_at[list(rows)] = 0

    def guided_tokens(self) -> list[list[GuidedToken]]:
        """Return the record of each row's guided tokens."""
        found = []
        columns = self._records[:, :-1].double()
        ends = (self.finished_at.tolist(), self._limits.tolist())
        rows = zip(self.written.tolist(), columns.tolist(), *ends, strict=True)
        steps = int(self.step.max()) if len(self.step) else 0
        for tokens, records, finished, limit in rows:
            length = min(len(records), finished, limit, steps)
            found.append(
                [
                    GuidedToken(token, math.exp(steered), math.exp(plain), int(kept))
                    for token, (steered, plain, kept) in zip(tokens[:length], records, strict=False)
                ]
            )
        return found


def _as_int(limit: float) -> int:
    return _NEVER if math.isinf(limit) else int(limit)
