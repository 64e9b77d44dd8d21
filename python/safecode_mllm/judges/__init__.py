"""Judges: who says whether helping is safe in this scene."""

from __future__ import annotations

import os
from typing import Any

from safecode_mllm.errors import ConfigError
from safecode_mllm.judges.bias import apply_policy, verdict_bias
from safecode_mllm.judges.calibration import Calibration
from safecode_mllm.judges.fixed import FixedJudge
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Label, Policy, Turn, Verdict
from safecode_mllm.judges.specs import JUDGE_NAMES, parse_spec

__all__ = [
    "JUDGE_NAMES",
    "Calibration",
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


def make_judge(
    spec: str | Judge | None, *, calibration: Calibration | str | os.PathLike[str] | None = None, **options: Any
) -> Judge | None:
    """Return the judge that `spec` names.

    Args:
        spec: "self" (the model judges with its own weights), "safe" or "unsafe" (a fixed verdict), "openai:MODEL" (an
            endpoint), "local:PATH" (another model), "guard:NAME" or "guard:NAME:PATH" (a guard model), any object with
            `name` and `judge_many`, or None for no judge.
        calibration: what `judge calibrate` wrote for this judge, or its file.
        options: further arguments of the judge's class.

    Raises:
        ConfigError: the name is unknown (with the nearest one), the object is no judge, or an option does not fit.
        ModelError: a model cannot be loaded.
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        loaded = calibration if isinstance(calibration, Calibration | None) else Calibration.load(calibration)
        return _named(spec, loaded, options)
    if isinstance(spec, type) or not isinstance(spec, Judge):
        raise ConfigError(
            f"judge={spec!r} is no judge: pass one of {list(JUDGE_NAMES)}, or an object with `name` and `judge_many`"
        )
    return spec


def _named(text: str, calibration: Calibration | None, options: dict[str, Any]) -> Judge:
    # Imported on use: an endpoint needs no torch, and a fixed verdict needs nothing.
    spec = parse_spec(text)
    if spec.kind == "fixed":
        if calibration is not None:
            raise ConfigError(f"judge={text!r} always says the same: it takes no calibration")
        return FixedJudge(spec.name, **options)  # type: ignore[arg-type]
    if spec.kind == "openai":
        from safecode_mllm.judges.endpoint import EndpointJudge

        return EndpointJudge(spec.name, calibration=calibration, **options)
    if spec.kind == "local":
        from safecode_mllm.judges.local import LocalJudge

        return LocalJudge(spec.path or "", calibration=calibration, **options)
    if spec.kind == "guard":
        from safecode_mllm.judges.guards import GuardJudge

        return GuardJudge(spec.name, spec.path, calibration=calibration, **options)
    from safecode_mllm.judges.self_judge import SelfJudge

    return SelfJudge(calibration=calibration, **options)


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
    if needs_model(judge) or (judges_with is not None and judges_with(None)):
        judge.bind(model, builder)  # type: ignore[attr-defined]


def needs_model(judge: Judge) -> bool:
    """Whether a judge sees no images, and nobody has been named who describes them."""
    return bool(getattr(judge, "needs_describer", False))
