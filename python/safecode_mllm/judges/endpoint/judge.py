"""The judge behind an OpenAI-compatible endpoint: a paid service, or a vLLM or Ollama server of one's own."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.extras import optional_imports
from safecode_mllm.judges.calibration import DEFAULT_THRESHOLD, Calibration, check_threshold, decide
from safecode_mllm.judges.categories import known_category
from safecode_mllm.judges.endpoint import background
from safecode_mllm.judges.endpoint.budget import Budget, Estimate, Price, Usage, image_tokens, text_tokens, total
from safecode_mllm.judges.endpoint.calls import Caller, CallPolicy, Rejected, redacted
from safecode_mllm.judges.endpoint.features import Features
from safecode_mllm.judges.endpoint.prompt import (
    INSTRUCTIONS,
    PROMPT_VERSION,
    SCHEMA,
    bounded_size,
    messages,
    question,
)
from safecode_mllm.judges.endpoint.replies import read_completion
from safecode_mllm.judges.protocol import JudgeRequest, Verdict, failed
from safecode_mllm.settings import openai_api_key, openai_base_url

DEFAULT_BASE_URL = "https://api.openai.com/v1"
# Enough to see a scene by, and four tiles at most where pictures are charged by the tile.
DEFAULT_MAX_SIDE = 768
# A label, a category and a sentence. A model that thinks first needs more.
DEFAULT_MAX_TOKENS = 200
# How long an endpoint may take to answer at all, before any request is sent to it.
_PROBE_TIMEOUT_S, _PROBES = 8.0, 2
_MAX_REASON = 300
# Local servers ask for no key, but the client wants one.
_NO_KEY = "none"

Replies = Literal["auto", "json", "word"]


class EndpointJudge:
    """Asks a vision-language model behind an OpenAI-compatible endpoint, many requests at a time.

    Every request ends with a verdict, an unknown verdict, or its own error; nothing is asked again once it has been
    answered. The key is never in a message, a verdict or a repr.

    Args:
        model: the endpoint's name of the model.
        base_url: its address, up to "/v1"; OPENAI_BASE_URL, or OpenAI's own.
        api_key: OPENAI_API_KEY where it is None; needed for OpenAI's own address.
        replies: "json" asks for structured output, "word" for one word, "auto" for as much as the endpoint offers.
        threshold: "unsafe" from this probability on, where the endpoint gives log-probabilities.
        calibration: what `judge calibrate` fitted to this judge.
        max_side: longer side of the pictures sent, pixels.
        max_tokens: longest reply.
        calls: concurrency, timeouts and repetition.
        budget: limits of requests and cost.
        price: what tokens cost; without it there is no cost.

    Raises:
        ConfigError: an argument is out of range, or there is no key for OpenAI's own address.
        MissingExtraError: the client is not installed.
    """

    remote = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        replies: Replies = "auto",
        threshold: float = DEFAULT_THRESHOLD,
        calibration: Calibration | None = None,
        max_side: int = DEFAULT_MAX_SIDE,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        calls: CallPolicy | None = None,
        budget: Budget | None = None,
        price: Price | None = None,
    ) -> None:
        with optional_imports():
            import openai  # noqa: F401
        self.model = _checked_name(model)
        self._base_url = base_url or openai_base_url() or DEFAULT_BASE_URL
        self.where = _address(self._base_url)
        self._key = _checked_key(api_key or openai_api_key(), self._base_url)
        check_threshold(threshold)
        for name, value, least in (("max_side", max_side, 64), ("max_tokens", max_tokens, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
        if budget is not None and budget.max_cost is not None and price is None:
            raise ConfigError(f"max_cost={budget.max_cost:g} needs a price: give price=Price(input=..., output=...)")
        self.threshold, self.calibration = threshold, calibration
        self.max_side, self.max_tokens = max_side, max_tokens
        self.calls, self.budget, self.price = calls or CallPolicy(), budget or Budget(), price
        self.usage = Usage()
        self._features = Features(replies)
        self._reached = False
        self._open: tuple[asyncio.AbstractEventLoop, Any] | None = None
        if calibration is not None:
            calibration.check(self.name, self.version)

    @property
    def name(self) -> str:
        """The judge's name: "openai:" and the model."""
        return f"openai:{self.model}"

    @property
    def version(self) -> str:
        """The model and the wording of the question."""
        return f"{self.model} prompt {PROMPT_VERSION}"

    @property
    def settings(self) -> dict[str, Any]:
        """What changes a verdict; never the key."""
        calibration = None if self.calibration is None else [self.calibration.scale, self.calibration.bias]
        return {
            "where": self.where,
            "replies": self._features.replies,
            "threshold": self.threshold if self.calibration is None else self.calibration.threshold,
            "calibration": calibration,
            "max_side": self.max_side,
            "max_tokens": self.max_tokens,
        }

    def explain(self) -> str:
        """Say in a sentence who is asked and how."""
        return f"asks {self.model} at {self.where}, {self._features.explain()}"

    def estimate(self, requests: Iterable[JudgeRequest]) -> Estimate:
        """Return what a job would take, without sending anything; tokens are estimated, rather too many."""
        return total(map(self._estimate_one, requests), self.price)

    def check_endpoint(self) -> None:
        """Raise JudgeError unless the endpoint answers at all; costs no tokens.

        Raises:
            JudgeError: nothing answers at its address within seconds.
        """
        background.run(self._probe())

    def judge_many(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """Return one verdict per request, in order; what fails on one request is its verdict's `error`.

        Raises:
            JudgeError: the endpoint cannot be reached, or the job would not fit into the budget; nothing was asked.
        """
        if not requests:
            return []
        self.budget.check_job(self.estimate(requests), self.usage)
        return background.run(self._judge_all(list(requests)))

    async def _judge_all(self, requests: list[JudgeRequest]) -> list[Verdict]:
        if not self._reached:
            await self._probe()
            self._reached = True
        caller = Caller(self._client(), self.where, self._secret, self.calls, self.budget, self.price, self.usage)
        # A picture is encoded when its turn comes, and a request that waits for another call keeps its place: whoever
        # answers with errors is not asked faster.
        places = asyncio.Semaphore(self.calls.concurrency)
        return list(await asyncio.gather(*(self._judge(caller, places, request) for request in requests)))

    async def _judge(self, caller: Caller, places: asyncio.Semaphore, request: JudgeRequest) -> Verdict:
        async with places:
            started = time.perf_counter()
            try:
                completion = await self._ask(caller, request)
                return self._verdict(completion, time.perf_counter() - started)
            except JudgeError as error:
                return failed(self.name, error, version=self.version, latency_s=time.perf_counter() - started)
            except Exception as error:
                # What goes wrong here must not take the other requests' answers with it.
                text = redacted(f"{type(error).__name__}: {error}", self._secret)
                return failed(self.name, text, version=self.version, latency_s=time.perf_counter() - started)

    async def _ask(self, caller: Caller, request: JudgeRequest) -> dict[str, Any]:
        """Return a completion, doing without what the endpoint turns out not to know."""
        key = uuid.uuid4().hex
        while True:
            features = self._features.current
            body = {
                "model": self.model,
                "messages": messages(request, self.max_side, structured="json" in features),
                **self._features.arguments(features, self.max_tokens, SCHEMA),
            }
            try:
                completion = await caller.complete(body, self._estimate_one(request), key)
            except Rejected as rejected:
                if not self._features.give_up_one(features, str(rejected)):
                    raise
                key = uuid.uuid4().hex  # another body is another request
                continue
            self._features.prove(features)
            return completion

    def _verdict(self, completion: dict[str, Any], latency: float) -> Verdict:
        reading = read_completion(completion)
        label, p, threshold = decide(reading.reply.label, reading.p_unsafe, self.threshold, self.calibration)
        return Verdict(
            label,
            p,
            threshold,
            self.name,
            latency,
            _without(reading.raw, self._secret),
            category=known_category(reading.reply.category),
            reason=redacted(reading.reply.reason, self._secret)[:_MAX_REASON] if reading.reply.reason else None,
            version=self.version,
        )

    def _estimate_one(self, request: JudgeRequest) -> Estimate:
        texts = INSTRUCTIONS + (request.policy_text or "") + question(request, structured=True)
        tokens = text_tokens(texts) + image_tokens(*bounded_size(request.image, self.max_side))
        cost = None if self.price is None else self.price.of(tokens, self.max_tokens)
        return Estimate(1, tokens, self.max_tokens, cost)

    async def _probe(self) -> None:
        """Ask for the list of models: any reply of a server will do, also that it has no such list."""
        import openai

        client, problem = self._client(), ""
        for _ in range(_PROBES):
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    async with client.models.with_streaming_response.list(timeout=_PROBE_TIMEOUT_S):
                        return
            except openai.APIStatusError:
                return
            except TimeoutError:
                problem = f"nothing answers within {_PROBE_TIMEOUT_S:g} s"
            except openai.APIConnectionError as error:
                problem = str(error.__cause__ or error)
            await asyncio.sleep(0.5)
        raise JudgeError(redacted(f"{self.where}: cannot be reached: {problem}", self._secret))

    def _client(self) -> Any:
        """Return the client of the running event loop; its connections are kept, since opening one takes longest."""
        from openai import AsyncOpenAI

        loop = asyncio.get_running_loop()
        if self._open is None or self._open[0] is not loop:
            # Repetition is ours: the client would not count calls against a budget, nor keep to one deadline.
            self._open = (loop, AsyncOpenAI(api_key=self._key, base_url=self._base_url, max_retries=0))
        return self._open[1]

    @property
    def _secret(self) -> str:
        return "" if self._key == _NO_KEY else self._key

    def __repr__(self) -> str:
        return f"EndpointJudge({self.model!r}, base_url={self.where!r})"


def _without(text: str, secret: str) -> str:
    """Return a reply as it is, but for a key that a server repeats in it."""
    return text.replace(secret, "[key]") if secret else text


def _checked_name(model: str) -> str:
    if not isinstance(model, str) or not model.strip():
        raise ConfigError(f"model={model!r} must be the name that the endpoint gives its model")
    return model


def _checked_key(key: str | None, base_url: str) -> str:
    if key:
        return key
    if base_url == DEFAULT_BASE_URL:
        raise ConfigError("no key for the endpoint: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own")
    return _NO_KEY


def _address(base_url: str) -> str:
    """Return an address without its query, fit for messages."""
    parts = urlsplit(base_url)
    if "@" in parts.netloc:
        # Not repeated in the message: it holds a secret, and would replace the key.
        raise ConfigError("base_url holds a user name: give the secret as api_key, and the address without it")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"base_url={base_url!r} must be an address such as http://localhost:8000/v1")
    host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
