"""How long answers may get: what was asked for, and what the model's context has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safecode_mllm.errors import PromptError
from safecode_mllm.requests import PreparedRequest

# Enough for an answer of a paragraph; generate()'s own default of 20 cuts sentences in half.
DEFAULT_MAX_NEW_TOKENS = 256


def context_length(model: Any) -> int | None:
    """Return how many columns the text model can hold, prompt and answer together; None if it does not say."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_fits(row: PreparedRequest, model: Any) -> None:
    """Raise PromptError for a prompt that fills the model's context, so that not one token could follow."""
    context, length = context_length(model), row.length
    if context is not None and length >= context:
        raise PromptError(
            f"prompt: with its image it has {length} tokens, and the model's context holds {context}; "
            "shorten the text or use a smaller image"
        )


@dataclass
class RowLimits:
    """How long the answers of one batch may get.

    Attributes:
        asked: for each row the tokens that its request, or the arguments, ask for.
        rooms: for each row the tokens that the model's context has room for; None if it does not say.
        extra: tokens on top of what was asked for, for the reason behind a refusal.
    """

    asked: list[int]
    rooms: list[int] | None
    extra: int = 0

    @classmethod
    def of(cls, rows: Sequence[PreparedRequest], arguments: Mapping[str, Any], model: Any) -> RowLimits:
        """Read the limits of a batch from its requests and the arguments of the call."""
        columns = max(row.length for row in rows)
        given = limit_of_all(arguments, columns)
        context = context_length(model)
        rooms = None if context is None else [context - row.length for row in rows]
        return cls([row.request.max_new_tokens or given for row in rows], rooms)

    @property
    def per_row(self) -> list[int] | None:
        """The limit of each row where they differ from that of the batch; None where they don't."""
        limits = self._limits()
        return None if len(set(limits)) == 1 else limits

    @property
    def of_batch(self) -> int:
        """The most tokens of any row."""
        return max(self._limits())

    def apply(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `model.generate` with the limit of the batch."""
        return {name: v for name, v in arguments.items() if name != "max_length"} | {"max_new_tokens": self.of_batch}

    def _limits(self) -> list[int]:
        wanted = [limit + self.extra for limit in self.asked]
        return wanted if self.rooms is None else [min(pair) for pair in zip(wanted, self.rooms, strict=True)]


def limit_of_all(arguments: Mapping[str, Any], columns: int) -> int:
    """Return the tokens that the arguments allow behind a prompt of so many columns.

    Raises:
        PromptError: max_length, which counts the prompt too, leaves no room behind it.
    """
    config = arguments.get("generation_config")
    for new_tokens, length in (
        (arguments.get("max_new_tokens"), arguments.get("max_length")),
        (getattr(config, "max_new_tokens", None), _asked_length(config)),
    ):
        if new_tokens is not None:
            return int(new_tokens)
        if length is not None:
            if length <= columns:
                raise PromptError(
                    f"prompt: with its image it has {columns} tokens, and max_length={length} counts these too; use "
                    "max_new_tokens"
                )
            return int(length) - columns
    return DEFAULT_MAX_NEW_TOKENS


def _asked_length(config: Any) -> int | None:
    """Return the max_length that somebody asked for: transformers 4 has one in every configuration."""
    length = getattr(config, "max_length", None)
    return None if config is None or length == type(config)().max_length else length
