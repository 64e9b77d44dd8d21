"""Models of transformers that only judge: any that talks, with pictures or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from safecode_mllm.errors import ModelError
from safecode_mllm.extras import optional_imports
from safecode_mllm.loading import PACKAGED_MODEL, checked_source, load_complete, load_model


@dataclass(frozen=True)
class JudgeModel:
    """A loaded model.

    Attributes:
        model: the model, in eval mode.
        processor: its processor, or its tokenizer if it sees no pictures.
        sees: whether it takes pictures.
    """

    model: Any
    processor: Any
    sees: bool


def load_judge_model(
    id_or_path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> JudgeModel:
    """Return a vision-language or a text model, whichever is there, with safetensors weights and no remote code.

    Raises:
        ModelError: nothing usable is there; the message says what to check.
    """
    if id_or_path == PACKAGED_MODEL:
        return JudgeModel(*load_model(id_or_path, device=device, dtype=dtype), sees=True)
    source = checked_source(id_or_path)
    with optional_imports():
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"cannot load judge {id_or_path!r}: no configuration there ({reason})") from error
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    return JudgeModel(*load_complete(id_or_path, source, *auto, device=device, dtype=dtype), sees=sees)
