"""`generate_fn`: steering for `model.generate(**inputs, custom_generate=...)`, the call that people write anyway."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.lingering import LingeringBias
from safecode_mllm.decoding.loop import SteeredGeneration, check_mode
from safecode_mllm.decoding.processors import split_processors
from safecode_mllm.decoding.record import GenerationReport
from safecode_mllm.decoding.wrappers import unwrapped
from safecode_mllm.errors import ConfigError, UnsupportedModelError
from safecode_mllm.generation.plan import Inputs, SteeringPlan, VerdictLike
from safecode_mllm.judges.protocol import Judge, JudgeRequest
from safecode_mllm.lengths import RowLimits, limit_of_all
from safecode_mllm.refusal import RefusalTokens
from safecode_mllm.styling import with_style

# A folder for `custom_generate="FOLDER", trust_remote_code=True`; upload a copy to share it.
RECIPE = str(Path(__file__).with_name("recipe"))

# What processors write beside input_ids and attention_mask. generate() would encode or drop some of these itself; an
# argument that a callable's signature names reaches it as the caller wrote it.
IMAGE_KEYS = (
    "pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "image_attention_mask",
    "mm_token_type_ids", "token_type_ids", "qformer_input_ids", "qformer_attention_mask", "aspect_ratio_ids",
    "aspect_ratio_mask", "cross_attention_mask", "num_crops", "spatial_shapes",
)  # fmt: skip
_TEXT_KEYS = ("input_ids", "attention_mask")
# What generate() adds of its own.
_PREPARED_BY_GENERATE = ("position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep")


def generate_fn(
    processor: Any,
    *,
    verdict: VerdictLike | Sequence[VerdictLike] | None = None,
    judge: str | Judge | None = "self",
    config: SafeCoDeConfig | None = None,
    seed: int | Sequence[int] | None = None,
    requests: JudgeRequest | Sequence[JudgeRequest] | None = None,
    noised: Mapping[str, Tensor] | None = None,
    refusal: RefusalTokens | None = None,
    streamer: Any = None,
    record: bool = False,
) -> GenerateFunction:
    """Return what `model.generate(**inputs, custom_generate=...)` needs to steer the answers to `inputs`.

    Args:
        processor: the model's processor; a tokenizer is enough without contrast.
        verdict: "safe", "unsafe" or a Verdict, for all prompts or one per prompt, instead of asking a judge.
        judge: "self" (the model judges, which needs prompts of one image and one user text), "safe", "unsafe", or a
            Judge, which needs `requests`.
        config: what to do with the logits; None takes the field `safecode` of the generation configuration, or else
            preset `safecode`.
        seed: integer in [0, 2^63), for noise and draws; prompt b gets seed + b, or its own from a list. None draws with
            torch's generator exactly as stock sampling does.
        requests: picture and text of each prompt, for a judge that looks at these.
        noised: processor output for noised pictures, instead of noise on the pixel values.
        refusal: refusal tokens to use instead of the configuration's; for experiments.
        streamer: a transformers streamer; may be passed to `generate` instead.
        record: keep the probabilities of each guided token in `.report`.

    Returns:
        A callable for `custom_generate`. Its `.report` describes the latest generation (verdicts, guided tokens,
        seconds); its `.generate(model, **inputs, **arguments)` does the same for models whose own `generate` hides the
        image from a callable.

    Raises:
        ConfigError: an argument is not legal, or does not fit the configuration.

    Source: SafeCoDe (arXiv 2509.19212).
    """
    plan = SteeringPlan(
        processor,
        verdict=verdict,
        judge=judge,
        config=config,
        seed=seed,
        requests=requests,
        noised=noised,
        refusal=refusal,
    )
    return GenerateFunction(plan, streamer=streamer, record=record)


class GenerateFunction:
    """What `generate_fn` returns."""

    def __init__(self, plan: SteeringPlan, *, streamer: Any = None, record: bool = False) -> None:
        self.plan, self.streamer, self.record = plan, streamer, record
        self.report = GenerationReport()
        self._keys = _processor_keys(plan.processor)
        self.__signature__ = _signature(type(self).__call__, self._keys)

    def generate(self, model: Any, inputs: Tensor | None = None, **arguments: Any) -> Any:
        """Run `model.generate` with steering; takes and returns what `generate` does, streamer and stop strings too."""
        model = unwrapped(model)
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if inputs is not None:
            arguments["input_ids"] = inputs
        clean = {key: arguments.pop(key) for key in (*_TEXT_KEYS, *self._keys) if key in arguments}
        if "input_ids" not in clean:
            raise ConfigError(f"input_ids is missing: pass the processor's output, got {sorted(arguments)}")
        clean.setdefault("attention_mask", torch.ones_like(clean["input_ids"]))
        arguments.pop("tokenizer", None)  # the processor has it
        streamer = arguments.pop("streamer", self.streamer)
        configured = arguments.get("generation_config", model.generation_config)
        config = self.plan.configuration(configured)
        generation = self._generation(model, clean, config, streamer)
        return generation.generate(model, **_with_style(generation, arguments, model))

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        stop_strings: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; called by `generate()` with everything prepared."""
        check_mode(vars(generation_config))
        lost = _arguments_that_generate_loses(self)
        check_mode(lost)
        if "inputs_embeds" in model_kwargs or "encoder_outputs" in model_kwargs:
            raise UnsupportedModelError(
                f"generate() hands a callable no image here, only {type(model).__name__} with its embeddings: call "
                "generate_fn(...).generate(model, **inputs, ...) with the same arguments instead"
            )
        config = self.plan.configuration(generation_config)
        if config.refusal_style == "explain" and config.uses_verdict:
            raise ConfigError(
                "refusal_style='explain' makes answers longer than generate() lets a callable: call "
                "generate_fn(...).generate(model, **inputs, ...) with the same arguments instead"
            )
        clean = self._clean(input_ids, generation_config.num_return_sequences or 1, model_kwargs)
        streamer = self.streamer or (_WithoutPrompt(lost["streamer"]) if lost.get("streamer") is not None else None)
        generation = self._generation(model, clean, config, streamer)
        processors, criteria = list(logits_processor), stopping_criteria
        if config.bias_decay > 0 and config.uses_verdict:
            fading = LingeringBias(generation.guidance, config.bias_decay, input_ids.shape[1])
            processors.insert(len(split_processors(processors).before), fading)
        if stop_strings is not None:
            criteria = generation.with_stop_strings(stop_strings, stopping_criteria)
        return generation(
            model,
            input_ids,
            type(logits_processor)(processors),
            criteria,
            generation_config,
            past_key_values=model_kwargs["past_key_values"],
        )

    def _generation(self, model: Any, clean: Inputs, config: SafeCoDeConfig, streamer: Any) -> SteeredGeneration:
        prepared = self.plan.prepare(model, clean, config)
        generation = SteeredGeneration(
            clean=prepared.clean,
            noised=prepared.noised,
            guidance=prepared.guidance,
            verdict_source=prepared.verdict_source,
            rng="philox" if self.plan.is_seeded else "torch",
            seeds=prepared.seeds,
            streamer=streamer,
            tokenizer=self.plan.tokenizer,
            record=self.record,
        )
        self.report = generation.report
        return generation

    def _clean(self, input_ids: Tensor, times: int, model_kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the processor's output as the caller passed it to `generate`."""
        given = {key: model_kwargs[key] for key in self._keys if model_kwargs.get(key) is not None}
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        known = {*_TEXT_KEYS, *self._keys, *_PREPARED_BY_GENERATE}
        # Each prompt's rows are equal; keys that no signature named were repeated with them.
        other = {key: value[::times] for key, value in model_kwargs.items() if _is_input(key, value, known)}
        return {"input_ids": input_ids[::times], "attention_mask": mask[::times], **given, **other}


class _WithoutPrompt:
    """A streamer that has had the prompt already: generate() pushes it before it calls anyone."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._begun = streamer, False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._streamer.put(value)
        self._begun = True

    def end(self) -> None:
        self._streamer.end()


def _with_style(generation: SteeredGeneration, arguments: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the arguments with what the configuration's style adds; only a style that needs room changes a limit."""
    rows, columns = generation.clean["input_ids"].shape
    limits = RowLimits([limit_of_all(arguments, columns)] * rows, None)
    styled = with_style(generation, limits, arguments, model)
    if not limits.extra:
        return styled
    if arguments.get("num_return_sequences", 1) > 1:
        raise ConfigError("refusal_style='explain' writes one answer per prompt: leave num_return_sequences out")
    return limits.apply(styled)


def _arguments_that_generate_loses(function: GenerateFunction) -> dict[str, Any]:
    """Return `streamer` and `assistant_model` of the `generate` call that is running `function`.

    All supported versions drop both before they call a callable. Then whoever reads the streamer would wait for ever,
    and an assistant would be ignored without a word; the caller's frame still has them.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("custom_generate") is function:
            return {name: frame.f_locals.get(name) for name in ("streamer", "assistant_model")}
        frame = frame.f_back
    return {}


def _processor_keys(processor: Any) -> tuple[str, ...]:
    own = getattr(processor, "model_input_names", None) or ()
    return tuple(dict.fromkeys([*IMAGE_KEYS, *(key for key in own if key not in _TEXT_KEYS)]))


def _signature(call: Any, keys: Sequence[str]) -> inspect.Signature:
    """Return the signature of `call` with the processor's keys as arguments of their own."""
    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())[1:]
    named = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in keys]
    return signature.replace(parameters=[*parameters[:-1], *named, parameters[-1]])


def _is_input(key: str, value: Any, known: set[str]) -> bool:
    return key not in known and isinstance(value, Tensor)
