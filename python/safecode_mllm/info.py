"""What is installed, what is supported, and how much memory a model needs."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

_PACKAGES = ("safecode-kernels", "torch", "transformers", "tokenizers", "numpy", "pillow")
# While an answer is guided, each request has a clean and a noised row, each with its own KV cache.
_GUIDED_BRANCHES = 2


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of the parts that can be told from a model's configuration; activations come on top.

    Attributes:
        parameters: number of weights.
        weights: bytes of the weights.
        cache_per_token: bytes of the KV cache per row and token.
        cache_plain: bytes of the KV cache of plain decoding.
        cache_guided: bytes of the KV cache while both branches run.
    """

    parameters: int
    weights: int
    cache_per_token: int
    cache_plain: int
    cache_guided: int


def versions() -> dict[str, str]:
    """Return name -> version of Python and the packages that matter; "not installed" for a missing one."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def memory_need(config: Any, dtype: str, batch: int, tokens: int) -> MemoryNeed:
    """Return the memory that a model needs, from its configuration alone: no weight is loaded.

    Args:
        config: a transformers configuration of a supported model.
        dtype: name of the torch dtype of weights and cache, for instance "bfloat16".
        batch: requests at a time, >= 1.
        tokens: prompt, image and answer tokens per request, >= 1.

    Returns:
        Bytes by part.

    Raises:
        UnsupportedModelError: the configuration is of no supported family.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from .decoding.families import family_of_config

    family_of_config(config)
    width = getattr(torch, dtype).itemsize
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_dim * width  # keys and values
    plain = per_token * batch * tokens
    return MemoryNeed(parameters, parameters * width, per_token, plain, _GUIDED_BRANCHES * plain)
