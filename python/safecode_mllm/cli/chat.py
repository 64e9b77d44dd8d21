"""`chat`: one image, one question."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..terminal import Console
from .parser import STDOUT
from .runtime import load_pipeline, write_json
from .verdict_text import verdict_text

if TYPE_CHECKING:
    from ..pipeline import SafeCoDe
    from ..results import ChatResult


def run_chat(args: argparse.Namespace, console: Console) -> None:
    """Answer one question about one image; with --compare show the plain answer too."""
    if args.stream and args.json == STDOUT:
        raise ConfigError("--stream and --json both write to stdout: give --json a FILE, or leave one of them out")
    request = {**_question(args), "seed": args.seed, **_generation(args)}
    pipeline = load_pipeline(args, console)
    if args.compare:
        _compare(pipeline, request, args, console)
        return
    if args.stream:
        stream = pipeline.stream(**request)
        for piece in stream:
            console.piece(piece)
        console.result("")
        result = stream.result
    else:
        result = pipeline.chat(**request)
        if args.json != STDOUT:
            console.result(result.text)
    console.note(_summary(result))
    if args.json:
        write_json(args.json, result.audit(), console)


def _compare(pipeline: SafeCoDe, request: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
    plain = pipeline.chat(**request, steering="off")
    steered = pipeline.chat(**request)
    if args.json != STDOUT:
        console.result(f"plain:    {plain.text}\nSafeCoDe: {steered.text}")
    console.note(_summary(steered))
    if args.json:
        write_json(args.json, {"plain": plain.audit(), "safecode": steered.audit()}, console)


def _question(args: argparse.Namespace) -> dict[str, Any]:
    """Return image and prompt, checked before anybody waits for a model to load."""
    from ..images import load_image
    from ..judges.specs import parse_spec
    from ..prompt_text import check_prompt

    parse_spec(args.judge)
    check_prompt(args.prompt)
    return {"image": load_image(args.image), "prompt": args.prompt}


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    """Return the generation arguments that were given on the command line."""
    # Greedy is said out loud: a model's own generation_config may sample.
    given: dict[str, Any] = {"do_sample": args.temperature > 0}
    if args.max_new_tokens is not None:
        given["max_new_tokens"] = args.max_new_tokens
    if args.temperature > 0:
        given["temperature"] = args.temperature
    return given


def _summary(result: ChatResult) -> str:
    parts = []
    if result.verdict is not None:
        parts.append(f"verdict: {verdict_text(result.verdict)}, judge {result.verdict.judge}")
    if result.record is not None:
        parts.append(f"{len(result.record)} guided tokens")
    if result.steering_effective is False:
        parts.append("steering had no effect: the answer does not open with a refusal")
    parts.append(f"seed {result.seed}")
    return "; ".join(parts)
