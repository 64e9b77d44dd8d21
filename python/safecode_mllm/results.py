"""What a request gives back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safecode_mllm.decoding.record import GuidedToken
from safecode_mllm.judges.protocol import Verdict

logger = logging.getLogger(__name__)

Steering = Literal["on", "off"]


@dataclass
class ChatResult:
    """The answer to one request.

    Attributes:
        text: the answer, special tokens removed; empty when `error` is set.
        verdict: the judge's verdict with the policy applied; None when none was asked for.
        steering: "on", or "off" for plain decoding.
        steering_effective: False when the verdict is unsafe and the answer does not open with a refusal; True when it
            does; None when the verdict is not unsafe or steering is off.
        record: the guided tokens with their probabilities; None when not recorded.
        seed: the seed of noise and draws; pass it again to get the same answer. None if the request failed before one
            was drawn.
        timings: wall-clock seconds per phase; in a batch, those of the whole batch.
        error: what went wrong with this request, in a batch; `chat` raises it instead.
        token_ids: the generated tokens, without padding.
        context: preset, configuration digest, model and versions, for `audit`.
        index: place of the request among those that were given together.
        notes: which ways the generation took and why: prefill, cache, steps, decode step; of the batch, in a batch.
    """

    text: str
    verdict: Verdict | None
    steering: Steering
    steering_effective: bool | None
    record: list[GuidedToken] | None
    seed: int | None
    timings: dict[str, float]
    error: Exception | None = None
    token_ids: list[int] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    notes: dict[str, str] = field(default_factory=dict)

    def audit(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary of what explains this answer: verdict, guided tokens, settings, versions.

        Append it to a file as one JSON line. Neither the image nor the prompt is in it, only their SHA-256 digests.
        With the same image, prompt, model and versions, `settings`, `generation` and `seed` give the answer again.
        """
        return {
            "text": self.text,
            "verdict": None if self.verdict is None else asdict(self.verdict),
            "steering": self.steering,
            "steering_effective": self.steering_effective,
            "guided_tokens": None if self.record is None else [asdict(token) for token in self.record],
            "seed": self.seed,
            "timings": self.timings,
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
            **self.context,
        }


def log_ineffective(results: Sequence[ChatResult]) -> None:
    """One line per batch: an unsafe verdict that brought no refusal is what a deployment must hear of."""
    count = sum(result.steering_effective is False for result in results)
    if count:
        logger.warning("%d of %d answers open with no refusal although the verdict is unsafe", count, len(results))


def log_cut_short(results: Sequence[ChatResult], rooms: Sequence[int] | None) -> None:
    """One line per batch: an answer that the end of the model's context cut off is not whole.

    Args:
        results: the results of a batch.
        rooms: for each the tokens that the context has room for behind its prompt; None if the model does not say.
    """
    rows = zip(results, rooms or [], strict=False)
    count = sum(len(result.token_ids) == room for result, room in rows)
    if count:
        logger.warning("%d of %d answers end where the model's context ends", count, len(results))
