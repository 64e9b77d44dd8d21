"""Exit codes, and which error stands for which."""

from __future__ import annotations

from ..errors import DecodeError, JudgeError, MissingExtraError, SafeCoDeError

OK, OTHER, BAD_INPUT, JUDGE_FAILED = 0, 1, 2, 3
# What a shell reports for a program that SIGINT or SIGPIPE ended.
INTERRUPTED, BROKEN_PIPE = 130, 141


def exit_code(error: Exception) -> int:
    """Return the exit code that stands for an error."""
    if isinstance(error, JudgeError):
        return JUDGE_FAILED
    if isinstance(error, DecodeError | MissingExtraError) or not isinstance(error, SafeCoDeError):
        return OTHER
    # Every other error raised on purpose is about what was asked for.
    return BAD_INPUT
