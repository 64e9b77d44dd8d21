"""What the subcommands share: loading a model, reading settings, writing JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SafeCoDeConfig
from ..errors import ConfigError
from ..terminal import Console, one_line
from .parser import STDOUT

if TYPE_CHECKING:
    from ..pipeline import SafeCoDe


# torch lists every device it knows; a line should stay a line.
_MAX_REASON = 120


def read_config(args: argparse.Namespace) -> SafeCoDeConfig:
    """Return the settings of --config or --preset."""
    if args.config is None:
        return SafeCoDeConfig.from_preset(args.preset)
    try:
        text = Path(args.config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {args.config}: cannot be read: {error}") from None
    return SafeCoDeConfig.from_json(text)


def load_pipeline(args: argparse.Namespace, console: Console) -> SafeCoDe:
    """Return the pipeline of --model with its judge and settings."""
    config = read_config(args)
    quiet_transformers(console)
    check_device(args.device)
    from ..pipeline import SafeCoDe

    console.note(f"loading {args.model}")
    return SafeCoDe.from_pretrained(args.model, device=args.device, dtype=args.dtype, judge=args.judge, config=config)


def check_device(name: str | None) -> None:
    """Raise ConfigError unless tensors can be made on a device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ConfigError(f"--device {name} cannot be used here: {one_line(str(error))[:_MAX_REASON]}") from error


def quiet_transformers(console: Console) -> None:
    """Keep transformers' own bars and advice away from people who did not ask for them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not console.shows_progress:
        logging.disable_progress_bar()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: Hazard World's model gains nothing from more, and sums don't depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_json(target: str, value: Any, console: Console) -> None:
    """Write a value as JSON to a file, or to stdout for "-"; numbers that JSON lacks become null."""
    # ASCII alone: JSON must escape only what lies below U+0020, and a terminal obeys U+0080-U+009F and U+202E too. DEL
    # is ASCII, and json leaves it as it is.
    text = json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f")
    if target == STDOUT:
        # Not through Console.result: every control character is escaped, and every byte counts.
        sys.stdout.write(text + "\n")
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    console.note(f"wrote {path}")


def _finite(value: Any) -> Any:
    """Return `value` with NaN and infinities, which are no JSON, turned into None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
