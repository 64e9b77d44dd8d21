"""Whether results can be written, asked before anybody waits for them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import ConfigError
from .parser import STDOUT


def check_outputs(args: argparse.Namespace) -> None:
    """Check --json and --out of any command; creates nothing.

    Raises:
        ConfigError: a target is of the wrong kind, or it or its folder cannot be written.
    """
    file, folder = getattr(args, "json", None), getattr(args, "out", None)
    if file is not None and file != STDOUT:
        check_file("--json", file)
    if folder is not None:
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ConfigError(f"--out {folder}: is no folder; give another name")
        _check_writable("--out", Path(folder))


def check_file(option: str, target: str) -> None:
    """Check that a file can be written; creates nothing.

    Raises:
        ConfigError: it is a folder, or it or its folder cannot be written.
    """
    if Path(target).is_dir():
        raise ConfigError(f"{option} {target}: is a folder; give the name of a file")
    _check_writable(option, Path(target))


def _check_writable(option: str, target: Path) -> None:
    """Check the target itself where it exists, otherwise the nearest folder above it that does."""
    found = next(path for path in (target, *target.absolute().parents) if path.exists())
    if found != target and not found.is_dir():
        raise ConfigError(f"{option} {target}: {found} is no folder")
    if not os.access(found, os.W_OK):
        raise ConfigError(f"{option} {target}: {found} cannot be written; choose another place")
