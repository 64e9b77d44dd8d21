"""Row operations on a KV cache that transformers has no public call for. Views wherever nothing has to move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.errors import UnsupportedModelError


def check_cache(cache: Any) -> None:
    """Raise UnsupportedModelError unless the cache is one whose rows can be dropped, copied and forked."""
    name = type(cache).__name__
    if name != "DynamicCache":
        raise UnsupportedModelError(
            f"cache class {name} is not supported by steered decoding; "
            "leave cache_implementation and past_key_values unset"
        )


def cached_length(cache: Any) -> int:
    """Return the number of positions in the cache."""
    return int(cache.get_seq_length())


def keep_first_rows(cache: Any, rows: int) -> None:
    """Drop all rows after the first `rows`, as views: nothing is copied."""
    for layer in _filled_layers(cache):
        layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]


def keep_first_columns(cache: Any, columns: int) -> None:
    """Forget all positions behind the first `columns`, as views: nothing is copied."""
    for layer in _filled_layers(cache):
        layer.keys, layer.values = layer.keys[:, :, :columns], layer.values[:, :, :columns]


def select_rows(cache: Any, index: Tensor) -> None:
    """Replace the rows of the cache by those of `index`, int64 [R] (a copy)."""
    for layer in _filled_layers(cache):
        layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)


def fork(cache: Any, rows: Sequence[int]) -> Any:
    """Return an independent cache with some rows of another; the first write to it copies, and leaves the other alone.

    Args:
        cache: a DynamicCache.
        rows: which of its rows, in order; one row however often is a view.
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    if len(set(rows)) == 1:
        row = rows[0]
        for layer in _filled_layers(forked):
            layer.keys = layer.keys[row : row + 1].expand(len(rows), -1, -1, -1)
            layer.values = layer.values[row : row + 1].expand(len(rows), -1, -1, -1)
    else:
        for layer in _filled_layers(forked):
            index = torch.tensor(rows, device=layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
    return forked


def _filled_layers(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.numel()]
