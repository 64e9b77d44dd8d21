"""Buffers, steps and graphs that are kept from one generation to the next, and never used for other weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from torch import Tensor

from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.device_steps import DeviceSteps, StepPlan
from safecode_mllm.decoding.graphs import StepRunner, make_runner
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.model_state import model_bindings
from safecode_mllm.decoding.picker import TokenPicker
from safecode_mllm.decoding.static import StaticBranches, static_length

# Shapes that are kept; each holds a KV cache of its size.
POOLED_SHAPES = 4


@dataclass
class Prepared:
    """Branches over a cache of fixed size, with the steps that were made for them; one generation at a time owns it."""

    key: Hashable
    branches: StaticBranches
    _steps: dict[Hashable, tuple[DeviceSteps, StepRunner, Any]] = field(default_factory=dict)

    def steps(
        self, guidance: Guidance, picker: TokenPicker, plan: StepPlan, lengths: Tensor | None
    ) -> tuple[DeviceSteps, StepRunner]:
        """Return the steps of a generation and how they are run, from an earlier one with the same plan if there was.

        Args:
            guidance: verdicts set.
            picker: gives the draws and the parameters of the decode step.
            plan: what is built into the steps.
            lengths: see DeviceSteps.
        """
        # The masks are built in too; the tokens they come from are kept here, so that no other ones get their id.
        key = (plan, guidance.masks() is None, id(guidance.refusal))
        if key in self._steps:
            steps, runner, _ = self._steps[key]
            steps.load(guidance, picker.draws, picker.warpers, lengths)
        else:
            steps = DeviceSteps(self.branches, guidance, picker.draws, picker.warpers, plan, lengths)
            runner = make_runner(steps)
            self._steps[key] = steps, runner, guidance.refusal
        return steps, runner


class StepPool:
    """Keeps the most recently used shapes of generations, for one model at a time.

    What is kept is used again only while every parameter and buffer has the address and version that it was made with,
    and modules have the same hooks and adapters.

    Args:
        capacity: shapes that are kept, at least 0.
    """

    def __init__(self, capacity: int = POOLED_SHAPES) -> None:
        self._capacity = capacity
        self._lock = Lock()
        self._idle: OrderedDict[Hashable, Prepared] = OrderedDict()
        self._weights: Hashable = None

    def take(self, model: Any, branches: Branches, columns: int) -> Prepared:
        """Return prefilled branches over a cache of fixed size; nobody else gets them before `give_back`.

        Args:
            model: the whole model.
            branches: after `prefill` and `expand`; may not be used any more.
            columns: columns that prompt and answer have at most.
        """
        bindings = model_bindings(model)
        # Weights whose changes cannot be noticed: what is made for them now is never found again.
        weights = object() if bindings is None else (id(model), bindings)
        key = (weights, *_shape_key(branches, columns))
        with self._lock:
            if weights != self._weights:
                self._idle.clear()
                self._weights = weights
            prepared = self._idle.pop(key, None)
        if prepared is None:
            return Prepared(key, StaticBranches(branches, columns))
        prepared.branches.load(branches)
        return prepared

    def give_back(self, prepared: Prepared) -> None:
        """Keep for later what a generation has finished with."""
        with self._lock:
            self._idle[prepared.key] = prepared
            while len(self._idle) > self._capacity:
                self._idle.popitem(last=False)

    def clear(self) -> None:
        """Let go of all memory."""
        with self._lock:
            self._idle.clear()

    def __len__(self) -> int:
        return len(self._idle)


def _shape_key(branches: Branches, columns: int) -> tuple[Hashable, ...]:
    images = None if branches.images is None else branches.images.shape
    return (
        branches.rows,
        branches.copies,
        branches.next_positions.shape,
        static_length(columns, branches.mask.device),
        images,
    )
