"""From verdicts to biases, the policies, and the fixed judge."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import ConfigError, JudgeError, UnknownVerdictError
from safecode_mllm.judges import FixedJudge, Judge, JudgeRequest, Verdict, apply_policy, make_judge, verdict_bias
from safecode_mllm.judges.asking import ask_judge, settle
from safecode_mllm.judges.protocol import count_outcomes, failed

SOFT = SafeCoDeConfig(lambda_boost=3.0, lambda_supp=2.0)
HARD = SOFT.replace(bias_form="hard")
probability = st.floats(0, 1, allow_nan=False)
amount = st.floats(0, 50, allow_nan=False)


def verdict_of(p: float, threshold: float) -> Verdict:
    return Verdict("unsafe" if p >= threshold else "safe", p, threshold)


@pytest.mark.parametrize(
    ("p", "threshold", "expected"),
    [
        (0.5, 0.5, 0.0), (1.0, 0.5, 3.0), (0.0, 0.5, -2.0), (0.75, 0.5, 1.5), (0.25, 0.5, -1.0),
        (0.2, 0.2, 0.0), (0.8, 0.8, 0.0),
        # q = .5 * .8 / (.5 * .8 + .5 * .2) = .8
        (0.5, 0.2, 3 * 0.6), (0.5, 0.8, -2 * 0.6),
        (0.0, 0.0, 3.0), (1.0, 1.0, 3.0), (0.3, 0.0, 3.0), (0.3, 1.0, -2.0),
    ],
)  # fmt: skip
def test_soft_form(p: float, threshold: float, expected: float) -> None:
    assert verdict_bias(verdict_of(p, threshold), SOFT) == pytest.approx(expected, abs=1e-12)


@given(p=probability, threshold=probability, boost=amount, suppression=amount)
def test_soft_form_has_the_labels_sign_and_stays_in_range(
    p: float, threshold: float, boost: float, suppression: float
) -> None:
    config = SafeCoDeConfig(lambda_boost=boost, lambda_supp=suppression)
    bias = verdict_bias(verdict_of(p, threshold), config)
    assert -suppression <= bias <= boost
    assert bias >= 0 if p >= threshold else bias <= 0
    monotone = verdict_bias(verdict_of(p, threshold), config.replace(monotone=True))
    assert monotone == max(0.0, bias)


@given(a=probability, b=probability, threshold=st.floats(0.01, 0.99))
def test_soft_form_rises_with_the_probability(a: float, b: float, threshold: float) -> None:
    low, high = sorted((a, b))
    assert verdict_bias(verdict_of(low, threshold), SOFT) <= verdict_bias(verdict_of(high, threshold), SOFT) + 1e-12


@pytest.mark.parametrize(("label", "expected"), [("unsafe", 3.0), ("safe", -2.0)])
def test_hard_form_takes_the_label(label: Any, expected: float) -> None:
    p = 0.51 if label == "unsafe" else 0.49
    assert verdict_bias(Verdict(label, p), HARD) == expected
    assert verdict_bias(Verdict(label), HARD) == expected


@pytest.mark.parametrize(("label", "expected"), [("unsafe", 3.0), ("safe", -2.0)])
def test_a_judge_without_probability_gives_the_hard_form(label: Any, expected: float) -> None:
    assert verdict_bias(Verdict(label), SOFT) == expected


def test_no_bias_form_has_no_bias() -> None:
    assert verdict_bias(Verdict("unsafe", 0.99), SafeCoDeConfig(bias_form="none")) == 0


@pytest.mark.parametrize("config", [SOFT, HARD])
def test_monotone_never_suppresses(config: SafeCoDeConfig) -> None:
    monotone = config.replace(monotone=True)
    assert verdict_bias(Verdict("safe", 0.0), monotone) == 0
    assert verdict_bias(Verdict("unsafe", 1.0), monotone) == 3.0


@pytest.mark.parametrize(("policy", "expected"), [("treat_as_unsafe", 3.0), ("no_bias", 0.0)])
@pytest.mark.parametrize("config", [SOFT, HARD, SOFT.replace(monotone=True)])
def test_an_unknown_verdict_has_its_policys_bias(config: SafeCoDeConfig, policy: Any, expected: float) -> None:
    assert verdict_bias(Verdict("unknown", policy=policy), config) == expected


@pytest.mark.parametrize("policy", [None, "raise"])
def test_an_unknown_verdict_without_policy_raises(policy: Any) -> None:
    with pytest.raises(UnknownVerdictError, match="on_unknown"):
        verdict_bias(Verdict("unknown", judge="j", policy=policy), SOFT)


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict("safe", 0.6), "contradicts"),
        (Verdict("unsafe", 0.4), "contradicts"),
        (Verdict("unsafe", 0.4, threshold=0.5), "threshold=0.5"),
        (Verdict("unsafe", 1.2), "p_unsafe=1.2"),
        (Verdict("safe", float("nan")), "p_unsafe=nan"),
        (Verdict("safe", 0.1, threshold=2.0), "threshold=2.0"),
        (Verdict("Unsafe"), "label='Unsafe'"),  # type: ignore[arg-type]
    ],
)
def test_a_senseless_verdict_is_the_judges_error(verdict: Verdict, text: str) -> None:
    with pytest.raises(JudgeError, match=text):
        verdict_bias(verdict, SOFT)


def test_policies_leave_a_verdict_alone() -> None:
    verdict = Verdict("safe", 0.1)
    assert apply_policy(verdict, SOFT.replace(on_unknown="treat_as_unsafe")) is verdict


def test_policy_raise() -> None:
    failed = JudgeError("no connection")
    with pytest.raises(JudgeError) as caught:
        apply_policy(failed, SOFT)
    assert caught.value is failed
    with pytest.raises(UnknownVerdictError, match=r"'guard'.*perhaps") as unread:
        apply_policy(Verdict("unknown", judge="guard", raw="perhaps" + "!" * 500), SOFT)
    assert len(str(unread.value)) < 300


@pytest.mark.parametrize("policy", ["treat_as_unsafe", "no_bias"])
def test_policy_stands_in_the_verdict(policy: Any) -> None:
    config = SOFT.replace(on_judge_error=policy, on_unknown="raise")
    verdict = apply_policy(JudgeError("no connection"), config, judge="guard")
    assert verdict == Verdict("unknown", judge="guard", policy=policy)
    config = SOFT.replace(on_judge_error="raise", on_unknown=policy)
    unread = Verdict("unknown", judge="guard", raw="perhaps", latency_s=0.2)
    verdict = apply_policy(unread, config)
    assert (verdict.label, verdict.policy, verdict.raw, verdict.latency_s) == ("unknown", policy, "perhaps", 0.2)
    # An exception that says "unknown" follows the policy for unknown replies, not the one for failures.
    assert apply_policy(UnknownVerdictError("?"), config, judge="guard").policy == policy


def test_policies_cover_judge_errors_only() -> None:
    with pytest.raises(ZeroDivisionError):
        apply_policy(ZeroDivisionError(), SOFT.replace(on_judge_error="no_bias"))


def test_fixed_judge() -> None:
    judge = FixedJudge("unsafe", p_unsafe=0.9)
    requests = [JudgeRequest(image=None, prompt="?")] * 3  # type: ignore[arg-type]
    assert judge.judge_many(requests) == [Verdict("unsafe", 0.9, judge="fixed")] * 3
    assert judge.judge_many([]) == []
    assert isinstance(judge, Judge)
    assert FixedJudge("safe").judge_many(requests)[0].p_unsafe is None


@pytest.mark.parametrize(("label", "p"), [("safe", 0.5), ("unsafe", 0.49), ("safe", -0.1), ("unsafe", float("nan"))])
def test_fixed_judge_refuses_contradictions(label: Any, p: float) -> None:
    with pytest.raises(ConfigError, match="p_unsafe"):
        FixedJudge(label, p_unsafe=p)


def test_fixed_judge_refuses_other_labels() -> None:
    with pytest.raises(ConfigError, match='"safe" or "unsafe"'):
        FixedJudge("unknown")  # type: ignore[arg-type]


@pytest.mark.parametrize("label", ["safe", "unsafe"])
def test_make_judge_by_label(label: str) -> None:
    judge = make_judge(label)
    assert judge is not None
    assert judge.judge_many([JudgeRequest(image=None, prompt="?")])[0].label == label  # type: ignore[arg-type]


def test_make_judge_passes_judges_and_none_through() -> None:
    judge = FixedJudge("safe")
    assert make_judge(judge) is judge
    assert make_judge(None) is None


def test_make_judge_self() -> None:
    judge = make_judge("self")
    assert judge is not None
    assert judge.name == "self"


@pytest.mark.parametrize(("spec", "text"), [("unsaef", "Did you mean 'unsafe'"), ("sefl", "Did you mean 'self'")])
def test_make_judge_suggests_the_nearest_name(spec: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_judge(spec)


@pytest.mark.parametrize("spec", [3, object(), FixedJudge])
def test_make_judge_refuses_what_is_no_judge(spec: Any) -> None:
    with pytest.raises(ConfigError, match="is no judge"):
        make_judge(spec)


@pytest.mark.parametrize("policy", ["treat_as_unsafe", "no_bias"])
def test_a_batch_without_verdicts_is_one_line_per_policy(policy: Any, caplog: pytest.LogCaptureFixture) -> None:
    def down(requests: Any) -> Any:
        raise JudgeError("no connection")

    requests = [JudgeRequest(image=None, prompt="?")] * 5  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        verdicts = ask_judge(down, requests, SOFT.replace(on_judge_error=policy), name="guard")
    assert verdicts == [Verdict("unknown", judge="guard", policy=policy)] * 5
    assert len(caplog.records) == 2
    assert "no connection" in caplog.text
    assert f"5 of 5 requests (5 failed, 0 could not be read): policy '{policy}'" in caplog.text


def test_settle_returns_the_error_of_a_verdict_that_contradicts_itself() -> None:
    settled = settle(Verdict("safe", 0.9), SOFT, name="guard")
    assert isinstance(settled, JudgeError) and "contradicts" in str(settled)


def test_one_failed_request_is_its_own_error_and_no_unknown() -> None:
    verdicts = [Verdict("safe", judge="remote"), failed("remote", "HTTP 500"), Verdict("unknown", judge="remote")]
    requests = [JudgeRequest(image=None, prompt="?")] * 3  # type: ignore[arg-type]
    config = SOFT.replace(on_unknown="no_bias")
    first, second, third = ask_judge(lambda _: verdicts, requests, config, name="remote")
    assert first == verdicts[0]
    assert isinstance(second, JudgeError) and not isinstance(second, UnknownVerdictError) and "HTTP 500" in str(second)
    assert isinstance(third, Verdict) and third.policy == "no_bias"
    second = settle(verdicts[1], config.replace(on_judge_error="treat_as_unsafe"), name="remote")
    assert isinstance(second, Verdict) and second.asks_for_refusal
    assert (second.policy, second.error, second.outcome) == ("treat_as_unsafe", "HTTP 500", "error")


def test_a_failed_verdict_has_no_bias_of_its_own() -> None:
    with pytest.raises(JudgeError, match="HTTP 500"):
        verdict_bias(failed("remote", "HTTP 500"), SOFT)
    with pytest.raises(JudgeError, match="contradicts error"):
        verdict_bias(Verdict("safe", error="HTTP 500"), SOFT)


def test_outcomes_are_counted_apart() -> None:
    outcomes = [Verdict("safe"), Verdict("unknown"), failed("j", "x"), JudgeError("y"), UnknownVerdictError("z")]
    assert count_outcomes(outcomes) == {"safe": 1, "unsafe": 0, "unknown": 2, "error": 2}
    assert failed("j", JudgeError()).error == "JudgeError()"


def test_failures_are_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    requests = [JudgeRequest(image=None, prompt="?")] * 3  # type: ignore[arg-type]
    verdicts = [Verdict("unknown"), failed("j", "x"), failed("j", "y")]
    with caplog.at_level(logging.WARNING):
        ask_judge(lambda _: verdicts, requests, SOFT, name="j")
    (record,) = caplog.records
    assert "3 of 3 requests (2 failed, 1 could not be read)" in record.getMessage()
