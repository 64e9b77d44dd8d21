"""`info`: what is installed, what is supported, and how much memory a model needs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from safecode_kernels import explain, list_backends

from ..errors import UnsupportedModelError
from ..info import GIB, MemoryNeed, memory_need, versions
from ..terminal import Console, format_table, one_line
from .parser import STDOUT
from .runtime import quiet_transformers, write_json


def run_info(args: argparse.Namespace, console: Console) -> None:
    """Print versions, back ends, supported models and, with --model, the memory need."""
    from ..decoding.families import FAMILIES

    report: dict[str, Any] = {
        "versions": versions(),
        "back_ends": {backend.name: backend.probe() or "usable" for backend in list_backends()},
        "chosen_back_end": explain().chosen,
        "models": {model_type: family.title for model_type, family in FAMILIES.items()},
    }
    need = None
    if args.model is not None:
        need = _need(args, console)
        report["memory"] = {"model": args.model, "dtype": args.dtype, "batch": args.batch, "tokens": args.tokens}
        report["memory"].update(asdict(need))
    if args.json != STDOUT:
        _print(report, need, args, console)
    if args.json:
        write_json(args.json, report, console)


def _need(args: argparse.Namespace, console: Console) -> MemoryNeed:
    quiet_transformers(console)
    from transformers import AutoConfig

    from ..loading import PACKAGED_MODEL

    source = args.model
    if source == PACKAGED_MODEL:
        from ..hazard_world import WEIGHTS

        source = WEIGHTS
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(str(error).strip().partition("\n")[0])
        raise UnsupportedModelError(f"--model {args.model}: no configuration there: {reason}") from error
    return memory_need(config, args.dtype, args.batch, args.tokens)


def _print(report: dict[str, Any], need: MemoryNeed | None, args: argparse.Namespace, console: Console) -> None:
    tables = [
        format_table(("package", "version"), list(report["versions"].items())),
        format_table(("back end", "here"), list(report["back_ends"].items())),
        format_table(("model type", "family"), list(report["models"].items())),
    ]
    if need is not None:
        tables.append(_memory_table(need, args))
    console.result("\n\n".join(tables))


def _memory_table(need: MemoryNeed, args: argparse.Namespace) -> str:
    rows = [
        ("weights", f"{need.weights / GIB:.2f}", f"{need.parameters / 1e9:.2f} billion parameters"),
        ("KV cache, plain", f"{need.cache_plain / GIB:.2f}", f"{need.cache_per_token / 1024:.1f} KiB per token"),
        ("KV cache, guided steps", f"{need.cache_guided / GIB:.2f}", "two branches per request"),
    ]
    title = f"{args.model}, {args.dtype}, {args.batch} x {args.tokens} tokens"
    note = "Computed from the configuration; activations and the framework come on top."
    return f"{format_table((title, 'GiB', ''), rows)}\n{note}"
