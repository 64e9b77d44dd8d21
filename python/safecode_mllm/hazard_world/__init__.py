"""A small rendered world with a small trained model: a test-bed for the mechanism, no evidence about large models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import DemoScene, Evaluation, MethodResult, demo_scenes, run_evaluation
    from .model import load_world
    from .paths import WEIGHTS
    from .training import TrainingReport, train
    from .tuning import Sweep, load_tuned, save_tuned, tune

# Imported on first use: the command line asks for WEIGHTS without paying for transformers.
_HOMES = {
    "DemoScene": "evaluate",
    "Evaluation": "evaluate",
    "MethodResult": "evaluate",
    "demo_scenes": "evaluate",
    "run_evaluation": "evaluate",
    "WEIGHTS": "paths",
    "load_world": "model",
    "TrainingReport": "training",
    "train": "training",
    "Sweep": "tuning",
    "load_tuned": "tuning",
    "save_tuned": "tuning",
    "tune": "tuning",
}

__all__ = [
    "WEIGHTS",
    "DemoScene",
    "Evaluation",
    "MethodResult",
    "Sweep",
    "TrainingReport",
    "demo_scenes",
    "load_tuned",
    "load_world",
    "run_evaluation",
    "save_tuned",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
