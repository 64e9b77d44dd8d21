"""Loads a model the way the published drivers ask for it."""

from __future__ import annotations

from typing import Any

import torch

from safecode_mllm import loading
from safecode_mllm.compat.model_types import model_type


def load_model(args: Any) -> tuple[Any, Any, Any]:
    """Return (model, processor, tokenizer) for `args.model_type` and `args.model_path`.

    Args:
        args: any object with these two attributes, such as the parsed arguments of the published command.

    Returns:
        The model on one device: a GPU in the published half precision, or the CPU in float32. Safetensors only, and no
        remote code.

    Raises:
        ConfigError: model_type is none of the published ones.
        ModelError: nothing usable is at model_path.
        UnsupportedModelError: the model is of no supported family.
    """
    kind = model_type(args.model_type.lower())
    dtype = getattr(torch, kind.half) if torch.cuda.is_available() else torch.float32
    model, processor = loading.load_model(args.model_path, dtype=dtype, processor_arguments=kind.processor_arguments)
    return model.eval(), processor, processor.tokenizer
