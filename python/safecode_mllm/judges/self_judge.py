"""The model as its own judge: it reads the image once more through the KV cache and answers with a letter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding.branches import Branches
from safecode_mllm.errors import SafeCoDeError
from safecode_mllm.judges.protocol import JudgeRequest, Label, Verdict
from safecode_mllm.judges.question import LABEL_ORDERS, LETTERS, questions
from safecode_mllm.prompts import HARMLESS_TEXT, PromptBuilder, collate

# Below this share of the probability mass on the letters the model did not answer the question (method section 4).
MIN_LETTER_MASS = 0.05
DEFAULT_THRESHOLD = 0.5
# How tokenizers mark a leading space, so that "A", " A" and "a" count as the same answer.
_SPACE_MARKS = "▁Ġ "


@dataclass(frozen=True)
class Reading:
    """What the read-out of one request gave: P(unsafe) in each label order, and the mass on the letters."""

    p_unsafe: tuple[float, ...]
    letter_mass: tuple[float, ...]


class SelfJudge:
    """Reads P(unsafe) from two letter logits, in both label orders, averaged.

    The question follows the untrusted request and quotes none of it. Its tokens run on a fork of the prompt's KV
    cache: no second image, no second prefill, and decoding is not touched.

    Args:
        threshold: label is "unsafe" when the averaged probability is at least this, in (0, 1).

    Source: SafeCoDe (arXiv 2509.19212) section 3.2 for the scene-level verdict; the read-out is ours.
    """

    name = "self"

    def __init__(self, threshold: float = DEFAULT_THRESHOLD):
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}")
        self.threshold = threshold
        self._model: Any = None
        self._builder: PromptBuilder | None = None

    def bind(self, model: Any, builder: PromptBuilder) -> SelfJudge:
        """Attach the model that judges, and the prompt builder of its processor."""
        self._model, self._builder = model, builder
        return self

    def judges_with(self, model: Any) -> bool:
        """Whether `model` is the one that judges; None asks whether no model is attached yet."""
        return self._model is model

    def explain(self) -> str:
        """Say in a sentence how this judge reads the model's verdict."""
        if self._builder is None:
            return "no model is attached yet"
        if self._builder.judge_suffix(HARMLESS_TEXT, questions()[0]).shares_image:
            return "reads two letters behind the prompt's own KV cache: no second image, no second prefill"
        return "the chat template puts the image behind the text, so each question needs a prefill of its own"

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Judge requests on their own, with a prefill of the clean images.

        Raises:
            SafeCoDeError: the judge is not bound to a model yet.
        """
        from transformers import DynamicCache

        if not requests:
            return []
        builder = self._require_builder()
        device = self._model.device
        rows = [builder.build(request.image, request.prompt) for request in requests]
        inputs = {key: value.to(device) for key, value in collate(rows, builder.pad_token_id).items()}
        with torch.no_grad():
            branches = Branches(self._model, inputs, None, DynamicCache())
            branches.prefill()
            return self.read(branches, range(len(requests)), requests)

    @torch.no_grad()
    def read(self, branches: Branches, rows: Sequence[int], requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Judge requests whose prompts `branches` has just prefilled, each in its clean row."""
        started = time.perf_counter()
        per_order = [self._logits(branches, rows, requests, question) for question in questions()]
        letters = letter_ids(self._require_builder().tokenizer)
        readings = _read(per_order, letters)
        latency = (time.perf_counter() - started) / len(requests)
        return [self._verdict(reading, latency) for reading in readings]

    def _logits(
        self, branches: Branches, rows: Sequence[int], requests: Sequence[JudgeRequest], question: str
    ) -> Tensor:
        """Logits [B, V] behind one question, from the cache where the prompt's image is part of what is shared."""
        builder = self._require_builder()
        suffixes = [builder.judge_suffix(request.prompt, question) for request in requests]
        if all(suffix.shares_image for suffix in suffixes):
            return branches.ask([s.ids for s in suffixes], [s.drop for s in suffixes], rows)
        return self._separate_prefill(requests, question)

    def _separate_prefill(self, requests: Sequence[JudgeRequest], question: str) -> Tensor:
        """The same question where the template puts the image behind the text: nothing can be shared."""
        from transformers import DynamicCache

        builder = self._require_builder()
        rows = [builder.build(request.image, f"{request.prompt}\n\n{question}") for request in requests]
        inputs = {key: value.to(self._model.device) for key, value in collate(rows, builder.pad_token_id).items()}
        return Branches(self._model, inputs, None, DynamicCache()).prefill()[0]

    def _verdict(self, reading: Reading, latency: float) -> Verdict:
        p_unsafe = sum(reading.p_unsafe) / len(reading.p_unsafe)
        mass = sum(reading.letter_mass) / len(reading.letter_mass)
        if not (mass >= MIN_LETTER_MASS and 0 <= p_unsafe <= 1):  # also when NaN
            raw = f"the letters hold {mass:.4f} of the mass, under {MIN_LETTER_MASS}"
            return Verdict("unknown", None, self.threshold, self.name, latency, raw)
        label: Label = "unsafe" if p_unsafe >= self.threshold else "safe"
        return Verdict(label, p_unsafe, self.threshold, self.name, latency)

    def _require_builder(self) -> PromptBuilder:
        if self._builder is None:
            raise SafeCoDeError("judge 'self' has no model: pass it to SafeCoDe(..., judge='self') or call bind()")
        return self._builder


@lru_cache(maxsize=16)
def letter_ids(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Return for each letter the ids of all its casing and spacing variants in the vocabulary."""
    found: dict[str, list[int]] = {letter.casefold(): [] for letter in LETTERS}
    for token, index in tokenizer.get_vocab().items():
        text = token.lstrip(_SPACE_MARKS).casefold()
        if text in found:
            found[text].append(index)
    missing = [letter for letter in LETTERS if not found[letter.casefold()]]
    if missing:
        raise SafeCoDeError(f"judge 'self' needs a token for each of {LETTERS}; the tokenizer has none for {missing}")
    return tuple(tuple(sorted(found[letter.casefold()])) for letter in LETTERS)


def _read(per_order: Sequence[Tensor], letters: tuple[tuple[int, ...], ...]) -> list[Reading]:
    """Turn the logits [B, V] of each label order into one reading per row, in float64."""
    p_orders, mass_orders = [], []
    for logits, labels in zip(per_order, LABEL_ORDERS, strict=True):
        logp = torch.log_softmax(logits.double(), -1)
        sums = torch.stack([logp[:, list(ids)].logsumexp(-1) for ids in letters], -1)
        p_orders.append(sums.softmax(-1)[:, labels.index("unsafe")])
        mass_orders.append(sums.exp().sum(-1))
    p, mass = torch.stack(p_orders, -1).tolist(), torch.stack(mass_orders, -1).tolist()
    return [Reading(tuple(ps), tuple(ms)) for ps, ms in zip(p, mass, strict=True)]
