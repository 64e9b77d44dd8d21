"""What a decoding loop works with, whichever way it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import has_encoder, placeholder_ids
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.picker import Draws, TokenPicker
from safecode_mllm.decoding.processors import ProcessorSplit
from safecode_mllm.decoding.record import GenerationReport
from safecode_mllm.decoding.static import StaticBranches
from safecode_mllm.decoding.step_pool import Prepared
from safecode_mllm.errors import DecodeError

if TYPE_CHECKING:
    from safecode_mllm.decoding.loop import SteeredGeneration


@dataclass
class Run:
    """One decoding of R = B * num_return_sequences rows, from prefilled branches on.

    Attributes:
        request: what was asked for; its report is filled while the loop runs.
        model: the whole model.
        branches: prefilled and expanded.
        prepared: the same over a cache of fixed size, with what was prepared for it; None if the cache grows.
        generation_config, criteria: as `generate()` prepared them.
        processors: the generation's logits processors.
        picker: how a step's logits become tokens.
    """

    request: SteeredGeneration
    model: Any
    branches: Branches | StaticBranches
    prepared: Prepared | None
    generation_config: Any
    criteria: Any
    processors: ProcessorSplit
    picker: TokenPicker

    @property
    def guidance(self) -> Guidance:
        """The rows' steering state."""
        return self.request.guidance

    @property
    def report(self) -> GenerationReport:
        """What the generation leaves behind."""
        return self.request.report

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self.request.clean["input_ids"].device

    @property
    def pad(self) -> Tensor | None:
        """What rows that have ended get, int64 []; None in a generation without end tokens."""
        has_eos = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        pad: Tensor | None = self.generation_config._pad_token_tensor
        return pad.to(self.device) if has_eos and pad is not None else None

    def limits(self) -> Tensor | None:
        """The most tokens of each row, int64 [R]; None where `generate()` ends them all at once."""
        given = self.request.new_tokens
        if given is None:
            return None
        times = self.guidance.rows // len(given)
        return torch.tensor(list(given), device=self.device).repeat_interleave(times)

    def banned_ids(self) -> list[int]:
        """Tokens that a guided row must not write: there is no image behind an image token."""
        return placeholder_ids(self.model)

    def wants(self, output: str) -> bool:
        """Whether the caller wants `output_scores` or `output_logits` in the result."""
        config = self.generation_config
        return bool(config.return_dict_in_generate and getattr(config, output))

    def finish(self, errors: dict[int, Exception]) -> None:
        """Put the rows' errors into the report; raise if the request wants that."""
        self.report.row_errors.update(errors)
        if errors and self.request.raise_row_errors:
            raise DecodeError("; ".join(str(error) for error in errors.values()))

    def output(
        self, ids: Tensor, scores: Sequence[Tensor] | None = None, logits: Sequence[Tensor] | None = None
    ) -> Any:
        """Return what `generate()` returns for these ids [R, L + N]."""
        if not self.generation_config.return_dict_in_generate:
            return ids
        from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

        output: dict[str, Any] = {"sequences": ids, "past_key_values": self.branches.cache}
        for name, kept in (("scores", scores), ("logits", logits)):
            output[name] = None if kept is None else tuple(kept)
        if has_encoder(self.branches.decoder):
            return GenerateEncoderDecoderOutput(**output)
        return GenerateDecoderOnlyOutput(**output)


def make_draws(request: SteeredGeneration, times: int, *, greedy: bool) -> Draws:
    """Return who draws for B requests with `times` answers each.

    Raises:
        ValueError: rng is unknown, or "philox" has no seeds.
    """
    device = request.clean["input_ids"].device
    if request.rng == "torch":
        return Draws("torch", None, None, greedy)
    if request.rng != "philox":
        raise ValueError(f"rng must be 'torch' or 'philox', got {request.rng!r}")
    if request.seeds is None and not greedy:
        raise ValueError("rng='philox' needs one seed per request: pass seeds=[...]")
    seeds = list(request.seeds) if request.seeds is not None else [0] * (request.guidance.rows // times)
    rows = torch.tensor(seeds, dtype=torch.int64, device=device).repeat_interleave(times)
    stream = torch.arange(times, dtype=torch.int64, device=device).repeat(len(seeds))
    return Draws("philox", rows, stream, greedy)
