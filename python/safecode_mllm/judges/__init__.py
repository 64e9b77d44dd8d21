"""Judges: who says whether helping is safe in this scene."""

from __future__ import annotations

from typing import Any

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.bias import apply_policy, verdict_bias
from safecode_mllm.judges.fixed import FIXED_LABELS, FixedJudge
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Label, Policy, Turn, Verdict

JUDGE_NAMES = ("self", *FIXED_LABELS)

__all__ = [
    "JUDGE_NAMES",
    "FixedJudge",
    "Judge",
    "JudgeRequest",
    "Label",
    "Policy",
    "Turn",
    "Verdict",
    "apply_policy",
    "bind",
    "make_judge",
    "verdict_bias",
]


def make_judge(spec: str | Judge | None) -> Judge | None:
    """Return the judge that `spec` names.

    Args:
        spec: "self" (the model judges with its own weights), "safe" or "unsafe" (a fixed verdict), any object with
            `name` and `judge_many`, or None for no judge.

    Raises:
        ConfigError: the name is unknown (with the nearest one), or the object is no judge.
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        if spec == "self":
            from safecode_mllm.judges.self_judge import SelfJudge

            return SelfJudge()
        for label in FIXED_LABELS:
            if spec == label:
                return FixedJudge(label)
        from safecode_mllm.config import nearest_name_hint

        hint = nearest_name_hint(spec, JUDGE_NAMES)
        raise ConfigError(f"judge={spec!r} is unknown: known are {list(JUDGE_NAMES)}.{hint}")
    if isinstance(spec, type) or not isinstance(spec, Judge):
        raise ConfigError(
            f"judge={spec!r} is no judge: pass one of {list(JUDGE_NAMES)}, or an object with `name` and `judge_many`"
        )
    return spec


def bind(judge: Judge, model: Any, builder: Any) -> None:
    """Give the model whose answers are steered to every judge that wants it, also inside an ensemble or a cache.

    Args:
        judge: any judge; one that has a model already keeps it.
        model: the model.
        builder: the prompt builder of its processor.
    """
    for member in getattr(judge, "members", ()):
        bind(member, model, builder)
    judges_with = getattr(judge, "judges_with", None)
    if getattr(judge, "needs_describer", False) or (judges_with is not None and judges_with(None)):
        judge.bind(model, builder)  # type: ignore[attr-defined]
