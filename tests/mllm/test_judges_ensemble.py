"""Several judges as one: means, unsafe if any, and nobody's silence taken for consent."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from judging import Scripted, requests, says
from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges import Judge, Verdict
from safecode_mllm.judges.ensemble import EnsembleJudge
from safecode_mllm.judges.protocol import failed


def join(*judges: Judge, rule: Any = "mean_log_odds") -> Verdict:
    (verdict,) = EnsembleJudge(judges, rule).judge_many(requests(1))
    assert verdict.judge == "ensemble" and verdict.latency_s is not None
    return verdict


def test_the_mean_is_over_log_odds() -> None:
    assert join(says("unsafe", 0.9), says("safe", 0.1)).p_unsafe == pytest.approx(0.5)
    # logit .9 = log 9, logit .5 = 0: the mean is log 3.
    assert join(says("unsafe", 0.9), says("unsafe", 0.5)).p_unsafe == pytest.approx(0.75)


def test_each_member_counts_from_its_own_threshold() -> None:
    # At its threshold a judge says nothing, whatever the threshold is.
    at_threshold = says("unsafe", 0.8, threshold=0.8)
    assert join(at_threshold, says("safe", 0.25)).p_unsafe == pytest.approx(1 / (1 + 3**0.5))
    assert join(at_threshold, says("safe", 0.25)).label == "safe"


def test_a_label_without_probability_is_a_strong_vote_that_can_be_outvoted() -> None:
    assert join(says("unsafe"), says("safe", 0.2)).label == "unsafe"
    assert join(says("unsafe"), says("safe", 0.001)).label == "safe"
    assert join(says("safe", 0.0), says("unsafe", 1.0)).p_unsafe == pytest.approx(0.5)


@pytest.mark.parametrize(("second", "label"), [(says("safe", 0.0), "unsafe"), (says("unsafe"), "unsafe")])
def test_unsafe_if_any(second: Judge, label: str) -> None:
    assert join(says("unsafe", 0.51), second, rule="unsafe_if_any").label == label


def test_unsafe_if_any_is_safe_if_all_are() -> None:
    verdict = join(says("safe", 0.4), says("safe"), rule="unsafe_if_any")
    assert (verdict.label, verdict.p_unsafe) == ("safe", None)


@pytest.mark.parametrize("rule", ["mean_log_odds", "unsafe_if_any"])
def test_silence_is_never_consent(rule: Any) -> None:
    broken = Scripted(lambda _: failed("broken", "HTTP 500"), "broken")
    assert join(says("safe", 0.0), says("unknown"), rule=rule).outcome == "unknown"
    verdict = join(says("safe", 0.0), broken, says("unknown"), rule=rule)
    assert verdict.outcome == "error" and "broken: HTTP 500" in str(verdict.error)
    assert join(says("unsafe"), broken, rule="unsafe_if_any").label == "unsafe"


def test_a_member_that_fails_as_a_whole_fails_on_each_request() -> None:
    def down(_: Any) -> Verdict:
        raise JudgeError("no connection")

    verdicts = EnsembleJudge([says("safe"), Scripted(down)]).judge_many(requests(3))
    assert [v.outcome for v in verdicts] == ["error"] * 3


def test_a_member_that_loses_a_request_fails() -> None:
    class Short(Scripted):
        def judge_many(self, requests: Any) -> list[Verdict]:
            return super().judge_many(requests)[1:]

    verdicts = EnsembleJudge([says("safe"), Short(lambda _: Verdict("safe"))]).judge_many(requests(3))
    assert [v.outcome for v in verdicts] == ["error"] * 3


def test_remote_members_are_asked_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def answer(_: Any) -> Verdict:
        meeting.wait()
        return Verdict("safe", 0.1)

    ensemble = EnsembleJudge([Scripted(answer, remote=True), Scripted(answer, remote=True)])
    assert ensemble.remote
    assert ensemble.judge_many(requests(1))[0].label == "safe"
    assert not EnsembleJudge([Scripted(answer, remote=True), says("safe")]).remote


def test_what_the_members_tell_is_told() -> None:
    verdict = join(says("unsafe", 0.9, category="fall"), says("safe", 0.4, category="none", reason="calm"))
    assert (verdict.label, verdict.category, verdict.reason) == ("unsafe", "fall", None)


@pytest.mark.parametrize(("judges", "rule"), [([], "mean_log_odds"), ([says("safe")], "mean_log_odds"),
                                              ([says("safe"), says("safe")], "vote")])  # fmt: skip
def test_bad_arguments(judges: list[Judge], rule: Any) -> None:
    with pytest.raises(ConfigError):
        EnsembleJudge(judges, rule)
