"""Loads a model and its processor, from the hub, a folder, or the package itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safecode_mllm.errors import SafeCoDeError
from safecode_mllm.extras import optional_imports

# The small trained model that ships with the package.
PACKAGED_MODEL = "hazard-world"


def load_model(
    id_or_path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> tuple[Any, Any]:
    """Return model and processor, ready to run.

    Remote code is never executed and weights are read as safetensors only.

    Raises:
        SafeCoDeError: nothing usable is there; the message says what to check.
    """
    model: Any
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if id_or_path == PACKAGED_MODEL:
        with optional_imports():
            from safecode_mllm.hazard_world import load_world

        model, processor = load_world()
        return model.to(target), processor
    with optional_imports():
        from transformers import AutoModelForImageTextToText, AutoProcessor

    # Half precision is slow and coarse on most CPUs; on a GPU the stored dtype is what people expect.
    chosen = dtype or ("auto" if target.type == "cuda" else torch.float32)
    try:
        processor = AutoProcessor.from_pretrained(id_or_path, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            id_or_path, dtype=chosen, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "the folder" if Path(id_or_path).exists() else "neither a folder nor a reachable hub id;"
        raise SafeCoDeError(
            f"cannot load model {id_or_path!r}: {where} must hold an image-text-to-text model with its processor and "
            f"safetensors weights ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return model.to(target), processor


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
