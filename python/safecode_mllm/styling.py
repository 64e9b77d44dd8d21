"""What is added to a generation for the style of its refusals and for a bias that fades."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safecode_mllm.decoding.explaining import ReasonProcessor
from safecode_mllm.decoding.lingering import LingeringBias
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.lengths import RowLimits

# The words that begin a reason, in any tokenizer.
MAX_OPENING_TOKENS = 32


def with_style(
    generation: SteeredGeneration, limits: RowLimits, arguments: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Return the arguments of `model.generate` with the processors that the configuration asks for.

    Args:
        generation: the generation they are for; its tokenizer must be set.
        limits: the rows' limits; they get room for a reason here.
        arguments: completed arguments.
        model: the model; says which tokens end a row.
    """
    config, result = generation.guidance.config, dict(arguments)
    prompt_length = generation.clean["input_ids"].shape[1]
    processors = list(result.get("logits_processor") or [])
    if config.bias_decay > 0 and config.uses_verdict:
        processors.insert(0, LingeringBias(generation.guidance, config.bias_decay, prompt_length))
    if config.refusal_style == "explain" and config.uses_verdict:
        # The reason has a budget of its own; rows without one are ended at the limit that was asked for.
        limits.extra = MAX_OPENING_TOKENS + config.reason_tokens
        processors.append(
            ReasonProcessor(
                generation.tokenizer,
                _end_ids(result, model),
                lambda: generation.report.verdicts,
                prompt_length,
                config.reason_tokens,
                limits.asked,
            )
        )
    if processors:
        from transformers import LogitsProcessorList

        result["logits_processor"] = LogitsProcessorList(processors)
    return result


def _end_ids(arguments: Mapping[str, Any], model: Any) -> list[int]:
    given = arguments.get("eos_token_id", model.generation_config.eos_token_id)
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return [int(token) for token in ids if token >= 0]
