"""From a chat completion to a verdict: the words, how they ended, and the probability of the label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safecode_mllm.judges.logprobs import label_of_token, p_unsafe
from safecode_mllm.judges.parsing import Reply, parse_reply

# A reply is kept for people to look at; a few lines are enough.
MAX_RAW = 4000
_VERDICT_FIELD = re.compile(r'"verdict"\s*:\s*"\s*')
_LABEL = re.compile(r"(?:un)?safe", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """What one completion says.

    Attributes:
        reply: label, category and reason.
        p_unsafe: from the log-probabilities where the label begins; None where the endpoint gives none.
        raw: the text, or in brackets why there is none.
    """

    reply: Reply
    p_unsafe: float | None
    raw: str


def read_completion(completion: dict[str, Any]) -> Reading:
    """Return what the first choice of a completion says; its form was checked when it arrived."""
    choice = completion["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    text = _text_of(message.get("content"))
    if not text.strip():
        refusal = _text_of(message.get("refusal"))
        return Reading(Reply("unknown"), None, f"({refusal or finish or 'no text'})"[:MAX_RAW])
    reply = parse_reply(text)
    if reply.label == "safe" and finish not in ("stop", None, "eos", "stop_sequence"):
        # Broken off: what would have come next is not known.
        return Reading(Reply("unknown"), None, f"{text[:MAX_RAW]} ({finish})")
    return Reading(reply, _probability(choice, text, reply), text[:MAX_RAW])


def _text_of(content: Any) -> str:
    """Return a message's text; some servers send it in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def _probability(choice: dict[str, Any], text: str, reply: Reply) -> float | None:
    """Return P(unsafe) at the token that begins the label, None if it cannot be found or its rivals are not given."""
    field = _VERDICT_FIELD.search(text) if text.lstrip("` \njson").startswith("{") else None
    label = _LABEL.match(text, field.end()) if field else _LABEL.search(text)
    if reply.label == "unknown" or label is None:
        return None
    before = 0
    for token, candidates in _tokens(choice.get("logprobs")):
        if not text.startswith(token, before):
            return None  # not the tokens of this text
        if before + len(token) > label.start():
            return p_unsafe(candidates) if label_of_token(token) == reply.label else None
        before += len(token)
    return None


def _tokens(logprobs: Any) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield each token with what could have stood in its place; ends where a server's data make no sense."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    for entry in content if isinstance(content, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
            return
        top = entry.get("top_logprobs")
        candidates = [pair for c in top if (pair := _candidate(c))] if isinstance(top, list) else []
        yield entry["token"], candidates


def _candidate(entry: Any) -> tuple[str, float] | None:
    token, logprob = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
    if not isinstance(token, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
        return None
    # No log-probability is above 0 by more than a rounding; NaN fails the comparison.
    return (token, float(logprob)) if logprob <= 1e-6 else None
