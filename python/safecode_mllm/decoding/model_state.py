"""What tells a model's present weights from all others, without reading them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

# What PEFT's layers keep besides their weights and decides which of them count.
_ADAPTER_SETTINGS = ("active_adapter", "disable_adapters", "merged_adapters", "scaling")


def model_state(model: Any) -> Hashable | None:
    """Return a value that stays equal while a model's weights, adapters, hooks and modes are the same.

    It holds what `model_bindings` does. Data written through `.data`, or a new tensor where the last one was, leave all
    of that, so one value of each tensor is in it too. What escapes: a `.data` write that keeps the first value of every
    tensor, and a hook that begins to do something else.

    Weights on the meta device, or made in inference mode, have no version: None.
    """
    bindings = model_bindings(model)
    return None if bindings is None else (bindings, _first_values(_tensors(model)))


def model_bindings(model: Any) -> Hashable | None:
    """Return a value that stays equal while a captured step would read what the model's next pass reads.

    It holds address, version, dtype, device and shape of every parameter and buffer, the settings of every adapter,
    which hooks there are, and modes. None as for `model_state`. The device is not waited for.
    """
    tensors = _tensors(model)
    if any(tensor.is_inference() or tensor.device.type == "meta" for tensor in tensors):
        return None
    places = tuple((t.data_ptr(), t._version, t.dtype, t.device, t.shape) for t in tensors)
    return places, _adapters(model), _hooks(model), _modes(model)


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _hooks(model: Any) -> tuple[int, ...]:
    """The hooks' numbers, which are never used twice; transformers sets hooks of its own in a model's first pass."""
    hooks = [
        (number, getattr(hook, "func", hook))
        for module in model.modules()
        for kind in (module._forward_pre_hooks, module._forward_hooks)
        for number, hook in kind.items()
    ]
    return tuple(number for number, hook in hooks if not _is_of_transformers(hook))


def _is_of_transformers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("transformers.")


def _modes(model: Any) -> Hashable:
    device = model.device.type
    cast_to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    precision = torch.get_float32_matmul_precision()
    # Tensors made in inference mode cannot be written to outside it.
    inference = torch.is_inference_mode_enabled()
    return getattr(model.config, "_attn_implementation", None), model.training, cast_to, precision, inference


@torch.no_grad()
def _first_values(tensors: list[Tensor]) -> tuple[float, ...]:
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor[(0,) * tensor.ndim].double())
    return tuple(value for values in by_device.values() for value in torch.stack(values).tolist())


def _adapters(model: Any) -> tuple[tuple[str, str, str], ...]:
    found = []
    for name, module in model.named_modules():
        for setting in _ADAPTER_SETTINGS:
            if setting in vars(module) or hasattr(type(module), setting):
                value = getattr(module, setting)
                if not callable(value):
                    found.append((name, setting, repr(value)))
    return tuple(found)
