"""Runs a checkout of the published code on tiny models, with the three repairs it needs on transformers 5.

Nothing of the checkout is changed. The repairs stand beside it: a stand-in for qwen-vl-utils that returns the pictures
as they are, IDEFICS prompts passed under the name that the processor wants, and Qwen's token types kept as long as its
ids.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PACKAGE = "safecode"


def load_checkout(folder: str) -> Any:
    """Import the published package from a checkout and return its module `utils`."""
    root = Path(folder).expanduser().resolve()
    if not (root / PACKAGE / "utils.py").is_file():
        raise FileNotFoundError(
            f"{folder!r} is no checkout of the published code: there is no {PACKAGE}/utils.py in it"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    _stand_in("requests", exceptions=types.SimpleNamespace(RequestException=OSError))
    _stand_in("qwen_vl_utils", process_vision_info=_pictures_as_they_are)
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(f"{PACKAGE}.utils")


def load_driver() -> Any:
    """Import the module of the checkout that runs benchmarks; its data libraries are not needed for the run itself."""
    for library in ("datasets", "pandas"):
        _stand_in(library, load_dataset=None)
    return importlib.import_module(f"{PACKAGE}.eval")


def _stand_in(name: str, **members: Any) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # torch looks for it
        vars(module).update(members)
        sys.modules[name] = module


def _pictures_as_they_are(conversation: Any) -> tuple[list[Any], None]:
    parts = [part for turn in conversation for part in turn["content"]]
    return [part["image"] for part in parts if part["type"] == "image"], None


class _PromptsByName:
    """An IDEFICS processor that takes a list of prompts as its first argument, as version 4.30 did."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, *prompts: Any, **arguments: Any) -> Any:
        return self._processor(text=prompts[0], **arguments) if prompts else self._processor(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


@contextlib.contextmanager
def repaired(model: Any, processor: Any) -> Iterator[Any]:
    """Give the processor to run the published code with; the model is repaired inside the block."""
    if type(processor).__name__ == "IdeficsProcessor":
        yield _PromptsByName(processor)
        return
    replaced = {name: getattr(model, name) for name in ("forward", "generate")}
    try:
        for name, method in replaced.items():
            setattr(model, name, _with_longer_types(method))
        yield processor
    finally:
        for name in replaced:
            delattr(model, name)


def _with_longer_types(method: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **arguments: Any) -> Any:
        types_, ids = arguments.get("mm_token_type_ids"), arguments.get("input_ids")
        if types_ is not None and ids is not None and ids.shape[1] > types_.shape[1]:
            missing = ids.shape[1] - types_.shape[1]
            arguments["mm_token_type_ids"] = torch.nn.functional.pad(types_, (0, missing))
        return method(*args, **arguments)

    return call


def run_published(utils: Any, model: Any, processor: Any, **arguments: Any) -> tuple[Any, list[int]]:
    """Run the published decoding, its prints thrown away; arguments as its function takes them."""
    with repaired(model, processor) as usable, contextlib.redirect_stdout(io.StringIO()):
        return utils.contrastive_decode_multistep_with_modulation(
            model, usable, processor.tokenizer, **arguments
        )  # fmt: skip
