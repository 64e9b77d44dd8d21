"""Row operations on a KV cache that transformers has no public call for. Views wherever nothing has to move."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding.families import decoder_of, has_encoder, image_layers
from safecode_mllm.errors import UnsupportedModelError

# Cache layers that keep keys and values of each column.
_LAYERS_WITH_COLUMNS = {"DynamicLayer", "DynamicSlidingWindowLayer", "SpareLayer"}


def check_cache(cache: Any) -> None:
    """Raise UnsupportedModelError unless the cache is one whose rows can be dropped, copied and forked."""
    parts = encoder_decoder_parts(cache) or (cache,)
    for part in parts:
        name = "offloaded " * getattr(part, "offloading", False) + type(part).__name__
        if name != "DynamicCache":
            raise UnsupportedModelError(
                f"cache class {name} is not supported by steered decoding; leave past_key_values unset, and "
                "cache_implementation unset or 'static'"
            )
        others = {type(layer).__name__ for layer in part.layers} - _LAYERS_WITH_COLUMNS
        if others:
            raise UnsupportedModelError(
                f"the model has layers whose memory is no row of columns ({', '.join(sorted(others))}), so that no "
                "branch can be dropped or forked; use a model whose layers all attend"
            )


def encoder_decoder_parts(cache: Any) -> tuple[Any, Any] | None:
    """Return the caches of what the decoder wrote and of what it reads, or None for a model without an encoder."""
    if type(cache).__name__ != "EncoderDecoderCache":
        return None
    return cache.self_attention_cache, cache.cross_attention_cache


def empty_cache(given: Any) -> tuple[Any, bool]:
    """Return the cache to prefill into, and whether the decode phase is to have one of fixed size.

    Args:
        given: what `generate()` prepared. A StaticCache says what was asked for and is not used itself: transformers 4
            keeps it for the model's next call.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if type(given).__name__ == "StaticCache":
        for layer in given.layers:
            # transformers 4 compares this before it uses the cache again, and layers that were never used lack it.
            layer.max_batch_size = getattr(layer, "max_batch_size", 0)
        return DynamicCache(), True
    if encoder_decoder_parts(given) is not None:
        return EncoderDecoderCache(DynamicCache(), DynamicCache()), False
    check_cache(given)
    # Columns that have left a sliding window may be needed again, by a fork that starts before them: a cache that was
    # made without the configuration keeps them all, and the mask hides them.
    return (DynamicCache() if any(getattr(layer, "is_sliding", False) for layer in given.layers) else given), False


def new_cache(model: Any) -> Any:
    """Return an empty cache for branches that no `generate()` prepares one for."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if has_encoder(decoder_of(model)) else DynamicCache()


def has_sliding_window(decoder: Any) -> bool:
    """Whether some layers see the last few columns only, padding and hidden ones counted."""
    from transformers import StaticCache

    layers = StaticCache(config=decoder.config.get_text_config(decoder=True), max_cache_len=1).layers
    return any(getattr(layer, "is_sliding", False) for layer in layers)


def static_obstacle(decoder: Any) -> str | None:
    """Return why a model's cache cannot be of fixed size, in a sentence; None if it can."""
    if has_sliding_window(decoder):
        return "it has layers with a sliding window, whose fixed cache moves its contents at every step"
    if has_encoder(decoder):
        return "its language model has an encoder, and with it a cache of two parts"
    if image_layers(decoder):
        return "it has layers that hold images, which are as long as there are images"
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


def spare_columns(cache: Any) -> None:
    """Let a filled DynamicCache keep spare columns from its next update on; other kinds of layers stay as they are."""
    from transformers.cache_utils import DynamicLayer

    from safecode_mllm.decoding.spare import SpareLayer

    if any(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [SpareLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]


def cached_length(cache: Any) -> int:
    """Return the number of positions in the cache."""
    return int(cache.get_seq_length())


def keep_first_rows(cache: Any, rows: int) -> None:
    """Drop all rows after the first `rows`, as views: nothing is copied."""
    for layer in _filled_layers(cache):
        layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]


def keep_first_columns(cache: Any, columns: int, image_layers: Collection[int] = ()) -> None:
    """Forget all positions behind the first `columns`, as views, of every layer but `image_layers`."""
    for index, layer in enumerate(cache.layers):
        if index in image_layers or not _is_filled(layer):
            continue
        layer.keys, layer.values = layer.keys[:, :, :columns], layer.values[:, :, :columns]


def unpack_pairs(cache: Any, shared: int, length: int) -> None:
    """Cut rows [shared][clean][noised] into rows [shared][clean], and below them rows [shared][noised] (a copy).

    Args:
        cache: a DynamicCache of R rows of length + (length - shared) columns.
        shared: columns of both.
        length: columns of one branch.
    """

    def unpacked(states: Tensor) -> Tensor:
        rows = states.shape[0]
        cut = states.new_empty(2 * rows, states.shape[1], length, states.shape[3])
        cut[:rows] = states[:, :, :length]
        cut[rows:, :, :shared] = states[:, :, :shared]
        cut[rows:, :, shared:] = states[:, :, length:]
        return cut

    for layer in _filled_layers(cache):
        layer.keys, layer.values = unpacked(layer.keys), unpacked(layer.values)


def first_columns(cache: Any, row: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """Return a copy of the first columns of one row: for each layer keys and values [1, H, columns, D]."""
    return [
        (layer.keys[row : row + 1, :, :columns].clone(), layer.values[row : row + 1, :, :columns].clone())
        for layer in cache.layers
    ]


def fill(
    cache: Any, rows: Sequence[Sequence[tuple[Tensor, Tensor]]], padding: Sequence[int], columns: int, copies: int
) -> None:
    """Write the first columns of an empty cache.

    Args:
        cache: a DynamicCache.
        rows: for each row and layer the keys and values [1, H, c, D] of its text, c >= columns - padding.
        padding: for each row how many columns of padding stand before that.
        columns: how many columns to write.
        copies: how often to write all rows, one below the other.
    """
    for index, layer in enumerate(zip(*rows, strict=True)):
        written = []
        for states in zip(*layer, strict=True):
            row = states[0]
            batch = row.new_zeros(len(states), row.shape[1], columns, row.shape[3])
            for target, source, start in zip(batch, states, padding, strict=True):
                target[:, start:] = source[0, :, : max(0, columns - start)]
            written.append(torch.cat([batch] * copies))
        cache.update(*written, index)


def select_rows(cache: Any, index: Tensor) -> None:
    """Replace the rows of the cache by those of `index`, int64 [R] (a copy)."""
    for layer in _filled_layers(cache):
        layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)


def fork(cache: Any, rows: Sequence[int]) -> Any:
    """Return an independent cache with some rows of another; the first write to it copies, and leaves the other alone.

    Args:
        cache: a DynamicCache.
        rows: which of its rows, in order; one row however often, and rows that follow each other, are views.
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in _filled_layers(forked):
        layer.keys, layer.values = _rows(layer.keys, rows), _rows(layer.values, rows)
    return forked


def _rows(states: Tensor, rows: Sequence[int]) -> Tensor:
    first = rows[0]
    if len(set(rows)) == 1:
        return states[first : first + 1].expand(len(rows), -1, -1, -1)
    if list(rows) == list(range(first, first + len(rows))):
        return states[first : first + len(rows)]
    return states.index_select(0, torch.tensor(rows, device=states.device))


def _filled_layers(cache: Any) -> list[Any]:
    layers = [layer for part in encoder_decoder_parts(cache) or (cache,) for layer in part.layers]
    return [layer for layer in layers if _is_filled(layer)]


def _is_filled(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None and bool(layer.keys.numel())
