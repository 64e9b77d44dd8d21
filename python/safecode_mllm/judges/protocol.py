"""What a judge is asked and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from safecode_mllm.errors import UnknownVerdictError

if TYPE_CHECKING:
    from PIL.Image import Image

    from safecode_mllm.conversations import Dialogue

Label = Literal["safe", "unsafe", "unknown"]
Policy = Literal["raise", "treat_as_unsafe", "no_bias"]
Role = Literal["user", "assistant"]
# How a request ended: with a label, with a reply that could not be read, or with a judge that failed.
Outcome = Literal["safe", "unsafe", "unknown", "error"]
OUTCOMES: tuple[Outcome, ...] = ("safe", "unsafe", "unknown", "error")


@dataclass(frozen=True)
class Turn:
    """One earlier turn of a conversation; untrusted."""

    role: Role
    text: str


@dataclass(frozen=True)
class JudgeRequest:
    """One scene and one request about it, all of it untrusted but `policy_text`: a judge must not obey it.

    Attributes:
        image: the scene, RGB.
        prompt: the user's request.
        conversation: the turns before it, oldest first.
        policy_text: the operator's own rules, which the judge is told to apply besides its question.
        dialogue: all of it as the model that answers reads it, with its pictures in their places, for a judge that
            reads that way; None where `image` and `prompt` say it all. Where there are several pictures `image` shows
            them side by side, and where there is none it is grey.
    """

    image: Image
    prompt: str
    conversation: tuple[Turn, ...] = ()
    policy_text: str | None = None
    dialogue: Dialogue | None = None


@dataclass(frozen=True)
class Verdict:
    """A judge's scene-level verdict.

    Attributes:
        label: "safe", "unsafe", or "unknown" when the reply could not be read or the judge failed.
        p_unsafe: probability in [0, 1] that answering is unsafe here, or None for a judge that gives none.
        threshold: the judge's threshold t; label is "unsafe" exactly when p_unsafe >= t.
        judge: name of the judge that gave it.
        latency_s: wall-clock seconds that the judge took, None if not measured.
        raw: the raw reply, None for judges that read probabilities.
        policy: the policy applied because the judge failed or the verdict is unknown; None when none was needed.
        category: what kind of danger, in the judge's own few words; None where it names none.
        reason: one sentence of the judge; untrusted, since a model wrote it.
        caption: the description that the judge worked from; untrusted too.
        version: which weights or settings of the judge gave it.
        error: why the judge failed on this request; such a verdict is no verdict, and its label is "unknown".
        cached: whether it was remembered instead of asked for.
    """

    label: Label
    p_unsafe: float | None = None
    threshold: float = 0.5
    judge: str = "fixed"
    latency_s: float | None = None
    raw: str | None = None
    policy: Policy | None = None
    category: str | None = None
    reason: str | None = None
    caption: str | None = None
    version: str | None = None
    error: str | None = None
    cached: bool = False

    @property
    def asks_for_refusal(self) -> bool:
        """Whether a refusal is what should come out: an unsafe verdict, or an unknown one that is treated as such."""
        return self.label == "unsafe" or self.policy == "treat_as_unsafe"

    @property
    def outcome(self) -> Outcome:
        """How the request ended; "error" and "unknown" are different things with policies of their own."""
        return self.label if self.error is None else "error"


@runtime_checkable
class Judge(Protocol):
    """Anything that turns requests into verdicts, in order, one each.

    A judge may also have `version` (which weights or settings), `settings` (plain values that change its verdicts; with
    `version`, what a cache tells judges apart by), and `remote` (True if it works elsewhere, so that it may be asked
    while this machine is busy with something else).
    """

    @property
    def name(self) -> str:
        """What it is called in verdicts and messages."""
        ...

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per request, in order.

        What fails on one request is that verdict's `error`; a judge that cannot answer at all raises JudgeError.
        """
        ...


def is_remote(judge: Any) -> bool:
    """Whether a judge works elsewhere, so that asking it costs this machine only time."""
    return bool(getattr(judge, "remote", False))


def failed(judge: str, error: object, *, version: str | None = None, latency_s: float | None = None) -> Verdict:
    """Return what stands for the verdict of a judge that failed on one request."""
    return Verdict("unknown", judge=judge, version=version, latency_s=latency_s, error=str(error) or repr(error))


def count_outcomes(outcomes: Iterable[Verdict | Exception]) -> dict[Outcome, int]:
    """Return how many requests ended in which way: safe, unsafe, unknown, error."""
    counts: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
    for outcome in outcomes:
        if isinstance(outcome, Verdict):
            counts[outcome.outcome] += 1
        else:
            counts["unknown" if isinstance(outcome, UnknownVerdictError) else "error"] += 1
    return counts
