"""What prepared steps share: results that lie ready, and whether a call's tensors are those that were prepared for."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from ..contract import StepResult

# A result, and the addresses of its token, logprob, n_kept and status.
AddressedResult = tuple[StepResult, int, int, int, int]
RESULT_DTYPES = (torch.int64, torch.float32, torch.int32, torch.int32)
# Results are allocated for so many steps at a time, after the first: four allocations cost more than a small step.
STEPS_PER_ALLOCATION = 32
# But of so many rows in all: results of large batches would lie in memory for steps that may never come.
ROWS_PER_ALLOCATION = 4096


def new_result(batch: int, device: torch.device | None = None) -> StepResult:
    """Return an unwritten result of B rows: four tensors of their own, as an operator of torch has to return them."""
    return StepResult(*[torch.empty(batch, dtype=dtype, device=device) for dtype in RESULT_DTYPES])


def readable(logits: Tensor) -> Tensor:
    """Return the logits as a plain tensor with neighbours of a row side by side: kernels know row strides only."""
    logits = logits.detach()
    return logits if logits.stride(1) == 1 else logits.contiguous()


class ReadyResults:
    """Hands out results of B rows, each of them once.

    Args:
        batch: number of rows B.
        device: where they are.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self._ready = self._allocate(1)

    def next(self) -> AddressedResult:
        """Return a result that was never handed out, with its addresses."""
        try:
            return self._ready.pop()
        except IndexError:
            ready = self._allocate(max(1, min(STEPS_PER_ALLOCATION, ROWS_PER_ALLOCATION // max(1, self._batch))))
            result = ready.pop()
            self._ready = ready  # last: other threads take from it
            return result

    def _allocate(self, steps: int) -> list[AddressedResult]:
        # On a CPU each has memory of its own, as an operator of torch has to return it; elsewhere that takes kernels.
        split = torch.unbind_copy if self._device.type == "cpu" else torch.unbind
        # What is allocated in inference mode could not be changed in place outside it, by whoever gets it later.
        with torch.inference_mode(False):
            columns = [split(torch.empty(steps, self._batch, dtype=d, device=self._device)) for d in RESULT_DTYPES]
        found = []
        for tensors in zip(*columns, strict=True):
            token, logprob, n_kept, status = (tensor.data_ptr() for tensor in tensors)
            found.append((StepResult(*tensors), token, logprob, n_kept, status))
        return found


class PreparedFor:
    """The shape, dtype and device that a step on an accelerator was prepared for.

    Args:
        clean_shape: [B, V].
        dtype: of the logits.
        device: of everything.
    """

    def __init__(self, clean_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = torch.Size(clean_shape), dtype, device
        self._column_shape = self._shape[:1]

    def _is_like_prepared(self, logits: object) -> TypeGuard[Tensor]:
        """Whether these are logits as prepared, neighbours of a row side by side."""
        if type(logits) is not Tensor or logits.dtype is not self._dtype or logits.shape != self._shape:
            return False
        return logits.device == self._device and (logits.stride(1) == 1 or self._shape[1] == 1)

    def _is_column(self, value: object) -> TypeGuard[Tensor]:
        """Whether `value` is int64 [B] as the kernels read it."""
        if type(value) is not Tensor or value.dtype is not torch.int64 or value.device != self._device:
            return False
        return value.shape == self._column_shape and value.is_contiguous()
