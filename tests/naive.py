"""The method written out without cache, batching tricks or kernels: what the decoding loop must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding.families import decoder_of, has_encoder
from tiny_models import extended


@dataclass
class NaiveSteering:
    """Greedy steering of B rows by hand, two full forward passes per guided step."""

    weight: float = 0.0
    beta: float = 0.0
    steps: int = 5
    bias: list[float] = field(default_factory=list)
    refusal: Any = None
    banned: tuple[int, ...] = ()


@torch.no_grad()
def naive_generate(
    model: Any, clean: dict[str, Tensor], noised: dict[str, Tensor], steering: NaiveSteering, new_tokens: int
) -> tuple[Tensor, list[Tensor]]:
    """Return ids [B, L + n] and the scores [B, V] that each token was the best of."""
    ids, all_scores = first_ids(model, clean), []
    rows = ids.shape[0]
    bias = steering.bias or [0.0] * rows
    states = [steering.refusal.start if steering.refusal and value else -1 for value in bias]
    for step in range(new_tokens):
        z = last_logits(model, clean, ids)
        if step < steering.steps:
            n = last_logits(model, noised, ids)
            scores = guided_scores(z, n, steering, bias, states)
        else:
            scores = z
        token = scores.argmax(-1)
        states = [
            steering.refusal.next_state(state, int(chosen)) if state >= 0 else -1
            for state, chosen in zip(states, token, strict=True)
        ]
        all_scores.append(scores)
        ids = torch.cat([ids, token[:, None]], 1)
    return ids, all_scores


def guided_scores(z: Tensor, n: Tensor, steering: NaiveSteering, bias: list[float], states: list[int]) -> Tensor:
    """Contrast, bias and cut of one step, row by row."""
    z = z.clone()
    z[:, list(steering.banned)] = -torch.inf
    scores = (1 + steering.weight) * z - steering.weight * n
    biased = z.clone()
    for row, (value, state) in enumerate(zip(bias, states, strict=True)):
        if value and state >= 0:
            member = members(steering.refusal.masks[state], z.shape[1])
            scores[row, member] += value
            biased[row, member] += value
    if steering.beta:
        cut = biased.amax(-1, keepdim=True) + math.log(steering.beta)
        scores = scores.masked_fill(biased < cut, -torch.inf)
    return scores


def members(words: Tensor, vocab_size: int) -> list[int]:
    """The token ids of one packed mask, bit by bit."""
    return [token for token in range(vocab_size) if int(words[token // 32]) >> (token % 32) & 1]


def first_ids(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What an answer continues, int64 [B, L]: the prompt, or the start token of a decoder that reads an encoder."""
    if has_encoder(decoder_of(model)):
        return torch.full_like(inputs["input_ids"][:, :1], model.language_model.config.decoder_start_token_id)
    return inputs["input_ids"]


@torch.no_grad()
def last_logits(model: Any, inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [B, V] behind `ids`, from scratch; for a model with an encoder these are its decoder's."""
    if has_encoder(decoder_of(model)):
        return model(**inputs, decoder_input_ids=ids, use_cache=False).logits[:, -1].float()
    return model(**extended(inputs, ids), use_cache=False).logits[:, -1].float()
