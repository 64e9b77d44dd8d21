"""The decoding loop that looks at every token: any processor, criterion, streamer and window works with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding.picker import Pick
from safecode_mllm.decoding.record import RowStatus, guided_tokens
from safecode_mllm.decoding.run import Run


class HostLoop:
    """The state of one decoding loop."""

    def __init__(self, run: Run) -> None:
        self.run, self.request, self.guidance, self.branches = run, run.request, run.guidance, run.branches
        self.pad = run.pad
        self.scores: list[Tensor] | None = [] if run.wants("output_scores") else None
        self.logits: list[Tensor] | None = [] if run.wants("output_logits") else None
        rows, device = self.guidance.rows, run.device
        run.report.guided = [[] for _ in range(rows)]
        self.unfinished = torch.ones(rows, dtype=torch.long, device=device)
        self.finished_at = torch.full((rows,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
        self.limits = run.limits()
        self.status = RowStatus(rows, device)
        self.banned = torch.tensor(run.banned_ids(), dtype=torch.int64, device=device)
        self._banned_rows: dict[tuple[bool, ...], Tensor] = {}

    def end_rows(self, rows: Sequence[int]) -> None:
        """End rows before their first token."""
        if rows:
            self.unfinished[list(rows)] = 0
            self.finished_at[list(rows)] = 0

    def decode(self, ids: Tensor, clean: Tensor, noised: Tensor | None) -> Any:
        """Pick and feed tokens until every row has ended; `clean`, `noised` [R, V] follow the prompt `ids` [R, L]."""
        streamer, report = self.request.streamer, self.run.report
        if streamer is not None:
            streamer.put(ids.cpu())
        step, started = 0, time.perf_counter()
        # Every row may have ended before its first token, when a judge failed on it.
        while self.unfinished.any():
            guided = self.guidance.window.guides(step)
            if step > 0:
                if not guided:
                    self.branches.drop_noised()
                clean, noised = self.branches.step(ids[:, -1])
            tokens, pick = self._pick(ids, clean, noised, step, guided)
            ids = torch.cat([ids, tokens[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            self._end_finished_rows(ids, pick, step)
            step += 1
            started = report.timed("guided" if guided else "free", started)
        if streamer is not None:
            streamer.end()
        report.lengths = self.finished_at.clamp(max=step).tolist()
        self.run.finish(self.status.errors(self.finished_at, self.run.processors.names_before()))
        return self.run.output(ids, self.scores, self.logits)

    def _pick(self, ids: Tensor, clean: Tensor, noised: Tensor | None, step: int, guided: bool) -> tuple[Tensor, Pick]:
        record = guided and self.request.record
        raw = clean.clone() if self.logits is not None or record else clean
        if guided:
            self._ban_placeholders(clean, step)
        pick = self.run.picker.pick(ids, clean, noised, step, guided=guided)
        if self.logits is not None:
            self.logits.append(raw.float())
        if self.scores is not None and pick.scores is not None:
            self.scores.append(pick.scores)
        tokens = pick.result.token
        if self.pad is not None:
            tokens = tokens * self.unfinished + self.pad * (1 - self.unfinished)
        if record:
            alive, steered = self.unfinished.tolist(), self.guidance.window.guided_rows(step)
            for row, token in enumerate(guided_tokens(pick.result, raw, self.run.processors.temperature())):
                if alive[row] and steered[row]:
                    self.run.report.guided[row].append(token)
        if guided and self.guidance.watches:
            self.guidance.observe(tokens.tolist(), step)
        return tokens, pick

    def _end_finished_rows(self, ids: Tensor, pick: Pick, step: int) -> None:
        self.status.observe(pick.result.status, step)
        scores = tuple(self.scores) if self.scores is not None else None
        unfinished = self.unfinished & ~self.run.criteria(ids, scores) & self.status.alive()
        if self.limits is not None:
            unfinished = unfinished & (step + 1 < self.limits)
        just_ended = (self.unfinished == 1) & (unfinished == 0)
        self.finished_at = self.finished_at.masked_fill(just_ended, step + 1)
        self.unfinished = unfinished

    def _ban_placeholders(self, clean: Tensor, step: int) -> None:
        if not len(self.banned) or not self.guidance.changes_logits:
            return
        guided = tuple(self.guidance.window.guided_rows(step))
        if guided not in self._banned_rows:
            rows = [row for row, is_guided in enumerate(guided) if is_guided]
            self._banned_rows[guided] = torch.tensor(rows, dtype=torch.int64, device=clean.device)[:, None]
        clean[self._banned_rows[guided], self.banned] = -torch.inf
