"""What an endpoint offers: found out by asking for everything and doing without what it refuses."""

from __future__ import annotations

from typing import Any, Literal, get_args

from safecode_mllm.errors import ConfigError

Feature = Literal["logprobs", "json", "temperature", "max_tokens"]
# Given up in this order where the endpoint does not say what it dislikes. Without "max_tokens" the same limit is sent
# under its other name.
_ORDER: tuple[Feature, ...] = get_args(Feature)
# How endpoints name a thing that they refuse.
_NAMES: dict[Feature, tuple[str, ...]] = {
    "logprobs": ("logprob",),
    "json": ("response_format", "json_schema", "structured", "grammar", "guided", "schema"),
    "temperature": ("temperature",),
    "max_tokens": ("max_tokens", "max_completion_tokens"),
}
# The most that OpenAI's own endpoint gives.
_TOP_LOGPROBS = 20


class Features:
    """What is asked for at the moment; shared by the calls of one judge, which all run in one event loop.

    Args:
        replies: "json", "word", or "auto" for JSON as long as the endpoint takes it.
    """

    def __init__(self, replies: str) -> None:
        if replies not in ("auto", "json", "word"):
            raise ConfigError(f'replies={replies!r} is not legal: it must be "auto", "json" or "word"')
        self.replies = replies
        self.current: frozenset[Feature] = frozenset(_ORDER) - (
            frozenset({"json"}) if replies == "word" else frozenset()
        )
        self._proven: frozenset[Feature] = frozenset()

    def arguments(self, features: frozenset[Feature], max_tokens: int, schema: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a chat completion that ask for `features`."""
        arguments: dict[str, Any] = {"max_tokens" if "max_tokens" in features else "max_completion_tokens": max_tokens}
        if "temperature" in features:
            arguments["temperature"] = 0
        if "logprobs" in features:
            arguments |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        if "json" in features:
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        return arguments

    def give_up_one(self, used: frozenset[Feature], complaint: str) -> bool:
        """Do without one feature of a refused call; False if there is nothing left that may be the cause.

        What has worked before is kept: a refusal is then about the one request.
        """
        if used != self.current:
            return True  # another call has found out in the meantime
        doubtful = [feature for feature in _ORDER if feature in used and feature not in self._proven]
        if self.replies == "json" and "json" in doubtful:
            doubtful.remove("json")
        named = [feature for feature in doubtful if any(name in complaint for name in _NAMES[feature])]
        suspects = named or doubtful
        self.current = used - frozenset(suspects[:1])
        return bool(suspects)

    def prove(self, used: frozenset[Feature]) -> None:
        """Remember that the endpoint took these."""
        self._proven |= used

    def explain(self) -> str:
        """Say what is asked for."""
        form = "for a JSON object" if "json" in self.current else "for one word"
        return f"{form}, {'with' if 'logprobs' in self.current else 'without'} log-probabilities"
