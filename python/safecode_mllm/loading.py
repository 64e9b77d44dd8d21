"""Loads a model and its processor, from the hub, a folder, or the package itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safecode_mllm.errors import ModelError
from safecode_mllm.extras import optional_imports

# The small trained model that ships with the package.
PACKAGED_MODEL = "hazard-world"


def load_model(
    id_or_path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> tuple[Any, Any]:
    """Return model and processor, ready to run.

    Remote code is never executed and weights are read as safetensors only.

    Raises:
        ModelError: nothing usable is there; the message says what to check.
    """
    model: Any
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if id_or_path == PACKAGED_MODEL:
        with optional_imports():
            from safecode_mllm.hazard_world import load_world

        model, processor = load_world()
        return model.to(target), processor
    _check_path(id_or_path)
    with optional_imports():
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    # Half precision is slow and coarse on most CPUs; on a GPU the stored dtype is what people expect.
    chosen = dtype or ("auto" if target.type == "cuda" else torch.float32)
    try:
        # The smallest file first: a wrong id then fails once, not once per file of the processor.
        AutoConfig.from_pretrained(id_or_path, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(id_or_path, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            id_or_path, dtype=chosen, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"cannot load model {id_or_path!r}: it must be a folder or a reachable hub id with an image-text-to-text "
            f"model, its processor and safetensors weights ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return model.to(target), processor


def _check_path(id_or_path: str) -> None:
    """Refuse what can only be a path and is no folder, before the hub is asked about it."""
    path = Path(id_or_path).expanduser()
    looks_like_a_path = id_or_path.startswith((".", "/", "~")) or id_or_path.count("/") > 1
    if path.is_file() or (looks_like_a_path and not path.is_dir()):
        raise ModelError(f"cannot load model {id_or_path!r}: there is no such folder")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
