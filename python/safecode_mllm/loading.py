"""Loads a model and its processor, from the hub, a folder, or the package itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from safecode_mllm.decoding.families import family_of_config
from safecode_mllm.errors import ModelError
from safecode_mllm.extras import optional_imports

# The small trained model that ships with the package.
PACKAGED_MODEL = "hazard-world"
# Enough names to see which part of a model lacks its weights.
_MAX_NAMES = 3


def load_model(
    id_or_path: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    processor_arguments: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return model and processor, ready to run.

    Remote code is never executed and weights are read as safetensors only. `processor_arguments` replace settings that
    are stored with the processor, such as `max_pixels`.

    Raises:
        ModelError: nothing usable is there; the message says what to check.
        UnsupportedModelError: the model is of no supported family.
    """
    model: Any
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if id_or_path == PACKAGED_MODEL:
        with optional_imports():
            from safecode_mllm.hazard_world.model import load_world

        model, processor = load_world(dtype=dtype or torch.float32)
        return model.to(target), processor
    source = checked_source(id_or_path)
    with optional_imports():
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    try:
        # The smallest file first: a wrong id then fails once, not once per file of the processor.
        family_of_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load(id_or_path, error) from error
    return load_complete(
        id_or_path, source, AutoModelForImageTextToText, AutoProcessor, device=device, dtype=dtype,
        processor_arguments=processor_arguments,
    )  # fmt: skip


def load_complete(
    id_or_path: str,
    source: str,
    auto_model: Any,
    auto_processor: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    processor_arguments: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return model and processor of the given auto classes, in eval mode, every weight of it from its files.

    Raises:
        ModelError: nothing usable is there, or part of the weights is missing.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with optional_imports():
        from safetensors import SafetensorError
    # Half precision is slow and coarse on most CPUs; on a GPU the stored dtype is what people expect.
    chosen = dtype or ("auto" if target.type == "cuda" else torch.float32)
    try:
        processor = auto_processor.from_pretrained(source, trust_remote_code=False, **(processor_arguments or {}))
        # Mismatched shapes are let through only to be refused below by name, like missing weights.
        model, loaded = auto_model.from_pretrained(
            source,
            dtype=chosen,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _cannot_load(id_or_path, error) from error
    _check_complete(id_or_path, loaded)
    return model.to(target).eval(), processor


def _cannot_load(id_or_path: str, error: Exception) -> ModelError:
    return ModelError(
        f"cannot load model {id_or_path!r}: it must be a folder or a reachable hub id with a model, its processor and "
        f"safetensors weights ({type(error).__name__}: {_first_line(error)})"
    )


def checked_source(id_or_path: str) -> str:
    """Return a model's id or its folder with ~ expanded.

    Raises:
        ModelError: it can only be a path and is no folder; the hub need not be asked about it.
    """
    source = os.path.expanduser(id_or_path)
    path = Path(source)
    looks_like_a_path = id_or_path.startswith((".", "/", "~")) or id_or_path.count("/") > 1
    if path.is_file() or (looks_like_a_path and not path.is_dir()):
        raise ModelError(f"cannot load model {id_or_path!r}: there is no such folder")
    return source


def _check_complete(id_or_path: str, loaded: Mapping[str, Any]) -> None:
    """Refuse a model part of whose weights stayed random; tied weights are not among the missing."""
    mismatched = [key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]]
    for what, found in (("are missing", loaded["missing_keys"]), ("have another shape", mismatched)):
        if found:
            names = ", ".join(sorted(found)[:_MAX_NAMES])
            raise ModelError(
                f"cannot load model {id_or_path!r}: {len(found)} of its weights {what} in its files ({names}): "
                "download or save it again, complete and for this architecture"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
