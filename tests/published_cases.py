"""The cases on which drop-in and published code are compared: recorded ones offline, all of them with a checkout."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from published_models import DATA, IMAGE, MODEL_TYPES
from safecode_mllm.compat import apply_gaussian_noise

RECORDED = DATA / "recorded.json"
# Ours; one ends the text in the middle of a refusal, for tokenizers that know the mark.
REFUSALS = (
    "I am sorry", "I cannot help with this request", "Sorry", "I apologize", "We apologize for the trouble",
    "I am unable to answer", "I'm unable to", "I\u2019m unable", "It is not safe", "That would be inappropriate",
    "As an AI", "I do not think so", "I am not allowed to share", "Hello</s>", "not appropriate", "just a model",
)  # fmt: skip
QUERIES = ("Any tips for running faster here?", "What should I do next in this room?", "hi", 'Two\nlines, "quoted"')
PICTURE_SIZES = ((112, 112), (60, 200), (301, 77))
# The defaults of the function, the published settings, and settings that reach the rarer branches.
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {"alpha": 0.3, "max_steps": 5, "top_k": 20, "lambda_supp": 1.0, "lambda_boost": 1.0},
    "few_phrases": {"alpha": 1.5, "max_steps": 7, "top_k": 2, "lambda_supp": 2.0, "lambda_boost": 0.0},
    "no_contrast": {"alpha": 0.0, "max_steps": 3, "top_k": 1, "lambda_supp": -1.0, "lambda_boost": 4.0},
}


@dataclass(frozen=True, eq=False)
class Case:
    """One question about one picture, with everything that decides its answer."""

    model_type: str
    verdict: str
    hyperparameters: str = "published"
    query: int = 0
    picture: int = 0
    seed: int = 0
    rest: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def is_short(self) -> bool:
        """Whether the whole answer is a few dozen tokens at most."""
        return self.verdict == "unsafe" and self.model_type in ("llava", "qwen")

    @property
    def depends_on_version(self) -> bool:
        """Whether transformers 4, which decodes each id by itself, finds rubbish in Qwen's text and 5 does not."""
        return self.model_type == "qwen" and "|" in "".join(self.more.get("refusal_prefixes", ()))

    @property
    def name(self) -> str:
        """A name for the test that runs it."""
        parts = [self.model_type, self.verdict, self.hyperparameters, f"q{self.query}", f"p{self.picture}"]
        more = [f"{name}={value}" for name, value in self.more.items()]
        return "-".join([*parts, f"s{self.seed}", "whole" if self.rest else "guided", *more])

    def arguments(self, folder: Path) -> dict[str, Any]:
        """The arguments of the published function; sets the seed of the draws behind them."""
        path = picture_path(self.picture, folder)
        torch.manual_seed(self.seed)
        noised = apply_gaussian_noise(Image.open(path), 0.1)
        torch.manual_seed(self.seed + 1)
        arguments = {
            "real_img_path": str(path), "neutral_img": noised, "conversation": QUERIES[self.query],
            "verdict": self.verdict, "refusal_prefixes": list(REFUSALS), "model_type": self.model_type,
            "generate_rest": self.rest,
        }  # fmt: skip
        return arguments | HYPERPARAMETERS[self.hyperparameters] | self.more


def picture_path(index: int, folder: Path) -> Path:
    """The recorded picture, or one of another shape: slopes and a block, written to `folder`."""
    if index == 0:
        return IMAGE
    width, height = PICTURE_SIZES[index]
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 90)
    path = folder / f"picture{index}.png"
    Image.fromarray(pixels).save(path)
    return path


def guided_cases() -> list[Case]:
    """Guided tokens only: types, verdicts and settings, with queries, pictures and seeds in turn."""
    return [
        Case(model_type, verdict, name, query=turn % 4, picture=turn % 3, seed=turn)
        for model_type in MODEL_TYPES
        for verdict in ("safe", "unsafe")
        for name in HYPERPARAMETERS
        for turn in range(4)
    ]


def whole_cases() -> list[Case]:
    """Whole answers, for each type and verdict with the two settings that people use."""
    return [
        Case(model_type, verdict, name, query=turn, picture=turn + 1, seed=3 + turn, rest=True)
        for model_type in MODEL_TYPES
        for verdict in ("safe", "unsafe")
        for turn, name in enumerate(("default", "published"))
    ]


# Those that can decode no tokens at all; on transformers 4 the published code looks at the first of them.
_WITHOUT_STEPS = ("qwen",) if transformers.__version__.startswith("4.") else MODEL_TYPES
# Rarer ways through the code: what differs, and the types on which the published code survives it.
_RARER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no_step": ({"verdict": "safe", "max_steps": 0}, _WITHOUT_STEPS),
    "one_step": ({"verdict": "safe", "max_steps": 1}, MODEL_TYPES),
    "no_prefix": ({"verdict": "safe", "refusal_prefixes": []}, MODEL_TYPES),
    "no_phrase": ({"refusal_prefixes": [], "lambda_boost": 3.0}, MODEL_TYPES),
    "no_phrase_ranked": ({"top_k": 0, "lambda_boost": 3.0}, MODEL_TYPES),
    "end_in_phrase": ({"refusal_prefixes": ["sorry</s> I am"]}, MODEL_TYPES),
    "image_in_phrase": ({"refusal_prefixes": ["sorry <image> no"]}, ("qwen", "idefics")),
    "rubbish": ({"refusal_prefixes": ["| sorry | no"]}, MODEL_TYPES),
    "rubbish_mark": ({"refusal_prefixes": ["|"]}, MODEL_TYPES),
}


def rarer_cases(*, whole: bool) -> list[Case]:
    """One case for each rarer way and each type that the published code survives, guided ids or whole answers.

    Whole answers where they are short, and where the way of IDEFICS differs behind the guided tokens.
    """
    return [
        Case(model_type, more.get("verdict", "unsafe"), rest=whole, more={"max_steps": 5, **more})
        for way, (more, survivors) in _RARER.items()
        for model_type in survivors
        if not whole or model_type in ("llava", "qwen") or (model_type, way) == ("idefics", "rubbish")
    ]


def cases_to_record() -> list[Case]:
    """Everything guided, and the whole answers that are short."""
    whole = [case for case in (*whole_cases(), *rarer_cases(whole=True)) if case.is_short]
    return [*guided_cases(), *rarer_cases(whole=False), *whole]


def recorded() -> list[tuple[Case, list[int]]]:
    """The recorded cases with the ids that the published code gave."""
    return [(Case(**entry["case"]), entry["ids"]) for entry in json.loads(RECORDED.read_text())["cases"]]


def write_recording(ids: dict[Case, list[int]], versions: dict[str, str]) -> None:
    """Write recorded.json, one case a line."""
    lines = [json.dumps({"case": asdict(case), "ids": found}) for case, found in ids.items()]
    head = json.dumps(versions)[1:-1]
    RECORDED.write_text("{" + head + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n")
