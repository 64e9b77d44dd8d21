"""What `judge` and `judge calibrate` share: the judge that was asked for, and requests from files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ImageError, PromptError
from ..judges import Judge, JudgeRequest, Turn, bind, make_judge, needs_model
from ..judges.specs import parse_spec
from ..terminal import Console

# Options that mean something to an endpoint alone.
_ENDPOINT_OPTIONS = ("dry_run", "price", "max_cost", "max_requests", "concurrency", "timeout")
_FIELDS = frozenset({"id", "image", "prompt", "conversation", "policy_text", "label"})


@dataclass(frozen=True)
class Line:
    """One request of a file.

    Attributes:
        number: its line, counted from 1.
        id: what names it in the results: its "id", or the line's number.
        image: path of its image.
        fields: prompt, conversation and policy_text, checked.
        label: "safe" or "unsafe" where it is labelled.
    """

    number: int
    id: str
    image: Path
    fields: dict[str, Any]
    label: str | None

    def request(self) -> JudgeRequest:
        """Return what the judge is asked; loads the image.

        Raises:
            ImageError: the image cannot be used; names the line.
        """
        from ..images import load_image

        try:
            return JudgeRequest(load_image(self.image), **self.fields)
        except ImageError as error:
            raise ImageError(f"line {self.number}: {error}") from error


def check_judge(args: argparse.Namespace) -> None:
    """Check what can be checked about --judge before anything is loaded.

    Raises:
        ConfigError: no such judge, a model is missing, or an option is not for this judge.
    """
    spec = parse_spec(args.judge)
    if spec.kind == "self" and args.model is None:
        raise ConfigError("--judge self needs --model: the model that judges")
    if spec.kind != "openai":
        given = [name for name in _ENDPOINT_OPTIONS if getattr(args, name)]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise ConfigError(f"{option} is for openai:MODEL; --judge is {args.judge}")
    if args.max_cost is not None and args.price is None:
        raise ConfigError("--max-cost needs --price IN OUT: what a million tokens cost")


def load_judge(args: argparse.Namespace, console: Console) -> Judge:
    """Return the judge of the command line, with its model, calibration and cache.

    Raises:
        ConfigError, ModelError: it cannot be made.
    """
    spec = parse_spec(args.judge)
    options: dict[str, Any] = {}
    if spec.kind == "openai":
        options = _endpoint_options(args)
    elif spec.kind in ("local", "guard"):
        from .runtime import check_device, quiet_transformers

        quiet_transformers(console)
        check_device(args.device)
        console.note(f"loading {args.judge}")
        options = {"device": args.device, "dtype": args.dtype, "batch_size": args.batch_size}
    judge = make_judge(args.judge, calibration=args.calibration, **options)
    assert judge is not None
    if spec.kind == "self" or needs_model(judge):
        _attach_model(judge, args, console)
    if args.cache is None:
        return judge
    from ..judges.cached import CachedJudge

    return CachedJudge(judge, args.cache)


def _endpoint_options(args: argparse.Namespace) -> dict[str, Any]:
    from ..judges.endpoint import Budget, Price
    from ..judges.endpoint.calls import CallPolicy

    limits = {"concurrency": args.concurrency, "timeout_s": args.timeout}
    return {
        "price": None if args.price is None else Price(*args.price),
        "budget": Budget(args.max_requests, args.max_cost),
        "calls": CallPolicy(**{name: value for name, value in limits.items() if value is not None}),
    }


def _attach_model(judge: Judge, args: argparse.Namespace, console: Console) -> None:
    if args.model is None:
        raise ConfigError(f"judge {args.judge!r} sees no images: give --model, which describes them to it")
    from .runtime import check_device, quiet_transformers

    quiet_transformers(console)
    check_device(args.device)
    from ..loading import load_model
    from ..prompts import PromptBuilder

    console.note(f"loading {args.model}")
    model, processor = load_model(args.model, device=args.device, dtype=args.dtype)
    bind(judge, model, PromptBuilder(processor))


def read_lines(name: str, option: str, *, labelled: bool = False) -> list[Line]:
    """Return the requests of a file of JSON lines, all checked but their images' contents.

    Args:
        name: the file.
        option: the option that named it, for messages.
        labelled: whether every line must have a label.

    Raises:
        ConfigError, ImageError, PromptError: the file or a line cannot be used; names the line and what is wrong.
    """
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {name}: cannot be read: {error}") from error
    lines = list(_lines(text, path, f"{option} {name}", labelled))
    if not lines:
        raise ConfigError(f"{option} {name}: holds no requests")
    seen: dict[str, int] = {}
    for line in lines:
        if line.id in seen:
            raise ConfigError(f"{option} {name}: lines {seen[line.id]} and {line.number} have the same id {line.id!r}")
        seen[line.id] = line.number
    return lines


def _lines(text: str, path: Path, where: str, labelled: bool) -> Iterator[Line]:
    for number, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        place = f"{where}, line {number}"
        try:
            values = json.loads(row)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place}: is no JSON: {error}") from None
        if not isinstance(values, dict) or not {"image", "prompt"} <= values.keys():
            raise ConfigError(f'{place}: must be an object with "image" and "prompt"')
        unknown = sorted(values.keys() - _FIELDS)
        if unknown:
            raise ConfigError(f"{place}: unknown field {unknown[0]!r}; known are {sorted(_FIELDS)}")
        yield _checked(values, path, number, place, labelled)


def _checked(values: dict[str, Any], path: Path, number: int, place: str, labelled: bool) -> Line:
    from ..prompt_text import check_prompt

    try:
        check_prompt(values["prompt"])
    except PromptError as error:
        raise PromptError(f"{place}: {error}") from None
    image = values["image"]
    if not isinstance(image, str) or not (path.parent / image).is_file():
        raise ImageError(f"{place}: image={image!r} is no file; paths start at the folder of {path.name}")
    label = values.get("label")
    if label not in ("safe", "unsafe") and (labelled or label is not None):
        raise ConfigError(f'{place}: label={label!r} must be "safe" or "unsafe"')
    policy = values.get("policy_text")
    if policy is not None and not isinstance(policy, str):
        raise ConfigError(f"{place}: policy_text must be text")
    turns = _turns(values.get("conversation", []), place)
    fields = {"prompt": values["prompt"], "conversation": turns, "policy_text": policy}
    return Line(number, str(values.get("id", number)), path.parent / image, fields, label)


def _turns(value: Any, place: str) -> tuple[Turn, ...]:
    is_list = isinstance(value, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "text"}
        and turn["role"] in ("user", "assistant")
        and isinstance(turn["text"], str)
        for turn in value
    )
    if not is_list:
        raise ConfigError(f'{place}: conversation must be a list of {{"role": "user" or "assistant", "text": ...}}')
    return tuple(Turn(turn["role"], turn["text"]) for turn in value)
