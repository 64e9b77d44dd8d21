"""Turns a step's logits into tokens: one fused step where that is exact, scores and the processor list otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safecode_kernels import PreparedStep, Status, StepResult, draw, plausible, prepare_step
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.processors import ProcessorSplit, apply, cut

Rng = Literal["torch", "philox"]


@dataclass(frozen=True)
class Draws:
    """Who draws, and with which keys.

    Attributes:
        rng: "torch" uses the device's default generator exactly as stock sampling does; "philox" is a pure function
            of (seed, stream, step, token), independent of batch and back end.
        seeds: int64 [R], in [0, 2^63); None with rng "torch".
        stream: int64 [R], the return index of each row.
        greedy: take the best token instead of drawing.
    """

    rng: Rng
    seeds: Tensor | None
    stream: Tensor | None
    greedy: bool


@dataclass(frozen=True)
class Pick:
    """What a step chose: the step's result, and the processed scores [R, V] where they were computed."""

    result: StepResult
    scores: Tensor | None


class TokenPicker:
    """Chooses the token of each step for R rows.

    Args:
        guidance: the rows' steering state, verdicts already set.
        processors: the generation's logits processors.
        draws: who draws.
        want_scores: keep the processed scores of each step (`output_scores`).
        backend: decode-step back end, by name or "auto".
    """

    def __init__(
        self, guidance: Guidance, processors: ProcessorSplit, draws: Draws, *, want_scores: bool, backend: str = "auto"
    ):
        self.guidance = guidance
        self.processors = processors
        self.draws = draws
        self.backend = backend
        warpers = processors.fused_parameters()
        self.warpers = warpers or {}
        # Greedy rows draw nothing, so there it does not matter who would.
        self.fused = (draws.rng == "philox" or draws.greedy) and warpers is not None and not want_scores
        # Which rows are guided may change from step to step, and with it the parameters.
        self._prepared: dict[tuple[bool, ...], PreparedStep] = {}

    def explain(self) -> str:
        """Say in a sentence how steps turn logits into tokens."""
        if self.fused:
            return "fused decode step"
        if self.draws.rng == "torch" and not self.draws.greedy:
            return "scores mode: rng='torch' draws as stock sampling does"
        return "scores mode: the processor list or output_scores needs full scores"

    def pick(self, ids: Tensor, clean: Tensor, noised: Tensor | None, step: int, *, guided: bool) -> Pick:
        """Choose a token per row from clean and noised logits [R, V]; `ids` [R, L] holds everything so far."""
        if self.fused:
            mask_ids = self._mask_ids(clean.device) if guided else None
            return Pick(self._step(clean, step, guided)(clean, noised, mask_id=mask_ids, step=step), None)
        if guided and self.guidance.changes_logits:
            scores, status = self.guided_scores(ids, clean, noised, step)
        else:
            scores = apply(self.processors.before, ids, clean.to(torch.float32, copy=True))
            status = _status_of(scores)
            scores = apply(self.processors.after, ids, scores)
        return Pick(self._choose(scores, status, step), scores)

    def guided_scores(self, ids: Tensor, clean: Tensor, noised: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """Return scores [R, V] and status [R] after contrast, bias, processors, cut and warpers, in that order."""
        steered = self._step(clean, step, True).scores(clean, noised, mask_id=self._mask_ids(clean.device))
        scales = torch.tensor(self.guidance.score_scales(step), device=clean.device)
        scores = apply(self.processors.before, ids, steered.scores / scales[:, None])
        allowed = scores > -torch.inf
        beta = torch.tensor(self.guidance.betas(step), device=clean.device)
        keep = plausible(steered.biased_clean, allowed, beta)
        status = torch.where(steered.status != Status.OK, steered.status, _status_of(scores))
        return apply(self.processors.after, ids, cut(scores, keep)), status

    def _choose(self, scores: Tensor, status: Tensor, step: int) -> StepResult:
        # Processors behind the first warper can break a row too.
        status = torch.where(status != Status.OK, status, _status_of(scores))
        # A failed row gets flat scores so that it cannot disturb the draws of the others.
        scores = torch.where((status != Status.OK)[:, None], 0.0, scores)
        if self.draws.greedy or self.draws.rng == "philox":
            result = draw(scores, seeds=self.draws.seeds, stream=self.draws.stream, step=step, greedy=self.draws.greedy)
            return result._replace(status=status)
        logprobs = torch.log_softmax(scores, -1)
        # One draw over all rows, finished ones included, from the default generator: what stock sampling does.
        token = torch.multinomial(torch.softmax(scores, -1), num_samples=1)
        kept = torch.isfinite(scores).sum(-1, dtype=torch.int32)
        return StepResult(token[:, 0], logprobs.gather(1, token)[:, 0], kept, status)

    def _step(self, clean: Tensor, step: int, guided: bool) -> PreparedStep:
        rows = tuple(self.guidance.window.guided_rows(step)) if guided else ()
        if rows not in self._prepared:
            masks = self.guidance.masks() if guided else None
            params = self.guidance.step_params(step, guided=guided, greedy=self.draws.greedy, warpers=self.warpers)
            self._prepared[rows] = prepare_step(
                params,
                batch=clean.shape[0],
                vocab_size=clean.shape[1],
                device=clean.device,
                dtype=clean.dtype,
                refusal_mask=None if masks is None else masks.to(clean.device),
                seeds=self.draws.seeds,
                stream=self.draws.stream,
                backend=self.backend,
            )
        return self._prepared[rows]

    def _mask_ids(self, device: torch.device) -> Tensor | None:
        mask_ids = self.guidance.mask_ids()
        return None if mask_ids is None else mask_ids.to(device)


def _status_of(scores: Tensor) -> Tensor:
    """Status [R] of plain scores [R, V]: one pass, since a maximum carries NaN and +inf along."""
    best = scores.amax(-1)
    status = torch.zeros_like(best, dtype=torch.int32)
    status[best == -torch.inf] = Status.NOTHING_FINITE
    status[best == torch.inf] = Status.INFINITE
    status[best.isnan()] = Status.NAN_CLEAN
    return status
