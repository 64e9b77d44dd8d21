"""Writes a model folder that transformers 4.57 and 5.x both read: the layout of the LLaVA checkpoints on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from .model import MODEL_INPUTS
from .paths import TUNED_FILE

_WEIGHTS_FILE = "model.safetensors"
# transformers 5 leaves this level out of the names of CLIP's weights and reads files with or without it; 4.57 needs it.
_VISION, _VISION_OF_4_57 = "vision_tower.", "vision_tower.vision_model."


def save_world(model: Any, processor: Any, folder: Path) -> None:
    """Write model.safetensors, the configurations and the tokenizer to a folder, which is created if need be.

    Settings that were tuned for another model of the same folder are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TUNED_FILE).unlink(missing_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _rename_weights(folder / _WEIGHTS_FILE)
    # Version 5 nests the image processor; preprocessor_config.json, which every version reads, holds it already.
    _edit(folder / "processor_config.json", remove=("image_processor",))
    _edit(
        folder / "tokenizer_config.json",
        remove=("backend", "extra_special_tokens", "is_local", "local_files_only"),
        tokenizer_class="PreTrainedTokenizerFast",
        additional_special_tokens=[processor.image_token],
        model_input_names=list(MODEL_INPUTS),
    )


def _rename_weights(path: Path) -> None:
    tensors = load_file(path)
    named = {
        name.replace(_VISION, _VISION_OF_4_57) if name.startswith(_VISION) and _VISION_OF_4_57 not in name else name: t
        for name, t in tensors.items()
    }
    save_file(named, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _edit(path: Path, *, remove: tuple[str, ...], **values: Any) -> None:
    """Change some keys of a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in found.items() if key not in remove} | values
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
