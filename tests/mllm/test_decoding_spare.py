"""A cache with spare columns holds what a plain one holds, whatever is done to it, and copies no column twice."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from safecode_mllm.decoding import kv, spare
from safecode_mllm.decoding.branches import Branches
from safecode_mllm.decoding.spare import SPARE_COLUMNS, SpareLayer
from tiny_models import FAMILY_NAMES, TinyModel, noised_copy, tiny_model

ROWS, HEADS, WIDTHS = 4, 2, (3, 5)


@cache
def model_of(name: str) -> TinyModel:
    return tiny_model(name)


def states(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values; some models have wider ones."""
    keys, values = (torch.randn(rows, HEADS, columns, width) for width in WIDTHS)
    return keys, values


def filled(rows: int = ROWS, columns: int = 7) -> DynamicCache:
    made = DynamicCache()
    made.update(*states(rows, columns), 0)
    return made


def rows_of(made: Any) -> int:
    return int(made.layers[0].keys.shape[0])


@pytest.mark.parametrize("seed", range(20))
def test_holds_what_a_plain_cache_holds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random operations of the loop and of the drop-in on both, and on forks that are written to and thrown away."""
    monkeypatch.setattr(spare, "SPARE_COLUMNS", 3)
    torch.manual_seed(seed)
    chance = random.Random(seed)
    plain = filled()
    ours = copy.deepcopy(plain)
    kv.spare_columns(ours)
    for _ in range(60):
        rows, length = rows_of(ours), kv.cached_length(ours)
        move = chance.choice(["append"] * 6 + ["fork"] * 2 + ["rewind", "drop", "select", "reorder"])
        if move == "append":
            new = states(rows, chance.choice([1, 1, 1, 2, 5]))
            for one, other in zip(ours.update(*new, 0), plain.update(*new, 0), strict=True):
                assert torch.equal(one, other)
        elif move == "fork":
            fork = kv.fork(ours, [chance.randrange(rows)])
            kv.keep_first_columns(fork, length - chance.randrange(3))
            fork.update(*states(1, chance.choice([1, 4])), 0)
        elif move == "rewind":
            for made in (ours, plain):
                kv.keep_first_columns(made, max(2, length - 2))
        elif move == "drop" and rows > 2:
            for made in (ours, plain):
                kv.keep_first_rows(made, rows - 1)
        elif move == "select":
            index = torch.tensor([chance.randrange(rows) for _ in range(ROWS)])
            for made in (ours, plain):
                kv.select_rows(made, index)
        elif move == "reorder":
            order = torch.randperm(rows)
            for made in (ours, plain):
                made.reorder_cache(order)
        for name in ("keys", "values"):
            assert torch.equal(getattr(ours.layers[0], name), getattr(plain.layers[0], name)), move


def test_columns_are_written_into_the_room_and_moved_when_it_is_full() -> None:
    ours = filled()
    kv.spare_columns(ours)
    places = []
    for _ in range(2 * SPARE_COLUMNS):
        ours.update(*states(ROWS, 1), 0)
        places.append(ours.layers[0].keys.data_ptr())
    # The first update moves, and then each that finds no room.
    assert [place for place, before in zip(places[1:], places, strict=False) if place != before] == [
        places[SPARE_COLUMNS + 1]
    ]


def test_dropped_rows_are_freed_at_the_next_update() -> None:
    ours = filled()
    kv.spare_columns(ours)
    ours.update(*states(ROWS, 1), 0)
    kv.keep_first_rows(ours, 1)
    ours.update(*states(1, 1), 0)
    held = ours.layers[0].keys.untyped_storage().nbytes()
    assert held == HEADS * (7 + 2 + SPARE_COLUMNS) * WIDTHS[0] * 4


@pytest.mark.parametrize("name", FAMILY_NAMES)
@torch.no_grad()
def test_steps_of_every_family_copy_no_column_twice(name: str) -> None:
    tiny = model_of(name)
    clean = tiny.prompts(2, extra=(0, 3))
    branches = Branches(tiny.model, clean, noised_copy(clean), DynamicCache())
    branches.prefill()
    found = []
    for token in range(20, 24):
        branches.step(torch.tensor([token, token + 1]))
        found.append([layer.keys.data_ptr() for layer in branches.cache.layers])
    assert all(type(layer) is SpareLayer for layer in branches.cache.layers)
    assert found[1:] == found[:1] * 3
    kv.check_cache(branches.cache)
