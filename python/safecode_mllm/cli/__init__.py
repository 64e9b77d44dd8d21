"""The command `safecode-mllm`: arguments in, text and exit codes out. A subcommand is loaded when it runs."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import SafeCoDeError
from ..extras import as_missing_extra
from ..terminal import Console, one_line
from .codes import BROKEN_PIPE, INTERRUPTED, OK, exit_code
from .outputs import check_outputs
from .parser import PROGRAM, build_parser

Handler = Callable[[argparse.Namespace, Console], int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 bad input, 3 the judge failed, 1 anything else.

    Args:
        argv: the arguments without the program's name; None takes them from the process.
    """
    args = build_parser().parse_args(argv)
    console = Console(quiet=args.quiet)
    try:
        with _logging_to_stderr(args):
            check_outputs(args)
            code = _handler(args.handler)(args, console)
        sys.stdout.flush()
        return OK if code is None else code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit; with the reader gone that would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return _report(error, args.debug, console)


def _handler(name: str) -> Handler:
    module, function = name.split(":")
    return getattr(importlib.import_module(module, __name__), function)


def _report(error: Exception, debug: bool, console: Console) -> int:
    """Print one line about an error (with --debug the traceback before it) and return the exit code."""
    if debug:
        traceback.print_exc()
    known = (as_missing_extra(error) if isinstance(error, ImportError) else None) or error
    text = one_line(str(known)) or "no message"
    if not isinstance(known, SafeCoDeError | OSError):
        text = f"{type(known).__name__}: {text} (unexpected; --debug shows where)"
    console.problem(f"{PROGRAM}: error: {text}")
    return exit_code(known)


class _Once(logging.Filter):
    """Lets each text pass once, however many requests cause it."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._shown
        self._shown.add(text)
        return is_new


@contextmanager
def _logging_to_stderr(args: argparse.Namespace) -> Iterator[None]:
    """Show the packages' warnings on stderr while a command runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    handler.addFilter(_Once())
    loggers = [logging.getLogger(package) for package in ("safecode_mllm", "safecode_kernels")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if args.debug else logging.ERROR if args.quiet else logging.WARNING)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
