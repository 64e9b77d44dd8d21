"""The decode step in CUDA C++ (csrc/cuda): one launch per step, each clean logit read once from memory.

Calls run on torch's current stream of the logits' device and never wait for it. A prepared step may be captured into a
CUDA graph; a replay may change in place the logits, the packed parameters, mask_id, seeds, stream and a step given as a
tensor. A prepared step owns its scratch, so it must not run on two streams at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native_cuda
from ..contract import DrawKey, RefusalMask, Rows, StepResult, StepScores
from ..errors import BackendUnavailable, LaunchError
from ..rng import MAX_STEP
from .prepared import PreparedFor, ReadyResults, readable

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

NULL = 0


def step(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None, key: DrawKey | None) -> StepResult:
    """Score, cut, filter and draw one token per row."""
    clean, noised = readable(clean), None if noised is None else readable(noised)
    words = None if mask is None else mask.words
    prepared = CudaStep(clean.shape, clean.dtype, clean.device, rows, words, key, reuse_results=True)
    mask_id = None if mask is None else mask.mask_id.contiguous()
    result = prepared(clean, noised, mask_id, 0 if key is None else _contiguous(key.step))
    assert result is not None, "arguments were checked by ops"
    return result


def scores(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None) -> StepScores:
    """Return every token's score, biased clean logit and whether it passes the cut."""
    clean, noised = readable(clean), None if noised is None else readable(noised)
    device = clean.device
    native = _native_step(clean.shape, clean.dtype, device)
    packed = rows.packed.contiguous()
    native.set_parameters(packed.data_ptr())
    words = None if mask is None else mask.words.contiguous()
    if words is not None:
        native.set_masks(words.data_ptr(), len(words))
    mask_id = None if mask is None else mask.mask_id.contiguous()
    out = StepScores(
        torch.empty(clean.shape, device=device),
        torch.empty(clean.shape, device=device),
        torch.empty(clean.shape, device=device, dtype=torch.bool),
        torch.empty(len(clean), device=device, dtype=torch.int32),
    )
    _check(
        native.scores(
            clean.data_ptr(),
            clean.stride(0),
            NULL if noised is None else noised.data_ptr(),
            0 if noised is None else noised.stride(0),
            NULL if mask_id is None else mask_id.data_ptr(),
            out.scores.data_ptr(),
            out.biased_clean.data_ptr(),
            out.keep.data_ptr(),
            out.status.data_ptr(),
            _stream(device),
        )
    )
    return out


def draw(scores: Tensor, key: DrawKey | None) -> StepResult:
    """Draw from processed scores; key None takes the best."""
    scores = readable(scores)
    # No parameters: no contrast, no bias and no filter, which leaves the draw.
    prepared = CudaStep(scores.shape, scores.dtype, scores.device, None, None, key, reuse_results=True)
    result = prepared(scores, None, None, 0 if key is None else _contiguous(key.step))
    assert result is not None, "arguments were checked by ops"
    return result


def prepare(
    clean_shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Rows,
    refusal_mask: Tensor | None,
    key: DrawKey | None,
    reuse_results: bool,
) -> CudaStep:
    """Return the decode step for logits of this shape and dtype with everything else resolved."""
    return CudaStep(clean_shape, dtype, rows.packed.device, rows, refusal_mask, key, reuse_results)


class CudaStep(PreparedFor):
    """A decode step whose scratch lies ready on the device; `contract.FastStep`.

    Raises:
        BackendUnavailable: the compiled module has no code for the device.
        LaunchError: CUDA refuses the launch, or an earlier kernel has failed.
    """

    def __init__(
        self,
        clean_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        rows: Rows | None,
        refusal_mask: Tensor | None,
        key: DrawKey | None,
        reuse_results: bool = False,
    ):
        super().__init__(clean_shape, dtype, device)
        self._native = _native_step(self._shape, dtype, device)
        # The kernels read these at every launch, so they must live as long.
        self._packed = None if rows is None else rows.packed.contiguous()
        self._words = None if refusal_mask is None else refusal_mask.contiguous()
        self._seeds = None if key is None else key.seeds.contiguous()
        self._streams = None if key is None else key.stream.contiguous()
        if self._packed is not None:
            self._native.set_parameters(self._packed.data_ptr())
        if self._words is not None:
            self._native.set_masks(self._words.data_ptr(), len(self._words))
        if self._seeds is not None and self._streams is not None:
            self._native.set_key(self._seeds.data_ptr(), self._streams.data_ptr())
        self._n_masks = 0 if self._words is None else len(self._words)
        self.use_plan(*self._native.plan())
        self._results = ReadyResults(self._shape[0], device)
        self._reused = self._results.next() if reuse_results else None

    def use_plan(self, clusters: bool, blocks_per_row: int) -> None:
        """Set how a row is spread over blocks, for measurements; a plan that fits the device is chosen without."""
        self._native.use_plan(clusters, blocks_per_row)
        zeroed, size = self._native.scratch_bytes()
        self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._scratch[:zeroed].zero_()
        self._native.set_scratch(self._scratch.data_ptr())

    def __call__(self, clean: Tensor, noised: Tensor | None, mask_id: object, step: object) -> StepResult | None:
        """Return one token per row; None for anything but plain tensors exactly as prepared."""
        if not self._is_like_prepared(clean) or not (noised is None or self._is_like_prepared(noised)):
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
        mask_address = NULL
        if mask_id is not None:
            if self._words is None or not self._is_column(mask_id):
                return None
            mask_address = mask_id.data_ptr()
        elif self._n_masks > 1:
            return None
        result, token, logprob, n_kept, status = self._reused or self._results.next()
        _check(
            self._native.decode(
                clean.data_ptr(),
                clean.stride(0),
                NULL if noised is None else noised.data_ptr(),
                0 if noised is None else noised.stride(0),
                mask_address,
                step_of_all,
                step_of_row,
                token,
                logprob,
                n_kept,
                status,
                _stream(self._device),
            )
        )
        return result


def _native_step(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _native_cuda.Step:
    index = device.index or 0
    if reason := _native_cuda.why_unusable(index):
        raise BackendUnavailable(f"native_cuda cannot serve logits on {device}: {reason}")
    return _native_cuda.Step(index, DTYPE_CODES[dtype], *shape)


def _check(code: int) -> None:
    if code:
        raise LaunchError(f"native_cuda: CUDA error {code}: {_native_cuda.error_text(code)}")


def _stream(device: torch.device) -> int:
    """Return the address of torch's current stream of the device."""
    return torch.cuda.current_stream(device).cuda_stream


def _contiguous(step: int | Tensor) -> int | Tensor:
    return step.contiguous() if isinstance(step, Tensor) else step
