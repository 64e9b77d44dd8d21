"""`info`: what is installed, what is supported, and how much memory a model needs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from safecode_kernels import explain, list_backends

from ..errors import ModelError
from ..info import MemoryNeed, memory_need, versions
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

    from ..loading import PACKAGED_MODEL, checked_source

    if args.model == PACKAGED_MODEL:
        from ..hazard_world import WEIGHTS

        source = str(WEIGHTS)
    else:
        source = checked_source(args.model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = one_line(str(error).strip().partition("\n")[0])
        raise ModelError(f"--model {args.model}: no configuration there: {reason}") from error
    return memory_need(config, args.dtype, args.batch, args.tokens)


def _print(report: dict[str, Any], need: MemoryNeed | None, args: argparse.Namespace, console: Console) -> None:
    tables = [
        format_table(("package", "version"), list(report["versions"].items()), words=2),
        format_table(("back end", "here"), list(report["back_ends"].items()), words=2),
        format_table(("model type", "family"), list(report["models"].items()), words=2),
    ]
    if need is not None:
        tables.append(_memory_table(need, args))
    console.result("\n\n".join(tables))


def _memory_table(need: MemoryNeed, args: argparse.Namespace) -> str:
    rows = [
        ("weights", _size(need.weights), f"{need.parameters:,} parameters"),
        ("KV cache, plain", _size(need.cache_plain), f"{_size(need.cache_per_token)} per token"),
        ("KV cache, guided steps", _size(need.cache_guided), "two branches per request"),
    ]
    title = f"memory of {args.model}, {args.dtype}, {args.batch} x {args.tokens} tokens"
    note = "Computed from the configuration; activations and the framework come on top."
    return f"{title}\n{format_table(('part', 'size', ''), rows)}\n{note}"


def _size(count: int) -> str:
    """Return a number of bytes in the largest unit that keeps it at or above one."""
    for unit, size in (("GiB", 1024**3), ("MiB", 1024**2)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
