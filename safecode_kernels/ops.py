"""The public calls: check every argument, choose the back end, run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from .backends import eager
from .bitmask import words_per_row
from .contract import LOGIT_DTYPES, DrawKey, FastStep, Kernels, RefusalMask, Rows, StepResult, StepScores
from .errors import ArgumentError, ArgumentTypeError
from .params import StepParams, resolve_rows
from .registry import resolve
from .rng import MAX_SEED, MAX_STEP, MAX_STREAM

PerRowId = int | Sequence[int] | Tensor


def decode_step(
    clean: Tensor,
    noised: Tensor | None,
    params: StepParams,
    *,
    refusal_mask: Tensor | None = None,
    mask_id: PerRowId | None = None,
    seeds: PerRowId | None = None,
    stream: PerRowId | None = None,
    step: PerRowId = 0,
    backend: str = "auto",
) -> StepResult:
    """Return one token per row: contrast, refusal bias, plausibility cut, filters and draw in one call.

    Per row, in float32, with z a clean and n a noised logit (z = -inf is excluded; n = -inf counts as z):

        s = (1 + a) * z - a * n                     a = 0 or noised None: s = z
        s += bias, z' = z + bias                    tokens of the row's refusal mask within `bias_scope`; else z' = z
        keep z' >= max z' + log(beta)
        greedy: the best s, ties to the lowest id; else s / temperature, top_k, top_p, min_p, Gumbel race (see rng.py)

    Args:
        clean: float32, bfloat16 or float16 [B, V], any device, any strides; read only.
        noised: like `clean`, or None for no contrast in any row.
        params: see StepParams.
        refusal_mask: int32 [M, ceil(V / 32)] from pack_masks, on the device of `clean`; None = no bias.
        mask_id: row of `refusal_mask` per request, [B] in [-1, M), -1 = none; an int serves all rows. None uses the
            only row of a one-row mask.
        seeds: [B] in [0, 2**63), an int serves all rows; needed when a row samples.
        stream: [B] in [0, 2**32), the index among the sequences drawn from one seed; default 0.
        step: index of the generated token, [B] in [0, 2**63), an int serves all rows.
        backend: a name of list_backends() or "auto".

    Returns:
        StepResult. A row that cannot be decoded has a status and leaves the others alone. B = 0 gives empty tensors.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is illegal; nothing has been computed. Where mask_id, seeds,
            stream or step are tensors on an accelerator their values are not looked at: that would stop the device.
        BackendUnavailable: the back end cannot serve these logits.

    Determinism:
        The token is a pure function of the row's logits, its parameters and (seed, stream, step).

    Source:
        SafeCoDe, arXiv 2509.19212; plausibility from VCD, arXiv 2311.16922, here over the biased logits.
    """
    prepared = _prepare_for(clean, params, refusal_mask, seeds, stream, backend)
    return prepared(clean, noised, mask_id=mask_id, step=step)


def decode_scores(
    clean: Tensor,
    noised: Tensor | None,
    params: StepParams,
    *,
    refusal_mask: Tensor | None = None,
    mask_id: PerRowId | None = None,
    backend: str = "auto",
) -> StepScores:
    """Return every token's score after contrast and bias, unfiltered, at temperature 1, with the keep mask of the cut.

    Args, Raises: as decode_step. A noised logit that is not finite contributes no contrast where the token is too
    implausible to be a candidate.

    Returns:
        StepScores; `status` is that of decode_step as far as it does not depend on the temperature.
    """
    return _prepare_for(clean, params, refusal_mask, None, None, backend).scores(clean, noised, mask_id=mask_id)


def draw(
    scores: Tensor,
    *,
    seeds: PerRowId | None = None,
    stream: PerRowId | None = None,
    step: PerRowId = 0,
    greedy: bool = False,
    backend: str = "auto",
) -> StepResult:
    """Return one token per row from scores that are already processed: the same race that decode_step runs.

    Args:
        scores: float32, bfloat16 or float16 [B, V]; -inf = excluded.
        seeds, stream, step, backend: as decode_step.
        greedy: take the best, ties to the lowest id; needs no seeds.

    Returns:
        StepResult; status 1 for a NaN, 4 for +inf, 3 for a row with nothing finite.
    """
    batch, _ = check_logits("scores", scores)
    kernels = resolve(backend, device=scores.device, dtype=scores.dtype).load()
    key = None if greedy else _draw_key(seeds, stream, step, batch, scores.device)
    return empty_result(scores.device) if batch == 0 else kernels.draw(scores, key)


def plausible(biased_clean: Tensor, allowed: Tensor, beta: float | Tensor) -> Tensor:
    """Return which allowed tokens are plausible: biased_clean >= max over the allowed + log(beta).

    Args:
        biased_clean: float32 [B, V], from decode_scores.
        allowed: bool [B, V], tokens whose score is still finite after the caller's processors.
        beta: in [0, 1], a number or one per row [B]; 0 keeps all that is allowed.

    Returns:
        bool [B, V]. With `allowed` = where decode_scores is finite it equals `StepScores.keep`.
    """
    batch, _ = check_logits("biased_clean", biased_clean)
    check_like("allowed", allowed, biased_clean, torch.bool)
    rows = resolve_rows(StepParams(plausibility_beta=beta), batch=batch, device=biased_clean.device)
    return allowed.clone() if batch == 0 else eager.plausible(biased_clean.float(), allowed, rows.log_beta)


def prepare_step(
    params: StepParams,
    *,
    batch: int,
    vocab_size: int,
    device: torch.device | str,
    dtype: torch.dtype,
    refusal_mask: Tensor | None = None,
    seeds: PerRowId | None = None,
    stream: PerRowId | None = None,
    backend: str = "auto",
    reuse_results: bool = False,
) -> PreparedStep:
    """Return the decode step with everything that stays the same during a generation resolved and checked once.

    Args:
        params, refusal_mask, seeds, stream, backend: as decode_step.
        batch: B >= 0.
        vocab_size: V >= 1.
        device, dtype: of the logits that will come.
        reuse_results: a call may overwrite the tensors that the call before it returned; saves their allocation, which
            takes longer than a small step. For callers that are done with a result before the next step.
    """
    _check_int("batch", batch, 0, 2**31 - 1)
    _check_int("vocab_size", vocab_size, 1, 2**31 - 1)
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors say it
    if dtype not in LOGIT_DTYPES:
        raise ArgumentTypeError(f"dtype={dtype}; legal: {_names(LOGIT_DTYPES)}")
    rows = resolve_rows(params, batch=batch, device=device)
    check_refusal_mask(refusal_mask, vocab_size, device)
    if rows.any_bias and refusal_mask is None:
        raise ArgumentError("refusal_bias is not 0 but refusal_mask is None: give pack_masks(...) or refusal_bias=0")
    key = _draw_key(seeds, stream, 0, batch, device) if rows.any_sampling and seeds is not None else None
    chosen = resolve(backend, device=device, dtype=dtype)
    kernels = chosen.load()
    fast = None
    if batch and hasattr(kernels, "prepare") and (key is not None or not rows.any_sampling):
        fast = kernels.prepare((batch, vocab_size), dtype, rows, refusal_mask, key, reuse_results)
    return PreparedStep(batch, vocab_size, device, dtype, chosen.name, rows, refusal_mask, key, kernels, fast)


@dataclass(frozen=True, eq=False)
class PreparedStep:
    """A decode step whose parameters, masks, seeds and back end are fixed; made by prepare_step."""

    batch: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    backend: str
    rows: Rows
    refusal_mask: Tensor | None
    key: DrawKey | None
    kernels: Kernels
    fast: FastStep | None = None

    def __call__(
        self, clean: Tensor, noised: Tensor | None = None, *, mask_id: PerRowId | None = None, step: PerRowId = 0
    ) -> StepResult:
        """Return one token per row; see decode_step."""
        if self.fast is not None:
            result = self.fast(clean, noised, mask_id, step)
            if result is not None:
                return result
        mask = self._check(clean, noised, mask_id)
        step = _check_step(step, self.batch, self.device)
        if self.rows.any_sampling and self.key is None:
            raise ArgumentError("seeds is None but a row has greedy=False; legal: one integer in [0, 2**63) per row")
        if self.batch == 0:
            return empty_result(self.device)
        key = None if self.key is None else self.key._replace(step=step)
        return self.kernels.step(clean, noised, self.rows, mask, key)

    def scores(self, clean: Tensor, noised: Tensor | None = None, *, mask_id: PerRowId | None = None) -> StepScores:
        """Return every token's score and the keep mask; see decode_scores."""
        mask = self._check(clean, noised, mask_id)
        if self.batch == 0:
            empty = clean.float()
            return StepScores(empty, empty.clone(), empty.bool(), empty.new_zeros(0, dtype=torch.int32))
        return self.kernels.scores(clean, noised, self.rows, mask)

    def _check(self, clean: Tensor, noised: Tensor | None, mask_id: PerRowId | None) -> RefusalMask | None:
        """Raise if the logits are not what the step was prepared for; return the masks of this step."""
        check_logits("clean", clean)
        if clean.shape != (self.batch, self.vocab_size):
            raise ArgumentError(f"clean has shape {list(clean.shape)}; legal: {[self.batch, self.vocab_size]}")
        if clean.dtype != self.dtype:
            raise ArgumentTypeError(f"clean is {clean.dtype}; legal: {self.dtype}, for which the step was prepared")
        if clean.device != self.device:
            raise ArgumentError(f"clean is on {clean.device}; legal: {self.device}, for which the step was prepared")
        if noised is not None:
            check_like("noised", noised, clean, clean.dtype)
        if self.refusal_mask is None:
            if mask_id is not None:
                raise ArgumentError("mask_id is given but refusal_mask is None: give both or neither")
            return None
        n_masks = len(self.refusal_mask)
        if mask_id is None:
            if n_masks != 1:
                raise ArgumentError(
                    f"mask_id is None but refusal_mask has {n_masks} rows; legal: one id in [-1, {n_masks}) per row"
                )
            mask_id = 0
        return RefusalMask(
            self.refusal_mask, _per_row_ids("mask_id", mask_id, self.batch, -1, n_masks - 1, self.device)
        )


def _prepare_for(
    clean: Tensor,
    params: StepParams,
    refusal_mask: Tensor | None,
    seeds: PerRowId | None,
    stream: PerRowId | None,
    backend: str,
) -> PreparedStep:
    batch, vocab_size = check_logits("clean", clean)
    return prepare_step(
        params,
        batch=batch,
        vocab_size=vocab_size,
        device=clean.device,
        dtype=clean.dtype,
        refusal_mask=refusal_mask,
        seeds=seeds,
        stream=stream,
        backend=backend,
    )


def check_logits(name: str, logits: Tensor) -> tuple[int, int]:
    """Return [B, V] of logits; raise ArgumentError or ArgumentTypeError unless they are."""
    if not isinstance(logits, Tensor):
        raise ArgumentTypeError(f"{name} is a {type(logits).__name__}; legal: a tensor [B, V]")
    if logits.dtype not in LOGIT_DTYPES:
        raise ArgumentTypeError(f"{name} is {logits.dtype}; legal: {_names(LOGIT_DTYPES)}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ArgumentError(f"{name} has shape {list(logits.shape)}; legal: [B, V] with V >= 1")
    return logits.shape[0], logits.shape[1]


def check_like(name: str, tensor: Tensor, model: Tensor, dtype: torch.dtype) -> None:
    """Raise ArgumentError or ArgumentTypeError unless a tensor has this dtype and the model's shape and device."""
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name} is a {type(tensor).__name__}; legal: a tensor of shape {list(model.shape)}")
    if tensor.dtype != dtype:
        raise ArgumentTypeError(f"{name} is {tensor.dtype}; legal: {dtype}")
    if tensor.shape != model.shape:
        raise ArgumentError(f"{name} has shape {list(tensor.shape)}; legal: {list(model.shape)}")
    if tensor.device != model.device:
        raise ArgumentError(f"{name} is on {tensor.device}; legal: {model.device}")


def check_refusal_mask(words: Tensor | None, vocab_size: int, device: torch.device) -> None:
    """Raise ArgumentError or ArgumentTypeError unless the words are masks of this vocabulary."""
    if words is None:
        return
    if not isinstance(words, Tensor) or words.dtype != torch.int32:
        kind = words.dtype if isinstance(words, Tensor) else type(words).__name__
        raise ArgumentTypeError(f"refusal_mask is {kind}; legal: int32 words from pack_masks")
    width = words_per_row(vocab_size)
    if words.ndim != 2 or words.shape[1] != width or words.shape[0] == 0:
        raise ArgumentError(
            f"refusal_mask has shape {list(words.shape)}; legal: [M >= 1, {width}], from pack_masks(..., {vocab_size})"
        )
    if words.device != device:
        raise ArgumentError(f"refusal_mask is on {words.device}; legal: {device}")


def _draw_key(
    seeds: PerRowId | None, stream: PerRowId | None, step: PerRowId, batch: int, device: torch.device
) -> DrawKey:
    if seeds is None:
        raise ArgumentError("seeds is None; legal: one integer in [0, 2**63) per row")
    return DrawKey(
        _per_row_ids("seeds", seeds, batch, 0, MAX_SEED, device),
        _per_row_ids("stream", 0 if stream is None else stream, batch, 0, MAX_STREAM, device),
        _check_step(step, batch, device),
    )


def _per_row_ids(name: str, value: PerRowId, batch: int, low: int, high: int, device: torch.device) -> Tensor:
    """Return int64 [B] on `device`.

    A tensor that already lies on an accelerator is taken as it is: reading its values would stop the device.
    """
    legal = f"integers in [{low}, {high}], one per row ({batch}) or one for all"
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int64, torch.int32):
            raise ArgumentTypeError(f"{name} is {value.dtype}; legal: int64 or int32, {legal}")
        if value.device.type != "cpu":
            if value.shape != (batch,) or value.device != device:
                raise ArgumentError(
                    f"{name} has shape {list(value.shape)} on {value.device}; legal: [{batch}] on {device}"
                )
            return value.long()
        value = value.tolist()
    values = list(value) if isinstance(value, Sequence) else [value] * batch
    if len(values) != batch:
        raise ArgumentError(f"{name} holds {len(values)} values; legal: {legal}")
    for row, item in enumerate(values):
        if not isinstance(item, Integral) or isinstance(item, bool):
            raise ArgumentTypeError(f"{name}[{row}]={item!r} is a {type(item).__name__}; legal: {legal}")
        if not low <= item <= high:
            raise ArgumentError(f"{name}[{row}]={item} is out of range; legal: {legal}")
    return torch.tensor(values, dtype=torch.int64).to(device)


def _check_int(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name}={value!r} is a {type(value).__name__}; legal: an integer in [{low}, {high}]")
    if not low <= value <= high:
        raise ArgumentError(f"{name}={value} is out of range; legal: an integer in [{low}, {high}]")
    return value


def _check_step(step: PerRowId, batch: int, device: torch.device) -> int | Tensor:
    """Return the step as it is if it is one number for all rows, else as int64 [B]."""
    if isinstance(step, (Tensor, Sequence)):
        return _per_row_ids("step", step, batch, 0, MAX_STEP, device)
    return _check_int("step", step, 0, MAX_STEP)


def empty_result(device: torch.device) -> StepResult:
    """Return the result of an empty batch."""
    ints = torch.zeros(0, dtype=torch.int32, device=device)
    return StepResult(ints.long(), ints.float(), ints, ints.clone())


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
