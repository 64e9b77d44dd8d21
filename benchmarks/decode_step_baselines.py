"""What the decode step is measured against: chains of PyTorch calls that give the same, and the published step.

Each returns token and log-probability; the first two also how many tokens were kept, as the step does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safecode_kernels.testing import Case

NEG_INF = -math.inf
# Of the published step (SafeCoDe's code): strength of the contrast, of the suppression, and its fixed temperature.
PUBLISHED_ALPHA, PUBLISHED_LAMBDA, PUBLISHED_TEMPERATURE = 0.3, 1.0, 0.8


@dataclass(frozen=True, eq=False)
class Inputs:
    """A case as plain tensors: weight, bias [B, 1]; refusal ids [R]; member float32 [V] is 1 for a refusal id."""

    clean: Tensor
    noised: Tensor
    weight: Tensor
    bias: Tensor
    refusal_ids: Tensor
    member: Tensor
    log_beta: float | None
    temperature: float
    top_k: int
    top_p: float
    greedy: bool


def inputs_of(case: Case) -> Inputs:
    """Return the case as a caller of plain PyTorch would hold it."""
    from safecode_kernels import unpack_mask

    assert case.noised is not None
    assert case.refusal_mask is not None
    params, vocab_size, device = case.params, case.clean.shape[1], case.clean.device
    member = unpack_mask(case.refusal_mask, vocab_size)[0]
    beta = float(params.plausibility_beta)  # type: ignore[arg-type]
    return Inputs(
        clean=case.clean,
        noised=case.noised,
        weight=torch.tensor(params.per_row("contrast_weight", case.batch), device=device).unsqueeze(1),
        bias=torch.tensor(params.per_row("refusal_bias", case.batch), device=device).unsqueeze(1),
        refusal_ids=member.nonzero().flatten(),
        member=member.float(),
        log_beta=math.log(beta) if beta > 0 else None,
        temperature=float(params.temperature),  # type: ignore[arg-type]
        top_k=int(params.top_k),  # type: ignore[call-overload]
        top_p=float(params.top_p),  # type: ignore[arg-type]
        greedy=bool(params.greedy),
    )


def naive_logprobs(x: Inputs) -> Tensor:
    """Return the log-probabilities of the naive chain, [B, V]."""
    return _filtered(_naive_scores(x), x).log_softmax(-1)


def naive(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(a) The step as a chain over the whole vocabulary."""
    scores = _naive_scores(x)
    if x.greedy:
        token = scores.argmax(-1, keepdim=True)
        logprob = scores.log_softmax(-1).gather(1, token)
    else:
        scores = _filtered(scores, x)
        probabilities = scores.softmax(-1)
        token = torch.multinomial(probabilities, 1)
        logprob = probabilities.gather(1, token).log()
    return token[:, 0], logprob[:, 0], (scores > NEG_INF).sum(-1)


def compact(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(b) The strongest chain we know: find the candidates, then do everything on [B, most candidates of a row]."""
    assert x.log_beta is not None
    z = x.clean.float()
    best = z.amax(-1, keepdim=True)
    row, token = (z + x.bias.clamp(min=0) >= best + x.bias.clamp(max=0) + x.log_beta).nonzero(as_tuple=True)
    clean = z[row, token]
    weight, shift = x.weight[row, 0], x.bias[row, 0] * x.member[token]
    score = (1 + weight) * clean - weight * x.noised[row, token].float() + shift
    counts = torch.bincount(row, minlength=len(z))
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    width = int(counts.max())
    scores = z.new_full((len(z), width), NEG_INF)
    biased, ids = scores.clone(), row.new_zeros(len(z), width)
    scores[row, slot], biased[row, slot], ids[row, slot] = score, clean + shift, token
    scores = scores.masked_fill(biased < biased.amax(-1, keepdim=True) + x.log_beta, NEG_INF)
    if x.greedy:
        place = scores.argmax(-1, keepdim=True)
        logprob = scores.log_softmax(-1).gather(1, place)
    else:
        scores = _filtered(scores, x)
        probabilities = scores.softmax(-1)
        place = torch.multinomial(probabilities, 1)
        logprob = probabilities.gather(1, place).log()
    return ids.gather(1, place)[:, 0], logprob[:, 0], (scores > NEG_INF).sum(-1)


def published(x: Inputs) -> Tensor:
    """(d) The published step: two softmaxes, a Python loop over the refusal ids, argmax or multinomial."""
    p = torch.softmax(x.clean.float() - PUBLISHED_ALPHA / 2 * x.noised.float(), -1)
    for token in x.refusal_ids.tolist():
        p[:, token] = p[:, token] * (1 - PUBLISHED_LAMBDA / 2)
    p = p / p.sum(-1, keepdim=True)
    if x.greedy:
        return p.argmax(-1)
    return torch.multinomial(torch.softmax((p + 1e-10).log() / PUBLISHED_TEMPERATURE, -1), 1)[:, 0]


def _naive_scores(x: Inputs) -> Tensor:
    z, n = x.clean.float(), x.noised.float()
    shift = x.bias.expand(-1, len(x.refusal_ids))
    scores = ((1 + x.weight) * z - x.weight * n).index_add_(1, x.refusal_ids, shift)
    if x.log_beta is None:
        return scores
    biased = z.clone().index_add_(1, x.refusal_ids, shift)
    return scores.masked_fill(biased < biased.amax(-1, keepdim=True) + x.log_beta, NEG_INF)


def _filtered(scores: Tensor, x: Inputs) -> Tensor:
    if x.greedy:
        return scores
    scores = scores / x.temperature
    if x.top_k:
        k = min(x.top_k, scores.shape[1])
        scores = scores.masked_fill(scores < scores.topk(k, -1).values[:, -1:], NEG_INF)
    if x.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        removed = p.cumsum(-1) - p >= x.top_p
        scores = scores.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), NEG_INF)
    return scores
