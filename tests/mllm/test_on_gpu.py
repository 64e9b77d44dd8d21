"""Generation on a GPU: the same tokens as on the CPU, and captured steps that are replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines import CONFIG
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from safecode_mllm.decoding.step_pool import StepPool
from safecode_mllm.judges.protocol import Verdict
from tiny_models import FAMILY_NAMES, TinyModel, noised_copy, tiny_model
from tiny_refusal import TinyTrie

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; make gpu-report-generate runs it")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRIE = TinyTrie()
VERDICTS = [Verdict("unsafe", 0.9), Verdict("safe", 0.2)]
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": dict(do_sample=True, temperature=0.9, top_k=40)}
# Looks at the host in its forward pass, so that its steps are run one by one.
NOT_CAPTURED = ("idefics",)


def generate(tiny: TinyModel, device: str, seeds: list[int], **options: Any) -> tuple[torch.Tensor, dict[str, str]]:
    clean = {key: value.to(device) for key, value in tiny.prompts(2, extra=(0, 3)).items()}
    generation = SteeredGeneration(
        clean,
        noised_copy(clean),
        Guidance(CONFIG, [True, True], TRIE),  # type: ignore[arg-type]
        verdict_source=lambda branches: VERDICTS,
        rng="philox",
        seeds=seeds,
        pool=options.pop("pool", None),
    )
    output = generation.generate(tiny.model.to(device), max_new_tokens=10, **options)
    return output.cpu(), generation.report.notes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_tokens_on_gpu_are_those_of_the_cpu_and_captured_ones_those_of_the_growing_cache(name: str, mode: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    tiny, pool = tiny_model(name), StepPool()
    wanted, _ = generate(tiny, "cpu", [3, 4], **MODES[mode])
    found, _ = generate(tiny, DEVICE, [3, 4], **MODES[mode])
    assert torch.equal(wanted, found)
    for seeds in ([3, 4], [7, 1], [3, 4]):
        wanted, _ = generate(tiny, DEVICE, seeds, **MODES[mode])
        found, notes = generate(tiny, DEVICE, seeds, pool=pool, cache_implementation="static", **MODES[mode])
        assert torch.equal(wanted, found)
    if name not in NOT_CAPTURED:
        assert notes["steps"].startswith("on the device: 2 graphs")
