"""SafeCoDe for Hugging Face vision-language models: context-aware safety without changing a weight.

Every public name is loaded when it is first used, so importing the package costs nothing and needs neither torch nor
transformers; a name whose optional dependency is missing says which extra to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from .config import PRESETS as PRESETS
    from .config import SafeCoDeConfig as SafeCoDeConfig
    from .decoding.guidance import Guidance as Guidance
    from .decoding.loop import SteeredGeneration as SteeredGeneration
    from .decoding.prefix_store import PrefixStore as PrefixStore
    from .generation.function import RECIPE as RECIPE
    from .generation.function import generate_fn as generate_fn
    from .generation.processor import SafeCoDeLogitsProcessor as SafeCoDeLogitsProcessor
    from .judges.protocol import Judge as Judge
    from .judges.protocol import JudgeRequest as JudgeRequest
    from .judges.protocol import Verdict as Verdict
    from .pipeline import SafeCoDe as SafeCoDe
    from .results import ChatResult as ChatResult

# Public name -> the module that holds it.
_HOMES = {
    "ChatResult": ".results",
    "Guidance": ".decoding.guidance",
    "Judge": ".judges.protocol",
    "JudgeRequest": ".judges.protocol",
    "PRESETS": ".config",
    "RECIPE": ".generation.function",
    "PrefixStore": ".decoding.prefix_store",
    "SafeCoDe": ".pipeline",
    "SafeCoDeConfig": ".config",
    "SafeCoDeLogitsProcessor": ".generation.processor",
    "SteeredGeneration": ".decoding.loop",
    "Verdict": ".judges.protocol",
    "generate_fn": ".generation.function",
}

__all__ = [
    "PRESETS",
    "RECIPE",
    "ChatResult",
    "Guidance",
    "Judge",
    "JudgeRequest",
    "PrefixStore",
    "SafeCoDe",
    "SafeCoDeConfig",
    "SafeCoDeLogitsProcessor",
    "SteeredGeneration",
    "Verdict",
    "__version__",
    "errors",
    "generate_fn",
]


def _load(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("safecode-kernels")
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .extras import optional_imports

    with optional_imports():
        value = _load(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
