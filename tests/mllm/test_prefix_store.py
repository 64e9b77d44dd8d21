"""Text before the image that is kept: answers stay what they were, whatever changes, and memory stays bounded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from counting import counted
from pipelines import CONFIG, PROMPT, front_door, picture
from safecode_mllm import PrefixStore
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.families import FAMILIES, Family
from safecode_mllm.decoding.prefill import prefix_ids
from safecode_mllm.decoding.prompt import Prompt
from safecode_mllm.errors import ConfigError
from safecode_mllm.pipeline import SafeCoDe
from tiny_models import CHAT_NAMES, FAMILY_NAMES, IMAGE, TinyModel, noised_copy, tiny_model

ROOMY = 2**24
# Sums of other lengths in other orders: the float32 noise floor of these models is 4e-6.
TOLERANCE = 2e-5
# A decision closer than this may fall either way when sums are ordered differently.
MIN_GAP = 1e-4
NAMES = tuple(name for name in FAMILY_NAMES if FAMILIES[name].pixels)


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def pictured(clean: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same ids with another picture."""
    return noised_copy(clean, seed=100 + seed)


@torch.no_grad()
def prefilled(model: Any, clean: dict[str, Tensor], store: PrefixStore | None) -> tuple[Branches, Tensor]:
    branches = Branches(model, clean, noised_copy(clean), DynamicCache(), store)
    return branches, torch.cat([logits for logits in branches.prefill() if logits is not None])


def assert_same(model: Any, clean: dict[str, Tensor], store: PrefixStore) -> None:
    """Compare the logits behind the prompt and of one step with those without a store."""
    ours, found = prefilled(model, clean, store)
    plain, wanted = prefilled(model, clean, None)
    assert ours.prefilled.startswith("behind"), ours.prefilled
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    tokens = torch.arange(20, 20 + ours.rows)
    with torch.no_grad():
        for mine, theirs in zip(ours.step(tokens), plain.step(tokens), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_other_pictures_behind_the_same_text(name: str) -> None:
    tiny, store = model_of(name), PrefixStore(ROOMY)
    clean = tiny.prompts(1)
    columns = clean["input_ids"].shape[1]
    shared = int((clean["input_ids"] == IMAGE).any(0).nonzero()[0])
    seen = []
    with counted(tiny.model) as counts:  # for all of it: other hooks could mean other keys and values
        for seed in range(3):
            seen.append(prefilled(tiny.model, pictured(clean, seed), store)[1])
    assert counts.passes == [(1, shared), *[(2, columns - shared)] * 3]
    assert counts.vision == 3
    assert (len(store), store.misses, store.hits) == (1, 1, 2)
    for seed in range(3):
        assert_same(tiny.model, pictured(clean, seed), store)
    assert min((a - b).abs().max() for a, b in pairwise(seen)) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_padding(name: str) -> None:
    tiny, store = model_of(name), PrefixStore(ROOMY)
    clean = tiny.prompts(2, extra=(0, 3))
    assert_same(tiny.model, clean, store)
    assert_same(tiny.model, pictured(clean, 1), store)
    assert (len(store), store.misses, store.hits) == (2, 2, 2)


def test_single_requests_and_padded_rows_share_entries() -> None:
    tiny = model_of("llava")
    padded = tiny.prompts(2, extra=(0, 3))
    single = {key: value[:1] for key, value in padded.items()}
    for key in ("input_ids", "attention_mask"):
        single[key] = single[key][:, 3:]
    for first, second, hits in ((single, padded, 1), (padded, single, 1)):
        store = PrefixStore(ROOMY)
        assert_same(tiny.model, first, store)
        assert_same(tiny.model, second, store)
        assert (store.hits, store.misses) == (hits, 2)


def in_place(model: Any) -> None:
    model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)


def through_data(model: Any) -> None:
    model.model.language_model.layers[0].mlp.up_proj.weight.data *= 1.5


def replaced(model: Any) -> None:
    layer = model.model.language_model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight * 1.5)


def same_place(model: Any) -> None:
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    weight.data.copy_(weight * 1.5)


def loaded(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(name for name in state if name.endswith("layers.0.mlp.up_proj.weight") and "language" in name)
    state[name] *= 1.5
    model.load_state_dict(state)


def other_dtype(model: Any) -> None:
    model.double()


CHANGES: list[Callable[[Any], None]] = [in_place, through_data, replaced, same_place, loaded, other_dtype]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_other_weights_never_use_an_entry(change: Callable[[Any], None]) -> None:
    tiny, store = tiny_model("llava"), PrefixStore(ROOMY)
    clean = tiny.prompts(1)
    _, before = prefilled(tiny.model, clean, store)
    change(tiny.model)
    if change is other_dtype:
        clean = {key: value.double() if value.is_floating_point() else value for key, value in clean.items()}
    _, after = prefilled(tiny.model, clean, store)
    assert (store.hits, store.misses) == (0, 2)
    if change is not other_dtype:
        assert (before - after).abs().max() > 0.01
    assert_same(tiny.model, clean, store)


@torch.no_grad()
def test_hooks_and_modes_never_use_an_entry_of_others() -> None:
    tiny, store = tiny_model("llava"), PrefixStore(ROOMY)
    clean = tiny.prompts(1)
    prefilled(tiny.model, clean, store)
    layer = tiny.model.model.language_model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, arguments, output: output + 1)
    assert_same(tiny.model, clean, store)
    hook.remove()
    assert (store.hits, store.misses) == (0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        prefilled(tiny.model, clean, store)
    assert (store.hits, store.misses) == (0, 3)
    assert_same(tiny.model, clean, store)
    assert (store.hits, store.misses) == (1, 3)


class Adapted(nn.Module):
    """A layer with adapters, as PEFT writes them: settings that are no weights decide which of them counts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict({name: nn.Linear(base.in_features, base.out_features) for name in "ab"})
        self._active, self._disabled = ["a"], False
        self.merged_adapters: list[str] = []
        self.scaling = {"a": 1.0, "b": 1.0}

    @property
    def active_adapter(self) -> list[str]:
        return self._active

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    def forward(self, states: Tensor) -> Tensor:
        output = self.base(states)
        for name in [] if self._disabled else self._active:
            output = output + self.scaling[name] * self.adapters[name](states)
        return output


@torch.no_grad()
def test_other_adapters_never_use_an_entry() -> None:
    tiny, store = tiny_model("llava"), PrefixStore(ROOMY)
    block = tiny.model.model.language_model.layers[0].mlp
    block.up_proj = adapted = Adapted(block.up_proj)
    clean = tiny.prompts(1)
    first = prefilled(tiny.model, clean, store)[1]
    seen = [first]
    for change in (
        lambda: setattr(adapted, "_active", ["b"]),
        lambda: adapted.scaling.update(b=0.5),
        lambda: setattr(adapted, "_disabled", True),
    ):
        change()
        seen.append(prefilled(tiny.model, clean, store)[1])
        assert (store.hits, store.misses) == (0, 2)
        assert (seen[-1] - seen[-2]).abs().max() > 0.01
        assert_same(tiny.model, clean, store)
        store = PrefixStore(ROOMY)
        prefilled(tiny.model, clean, store)
    adapted._active, adapted._disabled, adapted.scaling = ["a"], False, {"a": 1.0, "b": 1.0}
    torch.testing.assert_close(prefilled(tiny.model, clean, store)[1], first, rtol=0, atol=TOLERANCE)


def test_entries_belong_to_one_model_one_namespace_and_one_kind_of_cache() -> None:
    tiny, store = model_of("llava"), PrefixStore(ROOMY)
    clean = tiny.prompts(1)
    prefilled(tiny.model, clean, store)
    twin = tiny_model("llava")
    prefilled(twin.model, clean, store)
    assert (store.hits, store.misses) == (0, 2)
    other = store.in_namespace("tenant")
    prefilled(tiny.model, clean, other)
    assert (other.hits, other.misses, len(store)) == (0, 3, 3)
    prefilled(tiny.model, clean, other)
    prefilled(tiny.model, clean, store)
    assert (store.hits, store.misses) == (2, 3)
    first, second = (store.keys(tiny.model, kind, [[1, 2, 3]]) for kind in ("DynamicCache", "OtherCache"))
    assert first is not None and second is not None and first != second
    shorter = store.keys(tiny.model, "DynamicCache", [[1, 2]])
    assert shorter is not None and shorter[0] != first[0]
    # What belongs to a model that is gone makes room at the next occasion.
    before = len(store)
    del twin
    gc.collect()
    prefilled(tiny.model, tiny.prompts(1, seed=5), store)
    assert len(store) == before


def test_the_least_recently_used_entry_goes_first_and_memory_is_bounded() -> None:
    tiny = model_of("llava")
    prompts = [tiny.prompts(1, seed=seed) for seed in range(1, 5)]
    measure = PrefixStore(ROOMY)
    prefilled(tiny.model, prompts[0], measure)
    size = measure.bytes
    layers, heads, width = 3, 2, 16
    assert size == layers * 2 * heads * width * 4 * int((prompts[0]["input_ids"] == IMAGE).int().argmax())
    store = PrefixStore(3 * size)
    for index in (0, 1, 2, 0, 3):  # 1 has not been used for longest when 3 comes
        prefilled(tiny.model, prompts[index], store)
        assert store.bytes <= store.max_bytes
    assert (len(store), store.bytes, store.hits) == (3, 3 * size, 1)
    for index, hits in ((2, 2), (0, 3), (3, 4), (1, 4)):
        prefilled(tiny.model, prompts[index], store)
        assert store.hits == hits
    too_small = PrefixStore(size - 1)
    assert_same(tiny.model, prompts[0], too_small)
    assert (len(too_small), too_small.bytes) == (0, 0)
    store.clear()
    assert (len(store), store.bytes) == (0, 0)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "1 GB"])
def test_a_size_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_bytes must be a positive integer"):
        PrefixStore(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_column_of_an_image_or_behind_it_is_refused(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    prompt = Prompt(tiny.model, clean, None)
    for row, ids in enumerate(clean["input_ids"].tolist()):
        first = ids.index(IMAGE)
        assert prompt.text_columns[row] == first
        assert prefix_ids(prompt, row, first) == [token for token in ids[:first] if token]
        for columns in (first + 1, len(ids)):
            with pytest.raises(ValueError, match=f"columns={columns} of row {row} reach to its image"):
                prefix_ids(prompt, row, columns)


def test_what_cannot_be_kept_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    blip, store = model_of("instructblip"), PrefixStore(ROOMY)
    branches, _ = prefilled(blip.model, blip.prompts(1), store)
    assert branches.prefilled.endswith("nothing stored: no text stands before the image")
    tiny = tiny_model("llava")
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "llava", Family("LLaVA"))
        assert "has not been shown that storing" in prefilled(tiny.model, tiny.prompts(1), store)[0].prefilled
    with monkeypatch.context() as patch:
        text = tiny.model.config.get_text_config(decoder=True)
        patch.setattr(text, "sliding_window", 8, raising=False)
        assert "sliding window" in prefilled(tiny.model, tiny.prompts(1), store)[0].prefilled
    with torch.inference_mode():
        layer = tiny.model.model.language_model.layers[0].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        assert "do not tell when they change" in prefilled(tiny.model, tiny.prompts(1), store)[0].prefilled
    assert len(store) == 0


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_answers_equal_those_without_a_store(name: str) -> None:
    store = PrefixStore(ROOMY)
    kept, plain = front_door(name, prefix_store=store, judge="self"), front_door(name, judge="self")
    requests = [{"image": picture(seed), "prompt": PROMPT, "seed": seed} for seed in range(3)]
    for batch_size in (1, 3):
        ours = kept.chat_batch(requests, batch_size=batch_size, max_new_tokens=6)
        wanted = plain.chat_batch(requests, batch_size=batch_size, max_new_tokens=6)
        for mine, theirs in zip(ours, wanted, strict=True):
            assert mine.error is None and theirs.error is None
            assert_tokens(mine, theirs)
            assert mine.verdict.p_unsafe == pytest.approx(theirs.verdict.p_unsafe, abs=1e-4)
    assert (len(store), store.misses) == (1, 1)
    assert "1 prefixes" in kept.explain()["prefill"]
    assert "side by side" in plain.explain()["prefill"]


def assert_tokens(mine: Any, theirs: Any) -> None:
    """The same tokens, or a first difference at two tokens of the same probability."""
    for step, (ours, wanted) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=True)):
        if ours != wanted:
            close = abs(mine.record[step].p_steered - theirs.record[step].p_steered) < MIN_GAP
            assert close, f"step {step}: {ours} and {wanted}"
            return


def test_a_store_is_off_by_default_and_must_be_one() -> None:
    assert front_door()._answerer.prefix_store is None
    with pytest.raises(ConfigError, match=r"prefix_store must be a PrefixStore, got int"):
        SafeCoDe(front_door().model, front_door().processor, config=CONFIG, prefix_store=2**28)  # type: ignore[arg-type]
