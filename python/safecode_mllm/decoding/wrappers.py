"""Models that come wrapped in something else."""

from __future__ import annotations

from typing import Any

from safecode_mllm.errors import UnsupportedModelError


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, adapters active in it; any other model as it is.

    Raises:
        UnsupportedModelError: the adapter is a learned prompt, which is no part of the model inside.
    """
    get_base_model = getattr(model, "get_base_model", None)
    if get_base_model is None:
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(
            "adapters that learn a prompt (prompt tuning, prefix tuning) are not supported: the prompt would be in one "
            "branch only; use an adapter of weights, such as LoRA"
        )
    return get_base_model()
