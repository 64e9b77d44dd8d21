"""The decode step once more, token by token in plain Python: written from the specification, not from the code.

Every float32 operation is one numpy scalar operation, so that its rounding is exactly the one that the specification
names. Slow on purpose; for small vocabularies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MASK32 = 0xFFFFFFFF
INF = math.inf


@dataclass(frozen=True)
class RowParams:
    """One row's parameters as Python numbers."""

    contrast_weight: float
    plausibility_beta: float
    refusal_bias: float
    bias_scope: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    greedy: bool


@dataclass(frozen=True)
class RowResult:
    """token, logprob (float64), n_kept, status; scores and keep as lists over the vocabulary."""

    token: int
    logprob: float
    n_kept: int
    status: int
    scores: list[float]
    keep: list[bool]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK32, (a >> 32) ^ c[3] ^ k[1], a & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c[0], c[1], c[2], c[3]


def bits(token: int, seed: int, stream: int, step: int) -> int:
    """The 32 random bits of a token."""
    block = (token // 32) * 8 + token % 8
    word = (token // 8) % 4
    return philox((block, stream, step & MASK32, step >> 32), (seed & MASK32, seed >> 32))[word]


def gumbel(token: int, seed: int, stream: int, step: int) -> float:
    """The token's handicap in the race."""
    q = (bits(token, seed, stream, step) + 0.5) / 2.0**32
    return -math.log(-math.log1p(-q))


def _f(x: float, kind: type) -> np.floating:
    return kind(x)


def decode_row(
    clean: list[float],
    noised: list[float] | None,
    params: RowParams,
    refusal: set[int] | None,
    seed: int,
    stream: int,
    step: int,
    kind: type = np.float32,
) -> RowResult:
    """Decode one row; `refusal` None = the row has no mask; `kind` is the float type of the scores."""
    with np.errstate(all="ignore"):
        return _decode_row(clean, noised, params, refusal, seed, stream, step, kind)


def _decode_row(clean, noised, params, refusal, seed, stream, step, kind):
    vocab = range(len(clean))
    z = [_f(x, kind) for x in clean]
    failed = RowResult(0, -INF, 0, 0, [-INF] * len(clean), [False] * len(clean))

    def fail(status: int) -> RowResult:
        return RowResult(**{**failed.__dict__, "status": status})

    if any(math.isnan(x) for x in z):
        return fail(1)
    if any(x == INF for x in z):
        return fail(4)
    finite = [v for v in vocab if z[v] != -INF]
    if not finite:
        return fail(3)

    bias = _f(params.refusal_bias if refusal is not None else 0.0, kind)
    log_beta = _f(math.log(params.plausibility_beta) if params.plausibility_beta > 0 else -INF, kind)
    best_z = max(z[v] for v in finite)
    raised = {v: z[v] + bias if refusal is not None and v in refusal else z[v] for v in finite}
    if params.plausibility_beta == 0:
        gathered = set(finite)
    elif params.bias_scope == 0:
        gathered = {v for v in finite if raised[v] >= max(raised.values()) + log_beta}
    elif bias >= 0:
        gathered = {v for v in finite if z[v] + bias >= best_z + log_beta}
    else:
        gathered = {v for v in finite if z[v] >= (best_z + bias) + log_beta}

    scored = _scored(z, noised, params, refusal, bias, finite, gathered, kind)
    if isinstance(scored, int):
        return fail(scored)
    score, biased = scored

    allowed = [v for v in finite if score[v] != -INF]
    if not allowed:
        return fail(3)
    cut = max(biased[v] for v in allowed) + log_beta
    kept = [v for v in allowed if biased[v] >= cut]
    dense = [float(score.get(v, -INF)) for v in vocab]
    keep = [v in set(kept) for v in vocab]

    x = {v: score[v] for v in kept}
    if not params.greedy:
        x = _filtered(x, params, kind)
        if not x:
            return fail(3)
        if any(value == INF for value in x.values()):
            return fail(4)
    best = max(float(value) for value in x.values())
    mass = math.fsum(math.exp(float(value) - best) for value in x.values())
    race = {v: float(x[v]) + (0.0 if params.greedy else gumbel(v, seed, stream, step)) for v in x}
    token = min(v for v in race if race[v] == max(race.values()))
    return RowResult(token, float(x[token]) - best - math.log(mass), len(x), 0, dense, keep)


def _scored(z, noised, params, refusal, bias, finite, gathered, kind):
    """Score and biased clean logit of every finite token, or the status that forbids them."""
    score = {v: z[v] for v in finite}
    if noised is not None and params.contrast_weight > 0:
        n = [_f(x, kind) for x in noised]
        if any(math.isnan(n[v]) for v in gathered):
            return 2
        if any(n[v] == INF for v in gathered):
            return 4
        a, one_plus_a = _f(params.contrast_weight, kind), _f(1.0 + params.contrast_weight, kind)
        for v in finite:
            other = z[v] if n[v] == -INF or (v not in gathered and not math.isfinite(n[v])) else n[v]
            left = one_plus_a * z[v]
            score[v] = left if left == -INF else left - a * other

    biased = {v: z[v] for v in finite}
    if refusal is not None and bias != 0:
        threshold = -INF
        if params.bias_scope:
            ranked = sorted((score[v] for v in gathered), reverse=True)
            threshold = ranked[params.bias_scope - 1] if len(ranked) >= params.bias_scope else -INF
        in_scope = [v for v in finite if v in refusal and score[v] >= threshold]
        for v in in_scope:
            score[v], biased[v] = score[v] + bias, biased[v] + bias
    for v in finite:
        if math.isnan(score[v]) or score[v] == INF:
            if v in gathered:
                return 4
            score[v] = _f(-INF, kind)
    return score, biased


def _filtered(x, params, kind):
    """Temperature, top_k, top_p, min_p."""
    x = {v: value / _f(params.temperature, kind) for v, value in x.items()}
    x = {v: value for v, value in x.items() if value != -INF}  # what overflows is excluded
    if not x:
        return x
    if 0 < params.top_k <= len(x):
        kth = sorted(x.values(), reverse=True)[params.top_k - 1]
        x = {v: value for v, value in x.items() if value >= kth}
    if params.top_p < 1:
        order = sorted(x, key=lambda v: (-x[v], v))
        weight = {v: math.exp(float(x[v]) - float(x[order[0]])) for v in order}
        total, before, nucleus = sum(weight.values()), 0.0, {}
        for v in order:
            if before < params.top_p:
                nucleus[v] = x[v]
            before += weight[v] / total
        x = nucleus
    if params.min_p > 0:
        floor = max(x.values()) + _f(math.log(params.min_p), kind)
        x = {v: value for v, value in x.items() if value >= floor}
    return dict(sorted(x.items()))
