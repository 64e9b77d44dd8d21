"""Which arguments of `model.generate` the front door takes, and what it adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.errors import ConfigError

# What `chat` decides itself; whoever needs these works with SteeredGeneration and model.generate directly.
_RESERVED = (
    "assistant_model", "custom_generate", "inputs", "input_ids", "attention_mask", "pixel_values",
    "num_return_sequences", "output_logits", "output_scores", "past_key_values", "return_dict_in_generate", "streamer",
)  # fmt: skip
# One answer per request whatever a generation_config says: rows are matched to requests by their place.
_ONE_PLAIN_ANSWER = {
    "num_return_sequences": 1, "return_dict_in_generate": False, "output_scores": False, "output_logits": False,
}  # fmt: skip
_CONFIG_FIELDS = frozenset(field.name for field in fields(SafeCoDeConfig))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that `chat` decides itself, or that belongs to the configuration."""
    for name in arguments:
        if name in _RESERVED:
            raise ConfigError(f"{name} cannot be passed to chat; use SteeredGeneration and model.generate for it")
        if name in _CONFIG_FIELDS:
            raise ConfigError(f"{name} belongs to the configuration: pass config=SafeCoDeConfig({name}=...)")


def complete_arguments(arguments: Mapping[str, Any], model: Any, pad_token_id: int) -> dict[str, Any]:
    """Return the arguments for `model.generate`, with a padding token where none is given."""
    completed = dict(arguments, **_ONE_PLAIN_ANSWER)
    if model.generation_config.pad_token_id is None:
        completed.setdefault("pad_token_id", pad_token_id)
    return completed
