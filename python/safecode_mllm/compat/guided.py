"""The published algorithm over the branches and the KV cache of this package: one vision call, nothing run twice.

It is not the paper's decode step: an unsafe verdict forces a refusal phrase, a safe one makes refusal tokens less
likely for a few steps, and the answer goes on by stock sampling. Draws come from torch's default generator in the
published order: one per guided step behind the first, then one per free token.

Source: behaviour of the published code of SafeCoDe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.compat.distributions import rank_candidate_phrases_by_contrastive_prob
from safecode_mllm.compat.model_types import Inputs
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import decoder_of
from safecode_mllm.decoding.loop import check_mode

logger = logging.getLogger(__name__)

# Of the best phrases the first that holds one of these is taken.
_REFUSING_WORDS = ("sorry", "apologize", "unable", "cannot", "can't", "not allowed", "not able to")
_QUOTES = frozenset("\"'`\u00b4\u201c\u201d\u2018\u2019")
_LOG_FLOOR = 1e-10
_SAFE_TEMPERATURE = 0.8
_UNSAFE_TEMPERATURE = 0.7
# A safe answer has begun well when this many words stand there and the first, this long, is upper-case.
_ENOUGH_WORDS = 2
_ENOUGH_LETTERS = 2

# One token and, for families whose text attends to image states, which images it sees.
Column = tuple[int, ...]


@dataclass(frozen=True)
class Steering:
    """The published hyper-parameters, checked: alpha, steps, k, and the two lambdas; and what a refusal is."""

    alpha: float
    max_steps: int
    top_k: int
    lambda_supp: float
    lambda_boost: float
    refusal_prefixes: Sequence[str]
    refusal_ids: list[int]
    banned_ids: list[int]


class Written:
    """The prompt and what stands behind it, in the cache of one or two branches.

    Args:
        model: the Hugging Face model.
        clean: processor output for the prompt, a batch of 1.
        noised: the same for the noised picture, or None.
    """

    def __init__(self, model: Any, clean: Inputs, noised: Inputs | None):
        from transformers import DynamicCache

        self._branches = Branches(model, clean, noised, DynamicCache())
        self._cached = columns_of(clean)
        self.device = clean["input_ids"].device
        self.columns = list(self._cached)
        self._logits = self._branches.prefill()

    @property
    def ids(self) -> list[int]:
        """Ids of prompt and text."""
        return [column[0] for column in self.columns]

    def logits(self) -> tuple[Tensor, Tensor | None]:
        """Return the logits [V] of both branches behind `columns`, whatever was changed about these since."""
        if self.columns != self._cached:
            kept = _common_length(self._cached, self.columns)
            # The last column is run again even if it is cached: its logits are wanted.
            kept = min(kept, len(self.columns) - 1)
            self._branches.rewind(len(self._cached) - kept)
            new = torch.tensor([self.columns[kept:]], device=self.device)
            visible = new[:, :, 1:] if new.shape[2] > 1 else None
            self._logits = self._branches.step(new[:, :, 0], visible)
            self._cached = list(self.columns)
        clean, noised = self._logits
        return clean[0], None if noised is None else noised[0]

    def drop_noised(self) -> None:
        """Go on with the clean branch alone."""
        self._branches.drop_noised()

    def feed(self, token: Tensor) -> Tensor:
        """Feed one more token, int64 [1], of a text that will not be changed any more; returns logits [1, V]."""
        return self._branches.step(token)[0]


def columns_of(inputs: Inputs) -> list[Column]:
    """Return the text columns of a processor's output."""
    ids = inputs["input_ids"][0].tolist()
    visible = inputs.get("image_attention_mask")
    seen = [()] * len(ids) if visible is None else visible[0].tolist()
    return [(token, *images) for token, images in zip(ids, seen, strict=True)]


def _common_length(first: Sequence[Column], second: Sequence[Column]) -> int:
    for length, (mine, theirs) in enumerate(zip(first, second, strict=False)):
        if mine != theirs:
            return length
    return min(len(first), len(second))


Logits = Callable[[list[int]], tuple[Tensor, Tensor]]


def best_phrase(logits: Logits, steering: Steering, tokenizer: Any) -> str | None:
    """Return the refusal phrase that the contrast of the bare prompt ranks best, or None if there is none to rank."""
    clean, noised = logits([])
    contrast = clean - steering.alpha * noised
    ranked = rank_candidate_phrases_by_contrastive_prob(
        contrast, tokenizer, steering.refusal_prefixes, min(steering.top_k, len(contrast))
    )
    logger.debug("refusal phrases, best first: %s", ranked)
    refusing = [phrase for phrase, _ in ranked if any(word in phrase.lower() for word in _REFUSING_WORDS)]
    return next(iter(refusing or [phrase for phrase, _ in ranked]), None)


def refusing_tokens(logits: Logits, steering: Steering) -> list[int]:
    """Return guided ids for an unsafe verdict without a phrase: refusal tokens are made more likely, step by step."""
    guided: list[int] = []
    for step in range(steering.max_steps):
        clean, noised = logits(guided)
        probabilities = torch.softmax(clean - steering.alpha * noised, dim=0)
        modulated = _scaled(probabilities, steering.refusal_ids, 1 + steering.lambda_boost)
        modulated = modulated / modulated.sum()
        if step == 0:
            guided.append(int(_without(modulated, steering.banned_ids).argmax()))
        else:
            guided.append(_draw(modulated, _UNSAFE_TEMPERATURE, steering.banned_ids))
    return guided


def answering_tokens(logits: Logits, steering: Steering, tokenizer: Any) -> list[int]:
    """Return guided ids for a safe verdict: half the contrast, refusal tokens made less likely, an early stop."""
    guided: list[int] = []
    for step in range(steering.max_steps):
        clean, noised = logits(guided)
        probabilities = torch.softmax(clean - 0.5 * steering.alpha * noised, dim=0)
        factor = 1 - 0.5 * steering.lambda_supp
        modulated = _scaled(probabilities, steering.refusal_ids, factor)
        total = modulated.sum()
        modulated = modulated / total if total > 0 else probabilities
        if step == 0:
            guided.append(_first_token(_without(modulated, steering.banned_ids), steering.top_k, tokenizer))
            continue
        guided.append(_draw(modulated, _SAFE_TEMPERATURE, steering.banned_ids))
        if _has_begun_well(tokenizer.decode(guided)):
            break
    return guided


def continue_freely(written: Written, model: Any, arguments: dict[str, Any]) -> Tensor:
    """Sample the rest of the answer as `model.generate` would, from the clean branch's cache.

    Args:
        written: prompt and guided text.
        model: the Hugging Face model.
        arguments: of `generate`.

    Returns:
        ids int64 [L + N]: prompt, guided text, and the N new tokens.
    """

    def sample(
        model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **_: Any
    ) -> Tensor:
        check_mode(vars(generation_config))
        written.drop_noised()
        logits, ids = written.logits()[0][None], input_ids
        while True:
            scores = logits_processor(ids, logits.to(torch.float32, copy=True))
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
            ids = torch.cat([ids, token], 1)
            if stopping_criteria(ids, None).all():
                return ids
            logits = written.feed(token[0])

    ids = torch.tensor([written.ids], device=written.device)
    return decoder_of(model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), custom_generate=sample, **arguments
    )[0]


def _scaled(probabilities: Tensor, ids: list[int], factor: float) -> Tensor:
    ids = [token for token in ids if token < len(probabilities)]
    scaled = probabilities.clone()
    scaled[ids] = probabilities[ids] * factor
    return scaled


def _without(probabilities: Tensor, banned_ids: list[int]) -> Tensor:
    """A placeholder in the text would have no image behind it. Nothing is renormalised: no other choice changes."""
    allowed = probabilities.clone()
    allowed[banned_ids] = 0.0
    return allowed


def _first_token(probabilities: Tensor, top_k: int, tokenizer: Any) -> int:
    best = torch.topk(probabilities, max(1, min(top_k, len(probabilities)))).indices.tolist()
    is_quote = tokenizer.decode([best[0]]).strip() in _QUOTES
    return best[1] if is_quote and len(best) > 1 else best[0]


def _draw(probabilities: Tensor, temperature: float, banned_ids: list[int]) -> int:
    scaled = torch.softmax(torch.log(probabilities + _LOG_FLOOR) / temperature, dim=0)
    return int(torch.multinomial(_without(scaled, banned_ids), 1))


def _has_begun_well(text: str) -> bool:
    words = text.split()
    return len(words) >= _ENOUGH_WORDS and len(words[0]) >= _ENOUGH_LETTERS and words[0][0].isupper()
