"""From picture and text to steered tokens with real processors, and every key of every processor in both branches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

from naive import NaiveSteering, naive_generate
from pipelines import CONFIG, PROMPT, front_door, picture
from safecode_mllm.decoding import kv
from safecode_mllm.decoding.encoder_branches import make_branches
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.judges.protocol import Verdict
from safecode_mllm.requests import ChatRequest
from support_cells import NEWEST
from tiny_models import CHAT_NAMES, FAMILY_NAMES, TIER2_NAMES, noised_copy, tiny_model
from tiny_tier2_processors import TIER2_CHAT_NAMES

UNSAFE = Verdict("unsafe", 0.9)
NEW_TOKENS = 6
LENGTH = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is </s> this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cliff."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
]
# Which versions can build the processors of the others without torchvision is in docs/models.md.
only_newest = pytest.mark.skipif(transformers.__version__ != NEWEST, reason=f"tested on transformers {NEWEST}")
NEW_NAMES = ("idefics3", *TIER2_CHAT_NAMES)
newest = [pytest.param(name, marks=[only_newest, pytest.mark.slow]) for name in NEW_NAMES]
# One picture is the smoke test of these families; the rest is slow.
WAYS = [
    *((name, several) for name in CHAT_NAMES for several in (False, True)),
    *(pytest.param(name, False, marks=only_newest) for name in NEW_NAMES),
    *(pytest.param(name, True, marks=[only_newest, pytest.mark.slow]) for name in NEW_NAMES),
]


@contextmanager
def first_arguments(model: Any) -> Iterator[dict[str, Any]]:
    """The keyword arguments of the model's first pass; in transformers 4 some are run without their output head."""
    seen: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.update(kwargs)

    modules = {id(module): module for module in (model, model.base_model, getattr(model, "model", model))}
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules.values()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check_both_branches(seen: dict[str, Any], clean: Any, noised: Any) -> None:
    differing = []
    for key in clean:
        first, second = seen[key].chunk(2)
        assert torch.equal(first, clean[key]), f"{key} of the clean rows"
        assert torch.equal(second, noised[key]), f"{key} of the noised rows"
        if not torch.equal(first, second):
            differing.append(key)
    assert differing == ["pixel_values"]


@pytest.mark.parametrize(("name", "several"), WAYS)
def test_real_processors_through_the_front_door(name: str, several: bool) -> None:
    sc = front_door(name)
    image: Any = [picture(0), picture(1, (44, 60))] if several else picture()
    asked = CONVERSATION if several else f"{PROMPT} <image> </s>"
    request = sc._prepare(ChatRequest(image, asked, seed=5, verdict=UNSAFE), None)
    assert request.noised is not None
    with first_arguments(sc.model) as seen:
        result = sc.chat(image, asked, verdict=UNSAFE, seed=5, **LENGTH)
    check_both_branches(seen, request.clean, request.noised)
    naive = NaiveSteering(
        0.8, CONFIG.plausibility_beta, 5, [CONFIG.lambda_boost * 0.8], sc._answerer.refusal(CONFIG),
        tuple(placeholder_ids(sc.model)),
    )  # fmt: skip
    ids, _ = naive_generate(sc.model, request.clean, request.noised, naive, NEW_TOKENS)
    assert result.token_ids == ids[0, request.clean["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", newest)
def test_a_batch_of_different_pictures_answers_each_as_alone(name: str) -> None:
    sc = front_door(name)
    sizes = [(60, 44), (44, 60), (30, 30)]
    requests = [ChatRequest(picture(i, size), PROMPT, seed=i, verdict=UNSAFE) for i, size in enumerate(sizes)]
    requests.append(ChatRequest([picture(4), picture(5, (20, 40))], CONVERSATION, seed=4, verdict=UNSAFE))
    for request, result in zip(requests, sc.chat_batch(requests, **LENGTH), strict=True):
        assert result.error is None
        alone = sc.chat(request.image, request.prompt, verdict=UNSAFE, seed=request.seed, **LENGTH)
        assert result.token_ids == alone.token_ids
        assert alone.verdict is UNSAFE


@pytest.mark.parametrize("name", newest)
def test_the_self_judge_reads_the_pictures_once(name: str) -> None:
    sc = front_door(name)
    inside = sc.chat(picture(), PROMPT, seed=1, **LENGTH).verdict
    (alone,) = sc.judge_batch([{"image": picture(), "prompt": PROMPT}])
    assert inside is not None and inside.raw == alone.raw
    assert sc.explain()["judge"].startswith("reads two letters behind the prompt's own KV cache")


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *(pytest.param(name, marks=only_newest) for name in TIER2_NAMES)])
@torch.no_grad()
def test_every_key_of_every_family_travels_in_both_branches(name: str) -> None:
    tiny = tiny_model(name)
    clean = tiny.prompts(2, extra=(0, 3))
    noised = noised_copy(clean)
    with first_arguments(tiny.model) as seen:
        make_branches(tiny.model, clean, noised, kv.new_cache(tiny.model)).prefill()
    check_both_branches(seen, clean, noised)
