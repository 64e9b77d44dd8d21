"""From a verdict to a bias on refusal tokens, and what happens when there is no verdict."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from safecode_mllm.errors import JudgeError, UnknownVerdictError
from safecode_mllm.judges.protocol import Verdict

if TYPE_CHECKING:
    from safecode_mllm.config import SafeCoDeConfig

# A raw reply is untrusted and may be long; this much of it is enough to see what went wrong.
RAW_EXCERPT = 80


def verdict_bias(verdict: Verdict, config: SafeCoDeConfig) -> float:
    """Return the bias in logits on refusal tokens that a verdict asks for.

    Args:
        verdict: a verdict, through `apply_policy` if it may be unknown.
        config: reads bias_form, lambda_boost, lambda_supp and monotone. The factor 1 + a of the paper's scale is not
            included: it belongs to the guided step.

    Returns:
        A float in [-lambda_supp, lambda_boost], >= 0 if monotone.

    Raises:
        UnknownVerdictError: the verdict is unknown and no policy was applied to it.
        JudgeError: p_unsafe or threshold is no probability, or label and p_unsafe contradict each other.

    Source: SafeCoDe (arXiv 2509.19212), stage 2; the soft form is ours.
    """
    if config.bias_form == "none":
        return 0.0
    toward_refusal = _toward_refusal(verdict, soft=config.bias_form == "soft")
    boost = config.lambda_boost * max(0.0, toward_refusal)
    suppression = 0.0 if config.monotone else config.lambda_supp * max(0.0, -toward_refusal)
    return boost - suppression


def _toward_refusal(verdict: Verdict, *, soft: bool) -> float:
    """Return a number in [-1, 1]: 1 is certainly unsafe, -1 certainly safe."""
    if verdict.error is not None and verdict.label != "unknown":
        raise JudgeError(f"judge {verdict.judge!r}: label={verdict.label!r} contradicts error={verdict.error!r}")
    if verdict.label == "unknown":
        if verdict.policy == "treat_as_unsafe":
            return 1.0
        if verdict.policy == "no_bias":
            return 0.0
        raise JudgeError(_error_text(verdict)) if verdict.error else UnknownVerdictError(_unknown_text(verdict))
    _check_verdict(verdict)
    sign = 1.0 if verdict.label == "unsafe" else -1.0
    if verdict.p_unsafe is None or not soft:
        return sign
    # Moving the judge's threshold to one half first: the bias then changes sign exactly where the label does.
    unsafe = verdict.p_unsafe * (1.0 - verdict.threshold)
    safe = (1.0 - verdict.p_unsafe) * verdict.threshold
    total = unsafe + safe
    return (unsafe - safe) / total if total > 0 else sign


def _check_verdict(verdict: Verdict) -> None:
    if verdict.label not in ("safe", "unsafe"):
        raise JudgeError(f'judge {verdict.judge!r}: label={verdict.label!r} must be "safe", "unsafe" or "unknown"')
    if not 0.0 <= verdict.threshold <= 1.0:
        raise JudgeError(f"judge {verdict.judge!r}: threshold={verdict.threshold!r} must be in [0, 1]")
    if verdict.p_unsafe is None:
        return
    if not 0.0 <= verdict.p_unsafe <= 1.0:
        raise JudgeError(f"judge {verdict.judge!r}: p_unsafe={verdict.p_unsafe!r} must be in [0, 1]")
    if (verdict.p_unsafe >= verdict.threshold) != (verdict.label == "unsafe"):
        raise JudgeError(
            f"judge {verdict.judge!r}: label={verdict.label!r} contradicts p_unsafe={verdict.p_unsafe!r} with "
            f'threshold={verdict.threshold!r}; the label must be "unsafe" exactly when p_unsafe >= threshold'
        )


def apply_policy(outcome: Verdict | Exception, config: SafeCoDeConfig, *, judge: str = "judge") -> Verdict:
    """Return a verdict that has a bias, or raise, according to the policies for failures and unknown replies.

    Args:
        outcome: what the judge gave: a verdict, which may say that the judge failed, or the exception it raised.
        config: reads on_judge_error and on_unknown.
        judge: the judge's name, for the verdict that stands in for an exception.

    Returns:
        A safe or unsafe verdict unchanged; else an unknown one whose `policy` says what was applied.
        A verdict with a policy must never be cached.

    Raises:
        UnknownVerdictError: the reply could not be read and on_unknown is "raise".
        JudgeError: the judge failed and on_judge_error is "raise".
        Exception: `outcome` itself, if it is no JudgeError: a bug in a judge is not a verdict.
    """
    if isinstance(outcome, Exception):
        if not isinstance(outcome, JudgeError):
            raise outcome
        unread = isinstance(outcome, UnknownVerdictError)
        policy = config.on_unknown if unread else config.on_judge_error
        if policy == "raise":
            raise outcome
        return Verdict(label="unknown", judge=judge, policy=policy)
    if outcome.label != "unknown" or outcome.policy in ("treat_as_unsafe", "no_bias"):
        return outcome
    policy = config.on_judge_error if outcome.error else config.on_unknown
    if policy == "raise":
        raise JudgeError(_error_text(outcome)) if outcome.error else UnknownVerdictError(_unknown_text(outcome))
    return dataclasses.replace(outcome, policy=policy)


def _error_text(verdict: Verdict) -> str:
    return f"judge {verdict.judge!r} failed: {verdict.error}"


def _unknown_text(verdict: Verdict) -> str:
    reply = "" if verdict.raw is None else f" from the reply {verdict.raw[:RAW_EXCERPT]!r}"
    return (
        f"judge {verdict.judge!r}: neither safe nor unsafe could be read{reply}; "
        'set on_unknown to "treat_as_unsafe" or "no_bias" to answer all the same'
    )
