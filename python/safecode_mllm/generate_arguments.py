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
# Field of a GenerationConfig (and of its file) that holds a configuration, as SafeCoDeConfig.to_dict() writes it.
CONFIG_FIELD = "safecode"
_CONFIG_FIELDS = frozenset(field.name for field in fields(SafeCoDeConfig))


def config_in(generation_config: Any) -> SafeCoDeConfig | None:
    """Return the configuration in the field `safecode` of a GenerationConfig; None without one."""
    field = getattr(generation_config, CONFIG_FIELD, None)
    if field is None or isinstance(field, SafeCoDeConfig):
        return field
    try:
        return SafeCoDeConfig.from_dict(field)
    except ConfigError as error:
        raise ConfigError(f"field {CONFIG_FIELD!r} of the generation configuration: {error}") from error


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that `chat` decides itself, or that belongs to the configuration."""
    if getattr(arguments.get("generation_config"), CONFIG_FIELD, None) is not None:
        raise ConfigError(
            f"generation_config has a field {CONFIG_FIELD!r}, which a call of chat does not read: pass "
            "config=SafeCoDeConfig.from_dict(...), or put it into the model's own generation_config"
        )
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
