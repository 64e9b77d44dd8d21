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

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import decoder_of, placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.picker import Draws, Pick, Rng, TokenPicker
from safecode_mllm.decoding.processors import split_processors
from safecode_mllm.decoding.record import GenerationReport, RowStatus, guided_tokens
from safecode_mllm.decoding.static import StaticBranches
from safecode_mllm.errors import DecodeError, UnsupportedModelError
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
        streamer: a transformers streamer; B must be 1.
        tokenizer: needed for `stop_strings` only.
        record: keep probabilities of each guided token in the report.
        raise_row_errors: raise when a row failed, after the others finished; else leave it in the report.
        force_branches: run the noised branch even if nothing needs it. For tests.
        backend: decode-step back end, by name or "auto".
    """

    clean: Mapping[str, Tensor]
    noised: Mapping[str, Tensor] | None
    guidance: Guidance
    verdict_source: VerdictSource | None = None
    rng: Rng = "torch"
    seeds: Sequence[int] | None = None
    streamer: Any = None
    tokenizer: Any = None
    record: bool = False
    raise_row_errors: bool = True
    force_branches: bool = False
    backend: str = "auto"
    report: GenerationReport = field(default_factory=GenerationReport)
    _whole_model: Any = field(default=None, init=False, repr=False)

    def generate(self, model: Any, *, stop_strings: Any = None, **generate_kwargs: Any) -> Any:
        """Run `model.generate` with this loop; takes and returns what `generate` does.

        Raises:
            UnsupportedModelError: the model class, cache or generation mode is not supported.
            DecodeError: a row's logits could not be decoded (with `raise_row_errors`).
        """
        decoder = decoder_of(model)
        check_mode(generate_kwargs)  # generate() would not hand an assistant to a callable
        if stop_strings is not None:
            generate_kwargs["stopping_criteria"] = self._with_stop_strings(stop_strings, generate_kwargs)
        self._whole_model = model  # a decoder that is a part of it does not know it
        return decoder.generate(
            input_ids=self.clean["input_ids"],
            attention_mask=self.clean["attention_mask"],
            custom_generate=self,
            **generate_kwargs,
        )

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
        branches = Branches(model, self.clean, self._noised_if_needed(), cache)
        clean, noised = branches.prefill()
        started = self.report.timed("prefill", started)
        times = input_ids.shape[0] // branches.rows
        failed = self._ask_for_verdicts(branches, times)
        self.report.timed("judge", started)
        branches.expand(times)
        self.guidance.expand(times)
        clean = clean.repeat_interleave(times, 0)
        noised = None if noised is None else noised.repeat_interleave(times, 0)
        decoding = self._fixed(branches, generation_config.max_length) if fixed else branches
        run = _Run(self, model, decoding, generation_config, logits_processor, stopping_criteria, times)
        run.end_rows(failed)
        return run.decode(input_ids, clean, noised)

    def _fixed(self, branches: Branches, columns: int) -> Branches | StaticBranches:
        """Return the branches over a cache of fixed size, or as they are where the model cannot have one."""
        obstacle = kv.static_obstacle(branches.decoder)
        self.report.notes["cache"] = f"not of fixed size: {obstacle}" if obstacle else "of fixed size"
        return branches if obstacle else StaticBranches(branches, columns)

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

    def _with_stop_strings(self, stop_strings: Any, generate_kwargs: Mapping[str, Any]) -> Any:
        from transformers import StoppingCriteriaList, StopStringCriteria

        if self.tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer: pass tokenizer=... to SteeredGeneration")
        given = list(generate_kwargs.get("stopping_criteria") or [])
        return StoppingCriteriaList([*given, StopStringCriteria(self.tokenizer, stop_strings)])


class _Run:
    """The state of one decoding loop over R = B * num_return_sequences rows."""

    def __init__(
        self,
        request: SteeredGeneration,
        model: Any,
        branches: Branches | StaticBranches,
        generation_config: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        times: int,
    ):
        self.request = request
        self.guidance = request.guidance
        self.branches = branches
        self.criteria = stopping_criteria
        self.pad = generation_config._pad_token_tensor
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        returns_dict = generation_config.return_dict_in_generate
        self.scores: list[Tensor] | None = [] if returns_dict and generation_config.output_scores else None
        self.logits: list[Tensor] | None = [] if returns_dict and generation_config.output_logits else None
        self.returns_dict = returns_dict
        processors = split_processors(logits_processor)
        self.processors = processors
        self.picker = TokenPicker(
            self.guidance,
            processors,
            self._draws(times, greedy=not generation_config.do_sample),
            want_scores=self.scores is not None,
            backend=request.backend,
        )
        request.report.notes["decode_step"] = self.picker.explain()
        rows, device = self.guidance.rows, request.clean["input_ids"].device
        request.report.guided = [[] for _ in range(rows)]
        self.unfinished = torch.ones(rows, dtype=torch.long, device=device)
        self.finished_at = torch.full((rows,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=device)
        self.status = RowStatus(rows, device)
        self.banned = torch.tensor(placeholder_ids(model), dtype=torch.int64, device=device)
        self._banned_rows: dict[tuple[bool, ...], Tensor] = {}

    def end_rows(self, rows: Sequence[int]) -> None:
        """End rows before their first token."""
        if rows:
            self.unfinished[rows] = 0
            self.finished_at[rows] = 0

    def decode(self, ids: Tensor, clean: Tensor, noised: Tensor | None) -> Any:
        """Pick and feed tokens until every row has ended; `clean`, `noised` [R, V] follow the prompt `ids` [R, L]."""
        streamer, report = self.request.streamer, self.request.report
        if streamer is not None:
            streamer.put(ids.cpu())
        step, started = 0, time.perf_counter()
        # Every row may have ended before its first token, when a judge failed on it.
        while self.unfinished.any():
            guided = self.guidance.window.guides(step)
            if step > 0:
                if not guided:
                    self.branches.drop_noised()
                clean, noised = self.branches.step(ids[:, -1])
            tokens, pick = self._pick(ids, clean, noised, step, guided)
            ids = torch.cat([ids, tokens[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            self._end_finished_rows(ids, pick, step)
            step += 1
            started = report.timed("guided" if guided else "free", started)
        if streamer is not None:
            streamer.end()
        report.lengths = self.finished_at.clamp(max=step).tolist()
        self._report_row_errors()
        return self._output(ids)

    def _pick(self, ids: Tensor, clean: Tensor, noised: Tensor | None, step: int, guided: bool) -> tuple[Tensor, Pick]:
        record = guided and self.request.record
        raw = clean.clone() if self.logits is not None or record else clean
        if guided:
            self._ban_placeholders(clean, step)
        pick = self.picker.pick(ids, clean, noised, step, guided=guided)
        if self.logits is not None:
            self.logits.append(raw.float())
        if self.scores is not None and pick.scores is not None:
            self.scores.append(pick.scores)
        tokens = pick.result.token
        if self.has_eos and self.pad is not None:
            tokens = tokens * self.unfinished + self.pad.to(tokens.device) * (1 - self.unfinished)
        if record:
            alive, steered = self.unfinished.tolist(), self.guidance.window.guided_rows(step)
            for row, token in enumerate(guided_tokens(pick.result, raw, self.processors.temperature())):
                if alive[row] and steered[row]:
                    self.request.report.guided[row].append(token)
        if guided and self.guidance.watches:
            self.guidance.observe(tokens.tolist(), step)
        return tokens, pick

    def _end_finished_rows(self, ids: Tensor, pick: Pick, step: int) -> None:
        self.status.observe(pick.result.status, step)
        scores = tuple(self.scores) if self.scores is not None else None
        unfinished = self.unfinished & ~self.criteria(ids, scores) & self.status.alive()
        just_ended = (self.unfinished == 1) & (unfinished == 0)
        self.finished_at = self.finished_at.masked_fill(just_ended, step + 1)
        self.unfinished = unfinished

    def _ban_placeholders(self, clean: Tensor, step: int) -> None:
        """A steered row must not write an image token: there is no image behind it."""
        if not len(self.banned) or not self.guidance.changes_logits:
            return
        guided = tuple(self.guidance.window.guided_rows(step))
        if guided not in self._banned_rows:
            rows = [row for row, is_guided in enumerate(guided) if is_guided]
            self._banned_rows[guided] = torch.tensor(rows, dtype=torch.int64, device=clean.device)[:, None]
        clean[self._banned_rows[guided], self.banned] = -torch.inf

    def _draws(self, times: int, *, greedy: bool) -> Draws:
        request, device = self.request, self.request.clean["input_ids"].device
        if request.rng == "torch":
            return Draws("torch", None, None, greedy)
        if request.rng != "philox":
            raise ValueError(f"rng must be 'torch' or 'philox', got {request.rng!r}")
        if request.seeds is None and not greedy:
            raise ValueError("rng='philox' needs one seed per request: pass seeds=[...]")
        seeds = list(request.seeds) if request.seeds is not None else [0] * (self.guidance.rows // times)
        rows = torch.tensor(seeds, dtype=torch.int64, device=device).repeat_interleave(times)
        stream = torch.arange(times, dtype=torch.int64, device=device).repeat(len(seeds))
        return Draws("philox", rows, stream, greedy)

    def _report_row_errors(self) -> None:
        errors = self.status.errors(self.finished_at, self.processors.names_before())
        self.request.report.row_errors.update(errors)
        if errors and self.request.raise_row_errors:
            raise DecodeError("; ".join(str(error) for error in errors.values()))

    def _output(self, ids: Tensor) -> Any:
        if not self.returns_dict:
            return ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        output: dict[str, Any] = {"sequences": ids, "past_key_values": self.branches.cache}
        for name, kept in (("scores", self.scores), ("logits", self.logits)):
            output[name] = None if kept is None else tuple(kept)
        return GenerateDecoderOnlyOutput(**output)


def check_mode(arguments: Mapping[str, Any]) -> None:
    """Refuse the generation modes whose search cannot be steered, with the alternative."""
    for name in ("num_beams", "penalty_alpha", "prompt_lookup_num_tokens", "assistant_model"):
        value = arguments.get(name)
        neutral = 1 if name == "num_beams" else 0
        if value is not None and value != neutral:
            shown = type(value).__name__ if name == "assistant_model" else value
            raise UnsupportedModelError(
                f"{name}={shown} is not supported by steered decoding, which picks one token per row and step; "
                "use greedy decoding or sampling, with num_return_sequences for several answers"
            )
    if arguments.get("use_cache") is False:
        raise UnsupportedModelError("use_cache=False is not supported by steered decoding; leave it unset")
