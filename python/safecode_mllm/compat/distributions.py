"""The published helpers on one distribution: they rank, reweight and draw; what they printed is logged."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.judges.parsing import read_label

logger = logging.getLogger(__name__)

# Keeps the logarithm of a probability of zero finite.
_LOG_FLOOR = 1e-8


def rank_candidate_phrases_by_contrastive_prob(
    logits_cd: Tensor, tokenizer: Any, candidate_phrases: Sequence[str], top_k: int = 5
) -> list[tuple[str, float]]:
    """Return the `top_k` phrases whose tokens are the most probable first tokens, best first.

    Args:
        logits_cd: floating [V], of one position.
        tokenizer: encodes the phrases.
        candidate_phrases: a phrase that gives no token is left out; equal scores keep their order.
        top_k: how many to return.

    Returns:
        (phrase, sum of the probabilities of all its tokens at this one position): not the probability of the phrase,
        and longer phrases gain by their length.

    Source: the published code of SafeCoDe.
    """
    probabilities = torch.softmax(logits_cd, dim=0).tolist()
    scored = []
    for phrase in candidate_phrases:
        ids = tokenizer.encode(phrase, add_special_tokens=False)
        if ids:
            scored.append((phrase, sum(probabilities[token] for token in ids if token < len(probabilities))))
    return sorted(scored, key=lambda entry: entry[1], reverse=True)[:top_k]


def apply_gpt_guided_modulation(
    logits: Tensor,
    tokenizer: Any,
    topk_indices: Tensor,
    refusal_prefixes: Sequence[str],
    verdict: str,
    lambda_supp: float = 2.0,
    lambda_boost: float = 2.0,
    verbose: bool = True,
) -> Tensor:
    """Return logits moved on those of the given tokens whose text opens with a refusal prefix, whatever the case.

    Args:
        logits: floating [V].
        tokenizer: decodes single tokens.
        topk_indices: int64 [K], the tokens to look at.
        refusal_prefixes: text that a token has to begin with.
        verdict: "safe" takes `lambda_supp` off, "unsafe" adds `lambda_boost`, anything else changes nothing.
        lambda_supp: in logits.
        lambda_boost: in logits.
        verbose: log what was changed.

    Source: the published code of SafeCoDe.
    """
    shift = {"safe": -lambda_supp, "unsafe": lambda_boost}.get(read_label(verdict), 0.0)
    openings = tuple(prefix.lower() for prefix in refusal_prefixes)
    tokens = [int(token) for token in topk_indices if tokenizer.decode(token).lower().startswith(openings)]
    modulated = logits.clone()
    modulated[tokens] += shift
    if verbose:
        logger.info("verdict %s moves %d logits by %+g", verdict, len(tokens), shift)
    return modulated


def reweight_and_renormalize_probs(
    logits: Tensor,
    tokenizer: Any,
    refusal_token_ids: Collection[int],
    verdict: str,
    beta: float = 0.3,
    top_k: int = 50,
    verbose: bool = True,
) -> Tensor:
    """Return probabilities [V] with the refusal tokens among the best `top_k` made more or less likely.

    Args:
        logits: floating [V].
        tokenizer: unused but for its place in the signature.
        refusal_token_ids: which tokens.
        verdict: "unsafe" multiplies their probabilities by 1 + beta, "safe" by 1 - beta, anything else by 1.
        beta: see verdict.
        top_k: at most V.
        verbose: log what was changed.

    Source: the published code of SafeCoDe.
    """
    probabilities = torch.softmax(logits, dim=0)
    factor = {"unsafe": 1 + beta, "safe": 1 - beta}.get(read_label(verdict), 1.0)
    refusing = set(refusal_token_ids)
    best = torch.topk(probabilities, min(top_k, len(probabilities))).indices.tolist()
    tokens = [token for token in best if token in refusing]
    probabilities[tokens] *= factor
    if verbose:
        logger.info("verdict %s multiplies %d probabilities by %g", verdict, len(tokens), factor)
    return probabilities / probabilities.sum()


def adaptive_sample_from_probs(probs: Tensor, temperature: float = 0.7, top_p: float = 0.9) -> int:
    """Draw a token from the most probable ones that together hold `top_p`, with torch's default generator.

    Args:
        probs: floating [V], a distribution.
        temperature: > 0; 1.0 leaves the distribution as it is.
        top_p: the best token is always among those drawn from.

    Source: the published code of SafeCoDe.
    """
    if temperature != 1.0:
        probs = torch.softmax(torch.log(probs + _LOG_FLOOR) / temperature, dim=0)
    ranked, order = torch.sort(probs, descending=True)
    before = torch.cumsum(ranked, dim=0).roll(1)
    before[0] = 0.0
    kept = order[before <= top_p]
    weights = probs[kept]
    return int(kept[torch.multinomial(weights / weights.sum(), 1)])
