"""A step that stays on the device can be captured: nothing in it depends on data, and it is traced whole and once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.device_steps import DeviceSteps, StepPlan
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.picker import Draws
from safecode_mllm.decoding.static import StaticBranches
from safecode_mllm.judges.protocol import Verdict
from tiny_models import FAMILY_NAMES, noised_copy, tiny_model
from tiny_parts import EOS, IMAGE
from tiny_refusal import TinyTrie

CONFIG = SafeCoDeConfig(contrast_weight=0.8, lambda_boost=2.0, steps=3)
NEW_TOKENS = 7
# Operations whose result, or its shape, has to be known on the host.
DATA_DEPENDENT = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Collects the names of operations that would stop a GPU, or that a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        # Indexing by booleans has a shape that depends on them.
        by_flags = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in DATA_DEPENDENT or by_flags:
            self.found.add(name)
        return function(*args, **(kwargs or {}))


def device_steps(name: str) -> DeviceSteps:
    """Steps that have written their first token."""
    tiny = tiny_model(name)
    clean = tiny.prompts(2, extra=(0, 3))
    guidance = Guidance(CONFIG, [True, True], TinyTrie())
    branches = Branches(tiny.model, clean, noised_copy(clean), DynamicCache())
    first = branches.prefill()
    guidance.set_verdicts([Verdict("unsafe", 0.9), Verdict("safe", 0.2)])
    draws = Draws("philox", torch.tensor([3, 4]), torch.tensor([0, 0]), False)
    plan = StepPlan(
        new_tokens=NEW_TOKENS, pad=0, end_ids=(EOS,), banned_ids=(IMAGE,), temperature=0.9,
        recorded=CONFIG.steps, greedy=False, backend="auto",
    )  # fmt: skip
    static = StaticBranches(branches, clean["input_ids"].shape[1] + NEW_TOKENS)
    steps = DeviceSteps(static, guidance, draws, {"temperature": 0.9, "top_k": 40}, plan)
    steps.first(*first, guided=True)
    return steps


def run(steps: DeviceSteps, advance: Any) -> torch.Tensor:
    for step in range(1, NEW_TOKENS):
        guided = step < CONFIG.steps
        if not guided:
            steps.branches.drop_noised()
        advance(guided)
    return steps.written.clone()


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_no_operation_depends_on_data(name: str) -> None:
    steps, watch = device_steps(name), Watch()
    # The eager back end of the CPU looks at the host; on a GPU the kernels are one launch each. So the decode step
    # itself is left out of the watch.
    decide = steps._decide

    def unwatched(*arguments: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return decide(*arguments)

    steps._decide = unwatched  # type: ignore[method-assign]
    with watch:
        run(steps, lambda guided: steps.advance(guided=guided))
    # IDEFICS looks up added tokens in a table of their own, by a comparison with the size of the first one; in
    # transformers 4 it also asks the host whether there are any. Such a step is not captured, and runs as it is.
    expected = {"nonzero", "index_put_", "_local_scalar_dense"} if name == "idefics" else set()
    assert watch.found <= expected


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name != "idefics"])
@torch.no_grad()
def test_a_step_is_traced_whole_and_once(name: str) -> None:
    torch._dynamo.reset()
    wanted = run(plain := device_steps(name), lambda guided: plain.advance(guided=guided))
    steps = device_steps(name)
    compiled = {
        guided: torch.compile(lambda g=guided: steps.advance(guided=g), fullgraph=True, dynamic=False, backend="eager")
        for guided in (True, False)
    }
    seen: set[bool] = set()

    def advance(guided: bool) -> None:
        with torch._dynamo.config.patch(error_on_recompile=guided in seen):
            compiled[guided]()
        seen.add(guided)

    assert torch.equal(run(steps, advance), wanted)
