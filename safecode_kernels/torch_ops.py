"""The decode step as operators of torch, for torch.compile, torch.export and callers that hold tensors only.

    torch.ops.safecode_kernels.decode_step(clean, noised, pack_params(params, B), mask, mask_id, seeds, stream, step)

Shapes, dtypes and devices are checked here; values inside tensors are not looked at, except where a back end would read
memory that is not there. The back end is chosen once per device and dtype; the environment is read at that moment.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .bitmask import words_per_row
from .contract import LOGIT_DTYPES, PACKED_FIELDS, DrawKey, Kernels, RefusalMask, Rows, StepResult, StepScores
from .errors import ArgumentError, ArgumentTypeError
from .ops import check_like, check_logits, check_refusal_mask, empty_result
from .registry import resolve

NAMESPACE = "safecode_kernels"
_FIELDS = len(PACKED_FIELDS)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "decode_step(Tensor clean, Tensor? noised, Tensor params, Tensor? refusal_mask=None, Tensor? mask_id=None, "
    'Tensor? seeds=None, Tensor? stream=None, Tensor? step=None, str backend="auto") '
    "-> (Tensor token, Tensor logprob, Tensor n_kept, Tensor status)"
)
_library.define(
    "decode_scores(Tensor clean, Tensor? noised, Tensor params, Tensor? refusal_mask=None, Tensor? mask_id=None, "
    'str backend="auto") -> (Tensor scores, Tensor biased_clean, Tensor keep, Tensor status)'
)
_library.define(
    "draw(Tensor scores, Tensor? seeds=None, Tensor? stream=None, Tensor? step=None, bool greedy=False, "
    'str backend="auto") -> (Tensor token, Tensor logprob, Tensor n_kept, Tensor status)'
)


def decode_step(
    clean: Tensor,
    noised: Tensor | None,
    params: Tensor,
    refusal_mask: Tensor | None = None,
    mask_id: Tensor | None = None,
    seeds: Tensor | None = None,
    stream: Tensor | None = None,
    step: Tensor | None = None,
    backend: str = "auto",
) -> StepResult:
    """The operator `safecode_kernels::decode_step`; see ops.decode_step.

    Args:
        clean, noised, refusal_mask, backend: as ops.decode_step.
        params: float64 [10, B] from pack_params, on the device of `clean`.
        mask_id, seeds, stream, step: int64 [B] on that device; None stands for mask 0, no sampling, 0 and 0.
    """
    batch = _check(clean, noised, params, refusal_mask, mask_id)
    kernels = _kernels(backend, clean.device, clean.dtype)
    key = None if seeds is None else _key(seeds, stream, step, batch, clean.device)
    if batch == 0:
        return empty_result(clean.device)
    return kernels.step(clean, noised, Rows(params, torch.float32), _mask(refusal_mask, mask_id, batch), key)


def decode_scores(
    clean: Tensor,
    noised: Tensor | None,
    params: Tensor,
    refusal_mask: Tensor | None = None,
    mask_id: Tensor | None = None,
    backend: str = "auto",
) -> StepScores:
    """The operator `safecode_kernels::decode_scores`; arguments as decode_step."""
    batch = _check(clean, noised, params, refusal_mask, mask_id)
    kernels = _kernels(backend, clean.device, clean.dtype)
    if batch == 0:
        return _fake_scores(clean, noised, params)
    return kernels.scores(clean, noised, Rows(params, torch.float32), _mask(refusal_mask, mask_id, batch))


def draw(
    scores: Tensor,
    seeds: Tensor | None = None,
    stream: Tensor | None = None,
    step: Tensor | None = None,
    greedy: bool = False,
    backend: str = "auto",
) -> StepResult:
    """The operator `safecode_kernels::draw`; see ops.draw."""
    batch, _ = check_logits("scores", scores)
    kernels = _kernels(backend, scores.device, scores.dtype)
    if not greedy and seeds is None:
        raise ArgumentError("seeds is None; legal: int64 [B], or greedy=True")
    key = None if greedy or seeds is None else _key(seeds, stream, step, batch, scores.device)
    return empty_result(scores.device) if batch == 0 else kernels.draw(scores, key)


def _fake_step(clean: Tensor, *arguments: object, **named: object) -> StepResult:
    ints = clean.new_empty(clean.shape[0], dtype=torch.int32)
    return StepResult(torch.empty_like(ints, dtype=torch.int64), ints.float(), ints, torch.empty_like(ints))


def _fake_scores(clean: Tensor, *arguments: object, **named: object) -> StepScores:
    scores = clean.new_empty(clean.shape, dtype=torch.float32)
    keep = torch.empty_like(scores, dtype=torch.bool)
    status = clean.new_empty(clean.shape[0], dtype=torch.int32)
    return StepScores(scores, torch.empty_like(scores), keep, status)


@lru_cache(maxsize=64)
def _kernels(backend: str, device: torch.device, dtype: torch.dtype) -> Kernels:
    return resolve(backend, device=device, dtype=dtype).load()


def forget_backends() -> None:
    """Choose back ends anew: after a change of the environment variables that settings.py reads."""
    _kernels.cache_clear()


def _check(
    clean: Tensor,
    noised: Tensor | None,
    params: Tensor,
    refusal_mask: Tensor | None,
    mask_id: Tensor | None,
) -> int:
    """Return B; raise unless the operands fit together. The slow checks that name what is wrong run only if one is."""
    shape, dtype, device = clean.shape, clean.dtype, clean.device
    if len(shape) != 2 or shape[1] == 0 or dtype not in LOGIT_DTYPES:
        check_logits("clean", clean)
    batch, vocab_size = shape
    if noised is not None and (noised.dtype != dtype or noised.shape != shape or noised.device != device):
        check_like("noised", noised, clean, dtype)
    if params.dtype != torch.float64:
        raise ArgumentTypeError(f"params is {params.dtype}; legal: torch.float64, from pack_params")
    if params.shape != (_FIELDS, batch) or params.device != device:
        raise ArgumentError(
            f"params has shape {list(params.shape)} on {params.device}; legal: {[_FIELDS, batch]} on {device}, from "
            "pack_params"
        )
    if refusal_mask is not None:
        mask_shape = refusal_mask.shape
        # check_refusal_mask's conditions, without its call where they hold: a step of one row takes microseconds.
        usual = refusal_mask.dtype is torch.int32 and len(mask_shape) == 2 and refusal_mask.device == device
        if not usual or mask_shape[1] != words_per_row(vocab_size) or mask_shape[0] == 0:
            check_refusal_mask(refusal_mask, vocab_size, device)
        if mask_id is not None:
            _check_column("mask_id", mask_id, batch, device)
        elif mask_shape[0] != 1:
            raise ArgumentError(f"mask_id is None but refusal_mask has {len(refusal_mask)} rows; legal: int64 [B]")
    elif mask_id is not None:
        raise ArgumentError("mask_id is given but refusal_mask is None: give both or neither")
    return batch


def _check_column(name: str, column: Tensor, batch: int, device: torch.device) -> None:
    if column.dtype != torch.int64:
        raise ArgumentTypeError(f"{name} is {column.dtype}; legal: torch.int64")
    if column.shape != (batch,) or column.device != device:
        raise ArgumentError(f"{name} has shape {list(column.shape)} on {column.device}; legal: [{batch}] on {device}")


def _key(seeds: Tensor, stream: Tensor | None, step: Tensor | None, batch: int, device: torch.device) -> DrawKey:
    _check_column("seeds", seeds, batch, device)
    if stream is None:
        stream = torch.zeros_like(seeds)
    else:
        _check_column("stream", stream, batch, device)
    if step is not None:
        _check_column("step", step, batch, device)
    return DrawKey(seeds, stream, 0 if step is None else step)


def _mask(words: Tensor | None, mask_id: Tensor | None, batch: int) -> RefusalMask | None:
    if words is None:
        return None
    return RefusalMask(words, words.new_zeros(batch, dtype=torch.int64) if mask_id is None else mask_id)


# One Python implementation serves every device: the registry chooses the back end.
for _function, _fake in ((decode_step, _fake_step), (decode_scores, _fake_scores), (draw, _fake_step)):
    _library.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_function.__name__}", _fake, lib=_library)
