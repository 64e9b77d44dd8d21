"""An endpoint that fails in every way: no request is lost, none is doubled, and nothing becomes "safe" by accident."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import threading
import time
from typing import Any

import pytest

from bad_server import BadServer, Behaviour, Handler, honest, number_in, serving, truth
from judging import requests
from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges import Verdict
from safecode_mllm.judges.attacks import FORGED
from safecode_mllm.judges.endpoint import Budget, EndpointJudge, Price, calls
from safecode_mllm.judges.endpoint import judge as judge_module
from safecode_mllm.judges.endpoint.calls import CallPolicy
from troubles import (
    LOUD,
    SILENT,
    a_page,
    five_hundred,
    half,
    hang_up,
    junk,
    other_json,
    stall,
    too_many,
    too_many_with_time,
)

KEY = "sk-this-is-the-secret-key-0123456789"
# Patient, so that a busy machine is not taken for a silent server; the waits between calls are shortened instead.
PATIENT = CallPolicy(concurrency=8, timeout_s=20, attempts=5, deadline_s=60)
IMPATIENT = CallPolicy(timeout_s=0.4, attempts=4, deadline_s=20)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(judge_module, "_PROBE_TIMEOUT_S", 0.3)


def endpoint(server: BadServer | str, policy: CallPolicy = PATIENT, **options: Any) -> EndpointJudge:
    url = server if isinstance(server, str) else server.url
    return EndpointJudge("m", base_url=url, api_key=KEY, calls=policy, **options)


def judged(behaviour: Behaviour, n: int = 1, **options: Any) -> tuple[list[Verdict], BadServer]:
    with serving(behaviour) as server:
        return endpoint(server, **options).judge_many(requests(n)), server


# ---- trouble with single calls ----


def twice(trouble: Behaviour) -> Behaviour:
    """The trouble for the first two calls of each request, then what was asked for."""

    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        (trouble if seen < 2 else honest)(handler, body, seen)

    return behaviour


@pytest.mark.parametrize("trouble", LOUD, ids=lambda trouble: trouble.__name__)
def test_trouble_that_passes_costs_time_only(trouble: Behaviour) -> None:
    verdicts, server = judged(twice(trouble), n=2)
    assert [v.outcome for v in verdicts] == [truth(0), truth(1)]
    assert sorted(server.seen.values()) == [3, 3]
    assert list(server.answered.values()) == [1, 1]


@pytest.mark.parametrize("trouble", SILENT, ids=lambda trouble: trouble.__name__)
def test_silence_that_passes_costs_time_only(trouble: Behaviour) -> None:
    verdicts, server = judged(twice(trouble), policy=IMPATIENT)
    assert [v.outcome for v in verdicts] == [truth(0)]
    assert max(server.seen.values()) >= 3


@pytest.mark.parametrize("trouble", [five_hundred, stall, half, junk], ids=lambda trouble: trouble.__name__)
def test_trouble_that_stays_is_an_error_with_the_address(trouble: Behaviour) -> None:
    verdicts, server = judged(trouble, policy=CallPolicy(timeout_s=0.4, attempts=2, deadline_s=20))
    assert [v.outcome for v in verdicts] == ["error"]
    assert server.url in str(verdicts[0].error)
    assert len(server.calls) == 2
    assert verdicts[0].p_unsafe is None and verdicts[0].label == "unknown"


def test_a_storm_loses_no_request_doubles_none_and_keeps_the_order() -> None:
    rng = random.Random(7)
    storm = [five_hundred, too_many, half, hang_up, junk, other_json, a_page, too_many_with_time]
    plans = {number: [rng.choice(storm) for _ in range(rng.choice((0, 0, 1, 2, 4)))] for number in range(80)}
    # Every tenth never recovers.
    lost = {number for number in plans if number % 10 == 9}

    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        number = number_in(body)
        plan = plans[number]
        if number in lost:
            five_hundred(handler, body, seen)
        elif seen < len(plan):
            plan[seen](handler, body, seen)
        else:
            honest(handler, body)

    with serving(behaviour) as server:
        judge = endpoint(server)
        verdicts = judge.judge_many(requests(80))
    assert [v.outcome for v in verdicts] == ["error" if n in lost else truth(n) for n in range(80)]
    assert sorted(server.answered.values()) == [1] * (80 - len(lost))
    assert sum(server.seen.values()) == sum(5 if n in lost else len(plans[n]) + 1 for n in plans)
    assert judge.usage.requests == len(server.calls)
    assert server.most_at_once <= PATIENT.concurrency


# ---- waiting ----


def test_retry_after_holds_for_everybody() -> None:
    first = threading.Event()

    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        if not first.is_set():
            first.set()
            handler.send(429, b"{}", Retry_After="1")
        else:
            honest(handler, body)

    policy = CallPolicy(concurrency=1)
    verdicts, server = judged(behaviour, n=3, policy=policy)
    assert [v.outcome for v in verdicts] == [truth(n) for n in range(3)]
    times = [moment for moment, *_ in server.calls]
    assert times[1] - times[0] >= 1.0
    assert times[-1] - times[1] < 1.0


def test_a_wait_beyond_the_deadline_is_an_error_at_once() -> None:
    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        handler.send(429, b"{}", Retry_After="3600")

    started = time.monotonic()
    verdicts, server = judged(behaviour, n=3, policy=CallPolicy(concurrency=1))
    assert [v.outcome for v in verdicts] == ["error"] * 3
    assert "3600 s" in str(verdicts[0].error) or "3599 s" in str(verdicts[0].error)
    assert len(server.calls) == 1 and time.monotonic() - started < 5


def test_waits_are_jittered() -> None:
    caller = calls.Caller(None, "w", "", CallPolicy(), Budget(), None, judge_module.Usage())
    slept: list[float] = []

    async def record(seconds: float) -> None:
        slept.append(seconds)

    async def back_off_often() -> None:
        problem = calls._Problem("x")
        for attempt in itertools.chain(*[range(1, 5)] * 10):
            await caller._back_off(problem, attempt, time.monotonic() + 1000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls.asyncio, "sleep", record)
        asyncio.run(back_off_often())
    assert len(set(slept)) == len(slept)
    for attempt in range(4):
        assert all(0.005 * 2**attempt <= wait <= 0.01 * 2**attempt for wait in slept[attempt::4])


# ---- what no repetition helps ----


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_ends_the_job_after_a_few_calls(status: int) -> None:
    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        handler.send(status, b'{"error": {"message": "no"}}')

    verdicts, server = judged(behaviour, n=100)
    assert {v.outcome for v in verdicts} == {"error"}
    assert all(f"HTTP {status}" in str(v.error) for v in verdicts)
    assert len(server.calls) <= PATIENT.concurrency


def test_a_used_up_account_is_no_rate_limit() -> None:
    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        handler.send(429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}')

    verdicts, server = judged(behaviour, n=50)
    assert {v.outcome for v in verdicts} == {"error"}
    assert len(server.calls) <= PATIENT.concurrency


def test_one_refused_request_is_its_own_error() -> None:
    def behaviour(handler: Handler, body: Any, seen: int) -> None:
        if number_in(body) == 2:
            handler.send(413, b'{"error": {"message": "too large"}}')
        else:
            honest(handler, body)

    verdicts, _ = judged(behaviour, n=4)
    assert [v.outcome for v in verdicts] == [truth(0), truth(1), "error", truth(3)]


def test_a_closed_port_is_named_quickly() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(JudgeError, match=url):
        endpoint(url).judge_many(requests(50))
    assert time.monotonic() - started < 10


def test_a_port_that_never_answers_is_named_quickly() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        started = time.monotonic()
        with pytest.raises(JudgeError, match="nothing answers"):
            endpoint(url).judge_many(requests(50))
        assert time.monotonic() - started < 10


def test_an_endpoint_that_dies_in_the_middle_leaves_the_answers_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "UNREACHABLE_AFTER_S", 0.1)
    with serving(honest) as server:
        judge = endpoint(server, CallPolicy(concurrency=1))
        assert [v.outcome for v in judge.judge_many(requests(2))] == [truth(0), truth(1)]
    started = time.monotonic()
    verdicts = judge.judge_many(requests(300))
    assert {v.outcome for v in verdicts} == {"error"}
    assert time.monotonic() - started < 10, "it is not tried again for each of the rest"


# ---- money ----


def test_a_job_beyond_the_budget_is_refused_before_it_begins() -> None:
    with serving(honest) as server:
        for budget in (Budget(max_requests=3), Budget(max_cost=1e-6)):
            judge = endpoint(server, budget=budget, price=Price(1.0, 2.0))
            with pytest.raises(JudgeError, match="max_"):
                judge.judge_many(requests(4))
    assert server.calls == []


def test_repeated_calls_use_up_the_budget() -> None:
    verdicts, server = judged(five_hundred, n=2, budget=Budget(max_requests=3))
    assert {v.outcome for v in verdicts} == {"error"}
    assert "max_requests=3 is used up" in " ".join(str(v.error) for v in verdicts)
    assert len(server.calls) == 3


def test_calls_at_the_same_time_do_not_overdraw_the_budget_together() -> None:
    with serving(honest) as server:
        price = Price(1.0, 1.0)
        one = endpoint(server, price=price).estimate(requests(1)).cost
        assert one is not None
        judge = endpoint(server, price=price, budget=Budget(max_cost=8.5 * one))
        judge.judge_many(requests(8))
        # As reported: 110 tokens each, far fewer than estimated.
        assert judge.usage.cost == pytest.approx(8 * 110 / 1e6)
        assert (judge.usage.input_tokens, judge.usage.output_tokens) == (800, 80)


def test_what_may_have_been_paid_is_counted() -> None:
    with serving(stall) as server:
        judge = endpoint(server, CallPolicy(timeout_s=0.2, attempts=2, deadline_s=5), price=Price(1.0, 1.0))
        judge.judge_many(requests(1))
        assert judge.usage.cost == pytest.approx(2 * (judge.estimate(requests(1)).cost or 0))
    assert judge.usage.retries == 1


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": "many"}, {"prompt_tokens": -1, "completion_tokens": 1}])
def test_senseless_token_counts_are_replaced_by_the_estimate(usage: Any) -> None:
    with serving(lambda handler, body, seen: handler.answer("unsafe", usage=usage)) as server:
        judge = endpoint(server, price=Price(1.0, 1.0))
        assert judge.judge_many(requests(1))[0].outcome == "unsafe"
        assert judge.usage.cost == pytest.approx(judge.estimate(requests(1)).cost)


# ---- nothing fails open, nothing leaks ----


@pytest.mark.parametrize("finish", ["length", "content_filter", "tool_calls"])
def test_a_reply_that_was_broken_off_is_unknown(finish: str) -> None:
    for text, outcome in (("safe", "unknown"), ('{"verdict": "safe"', "unknown"), ("unsafe", "unsafe")):
        verdicts, _ = judged(lambda h, b, s, text=text: h.answer(text, finish=finish))  # type: ignore[misc]
        assert verdicts[0].outcome == outcome


@pytest.mark.parametrize("content", [None, "", "  ", [], {}, 5, [{"type": "image_url"}]])
def test_a_reply_without_text_is_unknown(content: Any) -> None:
    verdicts, server = judged(lambda handler, body, seen: handler.answer(content))
    assert verdicts[0].outcome == "unknown"
    assert len(server.calls) == 1, "it answered: asking again would only cost money"


def test_no_forged_reply_is_safe() -> None:
    replies = list(FORGED)
    verdicts, server = judged(lambda handler, body, _: handler.answer(replies[number_in(body)]), n=len(replies))
    assert not [v for v in verdicts if v.outcome in ("safe", "error")]
    assert len(server.calls) == len(replies)


def test_the_key_is_in_no_message_verdict_log_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    def repeat_the_key(handler: Handler, body: Any, seen: int) -> None:
        assert handler.headers["Authorization"] == f"Bearer {KEY}"
        number = number_in(body)
        text = f"unsafe because of {KEY}"
        if number == 0:
            handler.send(500, f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode())
        elif number == 1:
            handler.send(200, f"<html>{KEY}".encode())
        elif number == 2:
            handler.answer(text)
        else:
            handler.answer(f'{{"verdict": "unsafe", "category": "{KEY}", "reason": "{KEY}"}}')

    with caplog.at_level(logging.DEBUG), serving(repeat_the_key) as server:
        judge = endpoint(server, CallPolicy(attempts=2))
        verdicts = judge.judge_many(requests(4))
        said = "\n".join(map(repr, [*verdicts, judge, judge.settings, judge.explain(), judge.version]))
    assert [v.outcome for v in verdicts] == ["error", "error", "unsafe", "unsafe"]
    assert "[key]" in said
    assert KEY not in said + caplog.text
    with pytest.raises(ConfigError, match="api_key") as refused:
        endpoint(f"http://user:{KEY}@127.0.0.1/v1")
    assert KEY not in str(refused.value)
