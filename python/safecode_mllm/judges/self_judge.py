"""The model as its own judge: it reads the image once more through the KV cache and answers with a letter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safecode_mllm.conversations import Dialogue, Message
from safecode_mllm.decoding import kv
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.encoder_branches import make_branches
from safecode_mllm.decoding.question_layout import tree_obstacle
from safecode_mllm.errors import SafeCoDeError
from safecode_mllm.judges.calibration import (
    DEFAULT_THRESHOLD,
    Calibration,
    check_threshold,
    from_probability,
    logit,
    sigmoid,
)
from safecode_mllm.judges.captions import describe
from safecode_mllm.judges.letters import MIN_LETTER_MASS, Reading, letter_ids, read_letters
from safecode_mllm.judges.protocol import JudgeRequest, Verdict, failed
from safecode_mllm.judges.question import captioned_questions, questions
from safecode_mllm.judges.quoting import quote
from safecode_mllm.judges.weights import fingerprint
from safecode_mllm.prompts import HARMLESS_TEXT, PromptBuilder, collate

# A picture in which nothing can be seen.
_BLANK = (127, 127, 127)


class SelfJudge:
    """Reads P(unsafe) from two letter logits, in both label orders, averaged.

    The question follows the untrusted request and quotes none of it. Its tokens run on a fork of the prompt's KV
    cache: no second image, no second prefill, and decoding is not touched.

    Args:
        threshold: label is "unsafe" when the averaged probability is at least this, in (0, 1).
        captioned: let the model describe the image first, and ask with its description at hand: slower, since it
            writes; for models that see more when they have said what they see.
        contextual: subtract the log-odds that the same question has on a blank image: what the wording alone says; not
            for a request without an image.
        calibration: what `judge calibrate` fitted to this judge; brings its own threshold.

    Source: SafeCoDe (arXiv 2509.19212) section 3.2 for the scene-level verdict; the read-out is ours.
    """

    name = "self"

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        *,
        captioned: bool = False,
        contextual: bool = False,
        calibration: Calibration | None = None,
    ):
        check_threshold(threshold)
        self.threshold = threshold
        self.captioned, self.contextual, self.calibration = captioned, contextual, calibration
        self._model: Any = None
        self._builder: PromptBuilder | None = None

    def bind(self, model: Any, builder: PromptBuilder) -> SelfJudge:
        """Attach the model that judges, and the prompt builder of its processor."""
        self._model, self._builder = model, builder
        if self.calibration is not None:
            self.calibration.check(self.name, self.version)
        return self

    def judges_with(self, model: Any) -> bool:
        """Whether `model` is the one that judges; None asks whether no model is attached yet."""
        return self._model is model

    @property
    def version(self) -> str | None:
        """A fingerprint of the weights; None before a model is attached."""
        return None if self._model is None else fingerprint(self._model)

    @property
    def settings(self) -> dict[str, Any]:
        """What changes a verdict."""
        calibration = None if self.calibration is None else [self.calibration.scale, self.calibration.bias]
        return {
            "question": questions()[0],
            "threshold": self.threshold if self.calibration is None else self.calibration.threshold,
            "captioned": self.captioned,
            "contextual": self.contextual,
            "calibration": calibration,
        }

    def explain(self) -> str:
        """Say in a sentence how this judge reads the model's verdict."""
        if self._builder is None:
            return "no model is attached yet"
        if self._builder.judge_suffix(HARMLESS_TEXT, questions()[0]).shares_image:
            obstacle = tree_obstacle(self._model)
            rows = "both label orders in one row" if obstacle is None else f"a row per label order: {obstacle}"
            return f"reads two letters behind the prompt's own KV cache: no second image, no second prefill; {rows}"
        return "the chat template puts the image behind the text, so each question needs a prefill of its own"

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Judge requests on their own, with a prefill of the clean images.

        A request with earlier turns but without its dialogue fails: the places of its pictures are not known.

        Raises:
            SafeCoDeError: the judge is not bound to a model yet.
        """
        readable = [request.dialogue is not None or not request.conversation for request in requests]
        single = [request for request, reads in zip(requests, readable, strict=True) if reads]
        verdicts = iter(self._judge(single) if single else [])
        unread = failed(self.name, "it reads one turn: choose a judge that reads several", version=self.version)
        return [next(verdicts) if reads else unread for reads in readable]

    @torch.no_grad()
    def _judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        for with_pictures in (True, False):  # they cannot share a batch
            places = [n for n, asked in enumerate(requests) if bool(_dialogue(asked).images) is with_pictures]
            chosen = [requests[place] for place in places]
            if chosen:
                verdicts |= zip(places, self.read(self._prefilled(chosen), range(len(chosen)), chosen), strict=True)
        return [verdicts[place] for place in range(len(requests))]

    @torch.no_grad()
    def read(self, branches: Branches, rows: Sequence[int], requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Judge requests whose prompts `branches` has just prefilled, each in its clean row."""
        started = time.perf_counter()
        builder = self._require_builder()
        captions: list[str | None] = [None] * len(requests)
        if self.captioned:
            captions = [*describe(self._model, builder, [request.image for request in requests])]
        readings = self._readings(branches, rows, requests, captions)
        blanks: list[Reading | None] = [None] * len(requests)
        if self.contextual and all(_dialogue(request).images for request in requests):
            blank_requests = [_blank(request) for request in requests]
            blanks = [*self._readings(self._prefilled(blank_requests), range(len(requests)), blank_requests, captions)]
        latency = (time.perf_counter() - started) / len(requests)
        return [
            self._verdict(reading, blank, caption, latency)
            for reading, blank, caption in zip(readings, blanks, captions, strict=True)
        ]

    def _prefilled(self, requests: Sequence[JudgeRequest]) -> Branches:
        builder = self._require_builder()
        rows = [_build(builder, _dialogue(request)) for request in requests]
        branches = make_branches(self._model, self._inputs(rows), None, kv.new_cache(self._model))
        branches.prefill()
        return branches

    def _readings(
        self,
        branches: Branches,
        rows: Sequence[int],
        requests: Sequence[JudgeRequest],
        captions: Sequence[str | None],
    ) -> list[Reading]:
        texts = [_questions(request, caption) for request, caption in zip(requests, captions, strict=True)]
        per_order = self._logits(branches, rows, requests, list(zip(*texts, strict=True)))
        return read_letters(per_order, letter_ids(self._require_builder().tokenizer))

    def _logits(
        self,
        branches: Branches,
        rows: Sequence[int],
        requests: Sequence[JudgeRequest],
        orders: Sequence[Sequence[str]],
    ) -> Sequence[Tensor]:
        """Logits [B, V] behind each order's questions, one per request.

        Where the prompt's image is part of what is shared, one pass behind the prompt's cache answers all of them.
        """
        builder = self._require_builder()
        suffixes = [
            builder.judge_suffix(_dialogue(request), text)
            for texts in orders
            for request, text in zip(requests, texts, strict=True)
        ]
        if all(suffix.shares_image for suffix in suffixes):
            asked = branches.ask([s.ids for s in suffixes], [s.drop for s in suffixes], [*rows] * len(orders))
            return asked.split(len(requests))
        return [self._separate_prefill(requests, texts) for texts in orders]

    def _separate_prefill(self, requests: Sequence[JudgeRequest], texts: Sequence[str]) -> Tensor:
        """The same question where the template puts the image behind the text: nothing can be shared."""
        builder = self._require_builder()
        asked = [_dialogue(request).with_question(text) for request, text in zip(requests, texts, strict=True)]
        rows = [_build(builder, dialogue) for dialogue in asked]
        return make_branches(self._model, self._inputs(rows), None, kv.new_cache(self._model)).prefill()[0]

    def _inputs(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        device, dtype = self._model.device, self._model.dtype
        batch = collate(rows, self._require_builder().pad_token_id)
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()}

    def _verdict(self, reading: Reading, blank: Reading | None, caption: str | None, latency: float) -> Verdict:
        p = reading.p
        shown = reading if p is None or blank is None else blank
        if p is None or (blank is not None and blank.p is None):
            where = "" if shown is reading else "of the blank image "
            raw = f"the letters {where}hold {shown.mass:.4f} of the mass, under {MIN_LETTER_MASS}"
            return Verdict(
                "unknown", None, self.threshold, self.name, latency, raw, caption=caption, version=self.version
            )
        if blank is not None and blank.p is not None:
            p = sigmoid(logit(p) - logit(blank.p))
        label, p, threshold = from_probability(p, self.threshold, self.calibration)
        return Verdict(label, p, threshold, self.name, latency, caption=caption, version=self.version)

    def _require_builder(self) -> PromptBuilder:
        if self._builder is None:
            raise SafeCoDeError("judge 'self' has no model: pass it to SafeCoDe(..., judge='self') or call bind()")
        return self._builder


def _questions(request: JudgeRequest, caption: str | None) -> list[str]:
    """Return the question in each order of its labels; the operator's rules stand before it."""
    asked = questions() if caption is None else captioned_questions(quote(caption))
    return [f"{request.policy_text}\n{text}" for text in asked] if request.policy_text else asked


def _dialogue(request: JudgeRequest) -> Dialogue:
    return request.dialogue or Dialogue((request.image,), (Message("user", (None, request.prompt)),))


def _build(builder: PromptBuilder, dialogue: Dialogue) -> dict[str, Tensor]:
    return builder.build(dialogue.images, dialogue)


def _blank(request: JudgeRequest) -> JudgeRequest:
    """Return the same request about pictures that show nothing, as large as its own."""
    dialogue = _dialogue(request)
    blank = dialogue.with_images([Image.new("RGB", image.size, _BLANK) for image in dialogue.images])
    return replace(request, image=blank.sheet(), dialogue=blank)
