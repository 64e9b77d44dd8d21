"""The names of judges on a command line and in `judge=`: what "openai:MODEL" and the others mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.fixed import FIXED_LABELS
from safecode_mllm.judges.guard_formats import GUARDS
from safecode_mllm.names import nearest_name_hint

Kind = Literal["self", "fixed", "openai", "local", "guard"]
JUDGE_NAMES = ("self", *FIXED_LABELS, "openai:MODEL", "local:PATH", "guard:NAME[:PATH]")


@dataclass(frozen=True)
class JudgeSpec:
    """A judge's name taken apart.

    Attributes:
        kind: what kind of judge.
        name: the label of a fixed judge, the endpoint's model, or the guard.
        path: where a local model or a guard's weights are; None for the place where a guard is published.
    """

    kind: Kind
    name: str = ""
    path: str | None = None


def parse_spec(text: str) -> JudgeSpec:
    """Return what a judge's name stands for; loads nothing.

    Raises:
        ConfigError: the name is unknown (with the nearest one), or something is missing behind the colon.
    """
    kind, colon, rest = text.partition(":")
    if not colon and kind == "self":
        return JudgeSpec("self")
    if not colon and kind in FIXED_LABELS:
        return JudgeSpec("fixed", kind)
    if kind in ("openai", "local", "guard") and not rest.strip():
        form = next(name for name in JUDGE_NAMES if name.startswith(f"{kind}:"))
        raise ConfigError(f"judge={text!r} is not complete: it must be {form}")
    if kind == "openai":
        return JudgeSpec("openai", rest)
    if kind == "local":
        return JudgeSpec("local", path=rest)
    if kind == "guard":
        guard, _, path = rest.partition(":")
        if guard not in GUARDS:
            hint = nearest_name_hint(guard, GUARDS)
            raise ConfigError(f"judge={text!r}: there is no guard {guard!r}; known are {list(GUARDS)}.{hint}")
        return JudgeSpec("guard", guard, path or None)
    hint = nearest_name_hint(text, JUDGE_NAMES)
    raise ConfigError(f"judge={text!r} is unknown: known are {list(JUDGE_NAMES)}.{hint}")
