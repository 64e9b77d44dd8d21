"""Splits share neither combinations nor wordings; the same scene always gives the same pixels."""

from __future__ import annotations

import dataclasses
from itertools import combinations as pairs_of

import numpy as np
import pytest

from safecode_mllm.hazard_world.render import SIZE, render
from safecode_mllm.hazard_world.scenes import ACTIVITIES, OBJECTS, PLACES, Scene
from safecode_mllm.hazard_world.splits import SPLITS, combinations, draw_items, wordings


@pytest.mark.parametrize(("first", "second"), list(pairs_of(SPLITS, 2)))
def test_no_combination_and_no_wording_is_in_two_splits(first: str, second: str) -> None:
    for name in ACTIVITIES:
        for unsafe in (False, True):
            assert not set(combinations(first)[name, unsafe]) & set(combinations(second)[name, unsafe])
        assert not set(wordings(first)[name]) & set(wordings(second)[name])


@pytest.mark.parametrize("split", SPLITS)
def test_items_stay_inside_their_split(split: str) -> None:
    for item in draw_items(split, 300, 7):
        scene = item.scene
        assert (scene.place, scene.object) in combinations(split)[scene.activity, scene.unsafe]
        assert item.request in wordings(split)[scene.activity]


@pytest.mark.parametrize("split", SPLITS)
def test_every_deciding_value_occurs_in_every_split(split: str) -> None:
    for name, activity in ACTIVITIES.items():
        if activity.evidence == "sign":
            continue
        column = 0 if activity.evidence == "place" else 1
        for unsafe, values in ((False, activity.safe), (True, activity.unsafe)):
            assert {pair[column] for pair in combinations(split)[name, unsafe]} == set(values)


def test_draws_are_balanced_and_follow_their_seed() -> None:
    items = draw_items("test", 240, 5)
    assert items == draw_items("test", 240, 5)
    assert items != draw_items("test", 240, 6)
    for name in ACTIVITIES:
        truths = [item.scene.unsafe for item in items if item.scene.activity == name]
        assert sum(truths) * 2 == len(truths) == 240 / len(ACTIVITIES)


def test_rendering_is_deterministic() -> None:
    for item in draw_items("val", 60, 1):
        first, second = np.asarray(render(item.scene)), np.asarray(render(item.scene))
        assert first.shape == (SIZE, SIZE, 3)
        assert np.array_equal(first, second)


@pytest.mark.parametrize("change", [{"place": "lab"}, {"object": "dog"}, {"sign": "SAFE"}, {"dusk": True}])
def test_every_part_of_a_scene_is_visible(change: dict[str, object]) -> None:
    scene = Scene("run", "park", "ball", "STOP", dusk=False, layout_seed=11)
    before = np.asarray(render(scene), dtype=float)
    after = np.asarray(render(dataclasses.replace(scene, **change)), dtype=float)
    changed = (np.abs(before - after).max(-1) > 30).sum()
    assert changed > 10, "more than the grain must change"


def test_all_places_and_objects_look_different() -> None:
    scene = Scene("run", "park", "ball", None, dusk=False, layout_seed=11)
    looks = [render(dataclasses.replace(scene, place=p, object=o)).tobytes() for p in PLACES for o in OBJECTS]
    assert len(set(looks)) == len(PLACES) * len(OBJECTS)
