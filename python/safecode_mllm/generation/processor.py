"""The method as a logits processor, for those who cannot change the call of `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safecode_kernels import Status
from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.encoder_branches import make_branches
from safecode_mllm.decoding.families import decoder_of, has_encoder, placeholder_ids
from safecode_mllm.decoding.lingering import LingeringBias
from safecode_mllm.decoding.picker import Draws, TokenPicker
from safecode_mllm.decoding.processors import split_processors
from safecode_mllm.decoding.record import status_errors
from safecode_mllm.decoding.wrappers import unwrapped
from safecode_mllm.errors import ConfigError, DecodeError, SafeCoDeError, UnsupportedModelError
from safecode_mllm.generation.plan import Inputs, SteeringPlan, VerdictLike
from safecode_mllm.judges.protocol import Judge, JudgeRequest, Verdict
from safecode_mllm.refusal import RefusalTokens


class SafeCoDeLogitsProcessor:
    """Steers one stock generation: `model.generate(**inputs, logits_processor=[SafeCoDeLogitsProcessor(...)])`.

    It runs the noised branch itself, in a batch and a KV cache of its own, so each guided token costs a second forward
    pass; `generate_fn` runs both branches in one. Penalties and bans of `generate` come before it, and so before the
    contrast; sampling's filters come behind it, as the method wants.

    Args:
        model: a Hugging Face model of a supported family.
        processor: the model's processor.
        inputs: what `generate` gets: the processor's output for B prompts, left padded, on the model's device.
        verdict, judge, config, requests, noised, refusal: as for `generate_fn`; a judge is asked here and now.
        seed: of the noise, as for `generate_fn`; the draws are the caller's.
        num_return_sequences: as passed to `generate`.

    Raises:
        ConfigError: an argument is not legal, or does not fit the inputs.
        JudgeError: the judge failed, under policy "raise".

    Source: SafeCoDe (arXiv 2509.19212).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: Mapping[str, Tensor],
        *,
        verdict: VerdictLike | Sequence[VerdictLike] | None = None,
        judge: str | Judge | None = "self",
        config: SafeCoDeConfig | None = None,
        seed: int | Sequence[int] | None = None,
        requests: JudgeRequest | Sequence[JudgeRequest] | None = None,
        noised: Inputs | None = None,
        refusal: RefusalTokens | None = None,
        num_return_sequences: int = 1,
    ) -> None:
        model = unwrapped(model)
        if has_encoder(decoder_of(model)):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads its prompt with an encoder, which a logits processor cannot follow: use "
                "generate_fn(...).generate(model, **inputs, ...)"
            )
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
        clean = dict(inputs.items())
        clean.setdefault("attention_mask", torch.ones_like(clean["input_ids"]))
        chosen = plan.configuration(model.generation_config)
        if chosen.refusal_style == "explain" and chosen.uses_verdict:
            raise ConfigError(
                "refusal_style='explain' makes answers longer than a logits processor can: use "
                "generate_fn(...).generate(model, **inputs, ...)"
            )
        prepared = plan.prepare(model, clean, chosen)
        self._model, self._times, self._prompt = model, num_return_sequences, prepared.clean["input_ids"]
        self._guidance, self._noised = prepared.guidance, prepared.noised
        self.verdicts = self._ask(prepared.verdict_source, prepared.clean)
        self._guidance.set_verdicts(self.verdicts)
        self._guidance.expand(num_return_sequences)
        self._fading = LingeringBias(self._guidance, prepared.config.bias_decay, self._prompt.shape[1])
        draws = Draws("torch", None, None, greedy=False)
        self._picker = TokenPicker(self._guidance, split_processors([]), draws, want_scores=True)
        self._banned = torch.tensor(placeholder_ids(model), dtype=torch.int64, device=self._prompt.device)
        self._branch: Branches | None = None
        self._ids: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return steered scores [R, V] for the token behind `input_ids` [R, L]; later tokens pass through.

        Raises:
            SafeCoDeError: the processor has been used already, or the ids are not those of its inputs.
            UnsupportedModelError: the generation does not go on token by token: beams, assisted, contrastive search.
            DecodeError: a row's logits could not be decoded.
        """
        step = self._follow(input_ids)
        guidance = self._guidance
        if guidance.window.guides(step):
            noised = self._noised_logits(input_ids)
            if guidance.changes_logits:
                scores = self._steered(input_ids, scores, noised, step)
        else:
            self._branch = None  # its cache is not needed any more
        return self._fading(input_ids, scores) if guidance.config.bias_decay > 0 else scores

    def _ask(self, source: Any, clean: Inputs) -> list[Verdict | None]:
        if source is None:
            return [None] * len(clean["input_ids"])
        answers = source(_LateBranches(self._model, clean))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return list(answers)

    def _follow(self, ids: Tensor) -> int:
        """Check that `ids` go on where the last call ended, let the guidance see the new tokens, return the step."""
        prompt = self._prompt.repeat_interleave(self._times, 0)
        if self._ids is None:
            if not _equal(ids, prompt):
                raise SafeCoDeError(
                    f"input_ids {list(ids.shape)} are not the {list(prompt.shape)} of the inputs that this processor "
                    "was made for: pass it the same inputs as generate(), and num_return_sequences if there are "
                    "several. Beam search is not supported: use greedy decoding or sampling"
                )
        elif _equal(ids, prompt):
            raise SafeCoDeError(
                "this SafeCoDeLogitsProcessor has seen its prompt already: make a new one for each generate(). "
                "Assisted decoding, which shows it twice, cannot be steered: use greedy decoding or sampling"
            )
        elif not _equal(ids[:, :-1], self._ids):
            raise UnsupportedModelError(
                "the ids do not go on by one token per row: beam search, assisted decoding and contrastive search "
                "cannot be steered; use greedy decoding or sampling, with num_return_sequences for several answers"
            )
        step = ids.shape[1] - self._prompt.shape[1]
        if step > 0 and self._guidance.watches and self._guidance.window.guides(step - 1):
            self._guidance.observe(ids[:, -1].tolist(), step - 1)
        self._ids = ids
        return step

    def _noised_logits(self, ids: Tensor) -> Tensor | None:
        """Return the noised branch's logits [R, V] behind `ids`; None without contrast."""
        if self._noised is None:
            return None
        if self._branch is not None:
            return self._branch.step(ids[:, -1])[0]
        from transformers import DynamicCache

        self._branch = make_branches(self._model, self._noised, None, DynamicCache())
        logits, _ = self._branch.prefill()
        self._branch.expand(self._times)
        return logits.repeat_interleave(self._times, 0)

    def _steered(self, ids: Tensor, scores: Tensor, noised: Tensor | None, step: int) -> Tensor:
        guided = torch.tensor(self._guidance.window.guided_rows(step), device=scores.device)
        clean = scores.clone()
        clean[guided.nonzero(), self._banned] = -torch.inf
        steered, status = self._picker.guided_scores(ids, clean, None if noised is None else noised.float(), step)
        failed = {row: (Status(value), step) for row, value in enumerate(status.tolist()) if value}
        if failed:
            raise DecodeError("; ".join(map(str, status_errors(failed, "unknown").values())))
        return torch.where(guided[:, None], steered, scores)


class _LateBranches:
    """Stands for the prefilled clean prompts; they are prefilled when a judge first asks about them."""

    def __init__(self, model: Any, clean: Inputs) -> None:
        self._model, self._clean = model, clean

    @torch.no_grad()
    def ask(self, suffixes: Sequence[Sequence[int]], hidden: Sequence[int], rows: Sequence[int]) -> Tensor:
        """As `Branches.ask`."""
        from transformers import DynamicCache

        branches = make_branches(self._model, self._clean, None, DynamicCache())
        branches.prefill()
        return branches.ask(suffixes, hidden, rows)


def _equal(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.shape == second.shape and bool(torch.equal(first, second.to(first.device)))
