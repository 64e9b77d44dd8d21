"""Swaps the functions of this package into an installed copy of the published one, whose drivers then use them."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from safecode_mllm.compat import decode, distributions, judging, loading, noise
from safecode_mllm.compat.decode import OnUnknown
from safecode_mllm.errors import ConfigError

logger = logging.getLogger(__name__)

PACKAGE = "safecode"

Swaps = dict[str, dict[str, Callable[..., Any]]]

_DECODING: Swaps = {
    "utils": {
        function.__name__: function
        for function in (
            decode.contrastive_decode_multistep_with_modulation,
            decode.contrastive_decode_multistep_no_verdict,
            noise.apply_gaussian_noise,
            distributions.apply_gpt_guided_modulation,
            distributions.rank_candidate_phrases_by_contrastive_prob,
            distributions.reweight_and_renormalize_probs,
            distributions.adaptive_sample_from_probs,
        )
    }
}
_JUDGE: Swaps = {
    "judge": {
        function.__name__: function
        for function in (judging.set_judge, judging.get_judge, judging.prepare_caption_and_verdict)
    }
}
_LOADER: Swaps = {"load_models": {"load_model": loading.load_model}}

# Ours in place -> what stood there.
_originals: dict[Callable[..., Any], Callable[..., Any]] = {}


def install(
    *, strict_published: bool = False, on_unknown: OnUnknown = "raise", judge: bool = False, loader: bool = False
) -> list[str]:
    """Let the published package decode with this one: `import safecode` and its drivers go on as they are.

    Args:
        strict_published: also decide as the published code does where that fails open (docs/compat.md).
        on_unknown: what a verdict means that says neither safe nor unsafe.
        judge: swap the judge functions too. Their questions are worded otherwise, so verdicts change.
        loader: swap `load_model` too: one device, safetensors only, float32 without a GPU.

    Returns:
        The names that were swapped, as "module.function". Installing again first takes back what was installed.

    Raises:
        ConfigError: the published package cannot be imported, or is another one of that name.
    """
    uninstall()
    swaps = {**_DECODING, **(_JUDGE if judge else {}), **(_LOADER if loader else {})}
    options = {"strict_published": strict_published, "on_unknown": on_unknown}
    replacements: dict[Callable[..., Any], Callable[..., Any]] = {}
    names = []
    for module_name, functions in swaps.items():
        module = _published_module(module_name)
        for name, function in functions.items():
            if not hasattr(module, name):
                raise ConfigError(f"{module.__name__} has no {name}: this is another version of the published code")
            replacements[getattr(module, name)] = _with_options(function, options)
            names.append(f"{module.__name__}.{name}")
    _swap(replacements)
    _originals.update({ours: theirs for theirs, ours in replacements.items()})
    logger.info("swapped into the published package: %s", ", ".join(names))
    return names


def uninstall() -> None:
    """Put the published functions back; does nothing if none were swapped."""
    _swap(_originals)
    _originals.clear()


def _with_options(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    accepted = {name: value for name, value in options.items() if name in inspect.signature(function).parameters}
    # A new object even without options, so that the swap back meets nothing but what was swapped in.
    return functools.wraps(function)(functools.partial(function, **accepted))


def _published_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ImportError as error:
        raise ConfigError(
            f"cannot import {PACKAGE}.{name} ({error}): install the published package, or put its folder on PYTHONPATH"
        ) from error


def _swap(replacements: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    """Replace functions wherever a module of the published package, or the running script, holds them by name."""
    for module_name, module in list(sys.modules.items()):
        if module_name != "__main__" and module_name.partition(".")[0] != PACKAGE:
            continue
        for name, value in list(vars(module).items()):
            if inspect.isroutine(value) or isinstance(value, functools.partial):
                found = replacements.get(value)
                if found is not None:
                    setattr(module, name, found)
