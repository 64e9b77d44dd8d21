"""The decoding loop whose steps stay on the device: the host looks only now and then whether rows are left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_kernels import Status
from safecode_mllm.decoding.device_steps import StepPlan
from safecode_mllm.decoding.record import status_errors
from safecode_mllm.decoding.run import Run

# Steps between two looks on a GPU, where a look waits for everything before it. Rows that end in between write padding.
GPU_STEPS_PER_LOOK = 8
# Criteria that the device decides itself.
_KNOWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


def obstacle(run: Run) -> str | None:
    """Return why the steps of a run cannot stay on the device, in a sentence; None if they can."""
    if run.prepared is None:
        return "the cache grows"
    if not run.picker.fused:
        return run.picker.explain()
    if run.guidance.window.adaptive:
        return "adaptive windows depend on the tokens"
    if run.wants("output_logits"):
        return "output_logits needs every step's logits"
    return None


def _plan(run: Run) -> StepPlan:
    window = max(run.guidance.window.limits, default=0) if run.request.record else 0
    new_tokens = run.generation_config.max_length - run.request.clean["input_ids"].shape[1]
    return StepPlan(
        new_tokens=new_tokens,
        pad=None if run.pad is None else int(run.pad),
        end_ids=tuple(_end_ids(run.criteria)),
        banned_ids=tuple(run.banned_ids()) if run.guidance.changes_logits else (),
        temperature=run.processors.temperature(),
        recorded=int(min(window, new_tokens)),
        greedy=run.picker.draws.greedy,
        backend=run.request.backend,
    )


class DeviceLoop:
    """One decoding of a run without an obstacle."""

    def __init__(self, run: Run) -> None:
        assert run.prepared is not None
        self.run, self.branches = run, run.prepared.branches
        self._others = [c for c in run.criteria if type(c).__name__ not in _KNOWN_CRITERIA]
        self._watched = bool(self._others) or run.request.streamer is not None
        self._per_look = 1 if self._watched or run.device.type == "cpu" else GPU_STEPS_PER_LOOK
        self.plan = _plan(run)
        self.steps, self._run_step = run.prepared.steps(run.guidance, run.picker, self.plan, run.limits())

    def end_rows(self, rows: Sequence[int]) -> None:
        """End rows before their first token."""
        self.steps.end_before_the_first(rows)

    def decode(self, ids: Tensor, clean: Tensor, noised: Tensor | None) -> Any:
        """Write tokens until every row has ended; `clean`, `noised` [R, V] follow the prompt `ids` [R, L]."""
        steps, report, window = self.steps, self.run.report, self.run.guidance.window
        if self.run.request.streamer is not None:
            self.run.request.streamer.put(ids.cpu())
        started, written = time.perf_counter(), 0
        while written < self.plan.new_tokens and (written % self._per_look or bool(steps.alive.any())):
            guided = window.guides(written)
            if written == 0:
                steps.first(clean, noised, guided=guided)
            else:
                if not guided:
                    self.branches.drop_noised()
                self._run_step(guided=guided)
            written += 1
            if self._watched:
                self._look(ids, written)
            started = report.timed("guided" if guided else "free", started)
        if self.run.request.streamer is not None:
            self.run.request.streamer.end()
        return self._finished(ids, written)

    def _look(self, ids: Tensor, written: int) -> None:
        """Show the newest tokens to the streamer and to criteria that decide on the host."""
        if self.run.request.streamer is not None:
            self.run.request.streamer.put(self.steps.written[:, written - 1].cpu())
        if self._others:
            so_far = torch.cat([ids, self.steps.written[:, :written]], 1)
            for criterion in self._others:
                self.steps.end(criterion(so_far, None))

    def _finished(self, ids: Tensor, written: int) -> Any:
        steps, report = self.steps, self.run.report
        report.notes["steps"] = self._run_step.explain()
        lengths = steps.finished_at.clamp(max=written).tolist()
        # Steps after the last row's end were run only because nobody looked.
        last = written if steps.alive.any() else max(lengths, default=0)
        report.lengths = [min(length, last) for length in lengths]
        report.guided = steps.guided_tokens() if self.run.request.record else [[] for _ in lengths]
        found = zip(steps.status.tolist(), steps.failed_at.tolist(), lengths, strict=True)
        rows = {row: (Status(status), step) for row, (status, step, end) in enumerate(found) if status and step < end}
        self.run.finish(status_errors(rows, self.run.processors.names_before()))
        return self.run.output(torch.cat([ids, steps.written[:, :last]], 1))


def _end_ids(criteria: Sequence[Any]) -> list[int]:
    """The tokens that end a row, from the criteria that know them."""
    found = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
    return sorted({int(token) for ids in found for token in torch.as_tensor(ids).reshape(-1).tolist()})
