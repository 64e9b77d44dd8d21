"""Calls to an endpoint that may fail in every way: each request ends in time with a reply or with one error."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges.endpoint.budget import Budget, Estimate, Price, Usage
from safecode_mllm.terminal import one_line

# A verdict of a few hundred tokens with log-probabilities is far below this; anything larger is no reply.
MAX_REPLY_BYTES = 4 * 1024**2
# The first waiting time between two calls, and the longest that is not asked for by the server.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0
# An endpoint that could not be reached for so long is not tried again for the rest of the job.
UNREACHABLE_AFTER_S = 15.0
_CONNECT_TIMEOUT_S = 5.0
_MAX_MESSAGE = 200
_RETRIED = frozenset({408, 409, 425, 429})
# What is wrong with every request of the job: key, rights, address, model.
_HOPELESS = frozenset({401, 403, 404, 405})


class Rejected(JudgeError):
    """The endpoint does not take this form of request; another form may do."""


@dataclass(frozen=True)
class CallPolicy:
    """How calls are made.

    Attributes:
        concurrency: requests at a time.
        timeout_s: longest time of one call; a server that loads a model first may need minutes.
        attempts: most calls for one request.
        deadline_s: longest time for one request, waiting between calls included.
    """

    concurrency: int = 8
    timeout_s: float = 60.0
    attempts: int = 5
    deadline_s: float = 180.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
        for name in ("timeout_s", "deadline_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a finite number of seconds above 0")


@dataclass(frozen=True)
class _Problem:
    """What went wrong with one call.

    Attributes:
        text: for people.
        retry: whether another call may go better.
        wait_s: how long the server asked to wait.
        hopeless: whether every other request would fail too.
        unreached: whether no connection came about.
        rejected: whether the form of the request was refused.
        charged: whether tokens may have been paid for.
    """

    text: str
    retry: bool = True
    wait_s: float | None = None
    hopeless: bool = False
    unreached: bool = False
    rejected: bool = False
    charged: bool = False


class _Junk(Exception):
    """A reply with a good status and no completion in it."""


class _Broken(Exception):
    """A reply that ended before its end."""


class Caller:
    """Makes the calls of one job.

    Args:
        client: an AsyncOpenAI without retries of its own.
        where: the endpoint's address for messages, without credentials.
        secret: the key, cut out of every message.
        policy: timeouts and retries.
        budget: limits.
        price: of the tokens, None if unknown.
        usage: is added to.
    """

    def __init__(
        self,
        client: Any,
        where: str,
        secret: str,
        policy: CallPolicy,
        budget: Budget,
        price: Price | None,
        usage: Usage,
    ) -> None:
        self._client, self._where, self._secret = client, where, secret
        self._policy, self._budget, self._price, self.usage = policy, budget, price, usage
        # Jitter only: the process's own generator stays as it is.
        self._random = random.Random()
        self._not_before = 0.0
        self._unreached_since: float | None = None
        self._hopeless: str | None = None

    async def complete(self, body: dict[str, Any], estimate: Estimate, key: str) -> dict[str, Any]:
        """Return one chat completion as the endpoint's JSON.

        Args:
            body: arguments of the chat completion.
            estimate: of this call, for the budget.
            key: the same for every call of one request, so that a server that knows such keys does its work once.

        Raises:
            Rejected: the endpoint refuses this form of request.
            JudgeError: no completion came in time, the budget is used up, or the endpoint is hopeless.
        """
        deadline = time.monotonic() + self._policy.deadline_s
        for attempt in range(1, self._policy.attempts + 1):
            await self._wait_for_turn(deadline)
            outcome = await self._call(body, estimate, key, repeated=attempt > 1)
            if isinstance(outcome, dict):
                self._unreached_since = None
                return outcome
            self._learn(outcome)
            if outcome.rejected:
                raise Rejected(self._message(outcome.text))
            if not outcome.retry or attempt == self._policy.attempts:
                tries = f" ({attempt} calls)" if attempt > 1 else ""
                raise JudgeError(self._message(outcome.text + tries))
            await self._back_off(outcome, attempt, deadline)
        raise AssertionError("the last attempt returns or raises")

    async def _call(
        self, body: dict[str, Any], estimate: Estimate, key: str, *, repeated: bool
    ) -> dict[str, Any] | _Problem:
        if self._hopeless is not None:
            raise JudgeError(self._message(self._hopeless))
        self._budget.check_call(estimate, self.usage)
        self.usage.requests += 1
        self.usage.retries += repeated
        # Set aside until it is known, so that calls at the same time do not overdraw the budget together.
        reserved = estimate.cost or 0.0
        self.usage.cost += reserved
        spent = reserved
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                completion = _completion(await self._send(body, key))
            spent = self._charge(completion, reserved)
            return completion
        except Exception as error:
            problem = _problem_of(error, self._policy.timeout_s)
            spent = reserved if problem.charged else 0.0
            return problem
        finally:
            self.usage.cost += spent - reserved

    async def _send(self, body: dict[str, Any], key: str) -> bytes:
        create = self._client.chat.completions.with_streaming_response.create
        headers = {"Idempotency-Key": key}
        async with create(**body, extra_headers=headers, timeout=_timeouts(self._policy.timeout_s)) as response:
            return await _read(response)

    def _charge(self, completion: dict[str, Any], reserved: float) -> float:
        """Count the tokens that the server reports and return their cost, the reserved one where it reports none."""
        usage = completion.get("usage")
        sent, written = (_count(usage, name) for name in ("prompt_tokens", "completion_tokens"))
        if sent is None or written is None:
            return reserved
        self.usage.input_tokens += sent
        self.usage.output_tokens += written
        return 0.0 if self._price is None else self._price.of(sent, written)

    def _learn(self, problem: _Problem) -> None:
        """Keep what one request's problem says about all others."""
        now = time.monotonic()
        if problem.hopeless:
            self._hopeless = problem.text
        if problem.wait_s is not None:
            self._not_before = max(self._not_before, now + problem.wait_s)
        if not problem.unreached:
            self._unreached_since = None
        elif self._unreached_since is None:
            self._unreached_since = now
        elif now - self._unreached_since > UNREACHABLE_AFTER_S:
            self._hopeless = problem.text

    async def _wait_for_turn(self, deadline: float) -> None:
        """Wait as long as the server asked all callers to."""
        while (wait := self._not_before - time.monotonic()) > 0:
            if time.monotonic() + wait > deadline:
                raise JudgeError(
                    self._message(f"it asks to wait {wait:.0f} s, longer than the deadline of the request")
                )
            # Not all at once when the time has come.
            await asyncio.sleep(wait + self._random.uniform(0.0, _FIRST_WAIT_S))

    async def _back_off(self, problem: _Problem, attempt: int, deadline: float) -> None:
        if problem.wait_s is not None:
            return  # _wait_for_turn waits
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
        wait = self._random.uniform(longest / 2, longest)
        if time.monotonic() + wait > deadline:
            raise JudgeError(self._message(f"{problem.text}; no time left after {attempt} call(s)"))
        await asyncio.sleep(wait)

    def _message(self, text: str) -> str:
        return redacted(f"{self._where}: {text}", self._secret)


async def _read(response: Any) -> bytes:
    """Return a reply's body, taken piece by piece: an endless one ends here and not in a full memory."""
    reply = bytearray()
    pieces = response.iter_bytes()
    while True:
        try:
            reply += await anext(pieces)
        except StopAsyncIteration:
            return bytes(reply)
        except Exception as error:  # of whatever HTTP library the client's version uses
            raise _Broken(f"the reply broke off: {type(error).__name__}") from error
        if len(reply) > MAX_REPLY_BYTES:
            raise _Junk(f"the reply has more than {MAX_REPLY_BYTES // 1024**2} MiB")


def redacted(text: str, secret: str) -> str:
    """Return one line of a message, the key cut out of it wherever a server repeats it."""
    plain = one_line(text)
    return plain.replace(secret, "[key]") if secret else plain


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else None


def _timeouts(total_s: float) -> Any:
    from openai import Timeout

    return Timeout(total_s, connect=min(total_s, _CONNECT_TIMEOUT_S))


def _completion(reply: bytes) -> dict[str, Any]:
    """Return the JSON object of a reply; whatever else came with a good status is junk, and worth another call."""
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        start = reply[:60].decode("utf-8", "replace")
        raise _Junk(f"the reply is no JSON: {start!r}") from None
    if not isinstance(value, dict) or not isinstance(value.get("choices"), list) or not value["choices"]:
        raise _Junk("the reply holds no choices")
    choice = value["choices"][0]
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise _Junk("the reply holds no message")
    return value


def _problem_of(error: Exception, timeout_s: float) -> _Problem:
    import openai

    if isinstance(error, TimeoutError):
        return _Problem(f"no reply within {timeout_s:g} s", charged=True)
    if isinstance(error, _Junk | _Broken):
        return _Problem(str(error), charged=True)
    if isinstance(error, openai.APIStatusError):
        return _of_status(error)
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        late = isinstance(error, openai.APITimeoutError) and "Connect" not in type(cause).__name__
        if late:
            return _Problem(f"no reply within {timeout_s:g} s", charged=True)
        # Only where no connection came about: a server that breaks off in the middle is there.
        unreached = type(cause).__name__ in ("ConnectError", "ConnectTimeout")
        what = "cannot be reached" if unreached else "the connection broke"
        return _Problem(f"{what}: {str(cause) or type(cause).__name__}"[:_MAX_MESSAGE], unreached=unreached)
    if isinstance(error, openai.OpenAIError):
        return _Problem(f"{type(error).__name__}: {error}"[:_MAX_MESSAGE], retry=False)
    raise error


def _of_status(error: Any) -> _Problem:
    status, text = error.status_code, f"HTTP {error.status_code}: {error.message}"[:_MAX_MESSAGE]
    if status in _HOPELESS or error.code == "insufficient_quota":
        return _Problem(text, retry=False, hopeless=True)
    if status in _RETRIED or (status >= 500 and status != 501):
        return _Problem(text, wait_s=_retry_after(error.response.headers))
    return _Problem(text, retry=False, rejected=status in (400, 422, 501))


def _retry_after(headers: Any) -> float | None:
    """Return how many seconds the server asks to wait: Retry-After in seconds or as a date; None if it does not."""
    value = str(headers.get("retry-after") or "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    # NaN and negative numbers say nothing.
    return seconds if seconds > 0 else None
