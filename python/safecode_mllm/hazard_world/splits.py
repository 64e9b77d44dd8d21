"""Who may see what: train, validation and test differ in (activity, place, object) combinations and in wordings."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

from .language import REQUEST_TEMPLATES, request_text
from .scenes import ACTIVITIES, DUSK_SHARE, OBJECTS, PLACES, SAFE_SIGNS, TAUGHT_CLAIMS, WARNING_SIGNS, Scene

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
# The split itself is part of the world, so it does not follow the training seed.
_SPLIT_SEED = 20250919
_HELD_OUT_COMBINATIONS = 0.15
_HELD_OUT_WORDINGS = 4
# In scenes whose safety does not hang on it, a sign is a distractor.
_DISTRACTOR_SIGN_SHARE = 0.3
# Training sees signs that only claim something too; whatever a distractor says, the scene's own label stands.
_DISTRACTORS = SAFE_SIGNS + WARNING_SIGNS
_TAUGHT_DISTRACTORS = _DISTRACTORS + TAUGHT_CLAIMS["safe"] + TAUGHT_CLAIMS["unsafe"]
# A bear beside the track would make "safe to run" hard to defend: dangerous animals appear only where they decide.
_BYSTANDERS = tuple(thing for thing in OBJECTS if thing not in ("snake", "bear"))


@dataclass(frozen=True)
class Item:
    """One scene and one request about it."""

    scene: Scene
    request: str


@cache
def combinations(split: Split) -> dict[tuple[str, bool], tuple[tuple[str, str], ...]]:
    """Return the (place, object) pairs of a split per (activity, unsafe).

    Sign activities are safe or unsafe with every pair, so both truths share their pairs. Every deciding value
    (a safe place, an unsafe object, ...) occurs in every split: what is held out is what it occurs together with.
    """
    table: dict[tuple[str, bool], tuple[tuple[str, str], ...]] = {}
    for name, activity in ACTIVITIES.items():
        rng = random.Random(f"{_SPLIT_SEED}/{name}")
        if activity.evidence == "sign":
            pairs = _share([(place, thing) for place in PLACES for thing in _BYSTANDERS], split, rng)
            table[name, False] = table[name, True] = tuple(pairs)
            continue
        for unsafe, values in ((False, activity.safe), (True, activity.unsafe)):
            chosen: list[tuple[str, str]] = []
            for value in values:
                place_decides = activity.evidence == "place"
                others = [(value, thing) for thing in _BYSTANDERS] if place_decides else [(p, value) for p in PLACES]
                chosen.extend(_share(others, split, rng))
            table[name, unsafe] = tuple(chosen)
    return table


@cache
def wordings(split: Split) -> dict[str, tuple[str, ...]]:
    """Return the requests of a split per activity; every template and every phrase also occurs in train."""
    table: dict[str, tuple[str, ...]] = {}
    for name, activity in ACTIVITIES.items():
        rng = random.Random(f"{_SPLIT_SEED}/wordings/{name}")
        n_phrases = len(activity.phrases)
        grid = [(template, phrase) for template in range(len(REQUEST_TEMPLATES)) for phrase in range(n_phrases)]
        # The diagonal stays in train: it covers every template and every phrase.
        kept = [(template, phrase) for template, phrase in grid if template % n_phrases == phrase]
        rest = [pair for pair in grid if pair not in kept]
        rng.shuffle(rest)
        held = {"test": rest[:_HELD_OUT_WORDINGS], "val": rest[_HELD_OUT_WORDINGS : 2 * _HELD_OUT_WORDINGS]}
        held["train"] = kept + rest[2 * _HELD_OUT_WORDINGS :]
        table[name] = tuple(request_text(name, template, phrase) for template, phrase in held[split])
    return table


def draw_item(split: Split, rng: random.Random, activity: str | None = None, unsafe: bool | None = None) -> Item:
    """Draw one scene and one request of a split; activity and truth may be given."""
    name = activity or rng.choice(list(ACTIVITIES))
    truth = rng.random() < 0.5 if unsafe is None else unsafe
    place, thing = rng.choice(combinations(split)[name, truth])
    by_sign = ACTIVITIES[name].evidence == "sign"
    sign: str | None = None
    if by_sign:
        sign = rng.choice(WARNING_SIGNS if truth else SAFE_SIGNS)
    elif rng.random() < _DISTRACTOR_SIGN_SHARE:
        sign = rng.choice(_TAUGHT_DISTRACTORS if split == "train" else _DISTRACTORS)
    dusk = not by_sign and rng.random() < DUSK_SHARE
    scene = Scene(name, place, thing, sign, dusk, rng.randrange(2**31))
    return Item(scene, rng.choice(wordings(split)[name]))


def draw_items(split: Split, n: int, seed: int) -> list[Item]:
    """Draw n fresh items: activities take turns and each is as often safe as unsafe.

    Args:
        split: whose combinations and wordings are used.
        n: number of items.
        seed: the same seed gives the same items.

    Returns:
        The items, safe and unsafe alternating.
    """
    rng = random.Random(f"{split}/{seed}")
    names = list(ACTIVITIES)
    return [draw_item(split, rng, names[(i // 2) % len(names)], unsafe=bool(i % 2)) for i in range(n)]


def _share(pairs: list[tuple[str, str]], split: Split, rng: random.Random) -> list[tuple[str, str]]:
    """Shuffle the pairs and return the split's part of them; each held-out part has at least one."""
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    held = max(1, round(len(shuffled) * _HELD_OUT_COMBINATIONS))
    parts = {"test": shuffled[:held], "val": shuffled[held : 2 * held], "train": shuffled[2 * held :]}
    return parts[split]
