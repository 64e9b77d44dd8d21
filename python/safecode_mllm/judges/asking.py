"""Asks a judge so that every request ends with a verdict that has a bias, or with its own error."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import JudgeError
from safecode_mllm.judges.bias import apply_policy, verdict_bias
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Verdict, count_outcomes

logger = logging.getLogger(__name__)

JudgeMany = Callable[[Sequence[JudgeRequest]], Sequence[Verdict]]


def ask_judge(
    judge_many: JudgeMany, requests: Sequence[JudgeRequest], config: SafeCoDeConfig, *, name: str
) -> list[Verdict | JudgeError]:
    """Return for each request a verdict with the policies applied, or the error that policy "raise" leaves.

    Args:
        judge_many: turns requests into verdicts, one each, in order.
        requests: what to judge; none are asked for if it is empty.
        config: reads on_judge_error and on_unknown.
        name: the judge's name, for messages.
    """
    if not requests:
        return []
    outcomes: Sequence[Verdict | JudgeError]
    try:
        outcomes = judge_many(requests)
        if len(outcomes) != len(requests):
            raise JudgeError(f"judge {name!r} gave {len(outcomes)} verdicts for {len(requests)} requests")
        for outcome in outcomes:
            if not isinstance(outcome, Verdict):
                raise JudgeError(f"judge {name!r} gave a {type(outcome).__name__} instead of a Verdict")
    except (JudgeError, OSError) as error:  # OSError: a connection that failed or timed out
        logger.warning("judge %r failed: %s", name, error)
        failure = error if isinstance(error, JudgeError) else JudgeError(f"judge {name!r} failed: {error!r}")
        outcomes = [failure] * len(requests)
    settled = [settle(outcome, config, name=name) for outcome in outcomes]
    _log_failures(outcomes, settled, name)
    return settled


def ask_beside(
    judge: Judge, requests: Sequence[JudgeRequest], config: SafeCoDeConfig
) -> Callable[[], list[Verdict | JudgeError]]:
    """Ask a judge in a thread of its own, at once; the function returned waits for its verdicts.

    Args:
        judge: a judge that works elsewhere.
        requests: what to judge.
        config: as for `ask_judge`.
    """
    answer: Future[list[Verdict | JudgeError]] = Future()

    def ask() -> None:
        try:
            answer.set_result(ask_judge(judge.judge_many, requests, config, name=judge.name))
        except BaseException as error:
            answer.set_exception(error)

    # A daemon: whoever breaks off a generation does not wait for a judge.
    threading.Thread(target=ask, name="safecode-judge", daemon=True).start()
    return answer.result


def settle(outcome: Verdict | JudgeError, config: SafeCoDeConfig, *, name: str) -> Verdict | JudgeError:
    """Apply the policies to one outcome; the error that policy "raise" or a senseless verdict gives is returned."""
    if isinstance(outcome, Verdict) and outcome.policy is not None:
        # A policy is written here and never read from a judge: it could switch the configuration's off.
        outcome = replace(outcome, policy=None)
    try:
        verdict = apply_policy(outcome, config, judge=name)
        verdict_bias(verdict, config)  # refuses a verdict that contradicts itself
        return verdict
    except JudgeError as error:
        return error


def _log_failures(outcomes: Sequence[Verdict | JudgeError], settled: Sequence[Verdict | JudgeError], name: str) -> None:
    """One line per batch: a judge that fails on a whole benchmark must not drown everything else."""
    counts = count_outcomes(outcomes)
    if not counts["unknown"] and not counts["error"]:
        return
    policies = sorted({s.policy for s in settled if isinstance(s, Verdict) and s.policy})
    applied = f"policy {' and '.join(map(repr, policies))}" if policies else "they end with an error"
    logger.warning(
        "judge %r gave no verdict on %d of %d requests (%d failed, %d could not be read): %s",
        name,
        counts["unknown"] + counts["error"],
        len(outcomes),
        counts["error"],
        counts["unknown"],
        applied,
    )
