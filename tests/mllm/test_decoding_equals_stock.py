"""With weight 0, beta 0 and no verdict the loop is stock `generate`, token for token, for every family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from safecode_mllm.config import SafeCoDeConfig
from safecode_mllm.decoding.guidance import Guidance
from safecode_mllm.decoding.loop import SteeredGeneration
from tiny_models import FAMILY_NAMES, TinyModel, noised_copy, tiny_model

# float32 noise floor of these models is 4e-6: batches of 2B and B run different matrix kernels.
SCORE_TOLERANCE = 2e-5
UNSTEERED = SafeCoDeConfig(contrast_weight=0.0, plausibility_beta=0.0, bias_form="none")


class Favour(LogitsProcessor):
    """A user's own processor."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 40:60] += 0.5
        return scores


class StopOnResidue(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 17 == 3


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int] | str] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append("end")


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.8, top_k=40, top_p=0.95),
    "three_sequences": dict(do_sample=True, num_return_sequences=3),
    "stopping_criterion": dict(stopping_criteria=StoppingCriteriaList([StopOnResidue()])),
    "repetition_penalty": dict(repetition_penalty=1.3, min_new_tokens=4),
}


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def arguments(**mode: Any) -> dict[str, Any]:
    return dict(max_new_tokens=12, logits_processor=LogitsProcessorList([Favour()])) | mode


@pytest.mark.parametrize("force_branches", [False, True], ids=["short_circuit", "force_branches"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_unsteered_equals_stock(name: str, mode: str, force_branches: bool) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    wanted = arguments(**MODES[mode], return_dict_in_generate=True, output_scores=True, output_logits=True)
    torch.manual_seed(0)
    stock = tiny.model.generate(**clean, **wanted)
    torch.manual_seed(0)
    loop = SteeredGeneration(
        clean, noised_copy(clean), Guidance(UNSTEERED, [True, True]), force_branches=force_branches
    )
    ours = loop.generate(tiny.model, **wanted)
    assert torch.equal(stock.sequences, ours.sequences)
    for field in ("scores", "logits"):
        for theirs, mine in zip(getattr(stock, field), getattr(ours, field), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=SCORE_TOLERANCE)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_streamer_sees_the_same_calls(name: str) -> None:
    tiny, stock, ours = model_of(name), Collect(), Collect()
    clean = tiny.prompts(1)
    tiny.model.generate(**clean, streamer=stock, **arguments())
    SteeredGeneration(clean, None, Guidance(UNSTEERED, [True]), streamer=ours).generate(tiny.model, **arguments())
    assert stock.seen == ours.seen
    assert ours.seen[-1] == "end"


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_swapped_branches_differ(name: str) -> None:
    """The equality above would also hold if the noised rows were ignored or mixed up: with weight they are not."""
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    noised = noised_copy(clean)
    config = SafeCoDeConfig(contrast_weight=1.0, plausibility_beta=0.0, bias_form="none")

    def generate(first: Any, second: Any) -> torch.Tensor:
        return SteeredGeneration(first, second, Guidance(config, [True, True])).generate(tiny.model, **arguments())

    assert not torch.equal(generate(clean, noised), generate(noised, clean))
