"""Row operations on a KV cache that transformers has no public call for. Views wherever nothing has to move."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.errors import UnsupportedModelError


def check_cache(cache: Any) -> None:
    """Raise UnsupportedModelError unless the cache is one whose rows can be dropped, copied and forked."""
    offloaded = getattr(cache, "offloading", False)
    name = "offloaded " * offloaded + type(cache).__name__
    if name != "DynamicCache":
        raise UnsupportedModelError(
            f"cache class {name} is not supported by steered decoding; leave past_key_values unset, and "
            "cache_implementation unset or 'static'"
        )


def empty_cache(given: Any) -> tuple[Any, bool]:
    """Return the cache to prefill into, and whether the decode phase is to have one of fixed size.

    Args:
        given: what `generate()` prepared. A StaticCache says what was asked for and is not used itself: transformers 4
            keeps it for the model's next call.
    """
    from transformers import DynamicCache

    if type(given).__name__ == "StaticCache":
        return DynamicCache(), True
    check_cache(given)
    return given, False


def static_obstacle(decoder: Any) -> str | None:
    """Return why a model's cache cannot be of fixed size, in a sentence; None if it can."""
    from transformers import StaticCache

    layers = StaticCache(config=decoder.config.get_text_config(decoder=True), max_cache_len=1).layers
    if any(getattr(layer, "is_sliding", False) for layer in layers):
        return "it has layers with a sliding window, whose fixed cache moves its contents at every step"
    return None


class StaticLayers:
    """A StaticCache whose whole buffers are remembered, so that it can be filled again after rows were dropped.

    Args:
        cache: a filled DynamicCache; says how many rows there are, and of what.
        decoder: the model that it belongs to.
        length: columns of the new cache.

    Raises:
        UnsupportedModelError: see static_obstacle.
    """

    def __init__(self, cache: Any, decoder: Any, length: int) -> None:
        from transformers import StaticCache

        if obstacle := static_obstacle(decoder):
            raise UnsupportedModelError(f"cache_implementation='static' is not supported by this model: {obstacle}")
        self.cache = StaticCache(config=decoder.config.get_text_config(decoder=True), max_cache_len=length)
        layers: list[tuple[Any, Any]] = list(zip(self.cache.layers, cache.layers, strict=True))
        for target, source in layers:
            # transformers 4 asks for the keys only.
            wanted = len(inspect.signature(target.lazy_initialization).parameters)
            target.lazy_initialization(*(source.keys, source.values)[:wanted])
        self._whole: list[tuple[Any, Tensor, Tensor]] = [(layer, layer.keys, layer.values) for layer, _ in layers]

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        return sum(keys.nbytes + values.nbytes for _, keys, values in self._whole)

    def load(self, cache: Any) -> None:
        """Move a filled DynamicCache in, layer by layer; it may not be used any more."""
        for (target, keys, values), source in zip(self._whole, cache.layers, strict=True):
            columns = source.keys.shape[2]
            keys[:, :, :columns].copy_(source.keys)
            values[:, :, :columns].copy_(source.values)
            target.keys, target.values = keys, values
            if hasattr(target, "cumulative_length"):
                target.cumulative_length.fill_(columns)
            source.keys = source.values = None


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
