"""A stand-in for CUDA graphs on a CPU: records the operations of a function and runs them again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


class RecordedGraph(TorchDispatchMode):
    """What a CUDA graph does, operation by operation: no Python of the function runs in a replay, and no shape changes.

    Capturing has to run the function once, other than on a GPU; so the first replay is the run that was captured.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self._operations: list[tuple[Any, list[Any], Any, list[Any]]] = []
        self._is_captured_run = True
        with self:
            run()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, structure = tree_flatten((args, kwargs or {}))
        self._operations.append((function, given, structure, tree_flatten(result)[0]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again; tensors that were made in the recording are made anew."""
        if self._is_captured_run:
            self._is_captured_run = False
            return
        made: dict[int, Any] = {}
        for function, given, structure, results in self._operations:
            args, kwargs = tree_unflatten([made.get(id(value), value) for value in given], structure)
            again = tree_flatten(function(*args, **kwargs))[0]
            pairs = zip(results, again, strict=True)
            made.update({id(old): new for old, new in pairs if isinstance(old, torch.Tensor)})
