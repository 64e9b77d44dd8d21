"""How a step is run: as it is, or on a GPU as a replay of a captured CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from safecode_mllm.decoding.device_steps import DeviceSteps

logger = logging.getLogger(__name__)

# Steps of a kind that run before it is captured, so that libraries have allocated what they need.
WARM_UP_STEPS = 1


class StepGraph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Run the step on the same buffers again."""
        ...


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


class GraphRunner:
    """Captures each kind of step after a warm-up and replays it from then on, in later generations too.

    There are two kinds: guided steps of all rows, and free steps of the clean rows.

    Args:
        steps: what is captured; loaded anew for each generation.
        capture: returns the graph of a function without running it.
    """

    def __init__(self, steps: DeviceSteps, capture: Callable[[Callable[[], None]], StepGraph]) -> None:
        self._steps, self._capture = steps, capture
        self._graphs: dict[tuple[bool, int], StepGraph] = {}
        self._warm: dict[tuple[bool, int], int] = {}
        self._obstacle: str | None = None
        self.captured, self.replayed = 0, 0

    @torch.no_grad()
    def __call__(self, *, guided: bool) -> None:
        kind = (guided, self._steps.branches.copies)
        if kind not in self._graphs and not self._captures(kind, guided):
            self._steps.advance(guided=guided)
            return
        self._graphs[kind].replay()
        self.replayed += 1

    def _captures(self, kind: tuple[bool, int], guided: bool) -> bool:
        """Capture a kind of step if it is warm; returns whether there is a graph now."""
        if self._obstacle is not None or self._warm.get(kind, 0) < WARM_UP_STEPS:
            self._warm[kind] = self._warm.get(kind, 0) + 1
            return False
        try:
            self._graphs[kind] = self._capture(lambda: self._steps.advance(guided=guided))
        except RuntimeError as error:
            # A model that looks at the host in its forward pass cannot be captured; it can still be run.
            self._obstacle = str(error).splitlines()[0]
            logger.warning("a step could not be captured, steps run one by one: %s", self._obstacle)
            return False
        self.captured += 1
        return True

    def explain(self) -> str:
        """Say in a sentence how steps are run."""
        if self._obstacle is not None:
            return f"on the device, one by one: capturing failed ({self._obstacle})"
        return f"on the device: {self.captured} graphs captured so far, {self.replayed} steps replayed"


class CudaGraph:
    """A function captured into a CUDA graph.

    Args:
        run: launches work on the current stream, on buffers that never move; looks at nothing on the host.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run()

    def replay(self) -> None:
        """Run the captured work on the current stream."""
        self._graph.replay()


def make_runner(steps: DeviceSteps) -> StepRunner:
    """Return how the steps are run on their device."""
    return GraphRunner(steps, CudaGraph) if steps.branches.tokens.is_cuda else PlainRunner(steps)
