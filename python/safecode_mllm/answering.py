"""Prepared requests in, results out: one batch through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from safecode_mllm.audit import generation_settings, request_context
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.encoder_branches import prompt_columns
from safecode_mllm.decoding.families import logit_width
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration, Verdicts
from safecode_mllm.decoding.prefix_store import PrefixStore
from safecode_mllm.decoding.step_pool import StepPool
from safecode_mllm.errors import JudgeError
from safecode_mllm.generate_arguments import check_arguments, complete_arguments
from safecode_mllm.judges.asking import ask_beside
from safecode_mllm.judges.protocol import Judge, Verdict, is_remote
from safecode_mllm.lengths import RowLimits
from safecode_mllm.prompts import PromptBuilder, collate
from safecode_mllm.refusal import RefusalTokens, refusal_tokens
from safecode_mllm.requests import PreparedRequest, stack_noised
from safecode_mllm.results import ChatResult, log_cut_short, log_ineffective
from safecode_mllm.styling import with_style
from safecode_mllm.verdict_source import Pending, make_verdict_source


class Answerer:
    """Answers prepared requests with one model.

    Args:
        model: a model of a supported family, in evaluation mode.
        builder: builds its prompts.
        refusal: refusal tokens to use instead of those the configurations name.
        prefix_store: where the text before the image is kept; None keeps nothing.
    """

    def __init__(
        self,
        model: Any,
        builder: PromptBuilder,
        refusal: RefusalTokens | None = None,
        prefix_store: PrefixStore | None = None,
    ) -> None:
        self.model, self.builder, self.prefix_store = model, builder, prefix_store
        self._given_refusal = refusal
        self._refusals: dict[str, RefusalTokens] = {}
        self.pool = StepPool()

    def refusal(self, config: SafeCoDeConfig) -> RefusalTokens:
        """Return the refusal tokens of a configuration, found once per model."""
        if self._given_refusal is not None:
            return self._given_refusal
        kind = config.refusal_tokens
        if kind not in self._refusals:
            self._refusals[kind] = refusal_tokens(self.builder.tokenizer, logit_width(self.model), kind)
        return self._refusals[kind]

    def answer(
        self,
        rows: Sequence[PreparedRequest],
        judge: Judge | None,
        *,
        record: bool,
        arguments: Mapping[str, Any],
        streamer: Any = None,
    ) -> list[ChatResult]:
        """Answer rows that may share a batch (see `batching.batch_kind`), in one generation.

        Raises:
            ConfigError: an argument cannot be used.
        """
        check_arguments(arguments)
        config, noised = rows[0].config, stack_noised(rows)
        refusal = self.refusal(config) if config.uses_verdict else None
        clean = self._to_device(collate([row.clean for row in rows], self.builder.pad_token_id))
        generation = SteeredGeneration(
            clean=clean,
            noised=None if noised is None else self._to_device(collate(noised, self.builder.pad_token_id)),
            guidance=Guidance([row.config for row in rows], [row.steered for row in rows], refusal),
            verdict_source=self._verdict_source(rows, judge) if config.uses_verdict else None,
            rng="philox",
            seeds=[row.seed for row in rows],
            streamer=streamer,
            tokenizer=self.builder.tokenizer,
            record=record,
            raise_row_errors=False,
            pool=self.pool,
            prefix_store=self.prefix_store,
        )
        limits = RowLimits.of(rows, arguments, self.model)
        completed = complete_arguments(arguments, self.model, self.builder.pad_token_id)
        styled = with_style(generation, limits, completed, self.model)
        generation.new_tokens = limits.per_row
        output = generation.generate(self.model, **limits.apply(styled))
        new_ids = output[:, prompt_columns(self.model, clean) :].tolist()
        results = [self._result(row, index, new_ids[index], generation, record) for index, row in enumerate(rows)]
        for result in results:
            result.context["generation"] = generation_settings(arguments)
        log_ineffective(results)
        log_cut_short(results, limits.rooms)
        return results

    def _verdict_source(self, rows: Sequence[PreparedRequest], judge: Judge | None) -> Callable[[Branches], Verdicts]:
        """Ask the judge about the steered rows that bring no verdict of their own, with the policies applied."""
        config = rows[0].config
        given = [row.request.verdict if row.steered else None for row in rows]
        asked = [index for index, row in enumerate(rows) if row.steered and row.request.verdict is None]
        requests = [rows[index].for_judge() for index in asked]
        pending = None
        if judge is not None and is_remote(judge):
            # Asked now, while the prompt is prefilled; the loop waits only before the first token.
            pending = _ask_elsewhere([rows[index] for index in asked], judge)
        return make_verdict_source(given, asked, requests, judge, config, self.model, pending)

    def _result(
        self,
        row: PreparedRequest,
        index: int,
        token_ids: list[int],
        generation: SteeredGeneration,
        record: bool,
    ) -> ChatResult:
        report = generation.report
        error = report.row_errors.get(index)
        verdict = report.verdicts[index]
        kept = token_ids[: report.lengths[index]]
        text = "" if error else self.builder.tokenizer.decode(kept, skip_special_tokens=True).strip()
        effective = None
        if row.steered and verdict is not None and verdict.asks_for_refusal and error is None:
            effective = self.refusal(row.config).starts_with_refusal(text)
        return ChatResult(
            text=text,
            verdict=verdict,
            steering=row.request.steering,
            steering_effective=effective,
            record=report.guided[index] if record else None,
            seed=row.seed,
            timings=dict(report.seconds),
            notes=dict(report.notes),
            error=error,
            token_ids=[] if error else kept,
            context=request_context(row.dialogue, row.config, self.model),
        )

    def _to_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device, dtype = self.model.device, self.model.dtype
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}


def _ask_elsewhere(rows: Sequence[PreparedRequest], judge: Judge) -> Pending:
    """Ask a remote judge about the rows that it was not asked about before; what is returned waits for all answers."""
    fresh = [row for row in rows if row.asked is None]
    if fresh:
        verdicts = ask_beside(judge, [row.for_judge() for row in fresh], fresh[0].config)
        for place, row in enumerate(fresh):
            row.asked = partial(_nth, verdicts, place)
    return lambda: [row.asked() for row in rows if row.asked is not None]


def _nth(verdicts: Pending, place: int) -> Verdict | JudgeError:
    return verdicts()[place]
