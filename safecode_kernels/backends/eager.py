"""The reference: the decode step in eager torch, on any device.

Computed in the dtype of the parameters: float32 is the back end, float64 the oracle for all back ends.
Shapes: B rows, V tokens, C columns after dropping those that no row needs. A score of -inf means excluded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import bitmask, rng
from ..contract import DrawKey, RefusalMask, Rows, Status, StepResult, StepScores

NEG_INF = -math.inf


def step(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None, key: DrawKey | None) -> StepResult:
    """Score, cut, filter and draw one token per row."""
    z = clean.to(rows.dtype)
    bias = _row_bias(rows, mask)
    gathered, status = _gather(z, bias, rows)
    z, ids = _compact(z, None, gathered)
    if bias is None and (noised is None or not rows.any_contrast):
        return _choose(z, ids, rows, key, status)  # scores are the clean logits: what was gathered is what is kept
    refusal = None
    if bias is not None and mask is not None:
        refusal = _refusal(mask, ids, clean.shape[1])
        z, ids = _compact(z, ids, _candidates(z, refusal, bias, z > NEG_INF, rows))
        refusal = _refusal(mask, ids, clean.shape[1])
    n = None if noised is None or not rows.any_contrast else _columns(noised, ids).to(rows.dtype)
    s, biased_clean, status = _score(z, n, refusal, bias, z > NEG_INF, rows, status)
    keep = plausible(biased_clean, s > NEG_INF, rows.log_beta)
    return _choose(*_compact(s, ids, keep), rows, key, status)


def scores(clean: Tensor, noised: Tensor | None, rows: Rows, mask: RefusalMask | None) -> StepScores:
    """Return every token's score, biased clean logit and whether it passes the cut."""
    z = clean.to(rows.dtype)
    bias = _row_bias(rows, mask)
    gathered, status = _gather(z, bias, rows)
    n = None if noised is None or not rows.any_contrast else noised.to(rows.dtype)
    refusal = None
    if bias is not None and mask is not None:
        refusal = _refusal(mask, None, clean.shape[1])
        gathered = _candidates(z, refusal, bias, gathered, rows)
    s, biased_clean, status = _score(z, n, refusal, bias, gathered, rows, status)
    keep = plausible(biased_clean, s > NEG_INF, rows.log_beta)
    status = _first(status, _status_of_best(s.amax(-1)))
    return StepScores(s, biased_clean, keep, status)


def draw(scores: Tensor, key: DrawKey | None) -> StepResult:
    """Draw from processed scores; key None takes the best."""
    x = scores.float()
    status = _status_of_best(x.amax(-1))
    alive = (x > NEG_INF) & (status == Status.OK).unsqueeze(1)
    return _finish(*_compact(x, None, alive), key, None, status)


def plausible(biased_clean: Tensor, allowed: Tensor, log_beta: Tensor) -> Tensor:
    """Return the allowed tokens whose biased clean logit is at least the best allowed one plus log(beta)."""
    best = biased_clean.masked_fill(~allowed, NEG_INF).amax(-1, keepdim=True)
    floor = torch.where(log_beta == NEG_INF, NEG_INF, best + log_beta)  # inf - inf would be NaN
    return allowed & (biased_clean >= floor)


def _row_bias(rows: Rows, mask: RefusalMask | None) -> Tensor | None:
    """Return each row's bias [B, 1], 0 for a row without a mask; None if no row has one."""
    if mask is None or not rows.any_bias:
        return None
    return rows.bias.masked_fill(mask.mask_id.unsqueeze(1) < 0, 0.0)


def _gather(z: Tensor, bias: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return which tokens can pass the cut, z >= max z + log(beta) - |bias|, and the status of the clean rows.

    The two signs of the bias stand on two sides, each where it is added again at the cut: rounding is monotone, so no
    token that passes the cut is missed by an ulp.
    """
    best = z.amax(-1, keepdim=True)
    status = _status_of_best(best.squeeze(1))
    if bias is None:
        highest, floor = z, best + rows.log_beta
    else:
        highest, floor = z + bias.clamp(min=0), best + bias.clamp(max=0) + rows.log_beta
    return _at_least(highest, floor.masked_fill((status != Status.OK).unsqueeze(1), math.nan)), status


def _candidates(z: Tensor, refusal: Tensor, bias: Tensor, gathered: Tensor, rows: Rows) -> Tensor:
    """Return which gathered tokens pass the cut when all of the mask is biased; a row with a scope keeps them all."""
    passes = plausible(z + torch.where(refusal, bias, 0.0), gathered, rows.log_beta)
    return passes if rows.max_scope == 0 else torch.where(rows.scope == 0, passes, gathered)


def _score(
    z: Tensor,
    n: Tensor | None,
    refusal: Tensor | None,
    bias: Tensor | None,
    gathered: Tensor,
    rows: Rows,
    status: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contrast plus bias, clean logit plus bias, and the status; columns may be all tokens or some."""
    s = z
    if n is not None:
        no_contrast = (rows.weight == 0) | (n == NEG_INF) | (~gathered & ~n.isfinite())
        n = torch.where(no_contrast, z, n)
        status = _first(status, Status.NAN_NOISED, gathered & n.isnan())
        status = _first(status, Status.INFINITE, gathered & (n == math.inf))
        scaled = rows.one_plus_weight * z
        s = torch.where(scaled > NEG_INF, scaled - rows.weight * n, NEG_INF)
        # Before the bias: whether a token gets it must not depend on how its score left the numbers.
        overflow = ~(s < math.inf)
        status = _first(status, Status.INFINITE, gathered & overflow)
        s = s.masked_fill(overflow, NEG_INF)
    biased_clean = z
    if refusal is not None and bias is not None:
        if rows.max_scope:
            refusal = refusal & (s >= _kth_best(s.masked_fill(~gathered, NEG_INF), rows.scope, rows.max_scope))
        shift = torch.where(refusal, bias, 0.0)
        s, biased_clean = s + shift, z + shift
    overflow = ~(s < math.inf)
    status = _first(status, Status.INFINITE, gathered & overflow)
    failed = (status != Status.OK).unsqueeze(1)
    return s.masked_fill(overflow | failed, NEG_INF), biased_clean.masked_fill(failed, NEG_INF), status


def _choose(x: Tensor, ids: Tensor | None, rows: Rows, key: DrawKey | None, status: Tensor) -> StepResult:
    """Apply temperature, top_k, top_p and min_p, then draw."""
    if rows.any_temperature:
        x = x / rows.temperature
        # Before the filters: from an infinite maximum they would make a row with nothing in it.
        status = _first(status, _status_of_best(x.amax(-1)))
    if rows.max_top_k:
        x, ids = _compact(x, ids, _at_least(x, _kth_best(x, rows.top_k, rows.max_top_k)))
    if rows.any_top_p:
        x, ids = _nucleus(x, ids, rows.top_p)
    if rows.any_min_p:
        x, ids = _compact(x, ids, _at_least(x, x.amax(-1, keepdim=True) + rows.log_min_p))
    return _finish(x, ids, key if rows.any_sampling else None, rows.greedy, status)


def _finish(x: Tensor, ids: Tensor | None, key: DrawKey | None, greedy: Tensor | None, status: Tensor) -> StepResult:
    """Draw among the finite columns, with the log-probability under exactly these."""
    best = x.amax(-1, keepdim=True)
    status = _first(status, _status_of_best(best.squeeze(1)))
    n_kept = (x > NEG_INF).sum(-1, dtype=torch.int32)
    log_mass = (x - best).exp_().sum(-1).log()
    if key is not None:
        x, ids = _compact(x, ids, x - best >= -rng.GUMBEL_SPAN)
        noise = _gumbel(x, ids, key)
        race = x.double() + (noise if greedy is None else noise.masked_fill(greedy, 0.0))
        winner = race.argmax(-1, keepdim=True)
    else:
        winner = x.argmax(-1, keepdim=True)
    logprob = (x.gather(1, winner) - best).squeeze(1) - log_mass
    token = (winner if ids is None else ids.gather(1, winner)).squeeze(1)
    failed = status != Status.OK
    return StepResult(
        token.masked_fill(failed, 0), logprob.masked_fill(failed, NEG_INF), n_kept.masked_fill(failed, 0), status
    )


def _nucleus(x: Tensor, ids: Tensor | None, top_p: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keep, by (score descending, id ascending), while the mass before the token is below top_p; mass in float64."""
    best = x.amax(-1, keepdim=True).double()
    total = (x.double() - best).exp().sum(-1, keepdim=True)
    # All tokens below this weight together hold less than half of 1 - top_p: none can be kept, so none is sorted.
    hopeless = (0.5 * (1 - top_p) / x.shape[1] * total).log() + best
    x, ids = _compact(x, ids, _at_least(x, hopeless.to(x.dtype)))
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    mass = ((ordered.double() - best).exp() / total).cumsum(-1)
    before = torch.cat([torch.zeros_like(best), mass[:, :-1]], dim=1)
    keep = (before < top_p) | (top_p == 1)
    return _compact(x, ids, torch.empty_like(keep).scatter_(1, order, keep) & (x > NEG_INF))


def _kth_best(x: Tensor, k: Tensor, max_k: int) -> Tensor:
    """Return each row's K-th largest value [B, 1]; -inf where K is 0 or larger than the row."""
    best = x.topk(min(max_k, x.shape[1]), dim=-1).values
    return best.gather(1, (k - 1).clamp(0, best.shape[1] - 1)).masked_fill((k == 0) | (k > best.shape[1]), NEG_INF)


def _compact(x: Tensor, ids: Tensor | None, alive: Tensor) -> tuple[Tensor, Tensor | None]:
    """Exclude what is not alive, and drop columns if that halves them. ids None: column = token. Order stays."""
    counts = alive.sum(-1)
    width = max(int(counts.max()), 1)
    if 2 * width > x.shape[1]:
        if int(counts.min()) == x.shape[1]:
            return x, ids
        return torch.where(alive, x, NEG_INF), ids
    row, column = alive.nonzero(as_tuple=True)
    first = torch.searchsorted(row, torch.arange(x.shape[0], device=x.device))
    slot = torch.arange(len(row), device=x.device) - first[row]
    packed = x.new_full((x.shape[0], width), NEG_INF)
    packed[row, slot] = x[row, column]
    packed_ids = column.new_zeros((x.shape[0], width))
    packed_ids[row, slot] = column if ids is None else ids[row, column]
    return packed, packed_ids


def _at_least(x: Tensor, floor: Tensor) -> Tensor:
    """Return x >= floor, and False where x is -inf whatever the floor; a NaN floor keeps nothing."""
    return x >= floor.clamp(min=torch.finfo(x.dtype).min)


def _columns(dense: Tensor, ids: Tensor | None) -> Tensor:
    return dense if ids is None else dense.gather(1, ids)


def _refusal(mask: RefusalMask, ids: Tensor | None, vocab_size: int) -> Tensor:
    """Return which columns are in their row's mask, [B, C]; a mask id of -1 stands for no token."""
    words = mask.words.index_select(0, mask.mask_id.clamp(min=0))
    inside = bitmask.unpack_mask(words, vocab_size) if ids is None else bitmask.contains(words, ids)
    return inside & (mask.mask_id >= 0).unsqueeze(1)


def _gumbel(x: Tensor, ids: Tensor | None, key: DrawKey) -> Tensor:
    if ids is None:
        return rng.gumbel(rng.row_bits(x.shape[1], seeds=key.seeds, stream=key.stream, step=key.step))
    return rng.gumbel(rng.token_bits(ids, seeds=key.seeds, stream=key.stream, step=key.step))


def _status_of_best(best: Tensor) -> Tensor:
    """Return the status that a row's maximum [B] shows: torch's maximum is NaN if any element is."""
    status = torch.zeros(best.shape, dtype=torch.int32, device=best.device)
    status = status.masked_fill(best.isnan(), Status.NAN_CLEAN).masked_fill(best == math.inf, Status.INFINITE)
    return status.masked_fill(best == NEG_INF, Status.NOTHING_FINITE)


def _first(status: Tensor, later: Status | Tensor, where: Tensor | None = None) -> Tensor:
    """Return `status`, and where it is still ok the later one (in rows with any `where`)."""
    if where is not None:
        later = torch.where(where.any(-1), int(later), 0)
    return torch.where(status == Status.OK, later, status).to(torch.int32)
