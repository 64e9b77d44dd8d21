"""The decode step in C++ (csrc/cpu): one pass over the clean row, the noised row read at the candidates only."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeGuard

import torch
from torch import Tensor

from .. import _native
from ..contract import DrawKey, RefusalMask, Rows, StepResult, StepScores
from ..errors import ArgumentError
from ..rng import MAX_STEP
from .prepared import ReadyResults

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Below this many bytes of logits one thread is done before a second one has woken up.
THREADING_BYTES = 2 * 2**20

NULL = 0


def step(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None, key: DrawKey | None) -> StepResult:
    """Score, cut, filter and draw one token per row."""
    clean, noised = _readable(clean), None if noised is None else _readable(noised)
    batch, vocab_size = clean.shape
    packed = rows.packed.contiguous()
    words, mask_id = (None, None) if mask is None else (mask.words.contiguous(), mask.mask_id.contiguous())
    seeds, stream, index = (None, None, 0) if key is None else _contiguous(key)
    result, token, logprob, n_kept, status = _results(batch).next()
    served = _native.decode_once(
        DTYPE_CODES[clean.dtype],
        batch,
        vocab_size,
        packed.data_ptr(),
        NULL if words is None else words.data_ptr(),
        0 if words is None else len(words),
        NULL if seeds is None else seeds.data_ptr(),
        NULL if stream is None else stream.data_ptr(),
        clean.data_ptr(),
        clean.stride(0),
        NULL if noised is None else noised.data_ptr(),
        0 if noised is None else noised.stride(0),
        NULL if mask_id is None else mask_id.data_ptr(),
        *_step_index(index),
        token,
        logprob,
        n_kept,
        status,
        _threads(batch, vocab_size, clean.dtype),
    )
    if not served:
        raise ArgumentError(
            "a mask_id is outside [-1, M), a step outside [0, 2**63), or a row samples and there are no seeds"
        )
    return result


def scores(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None) -> StepScores:
    """Return every token's score, biased clean logit and whether it passes the cut."""
    clean, noised = _readable(clean), None if noised is None else _readable(noised)
    batch, vocab_size = clean.shape
    words = None if mask is None else mask.words.contiguous()
    native = _native_step(clean.shape, clean.dtype, rows, words, None)
    mask_id = None if mask is None else mask.mask_id.contiguous()
    out = StepScores(
        torch.empty(clean.shape),
        torch.empty(clean.shape),
        torch.empty(clean.shape, dtype=torch.bool),
        torch.empty(len(clean), dtype=torch.int32),
    )
    served = native.scores(
        clean.data_ptr(),
        clean.stride(0),
        NULL if noised is None else noised.data_ptr(),
        0 if noised is None else noised.stride(0),
        NULL if mask_id is None else mask_id.data_ptr(),
        out.scores.data_ptr(),
        out.biased_clean.data_ptr(),
        out.keep.data_ptr(),
        out.status.data_ptr(),
        _threads(batch, vocab_size, clean.dtype),
    )
    if not served:
        raise ArgumentError("a mask_id is outside [-1, M)")
    return out


def draw(scores: Tensor, key: DrawKey | None) -> StepResult:
    """Draw from processed scores; key None takes the best."""
    scores = _readable(scores)
    batch, vocab_size = scores.shape
    result, token, logprob, n_kept, status = _results(batch).next()
    seeds, stream, step = (None, None, 0) if key is None else _contiguous(key)
    _native.draw(
        DTYPE_CODES[scores.dtype],
        batch,
        vocab_size,
        scores.data_ptr(),
        scores.stride(0),
        NULL if seeds is None else seeds.data_ptr(),
        NULL if stream is None else stream.data_ptr(),
        *_step_index(step),
        token,
        logprob,
        n_kept,
        status,
        _threads(batch, vocab_size, scores.dtype),
    )
    return result


def prepare(
    clean_shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Rows,
    refusal_mask: Tensor | None,
    key: DrawKey | None,
    reuse_results: bool,
) -> NativeStep:
    """Return the decode step for logits of this shape and dtype with everything else resolved."""
    return NativeStep(clean_shape, dtype, rows, refusal_mask, key, reuse_results)


class NativeStep:
    """A decode step whose parameters lie in native memory; `contract.FastStep`."""

    def __init__(
        self,
        clean_shape: tuple[int, int],
        dtype: torch.dtype,
        rows: Rows,
        refusal_mask: Tensor | None,
        key: DrawKey | None,
        reuse_results: bool = False,
    ):
        self._shape = torch.Size(clean_shape)
        self._dtype = dtype
        self._words = None if refusal_mask is None else refusal_mask.contiguous()  # native memory points into it
        self._native = _native_step(self._shape, dtype, rows, self._words, key)
        self._n_masks = 0 if refusal_mask is None else len(refusal_mask)
        self._threaded = _is_large(*clean_shape, dtype)
        self._column_shape = self._shape[:1]
        self._results = ReadyResults(self._shape[0], rows.packed.device)
        self._reused = self._results.next() if reuse_results else None

    def __call__(self, clean: Tensor, noised: Tensor | None, mask_id: object, step: object) -> StepResult | None:
        """Return one token per row; None for anything but plain tensors exactly as prepared."""
        if type(clean) is not Tensor or not clean.is_cpu or clean.dtype is not self._dtype:
            return None
        if clean.shape != self._shape:
            return None
        step_of_all, step_of_row = 0, NULL
        if type(step) is int:
            if not 0 <= step <= MAX_STEP:
                return None
            step_of_all = step
        else:
            if not self._is_column(step):
                return None
            step_of_row = step.data_ptr()
        # The usual logits are contiguous, and to ask that is faster than to ask for strides.
        clean_stride = noised_stride = self._shape[1]
        if not clean.is_contiguous():
            clean_stride, column_stride = clean.stride()
            if column_stride != 1 and self._shape[1] != 1:
                return None
        noised_address = NULL
        if noised is not None:
            if type(noised) is not Tensor or not noised.is_cpu or noised.dtype is not self._dtype:
                return None
            if noised.shape != self._shape:
                return None
            if not noised.is_contiguous():
                noised_stride, column_stride = noised.stride()
                if column_stride != 1 and self._shape[1] != 1:
                    return None
            noised_address = noised.data_ptr()
        mask_address = NULL
        if mask_id is not None:
            if self._words is None or not self._is_column(mask_id):
                return None
            mask_address = mask_id.data_ptr()
        elif self._n_masks > 1:
            return None
        result, token, logprob, n_kept, status = self._reused or self._results.next()
        served = self._native.decode(
            clean.data_ptr(),
            clean_stride,
            noised_address,
            noised_stride,
            mask_address,
            step_of_all,
            step_of_row,
            token,
            logprob,
            n_kept,
            status,
            torch.get_num_threads() if self._threaded else 1,
        )
        return result if served else None

    def _is_column(self, value: object) -> TypeGuard[Tensor]:
        """Whether `value` is int64 [B] as native code reads it."""
        if type(value) is not Tensor or value.dtype is not torch.int64 or not value.is_cpu:
            return False
        return value.shape == self._column_shape and value.is_contiguous()


@lru_cache(maxsize=8)
def _results(batch: int) -> ReadyResults:
    return ReadyResults(batch, torch.device("cpu"))


def _native_step(
    shape: tuple[int, ...], dtype: torch.dtype, rows: Rows, words: Tensor | None, key: DrawKey | None
) -> _native.Step:
    batch, vocab_size = shape
    packed = rows.packed.contiguous()  # until native memory has its copy
    native = _native.Step(DTYPE_CODES[dtype], batch, vocab_size, packed.data_ptr())
    if words is not None:
        native.set_masks(words.data_ptr(), len(words))
    if key is not None:
        seeds, stream, _ = _contiguous(key)
        native.set_key(seeds.data_ptr(), stream.data_ptr())
    return native


def _contiguous(key: DrawKey) -> tuple[Tensor, Tensor, int | Tensor]:
    step = key.step.contiguous() if isinstance(key.step, Tensor) else key.step
    return key.seeds.contiguous(), key.stream.contiguous(), step


def _step_index(step: int | Tensor) -> tuple[int, int]:
    """Return the step as native code takes it: one number for all rows, and the address of one per row."""
    return (0, step.data_ptr()) if isinstance(step, Tensor) else (step, NULL)


def _readable(logits: Tensor) -> Tensor:
    """Return the logits with neighbours of a row side by side: native code knows row strides only."""
    return logits if logits.is_contiguous() or logits.stride(1) == 1 else logits.contiguous()


def _is_large(batch: int, vocab_size: int, dtype: torch.dtype) -> bool:
    return batch > 1 and batch * vocab_size * dtype.itemsize >= THREADING_BYTES


def _threads(batch: int, vocab_size: int, dtype: torch.dtype) -> int:
    return torch.get_num_threads() if _is_large(batch, vocab_size, dtype) else 1
