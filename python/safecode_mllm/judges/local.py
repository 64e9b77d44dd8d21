"""Another model on this machine as the judge: one that sees, or a text model that works from a description."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges.calibration import DEFAULT_THRESHOLD, Calibration, check_threshold, from_probability
from safecode_mllm.judges.captions import describe
from safecode_mllm.judges.hf_models import JudgeModel, load_judge_model
from safecode_mllm.judges.letters import MIN_LETTER_MASS, Reading, letter_ids, read_letters
from safecode_mllm.judges.parsing import read_label
from safecode_mllm.judges.protocol import JudgeRequest, Verdict
from safecode_mllm.judges.question import DESCRIBED_SCENE, WORD_QUESTION, letter_questions, questions
from safecode_mllm.judges.quoting import quote
from safecode_mllm.judges.text_prompts import TextPrompts
from safecode_mllm.judges.weights import fingerprint
from safecode_mllm.judges.writing import Written, next_logits, write
from safecode_mllm.prompts import PromptBuilder

Protocol = Literal["one_step", "two_step"]
Reads = Literal["letters", "words"]

DEFAULT_BATCH_SIZE = 8
# A word, and room for a model that says a sentence; thinking models need more.
DEFAULT_MAX_NEW_TOKENS = 32


class LocalJudge:
    """Asks another model of transformers.

    "one_step" shows it image and request and reads two letters. "two_step" has the image described first and asks about
    the description alone, as the paper's judge does; a text model can do nothing else.

    Args:
        source: a folder, a hub id, or a loaded model.
        protocol: None is "one_step" for a model that sees and "two_step" for one that does not.
        reads: "letters" reads probabilities; "words" has the model write and reads the label from the text, which is
            the published protocol and works in two steps only.
        describer: who describes the image in two steps, a loaded model that sees; None is the judge itself, and for a
            text model the model whose answers are steered.
        threshold: "unsafe" from this probability on.
        calibration: what `judge calibrate` fitted to this judge.
        batch_size: requests per forward pass.
        max_new_tokens: longest reply in words.
        device: where to run.
        dtype: of the weights.

    Raises:
        ConfigError: the arguments do not go together.
        ModelError: the model cannot be loaded.

    Source: SafeCoDe (arXiv 2509.19212) for two steps; our wording.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | JudgeModel,
        *,
        protocol: Protocol | None = None,
        reads: Reads = "letters",
        describer: JudgeModel | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        calibration: Calibration | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        for name, value, literal in (("protocol", protocol or "one_step", Protocol), ("reads", reads, Reads)):
            if value not in get_args(literal):
                raise ConfigError(f"{name}={value!r} is not legal: it must be one of {list(get_args(literal))}")
        for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigError(f"{name}={number!r} must be an integer of at least 1")
        check_threshold(threshold)
        self._is_loaded = isinstance(source, JudgeModel)
        loaded = (
            source
            if isinstance(source, JudgeModel)
            else load_judge_model(os.fspath(source), device=device, dtype=dtype)
        )
        self.source = "model" if isinstance(source, JudgeModel) else os.fspath(source)
        self.protocol: Protocol = protocol or ("one_step" if loaded.sees else "two_step")
        self.reads, self.threshold, self.calibration = reads, threshold, calibration
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        if self.protocol == "one_step" and not loaded.sees:
            raise ConfigError(f"protocol='one_step' needs a model that takes images, and {self.source!r} does not")
        if self.protocol == "one_step" and reads == "words":
            raise ConfigError("reads='words' works with protocol='two_step'; one step reads letters")
        self._model = loaded.model
        self._texts = TextPrompts(loaded.processor) if self.protocol == "two_step" else None
        self._pictures = PromptBuilder(loaded.processor) if loaded.sees else None
        self._describer: tuple[Any, PromptBuilder] | None = None
        if describer is not None:
            self._describer = (describer.model, PromptBuilder(describer.processor))
        elif self._pictures is not None:
            self._describer = (self._model, self._pictures)
        if calibration is not None:
            calibration.check(self.name, self.version)

    @property
    def name(self) -> str:
        """The judge's name: "local:" and where the model is from."""
        return f"local:{self.source}"

    @property
    def version(self) -> str:
        """Fingerprints of the weights that judge, and of those that describe where these are others."""
        own = fingerprint(self._model)
        if self.protocol == "one_step" or self._describer is None or self._describer[0] is self._model:
            return own
        return f"{own} on {fingerprint(self._describer[0])}"

    @property
    def settings(self) -> dict[str, Any]:
        """What changes a verdict."""
        calibration = None if self.calibration is None else [self.calibration.scale, self.calibration.bias]
        return {
            "protocol": self.protocol,
            "reads": self.reads,
            "threshold": self.threshold if self.calibration is None else self.calibration.threshold,
            "calibration": calibration,
            "max_new_tokens": self.max_new_tokens,
            "questions": [questions()[0], DESCRIBED_SCENE, letter_questions()[0], WORD_QUESTION],
        }

    @property
    def needs_describer(self) -> bool:
        """Whether a model that sees has still to be attached."""
        return self.protocol == "two_step" and self._describer is None

    def bind(self, model: Any, builder: PromptBuilder) -> LocalJudge:
        """Attach the model that describes images, for a judge that sees none."""
        if self.needs_describer:
            self._describer = (model, builder)
        return self

    def explain(self) -> str:
        """Say in a sentence how this judge comes to a verdict."""
        read = "reads two letters" if self.reads == "letters" else "writes a word"
        seen = "sees the image" if self.protocol == "one_step" else "works from a description of the image"
        return f"{self.source} {seen} and {read}"

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per request, in order.

        Raises:
            JudgeError: a text model has nobody who describes the images.
        """
        verdicts: list[Verdict] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            started = time.perf_counter()
            judged = self._in_one_step(batch) if self.protocol == "one_step" else self._in_two_steps(batch)
            latency = (time.perf_counter() - started) / len(batch)
            verdicts += [replace(v, judge=self.name, version=self.version, latency_s=latency) for v in judged]
        return verdicts

    def _in_one_step(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        builder = self._pictures
        assert builder is not None
        prompts = [
            [builder.build(r.image, f"{_said_before(r)}{r.prompt}\n\n{_rules(r)}{question}") for r in requests]
            for question in questions()
        ]
        return [self._verdict(reading, None) for reading in self._letters(prompts, builder.tokenizer)]

    def _in_two_steps(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        if self._describer is None:
            raise JudgeError(f"judge {self.name!r} sees no images: give it a describer, or use it inside SafeCoDe")
        texts = self._texts
        assert texts is not None
        captions = describe(*self._describer, [request.image for request in requests])
        scenes = [_described(request, caption) for request, caption in zip(requests, captions, strict=True)]
        if self.reads == "words":
            rows = [texts.build(scene + WORD_QUESTION) for scene in scenes]
            written = write(self._model, texts.tokenizer, rows, self.max_new_tokens)
            return [self._written(reply, caption) for reply, caption in zip(written, captions, strict=True)]
        prompts = [[texts.build(scene + question) for scene in scenes] for question in letter_questions()]
        readings = self._letters(prompts, texts.tokenizer)
        return [self._verdict(reading, caption) for reading, caption in zip(readings, captions, strict=True)]

    def _letters(self, prompts: Sequence[Sequence[Any]], tokenizer: Any) -> list[Reading]:
        per_order = [next_logits(self._model, tokenizer, rows) for rows in prompts]
        return read_letters(per_order, letter_ids(tokenizer))

    def _verdict(self, reading: Reading, caption: str | None) -> Verdict:
        if reading.p is None:
            raw = f"the letters hold {reading.mass:.4f} of the mass, under {MIN_LETTER_MASS}"
            return Verdict("unknown", None, self.threshold, raw=raw, caption=caption)
        label, p, threshold = from_probability(reading.p, self.threshold, self.calibration)
        return Verdict(label, p, threshold, caption=caption)

    def _written(self, reply: Written, caption: str) -> Verdict:
        label = read_label(reply.text)
        if label == "safe" and not reply.ended:
            label = "unknown"  # cut off: it might have gone on to say the contrary
        return Verdict(label, None, self.threshold, raw=reply.text, caption=caption)

    def __repr__(self) -> str:
        return f"LocalJudge({self.source!r}, protocol={self.protocol!r}, reads={self.reads!r})"


def _described(request: JudgeRequest, caption: str) -> str:
    """Return everything about the scene that stands before the question; what is untrusted is quoted."""
    scene = DESCRIBED_SCENE.format(caption=quote(caption), request=quote(request.prompt))
    return _said_before(request) + scene + _rules(request)


def _said_before(request: JudgeRequest) -> str:
    return "".join(f"Earlier turn, {turn.role}: {quote(turn.text)}\n" for turn in request.conversation)


def _rules(request: JudgeRequest) -> str:
    return f"{request.policy_text}\n" if request.policy_text else ""
