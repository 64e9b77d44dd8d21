"""A KV cache with spare columns: a decode step writes its own column and copies no other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

# Columns of memory behind the used ones. A layer is copied once per so many tokens instead of once per token, and a row
# holds that many columns more than it needs: a tenth of a prompt with a picture.
SPARE_COLUMNS = 64


class SpareLayer(DynamicLayer):
    """A filled layer of a DynamicCache, whose keys and values are views of memory with room behind them.

    Whoever sets `keys` and `values` to other tensors need not know: what is not the beginning of the memory, with all
    of its rows, is moved into new memory at the next update. So dropped rows are freed as in a DynamicLayer.
    """

    _memory: dict[str, Tensor]

    @classmethod
    def of(cls, layer: DynamicLayer) -> SpareLayer:
        """Return a layer with the contents of another, which a write to it leaves alone."""
        made = cls.__new__(cls)
        vars(made).update(vars(layer), _memory={})
        return made

    def __copy__(self) -> SpareLayer:
        return self.of(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, floating [R, H, n, D]; returns the keys and values of all columns."""
        keys, values = self.keys, self.values
        if keys is None or values is None or not keys.numel():  # emptied by reset()
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._appended("keys", keys, key_states), self._appended("values", values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _appended(self, name: str, states: Tensor, new: Tensor) -> Tensor:
        rows, heads, length, width = states.shape
        total = length + new.shape[2]
        memory = self._memory.get(name)
        if memory is None or not _begins(states, memory) or total > memory.shape[2]:
            memory = states.new_empty(rows, heads, total + SPARE_COLUMNS, width)
            memory[:, :, :length] = states
            self._memory[name] = memory
        memory[:, :, length:total] = new
        return memory[:, :, :total]


def _begins(states: Tensor, memory: Tensor) -> bool:
    same_place = states.data_ptr() == memory.data_ptr() and states.stride() == memory.stride()
    return same_place and states.shape[0] == memory.shape[0]
