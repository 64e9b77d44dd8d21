"""The decode step in Triton (triton_kernels): one pass over the clean row, the noised row read at candidates only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..bitmask import words_per_row
from ..contract import DrawKey, RefusalMask, Rows, StepResult, StepScores
from ..errors import ArgumentError
from ..params import StepParams, resolve_rows
from ..rng import MAX_STEP
from .prepared import PreparedFor, new_result, readable
from .triton_kernels import scores as scores_kernels
from .triton_kernels import step as step_kernels
from .triton_kernels.numbers import RANK_NEG_INF
from .triton_kernels.shapes import MAX_SLICES, SIZES, Split, options_of, split_rows

NEG_INF = -float("inf")


def step(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None, key: DrawKey | None) -> StepResult:
    """Score, cut, filter and draw one token per row."""
    words, mask_id = (None, None) if mask is None else (mask.words, mask.mask_id.contiguous())
    prepared = TritonStep(clean.shape, clean.dtype, rows, words, key)
    now: int | Tensor = 0 if key is None else key.step
    result = prepared(
        readable(clean),
        None if noised is None else readable(noised),
        mask_id,
        now.contiguous() if isinstance(now, Tensor) else now,
    )
    if result is None:
        raise ArgumentError("a mask_id is outside [-1, M), or a step outside [0, 2**63)")
    return result


def scores(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None) -> StepScores:
    """Return every token's score, biased clean logit and whether it passes the cut."""
    clean, noised = readable(clean), None if noised is None else readable(noised)
    (batch, vocab_size), device = clean.shape, clean.device
    split = split_rows(batch, vocab_size, SIZES)
    out = StepScores(
        torch.empty(clean.shape, dtype=torch.float32, device=device),
        torch.empty(clean.shape, dtype=torch.float32, device=device),
        torch.empty(clean.shape, dtype=torch.bool, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
    )
    slots = (batch, MAX_SLICES)
    values = {
        **_sizes(batch, vocab_size, split),
        **_logits(clean, noised),
        **_masks(None if mask is None else mask.words, vocab_size, batch, device),
        "packed": rows.packed.contiguous(),
        "ranks": torch.full(slots, RANK_NEG_INF.value, dtype=torch.int32, device=device),
        "faults": torch.zeros(slots, dtype=torch.int32, device=device),
        "best_scores": torch.full(slots, NEG_INF, device=device),
        "best_biased": torch.full(slots, NEG_INF, device=device),
        "cuts": torch.full((batch,), NEG_INF, device=device),
        "thresholds": torch.full((batch,), NEG_INF, device=device),
        "out_scores": out.scores,
        "out_biased_clean": out.biased_clean,
        "out_keep": out.keep,
        "out_status": out.status,
    }
    if mask is not None:
        values["mask_ids"] = mask.mask_id.contiguous()
    by_slice = (batch, split.slices)
    with _on(device):
        _launch(scores_kernels.max_slices, by_slice, {**values, "logits": clean, "stride": clean.stride(0)})
        if mask is not None and rows.any_bias:
            values["best_gathered"] = torch.full(slots, NEG_INF, device=device)
            values["scratch_x"] = torch.empty(batch if rows.max_scope else 0, split.padded_size, device=device)
            values["chosen_x"] = torch.empty(batch, SIZES.room, device=device)
            _launch(scores_kernels.gather_slices, by_slice, values)
            _launch(scores_kernels.bound_rows, (batch,), values)
        _launch(scores_kernels.score_slices, by_slice, values)
        _launch(scores_kernels.keep_slices, by_slice, values)
    return out


def draw(scores: Tensor, key: DrawKey | None) -> StepResult:
    """Draw from processed scores; key None takes the best."""
    scores = readable(scores)
    (batch, vocab_size), device = scores.shape, scores.device
    split = split_rows(batch, vocab_size, SIZES)
    neutral = StepParams(contrast_weight=0, plausibility_beta=0, greedy=key is None)
    result = new_result(batch, device)
    values = {
        **_sizes(batch, vocab_size, split),
        **_key(key, batch, device),
        **_steps(0 if key is None else key.step, result.token),
        **_races(batch, device),
        **_outputs(result),
        "packed": resolve_rows(neutral, batch=batch, device=device).packed,
        "plan_left": torch.full((batch,), vocab_size, dtype=torch.int32, device=device),
        "scores": scores,
        "scores_stride": scores.stride(0),
        "tokens": torch.empty(0, dtype=torch.int32, device=device),  # no row is a list of some tokens
    }
    with _on(device):
        maxima = {**values, "logits": scores, "stride": scores.stride(0), "ranks": values["plan_ranks"]}
        _launch(scores_kernels.max_slices, (batch, split.slices), maxima)
        _launch(step_kernels.race_slices, (batch, split.slices), values)
        _launch(step_kernels.merge_slices, (batch,), values)
    return result


def prepare(
    clean_shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Rows,
    refusal_mask: Tensor | None,
    key: DrawKey | None,
    reuse_results: bool,
) -> TritonStep:
    """Return the decode step for logits of this shape and dtype with everything else resolved."""
    return TritonStep(clean_shape, dtype, rows, refusal_mask, key, reuse_results)


class TritonStep(PreparedFor):
    """A decode step with its room on the device; `contract.FastStep`.

    A call launches two to five kernels on the current stream and waits for nothing. With `reuse_results` it allocates
    nothing either, so a CUDA graph can hold it, once an ordinary call has compiled the kernels. The kernels read
    `rows.packed`, the seeds and the masks when they run: who writes into these tensors changes the next replay, within
    what the facts of `rows` allow.
    """

    def __init__(
        self,
        clean_shape: tuple[int, ...],
        dtype: torch.dtype,
        rows: Rows,
        refusal_mask: Tensor | None,
        key: DrawKey | None,
        reuse_results: bool = False,
    ):
        batch, vocab_size = clean_shape
        device = rows.packed.device
        super().__init__(clean_shape, dtype, device)
        split = split_rows(batch, vocab_size, SIZES)
        self._n_masks = 0 if refusal_mask is None else len(refusal_mask)
        self._reused = new_result(batch, device) if reuse_results else None
        self._values = {
            **_sizes(batch, vocab_size, split),
            **_masks(refusal_mask, vocab_size, batch, device),
            **_key(key, batch, device),
            **_scratch(batch, split, device),
            "packed": rows.packed.contiguous(),
            "some_uncut": int(rows.any_dense),
        }
        by_slice, by_row = (batch, split.slices), (batch,)
        self._launches: list[tuple[Any, tuple[int, ...]]] = []
        if rows.any_dense or batch <= SIZES.max_split_rows:
            self._launches += [(step_kernels.scan_slices, by_slice), (step_kernels.finish_rows, by_row)]
        else:
            self._launches += [(step_kernels.decode_rows, by_row)]
        self._launches += [(step_kernels.rest_rows, by_row)]
        self._values.update(_races(batch, device))
        if rows.any_dense:
            first = self._values["floats"].shape[1] - split.padded_size
            scores, tokens = (self._values[name][:, first:] for name in ("floats", "ints"))
            self._values.update(scores=scores, tokens=tokens, scores_stride=scores.stride(0))
            self._launches += [(step_kernels.race_slices, by_slice), (step_kernels.merge_slices, by_row)]

    def __call__(self, clean: Tensor, noised: Tensor | None, mask_id: object, step: object) -> StepResult | None:
        """Return one token per row; None for anything but plain tensors exactly as prepared."""
        if not self._is_like_prepared(clean) or not (noised is None or self._is_like_prepared(noised)):
            return None
        if mask_id is not None:
            if not self._n_masks or not self._is_column(mask_id) or not self._is_legal(mask_id, -1, self._n_masks - 1):
                return None
        elif self._n_masks > 1:
            return None
        if type(step) is int:
            if not 0 <= step <= MAX_STEP:
                return None
        elif not self._is_column(step) or not self._is_legal(step, 0, MAX_STEP):
            return None
        result = self._reused or new_result(self._shape[0], self._device)
        values = {**self._values, **_logits(clean, noised), **_steps(step, result.token), **_outputs(result)}
        if mask_id is not None:
            values["mask_ids"] = mask_id
        with _on(self._device):
            for kernel, grid in self._launches:
                _launch(kernel, grid, values)
        return result

    def _is_legal(self, column: Tensor, low: int, high: int) -> bool:
        """Whether the values are in range; on an accelerator nobody looks, since that would stop it."""
        return self._device.type != "cpu" or bool(((column >= low) & (column <= high)).all())


def _launch(kernel: Any, grid: tuple[int, ...], values: dict[str, Any]) -> None:
    """Launch a kernel with those of the values that it names."""
    kernel[grid](**{name: values[name] for name in kernel.arg_names}, **options_of(kernel.__name__))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on this device: it takes the current one, not the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


# ---- arguments of the kernels, by name ----


def _sizes(batch: int, vocab_size: int, split: Split) -> dict[str, int]:
    return {
        "batch": batch,
        "vocab_size": vocab_size,
        "padded_size": split.padded_size,
        "slices": split.slices,
        "slice_size": split.slice_size,
        "column_bits": split.column_bits,
        "BLOCK": SIZES.block,
        "MEMORY_BLOCK": SIZES.memory_block,
        "TILE": SIZES.tile,
        "ROOM": SIZES.room,
        "LOG_ROOM": SIZES.log_room,
    }


def _logits(clean: Tensor, noised: Tensor | None) -> dict[str, Any]:
    other = clean if noised is None else noised
    return {
        "clean": clean,
        "clean_stride": clean.stride(0),
        "noised": other,
        "noised_stride": other.stride(0),
        "has_noised": int(noised is not None),
    }


def _masks(words: Tensor | None, vocab_size: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Without masks no row has one; else all rows have the first one, unless a step says otherwise."""
    if words is None:
        words = torch.zeros(1, words_per_row(vocab_size), dtype=torch.int32, device=device)
        mask_ids = torch.full((batch,), -1, dtype=torch.int64, device=device)
    else:
        mask_ids = torch.zeros(batch, dtype=torch.int64, device=device)
    return {"words": words.contiguous(), "words_per_row": words_per_row(vocab_size), "mask_ids": mask_ids}


def _key(key: DrawKey | None, batch: int, device: torch.device) -> dict[str, Tensor]:
    if key is None:  # nobody draws
        nothing = torch.zeros(batch, dtype=torch.int64, device=device)
        return {"seeds": nothing, "streams": nothing}
    return {"seeds": key.seeds.contiguous(), "streams": key.stream.contiguous()}


def _steps(step: object, unused: Tensor) -> dict[str, Any]:
    """One step for all rows, or -1 and one per row; `unused` is any int64 [B]."""
    return {"steps": step, "step_of_all": -1} if isinstance(step, Tensor) else {"steps": unused, "step_of_all": step}


def _scratch(batch: int, split: Split, device: torch.device) -> dict[str, Tensor]:
    """What places.Scratch points into: 8 bytes per token of the vocabulary and row, of which few are touched."""
    width = 2 * MAX_SLICES + SIZES.room + split.padded_size
    ints = torch.empty(batch, width, dtype=torch.int32, device=device)
    floats = torch.empty(batch, width, device=device)
    # Slots beyond the last slice are never written: they stay as they are here.
    ints[:, :MAX_SLICES] = RANK_NEG_INF.value
    ints[:, MAX_SLICES : 2 * MAX_SLICES] = 0
    floats[:, :MAX_SLICES] = NEG_INF
    return {"ints": ints, "floats": floats}


def _races(batch: int, device: torch.device) -> dict[str, Tensor]:
    """What places.Plan points into, and the result of each slice's race."""

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(batch, MAX_SLICES, dtype=dtype, device=device)

    return {
        "plan_ranks": torch.full((batch, MAX_SLICES), RANK_NEG_INF.value, dtype=torch.int32, device=device),
        "plan_left": torch.zeros(batch, dtype=torch.int32, device=device),
        "plan_listed": torch.zeros(batch, dtype=torch.int32, device=device),
        "race_value": empty(torch.float64),
        "race_token": empty(torch.int32),
        "race_score": empty(torch.float32),
        "race_mass": empty(torch.float32),
        "race_count": empty(torch.int32),
    }


def _outputs(result: StepResult) -> dict[str, Tensor]:
    return {f"out_{name}": tensor for name, tensor in result._asdict().items()}
