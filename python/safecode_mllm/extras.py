"""Which optional dependency belongs to which extra, and the one line that says how to install it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingExtraError

# Top-level import name -> the extra in pyproject.toml that installs it.
EXTRA_OF_MODULE = {
    "transformers": "hf",
    "PIL": "hf",
    "numpy": "hf",
    "tqdm": "hf",
    "openai": "judges",
    "matplotlib": "bench",
    "scipy": "bench",
}


def as_missing_extra(error: ImportError) -> MissingExtraError | None:
    """Return the error that says which extra to install, or None when `error` is about something else.

    Args:
        error: what a failed import raised.

    Returns:
        A MissingExtraError whose message is the pip command; None when the missing module belongs to no extra, that is,
        when something is broken rather than left out.
    """
    if isinstance(error, MissingExtraError):
        return error
    if not isinstance(error, ModuleNotFoundError):
        return None
    module = (error.name or "").partition(".")[0]
    extra = EXTRA_OF_MODULE.get(module)
    if extra is None:
        return None
    return MissingExtraError(f"{module} is not installed: pip install 'safecode-kernels[{extra}]'", name=module)


@contextmanager
def optional_imports() -> Iterator[None]:
    """Turn a missing optional dependency inside the block into the error that says which extra to install.

    Raises:
        MissingExtraError: an import in the block met a module of an extra that is not installed.
    """
    try:
        yield
    except ImportError as error:
        missing = as_missing_extra(error)
        if missing is None:
            raise
        raise missing from None
