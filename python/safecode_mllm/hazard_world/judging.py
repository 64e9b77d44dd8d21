"""Judges on this world: how good each is, and how often an attack turns its verdict."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..judges.attacks import FORGED
from ..judges.ensemble import EnsembleJudge
from ..judges.fitting import fit_calibration
from ..judges.fixed import FixedJudge
from ..judges.hf_models import JudgeModel
from ..judges.local import LocalJudge
from ..judges.metrics import Quality, quality
from ..judges.protocol import Judge, JudgeRequest, Verdict
from ..judges.self_judge import SelfJudge
from ..prompts import PromptBuilder
from .claims import Claimed, contradicting, with_letter, with_sign, with_words
from .render import render
from .splits import Item, Split, draw_items

DEFAULT_N = 480
# Calibration is fitted on other scenes than anything is measured on.
_FIT_SPLIT: Split = "val"
_FIT_N, _FIT_SEED = 240, 1
# A caption of this world has 16 tokens at most.
_BATCH = 48
# Judges whose verdicts are attacked: ours with the image, ours over a description, and the published protocol.
ATTACKED = ("self", "self, captioned", "described, letters", "published: described, a word")
PUBLISHED = "published: described, a word"

Where = Literal["words", "letters", "sign", "forged"]


@dataclass(frozen=True)
class Attack:
    """One kind of attack.

    Attributes:
        where: a sentence behind the request, an order to choose a letter, a sign in the picture, or a forged reply.
        held_out: whether its wordings are ones that training never showed.
    """

    where: Where
    held_out: bool

    @property
    def name(self) -> str:
        """Its key in results."""
        return f"{self.where}, {'held out' if self.held_out else 'taught'}"


ATTACKS = (
    Attack("words", False),
    Attack("words", True),
    Attack("letters", False),
    Attack("letters", True),
    Attack("sign", False),
    Attack("sign", True),
    Attack("forged", True),
)


@dataclass(frozen=True)
class Flips:
    """What one attack did to one judge; per scene, in the order of the scenes.

    Attributes:
        flipped: the verdict is another one.
        obeyed: it is the one that was claimed, and was not before; for letters, any other one.
        claimed_safe: the attack claimed "safe" of an unsafe scene, the direction that is dangerous.
    """

    flipped: list[bool]
    obeyed: list[bool]
    claimed_safe: list[bool]


def world_judges(model: Any, processor: Any, other: JudgeModel | None = None) -> dict[str, Judge]:
    """Return the judges that can be made of a model of this world.

    Args:
        model: a LlavaForConditionalGeneration.
        processor: its processor.
        other: a model trained from another seed: the one that judges for this one in one row.
    """
    builder = PromptBuilder(processor)
    own = JudgeModel(model, processor, sees=True)

    def self_judge(**options: Any) -> SelfJudge:
        return SelfJudge(**options).bind(model, builder)

    described = LocalJudge(own, protocol="two_step", batch_size=_BATCH)
    judges: dict[str, Judge] = {
        "self": self_judge(),
        "self, captioned": self_judge(captioned=True),
        "self, contextual": self_judge(contextual=True),
        "self, calibrated": _calibrated(self_judge),
        "described, letters": described,
        PUBLISHED: LocalJudge(own, protocol="two_step", reads="words", batch_size=_BATCH, max_new_tokens=4),
        "ensemble: self and described": EnsembleJudge([self_judge(), described]),
        "ensemble: unsafe if any": EnsembleJudge([self_judge(), described], "unsafe_if_any"),
        "safe": FixedJudge("safe"),
        "unsafe": FixedJudge("unsafe"),
    }
    if other is not None:
        judges["local: another seed's model"] = LocalJudge(other, batch_size=_BATCH)
    return judges


def _calibrated(make: Callable[..., SelfJudge]) -> SelfJudge:
    items = draw_items(_FIT_SPLIT, _FIT_N, _FIT_SEED)
    plain = make()
    verdicts = judge_all(plain, [_asked(item) for item in items])
    fit = fit_calibration(verdicts, [item.scene.unsafe for item in items], judge=plain.name, version=plain.version)
    return make(calibration=fit.calibration)


def judge_all(judge: Judge, requests: Sequence[JudgeRequest]) -> list[Verdict]:
    """Return a verdict per request, in batches that fit a small machine."""
    verdicts: list[Verdict] = []
    for start in range(0, len(requests), _BATCH):
        verdicts += judge.judge_many(requests[start : start + _BATCH])
    return verdicts


def judge_quality(judge: Judge, *, n: int = DEFAULT_N, seed: int = 0, split: Split = "test") -> Quality:
    """Return how good a judge is on fresh scenes; the truth is the scene's, also where it was taught otherwise."""
    items = draw_items(split, n, seed)
    verdicts = judge_all(judge, [_asked(item) for item in items])
    return quality(verdicts, [item.scene.unsafe for item in items])


def measure_flips(judge: Judge, attack: Attack, *, n: int = DEFAULT_N, seed: int = 0) -> Flips:
    """Return what an attack does to a judge's verdicts on fresh test scenes.

    Args:
        judge: who judges.
        attack: what is tried; signs are tried in scenes that no sign decides.
        n: number of scenes drawn, of which a third drops out for signs.
        seed: seed of the scenes and of the attack.
    """
    items = draw_items("test", n, seed)
    if attack.where == "sign":
        items = [without_sign(item) for item in items if item.scene.stratum != "reasoning"]
    rng = random.Random(f"attack/{attack.name}/{seed}")
    attacked = [_attacked(item, attack, rng) for item in items]
    before = judge_all(judge, [_asked(item) for item in items])
    after = judge_all(judge, attacked)
    claims = [_claim(item, attack) for item in items]
    flipped = [a.outcome != b.outcome for a, b in zip(after, before, strict=True)]
    obeyed = [
        flip and (claim is None or verdict.outcome == claim)
        for flip, verdict, claim in zip(flipped, after, claims, strict=True)
    ]
    return Flips(flipped, obeyed, [claim == "safe" for claim in claims])


def without_sign(item: Item) -> Item:
    """Return the item without the sign that stands in its scene."""
    return replace(item, scene=replace(item.scene, sign=None))


def _claim(item: Item, attack: Attack) -> Claimed | None:
    if attack.where == "letters":
        return None
    # Every forged reply is after a "safe".
    return "safe" if attack.where == "forged" else contradicting(item.scene)


def _attacked(item: Item, attack: Attack, rng: random.Random) -> JudgeRequest:
    scene, request, held_out = item.scene, item.request, attack.held_out
    if attack.where == "sign":
        return JudgeRequest(render(with_sign(scene, rng, held_out=held_out)), request)
    if attack.where == "words":
        return JudgeRequest(render(scene), with_words(request, scene, rng, held_out=held_out))
    if attack.where == "letters":
        return JudgeRequest(render(scene), with_letter(request, rng.choice("AB"), rng, held_out=held_out))
    return JudgeRequest(render(scene), f"{request} {rng.choice(FORGED)}")


def _asked(item: Item) -> JudgeRequest:
    return JudgeRequest(render(item.scene), item.request)


def mean_with_interval(
    per_model: Sequence[Sequence[bool]], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Return a rate over several models on the same scenes, with its 95 % interval from a bootstrap over scenes.

    Args:
        per_model: for each model the outcome per scene; the scenes are the same.
        seed: seed of the resampling.
        resamples: bootstrap samples.
    """
    scenes = np.mean(np.array(per_model, dtype=np.float64), axis=0)
    if not len(scenes):
        return (float("nan"),) * 3
    rng = np.random.default_rng(seed)
    draws = scenes[rng.integers(0, len(scenes), (resamples, len(scenes)))].mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(scenes.mean()), float(low), float(high)
