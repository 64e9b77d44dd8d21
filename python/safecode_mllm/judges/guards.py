"""Guard models as judges: trained to label requests, with formats of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges.calibration import DEFAULT_THRESHOLD, Calibration, check_threshold, decide
from safecode_mllm.judges.captions import describe
from safecode_mllm.judges.guard_formats import GUARDS
from safecode_mllm.judges.hf_models import JudgeModel, load_judge_model
from safecode_mllm.judges.protocol import JudgeRequest, Label, Verdict
from safecode_mllm.judges.text_prompts import TextPrompts
from safecode_mllm.judges.weights import fingerprint
from safecode_mllm.judges.writing import Written, p_unsafe_at, write
from safecode_mllm.names import nearest_name_hint
from safecode_mllm.prompts import PromptBuilder

DEFAULT_BATCH_SIZE = 8
# Logits of every token of a long reply would fill a memory; what thinks for a page is not read for probabilities.
_MOST_WEIGHED_TOKENS = 64


class GuardJudge:
    """Asks a guard model, through the chat template that comes with it.

    Args:
        guard: one of GUARDS.
        source: a folder, a hub id or a loaded model; None is the place where the guard is published.
        describer: who describes the image to a guard that sees none, a loaded model that does; None is the model whose
            answers are steered.
        threshold: "unsafe" from this probability on, where the label's probability can be read.
        calibration: what `judge calibrate` fitted to this judge.
        batch_size: requests per forward pass.
        device: where to run.
        dtype: of the weights.

    Raises:
        ConfigError: there is no such guard, or the model does not take what this guard is given.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        guard: str,
        source: str | os.PathLike[str] | JudgeModel | None = None,
        *,
        describer: JudgeModel | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        calibration: Calibration | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if guard not in GUARDS:
            hint = nearest_name_hint(guard, GUARDS)
            raise ConfigError(f"guard={guard!r} is unknown: known are {list(GUARDS)}.{hint}")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r} must be an integer of at least 1")
        check_threshold(threshold)
        self.guard, self.format = guard, GUARDS[guard]
        loaded = (
            source
            if isinstance(source, JudgeModel)
            else load_judge_model(os.fspath(source or self.format.model_id), device=device, dtype=dtype)
        )
        if self.format.sees and not loaded.sees:
            raise ConfigError(f"guard {guard!r} takes images, and the model given for it does not")
        self.threshold, self.calibration, self.batch_size = threshold, calibration, batch_size
        self._model = loaded.model
        self._prompts: PromptBuilder | TextPrompts = (
            PromptBuilder(loaded.processor) if self.format.sees else TextPrompts(loaded.processor)
        )
        self._describer = None if describer is None else (describer.model, PromptBuilder(describer.processor))
        if calibration is not None:
            calibration.check(self.name, self.version)

    @property
    def name(self) -> str:
        """The judge's name: "guard:" and the kind of guard."""
        return f"guard:{self.guard}"

    @property
    def version(self) -> str:
        """Fingerprints of the weights, also of those that describe."""
        own = fingerprint(self._model)
        return own if self.format.sees or self._describer is None else f"{own} on {fingerprint(self._describer[0])}"

    @property
    def settings(self) -> dict[str, Any]:
        """What changes a verdict."""
        calibration = None if self.calibration is None else [self.calibration.scale, self.calibration.bias]
        threshold = self.threshold if self.calibration is None else self.calibration.threshold
        return {"guard": self.guard, "threshold": threshold, "calibration": calibration}

    @property
    def needs_describer(self) -> bool:
        """Whether a model that sees has still to be attached."""
        return not self.format.sees and self._describer is None

    def bind(self, model: Any, builder: PromptBuilder) -> GuardJudge:
        """Attach the model that describes images, for a guard that sees none."""
        if self.needs_describer:
            self._describer = (model, builder)
        return self

    def explain(self) -> str:
        """Say in a sentence what this judge works from."""
        return f"{self.guard} " + ("sees the image" if self.format.sees else "works from a description of the image")

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per request, in order.

        Raises:
            JudgeError: the guard sees no images and nobody describes them.
        """
        verdicts: list[Verdict] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            started = time.perf_counter()
            captions, rows = self._rows(batch)
            limit = self.format.max_new_tokens
            replies = write(self._model, self._tokenizer, rows, limit, keep_logits=limit <= _MOST_WEIGHED_TOKENS)
            latency = (time.perf_counter() - started) / len(batch)
            verdicts += [self._verdict(reply, c, latency) for reply, c in zip(replies, captions, strict=True)]
        return verdicts

    @property
    def _tokenizer(self) -> Any:
        return self._prompts.tokenizer

    def _rows(self, requests: Sequence[JudgeRequest]) -> tuple[list[str | None], list[dict[str, torch.Tensor]]]:
        if isinstance(self._prompts, PromptBuilder):
            prompts = self._prompts
            return [None] * len(requests), [prompts.build(r.image, self.format.ask(r, None)) for r in requests]
        if self._describer is None:
            raise JudgeError(f"judge {self.name!r} sees no images: give it a describer, or use it inside SafeCoDe")
        captions = describe(*self._describer, [request.image for request in requests])
        texts = [self.format.ask(request, caption) for request, caption in zip(requests, captions, strict=True)]
        return [*captions], [self._prompts.build(text) for text in texts]

    def _verdict(self, written: Written, caption: str | None, latency: float) -> Verdict:
        reply = self.format.read(written.text)
        label: Label = reply.label
        if label == "safe" and not written.ended:
            label = "unknown"  # cut off: it might have gone on to say the contrary
        p = reply.p_unsafe
        if reply.place is not None and label != "unknown":
            weighed = p_unsafe_at(written, self._tokenizer, reply.place, self.format.weights)
            # A third label between the two counts as unsafe: its probability is at the threshold or above.
            known = [value for value in (weighed, reply.p_unsafe) if value is not None]
            p = max(known, default=None)
        label, p, threshold = decide(label, p, self.threshold, self.calibration)
        return Verdict(
            label,
            p,
            threshold,
            self.name,
            latency,
            written.text,
            category=reply.category,
            reason=reply.reason,
            caption=caption,
            version=self.version,
        )

    def __repr__(self) -> str:
        return f"GuardJudge({self.guard!r})"
