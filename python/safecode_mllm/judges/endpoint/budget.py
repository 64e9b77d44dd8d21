"""What a job may cost, what it would cost, and what it has cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from safecode_mllm.errors import ConfigError, JudgeError

_MILLION = 1_000_000
# Tokens cannot be counted without the server's tokenizer. One token for three characters is more than English needs.
_CHARACTERS_PER_TOKEN = 3
# The price of pictures at the best known endpoint: a base, and so many tokens per tile of 512 pixels. Others differ.
_IMAGE_BASE_TOKENS, _IMAGE_TILE_TOKENS, _IMAGE_TILE = 85, 170, 512


class BudgetError(JudgeError):
    """A job would cost more, or take more requests, than it was allowed."""


@dataclass(frozen=True)
class Price:
    """What tokens cost, in any currency per million; the package ships no prices, since they change."""

    input: float
    output: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"price.{field.name}={value!r} must be a finite number >= 0, per million tokens")

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """Return the cost of so many tokens."""
        return (input_tokens * self.input + output_tokens * self.output) / _MILLION


@dataclass(frozen=True)
class Estimate:
    """What a job would take if no call were repeated and every reply were as long as it may be.

    Attributes:
        requests: calls.
        input_tokens: of texts and pictures, estimated on the high side.
        output_tokens: the longest replies.
        cost: None without a price.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float | None


@dataclass
class Usage:
    """What was really used; `cost` counts what the server reported, and estimates where it reported nothing.

    Attributes:
        requests: calls that were sent, repeated ones included.
        retries: of these, repeated ones.
        input_tokens: as reported.
        output_tokens: as reported.
        cost: 0 without a price.
    """

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Limits of all calls of one judge together; None is no limit.

    Attributes:
        max_requests: calls, repeated ones included.
        max_cost: in the currency of the price.
    """

    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"max_requests={self.max_requests!r} must be at least 1")
        if self.max_cost is not None and not 0 < self.max_cost < math.inf:
            raise ConfigError(f"max_cost={self.max_cost!r} must be a finite number above 0")

    def check_job(self, estimate: Estimate, used: Usage) -> None:
        """Raise BudgetError if a whole job would not fit into what is left, before anything is sent."""
        if self.max_requests is not None and used.requests + estimate.requests > self.max_requests:
            raise BudgetError(
                f"the job needs {estimate.requests} requests, {used.requests} were sent, and max_requests is "
                f"{self.max_requests}: raise it or judge fewer"
            )
        if self.max_cost is not None and estimate.cost is not None and used.cost + estimate.cost > self.max_cost:
            raise BudgetError(
                f"the job may cost {estimate.cost:.4g}, {used.cost:.4g} is spent, and max_cost is {self.max_cost:g}: "
                "raise it, judge fewer, or send smaller pictures"
            )

    def check_call(self, estimate: Estimate, used: Usage) -> None:
        """Raise BudgetError if one more call would not fit; repeated calls use up a budget too."""
        if self.max_requests is not None and used.requests >= self.max_requests:
            raise BudgetError(f"max_requests={self.max_requests} is used up")
        if self.max_cost is not None and estimate.cost is not None and used.cost + estimate.cost > self.max_cost:
            raise BudgetError(f"max_cost={self.max_cost:g} is used up: {used.cost:.4g} is spent")


def text_tokens(text: str) -> int:
    """Return about how many tokens a text has, rather too many."""
    # Scripts that few tokenizers know well take a token per character or more; their UTF-8 is longer too.
    return math.ceil(max(len(text), len(text.encode("utf-8", "surrogatepass")) / 2) / _CHARACTERS_PER_TOKEN)


def image_tokens(width: int, height: int) -> int:
    """Return about how many tokens a picture is charged."""
    tiles = math.ceil(width / _IMAGE_TILE) * math.ceil(height / _IMAGE_TILE)
    return _IMAGE_BASE_TOKENS + _IMAGE_TILE_TOKENS * tiles


def total(estimates: Iterable[Estimate], price: Price | None) -> Estimate:
    """Return the sum of single calls."""
    parts = list(estimates)
    input_tokens, output_tokens = sum(e.input_tokens for e in parts), sum(e.output_tokens for e in parts)
    cost = None if price is None else price.of(input_tokens, output_tokens)
    return Estimate(sum(e.requests for e in parts), input_tokens, output_tokens, cost)
