"""Keys and values of the text before the first image, kept from one generation to the next."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safecode_mllm.decoding.model_state import model_state
from safecode_mllm.errors import ConfigError

# Keys and values [1, H, c, D] of every layer.
Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PrefixKey:
    """What has to be the same for a prefix to be used again."""

    model: weakref.ref[Any]
    state: Hashable
    cache_class: str
    namespace: str
    ids: tuple[int, ...]


class _Shelf:
    """The entries of a store and of its namespaces, least recently used first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: OrderedDict[PrefixKey, Layers] = OrderedDict()
        self.hits = self.misses = self.bytes = 0


class PrefixStore:
    """Keeps the text before the first image, least recently used out, so that later requests need not process it.

    Only that text can be kept: what stands at or behind an image depends on the picture. An entry is used again for the
    same model object with the same weights, adapters and hooks on the same device, in the same dtype and kind of cache,
    for exactly the same token ids, and in the same namespace; there is no partial match. What cannot be noticed is in
    `model_state`: after a change of that kind call `clear()`.

    Args:
        max_bytes: memory for keys and values, on the model's device; an int > 0.

    Attributes:
        namespace: entries of other namespaces are never used; "" at first.

    Raises:
        ConfigError: max_bytes is no positive integer.
    """

    def __init__(self, max_bytes: int) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ConfigError(f"max_bytes must be a positive integer, got {max_bytes!r}; 2**28 is 256 MiB")
        self.max_bytes = max_bytes
        self.namespace = ""
        self._shelf = _Shelf()

    def in_namespace(self, name: str) -> PrefixStore:
        """Return the same store, memory and order of use included, that sees the entries of one namespace only.

        One per tenant, for instance: what takes less time tells what others have asked.
        """
        other = copy.copy(self)
        other.namespace = name
        return other

    @property
    def bytes(self) -> int:
        """Memory of all entries, of all namespaces."""
        return self._shelf.bytes

    @property
    def hits(self) -> int:
        """How often a prefix was found."""
        return self._shelf.hits

    @property
    def misses(self) -> int:
        """How often one was not."""
        return self._shelf.misses

    def __len__(self) -> int:
        return len(self._shelf.entries)

    def clear(self) -> None:
        """Forget all entries, of all namespaces."""
        with self._shelf.lock:
            self._shelf.entries.clear()
            self._shelf.bytes = 0

    def explain(self) -> str:
        """Say in a sentence what is kept."""
        return (
            f"{len(self)} prefixes, {self.bytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB; "
            f"{self.hits} found, {self.misses} not"
        )

    def keys(self, model: Any, cache_class: str, prefixes: Sequence[Sequence[int]]) -> list[PrefixKey] | None:
        """Return the keys of prefixes, full token ids; None if nothing tells whether the weights are still the same."""
        state = model_state(model)
        if state is None:
            return None
        reference = weakref.ref(model)
        return [PrefixKey(reference, state, cache_class, self.namespace, tuple(ids)) for ids in prefixes]

    def get(self, key: PrefixKey) -> Layers | None:
        """Return an entry and make it the most recently used one; None if there is none."""
        with self._shelf.lock:
            found = self._shelf.entries.get(key)
            if found is None:
                self._shelf.misses += 1
            else:
                self._shelf.hits += 1
                self._shelf.entries.move_to_end(key)
            return found

    def put(self, key: PrefixKey, layers: Layers) -> bool:
        """Keep an entry; returns False for one that is larger than the whole store."""
        size = _bytes(layers)
        if size > self.max_bytes:
            return False
        shelf = self._shelf
        with shelf.lock:
            for gone in [old for old in shelf.entries if old.model() is None or old == key]:
                shelf.bytes -= _bytes(shelf.entries.pop(gone))
            while shelf.bytes + size > self.max_bytes:
                _, oldest = shelf.entries.popitem(last=False)
                shelf.bytes -= _bytes(oldest)
            shelf.entries[key] = layers
            shelf.bytes += size
        return True


def _bytes(layers: Layers) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)
