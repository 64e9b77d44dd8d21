"""One event loop in a thread of its own, for every endpoint judge of the process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_owner = 0


def event_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop, started on first use and again after a fork, which copies no thread."""
    global _loop, _owner
    with _lock:
        if _loop is None or _owner != os.getpid():
            _loop, _owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name="safecode-endpoint", daemon=True).start()
        return _loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from any thread, also one with a loop of its own (a notebook)."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())
    try:
        return future.result()
    except BaseException:
        # Ctrl-C ends the waiting; the calls that are still out must end too.
        future.cancel()
        raise
