"""SafeCoDe as a recipe: `model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, processor=...)`."""

from __future__ import annotations

from typing import Any

from safecode_mllm import SafeCoDeConfig, generate_fn


def generate(
    model: Any,
    processor: Any = None,
    verdict: Any = None,
    judge: Any = "self",
    safecode: dict[str, Any] | None = None,
    seed: int | None = None,
    requests: Any = None,
    **arguments: Any,
) -> Any:
    """Answer as `model.generate` does, steered; `safecode` holds fields of a SafeCoDeConfig."""
    config = None if safecode is None else SafeCoDeConfig.from_dict(safecode)
    function = generate_fn(processor, verdict=verdict, judge=judge, config=config, seed=seed, requests=requests)
    return function.generate(model, **arguments)
