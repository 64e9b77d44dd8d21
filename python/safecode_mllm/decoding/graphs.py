"""How a step is run: as it is, or on a GPU as a replay of a captured CUDA graph."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from safecode_mllm.decoding.device_steps import DeviceSteps, StepPlan
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.picker import TokenPicker
from safecode_mllm.decoding.static import StaticBranches


class StepRunner(Protocol):
    """Runs one step of a generation."""

    def __call__(self, *, guided: bool) -> None:
        """Feed what was written last and write the next token of every row."""
        ...

    def explain(self) -> str:
        """Say in a sentence how steps are run."""
        ...


class PlainRunner:
    """Runs the step as it is."""

    def __init__(self, steps: DeviceSteps) -> None:
        self._steps = steps

    @torch.no_grad()
    def __call__(self, *, guided: bool) -> None:
        self._steps.advance(guided=guided)

    def explain(self) -> str:
        """Say in a sentence how steps are run."""
        return "on the device, one by one"


def prepared_steps(
    branches: StaticBranches, guidance: Guidance, picker: TokenPicker, plan: StepPlan, lengths: Tensor | None
) -> tuple[DeviceSteps, StepRunner]:
    """Return the steps of a generation, and how they are run on its device."""
    steps = DeviceSteps(branches, guidance, picker.draws, picker.warpers, plan, lengths)
    return steps, PlainRunner(steps)
