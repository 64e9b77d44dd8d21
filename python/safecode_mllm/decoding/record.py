"""What a generation leaves behind besides its tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safecode_kernels import Status, StepResult
from safecode_mllm.errors import DecodeError
from safecode_mllm.judges.protocol import Verdict


@dataclass(frozen=True)
class GuidedToken:
    """One token of the guided window.

    Attributes:
        token_id: the token.
        p_steered: its probability under the distribution it was chosen from (greedy: over the kept tokens).
        p_plain: its probability without steering, at the same temperature, before any filter.
        n_kept: how many tokens could have been chosen.
    """

    token_id: int
    p_steered: float
    p_plain: float
    n_kept: int


@dataclass
class GenerationReport:
    """Filled while a generation runs; rows count requests times return sequences.

    Attributes:
        verdicts: one per request, None where none was asked for.
        guided: for each row its guided tokens; empty when not recorded.
        lengths: for each row how many tokens it generated; what follows in the output is padding.
        row_errors: row -> the error that ended it early; the other rows finished.
        seconds: wall-clock seconds of "prefill", "judge", "guided" and "free".
        notes: which ways were taken and why, for people.
    """

    verdicts: list[Verdict | None] = field(default_factory=list)
    guided: list[list[GuidedToken]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    row_errors: dict[int, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def timed(self, phase: str, start: float) -> float:
        """Add the time since `start` (of `time.perf_counter`) to a phase and return the present time."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - start
        return now


class RowStatus:
    """Remembers on the device which rows failed, at which step, so that the loop need not look at each step."""

    def __init__(self, rows: int, device: torch.device):
        self._status = torch.zeros(rows, dtype=torch.int32, device=device)
        self._step = torch.zeros(rows, dtype=torch.int32, device=device)

    def observe(self, status: Tensor, step: int) -> None:
        """Take in a step's status, int32 [R]; the first failure of a row stands."""
        new = (self._status == 0) & (status != 0)
        self._status = torch.where(new, status, self._status)
        self._step = self._step.masked_fill(new, step)

    def alive(self) -> Tensor:
        """Rows without a failure, bool [R]."""
        return self._status == 0

    def errors(self, finished_at: Tensor, processors: str) -> dict[int, Exception]:
        """Return the error of each failed row; what happens after the step [R] at which a row ended doesn't count."""
        rows = zip(self._status.tolist(), self._step.tolist(), finished_at.tolist(), strict=True)
        failed = {row: (Status(status), step) for row, (status, step, end) in enumerate(rows) if status and step < end}
        return status_errors(failed, processors)


def status_errors(failed: dict[int, tuple[Status, int]], processors: str) -> dict[int, Exception]:
    """Return the error of each row that failed with a status at a step; `processors` names those before the warpers."""
    return {
        row: DecodeError(
            f"row {row}, step {step}: {status.text} (status {int(status)}); "
            f"logits processors before the warpers: {processors}; check the model's weights and dtype"
        )
        for row, (status, step) in failed.items()
    }


def guided_tokens(result: StepResult, clean: Tensor, temperature: float) -> list[GuidedToken]:
    """Describe a guided step for each row, from its result and the untouched clean logits [R, V]."""
    plain = torch.softmax(clean.float() / temperature, -1).gather(1, result.token[:, None])[:, 0]
    columns = (result.token, result.logprob.exp(), plain, result.n_kept)
    return [GuidedToken(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
