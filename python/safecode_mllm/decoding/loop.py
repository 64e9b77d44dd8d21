"""The decoding loop: a callable for `model.generate(..., custom_generate=...)`.

Images travel inside the callable and `generate()` sees ids and mask only. So nothing is encoded twice, the three
supported generations of transformers behave the same, and everything else (GenerationConfig, processors, stopping
criteria, maximum lengths) still comes from `generate()`. The streamer and the stop strings are bound here because
`generate()` does not hand them to a callable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safecode_mllm.decoding import device_loop, kv
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.device_loop import DeviceLoop
from safecode_mllm.decoding.encoder_branches import generate_arguments, make_branches
from safecode_mllm.decoding.families import decoder_of
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.host_loop import HostLoop
from safecode_mllm.decoding.picker import Rng, TokenPicker
from safecode_mllm.decoding.prefix_store import PrefixStore
from safecode_mllm.decoding.processors import ProcessorSplit, split_processors
from safecode_mllm.decoding.record import GenerationReport
from safecode_mllm.decoding.run import Run, make_draws
from safecode_mllm.decoding.step_pool import Prepared, StepPool
from safecode_mllm.decoding.wrappers import unwrapped
from safecode_mllm.errors import UnsupportedModelError
from safecode_mllm.judges.protocol import Verdict

# One verdict per request, None for no bias, or an error that ends the request's rows.
Verdicts = Sequence[Verdict | Exception | None]
# Asked between the prefill and the first token: a judge that reads the model itself needs the branches.
VerdictSource = Callable[[Branches], Verdicts]


@dataclass
class SteeredGeneration:
    """One steered generation of B requests, each with its image.

    Args:
        clean: processor output for the real images: `input_ids`, `attention_mask` int64 [B, L], left padded, and the
            image keys, all on the model's device.
        noised: the same with noised pixels; may be None when no row needs contrast.
        guidance: what each of the B rows is steered with.
        verdict_source: called once after the prefill; None when no verdict is used.
        rng: "torch" equals stock sampling token for token; "philox" is independent of batch and back end.
        seeds: one seed in [0, 2^63) per request; needed by "philox".
        new_tokens: the most tokens of each request's answer, below what `generate()` allows all; None is that.
        streamer: a transformers streamer; B must be 1.
        tokenizer: needed for `stop_strings` only.
        record: keep probabilities of each guided token in the report.
        raise_row_errors: raise when a row failed, after the others finished; else leave it in the report.
        force_branches: run the noised branch even if nothing needs it. For tests.
        backend: decode-step back end, by name or "auto".
        pool: keeps buffers and captured steps for later generations of the same shape, with
            cache_implementation="static".
        prefix_store: where the text before the image is kept across generations; None keeps nothing.
    """

    clean: Mapping[str, Tensor]
    noised: Mapping[str, Tensor] | None
    guidance: Guidance
    verdict_source: VerdictSource | None = None
    rng: Rng = "torch"
    seeds: Sequence[int] | None = None
    new_tokens: Sequence[int] | None = None
    streamer: Any = None
    tokenizer: Any = None
    record: bool = False
    raise_row_errors: bool = True
    force_branches: bool = False
    backend: str = "auto"
    pool: StepPool | None = None
    prefix_store: PrefixStore | None = None
    report: GenerationReport = field(default_factory=GenerationReport)
    _whole_model: Any = field(default=None, init=False, repr=False)

    def generate(self, model: Any, *, stop_strings: Any = None, **generate_kwargs: Any) -> Any:
        """Run `model.generate` with this loop; takes and returns what `generate` does.

        Raises:
            UnsupportedModelError: the model class, cache or generation mode is not supported.
            DecodeError: a row's logits could not be decoded (with `raise_row_errors`).
        """
        model = unwrapped(model)
        decoder = decoder_of(model)
        check_mode(generate_kwargs)  # generate() would not hand an assistant to a callable
        if stop_strings is not None:
            criteria = generate_kwargs.get("stopping_criteria")
            generate_kwargs["stopping_criteria"] = self.with_stop_strings(stop_strings, criteria)
        self._whole_model = model  # a decoder that is a part of it does not know it
        prompts = generate_arguments(model, self.clean)
        return decoder.generate(**prompts, custom_generate=self, **generate_kwargs)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Decode; called by `generate()` with everything prepared."""
        check_mode(vars(generation_config))
        model = model if self._whole_model is None else self._whole_model
        started = time.perf_counter()
        cache, fixed = kv.empty_cache(model_kwargs["past_key_values"])
        branches = make_branches(model, self.clean, self._noised_if_needed(), cache, self.prefix_store)
        clean, noised = branches.prefill()
        self.report.notes["prefill"] = branches.prefilled
        started = self.report.timed("prefill", started)
        times = input_ids.shape[0] // branches.rows
        failed = self._ask_for_verdicts(branches, times)
        self.report.timed("judge", started)
        branches.expand(times)
        self.guidance.expand(times)
        clean = clean.repeat_interleave(times, 0)
        noised = None if noised is None else noised.repeat_interleave(times, 0)
        prepared = self._fixed(model, branches, generation_config.max_length) if fixed else None
        processors = split_processors(logits_processor)
        loop = self._loop(
            Run(
                self,
                model,
                branches if prepared is None else prepared.branches,
                prepared,
                generation_config,
                stopping_criteria,
                processors,
                self._picker(processors, generation_config, times),
            )
        )
        loop.end_rows(failed)
        output = loop.decode(input_ids, clean, noised)
        # Whoever gets an output object gets the cache with it. After an error the buffers are not worth keeping.
        if prepared is not None and self.pool is not None and not generation_config.return_dict_in_generate:
            self.pool.give_back(prepared)
        return output

    def _picker(self, processors: ProcessorSplit, generation_config: Any, times: int) -> TokenPicker:
        picker = TokenPicker(
            self.guidance,
            processors,
            make_draws(self, times, greedy=not generation_config.do_sample),
            want_scores=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
            backend=self.backend,
        )
        self.report.notes["decode_step"] = picker.explain()
        return picker

    def _loop(self, run: Run) -> HostLoop | DeviceLoop:
        """Return the loop for a run: steps that stay on the device where nothing has to look at them."""
        obstacle = device_loop.obstacle(run)
        if obstacle is None:
            return DeviceLoop(run)
        self.report.notes["steps"] = f"looked at one by one: {obstacle}"
        return HostLoop(run)

    def _fixed(self, model: Any, branches: Branches, columns: int) -> Prepared | None:
        """Return the branches over a cache of fixed size; None where the model cannot have one."""
        obstacle = kv.static_obstacle(branches.decoder)
        self.report.notes["cache"] = f"not of fixed size: {obstacle}" if obstacle else "of fixed size"
        pool = StepPool(0) if self.pool is None else self.pool
        return None if obstacle else pool.take(model, branches, columns)

    def _noised_if_needed(self) -> Mapping[str, Tensor] | None:
        needed = self.guidance.uses_contrast or self.force_branches
        if needed and self.noised is None:
            raise ValueError("noised inputs are needed: contrast_weight is not 0, but `noised` is None")
        return self.noised if needed else None

    def _ask_for_verdicts(self, branches: Branches, times: int) -> list[int]:
        """Set the verdicts; returns the rows whose request has an error instead of one."""
        answers = self.verdict_source(branches) if self.verdict_source else [None] * self.guidance.rows
        rows = [answer for answer in answers for _ in range(times)]
        failed = {row: answer for row, answer in enumerate(rows) if isinstance(answer, Exception)}
        self.report.verdicts = [None if isinstance(answer, Exception) else answer for answer in answers]
        self.guidance.set_verdicts(self.report.verdicts)
        self.report.row_errors.update(failed)
        if failed and self.raise_row_errors:
            raise next(iter(failed.values()))
        return list(failed)

    def with_stop_strings(self, stop_strings: Any, criteria: Any) -> Any:
        """Return stopping criteria that also stop at strings; `criteria` may be None."""
        from transformers import StoppingCriteriaList, StopStringCriteria

        if self.tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer: pass tokenizer=... to SteeredGeneration")
        return StoppingCriteriaList([*(criteria or []), StopStringCriteria(self.tokenizer, stop_strings)])


def check_mode(arguments: Mapping[str, Any]) -> None:
    """Refuse the generation modes whose search cannot be steered, with the alternative."""
    for name in ("num_beams", "penalty_alpha", "prompt_lookup_num_tokens", "dola_layers", "assistant_model"):
        value = arguments.get(name)
        neutral = 1 if name == "num_beams" else 0
        if value is not None and value != neutral:
            shown = type(value).__name__ if name == "assistant_model" else value
            raise UnsupportedModelError(
                f"{name}={shown} is not supported by steered decoding, which picks one token per row and step; "
                "use greedy decoding or sampling, with num_return_sequences for several answers"
            )
    for name in ("output_attentions", "output_hidden_states"):
        if arguments.get(name):
            raise UnsupportedModelError(
                f"{name}=True is not supported by steered decoding; call the model on the finished ids for it"
            )
    if arguments.get("use_cache") is False:
        raise UnsupportedModelError("use_cache=False is not supported by steered decoding; leave it unset")
