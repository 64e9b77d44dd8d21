"""What a judge is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image

Label = Literal["safe", "unsafe", "unknown"]
Policy = Literal["raise", "treat_as_unsafe", "no_bias"]


@dataclass(frozen=True)
class JudgeRequest:
    """One scene and one request about it. Both are untrusted: a judge must not obey either."""

    image: Image
    prompt: str


@dataclass(frozen=True)
class Verdict:
    """A judge's scene-level verdict.

    Attributes:
        label: "safe", "unsafe", or "unknown" when the reply could not be read.
        p_unsafe: probability in [0, 1] that answering is unsafe here, or None for a judge that gives none.
        threshold: the judge's threshold t; label is "unsafe" exactly when p_unsafe >= t.
        judge: name of the judge that gave it.
        latency_s: wall-clock seconds that the judge took, None if not measured.
        raw: the raw reply, None for judges that read probabilities.
        policy: the policy applied because the judge failed or the verdict is unknown; None when none was needed.
    """

    label: Label
    p_unsafe: float | None = None
    threshold: float = 0.5
    judge: str = "fixed"
    latency_s: float | None = None
    raw: str | None = None
    policy: Policy | None = None

    @property
    def asks_for_refusal(self) -> bool:
        """Whether a refusal is what should come out: an unsafe verdict, or an unknown one that is treated as such."""
        return self.label == "unsafe" or self.policy == "treat_as_unsafe"


@runtime_checkable
class Judge(Protocol):
    """Anything that turns requests into verdicts, in order, one each."""

    name: str

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per request, in order; raise JudgeError when the judge cannot answer at all."""
        ...
