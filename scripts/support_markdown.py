"""The support table as Markdown, from docs/support.json."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each row is, in the order of the table: title, class of transformers.
ROWS = {
    "llava": ("LLaVA 1.5", "LlavaForConditionalGeneration"),
    "llava_next": ("LLaVA-NeXT", "LlavaNextForConditionalGeneration"),
    "qwen2_vl": ("Qwen2-VL", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3-VL", "Qwen3VLForConditionalGeneration"),
    "instructblip": ("InstructBLIP", "InstructBlipForConditionalGeneration"),
    "idefics": ("IDEFICS v1", "IdeficsForVisionText2Text"),
    "idefics3": ("Idefics3", "Idefics3ForConditionalGeneration"),
    "blip_2": ("BLIP-2 on OPT", "Blip2ForConditionalGeneration"),
    "blip_2_t5": ("BLIP-2 on T5", "Blip2ForConditionalGeneration"),
    "gemma3": ("Gemma 3", "Gemma3ForConditionalGeneration"),
    "idefics2": ("Idefics2", "Idefics2ForConditionalGeneration"),
    "instructblip_t5": ("InstructBLIP on T5", "InstructBlipForConditionalGeneration"),
    "internvl": ("InternVL", "InternVLForConditionalGeneration"),
    "llava_onevision": ("LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration"),
    "mistral3": ("Mistral 3", "Mistral3ForConditionalGeneration"),
    "mllama": ("Mllama (Llama 3.2 Vision)", "MllamaForConditionalGeneration"),
    "paligemma": ("PaliGemma", "PaliGemmaForConditionalGeneration"),
    "pixtral": ("Pixtral", "LlavaForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3-VL MoE", "Qwen3VLMoeForConditionalGeneration"),
    "smolvlm": ("SmolVLM", "SmolVLMForConditionalGeneration"),
}
COLUMNS = {
    "dynamic": "one request", "batch": "batch", "self_judge": "self-judge", "static": "cache of fixed size",
    "packed": "packed prefill",
    "front_door": "`SafeCoDe`",
}  # fmt: skip
# The letters of the reasons in docs/models.md.
EMPTY = {
    ("front_door", "instructblip"): "a", ("front_door", "idefics"): "a", ("front_door", "blip_2"): "a",
    ("front_door", "blip_2_t5"): "a", ("front_door", "instructblip_t5"): "a", ("front_door", "paligemma"): "a",
    ("front_door", "mistral3"): "b", ("front_door", "pixtral"): "b", ("front_door", "smolvlm"): "b",
    ("front_door", "qwen3_vl_moe"): "c",
    ("static", "gemma3"): "e", ("static", "mllama"): "f", ("static", "blip_2_t5"): "g",
    ("static", "instructblip_t5"): "g",
    ("packed", "instructblip"): "h", ("packed", "instructblip_t5"): "h", ("packed", "blip_2"): "h",
    ("packed", "blip_2_t5"): "h",
}  # fmt: skip
# For the other cells of tier 2.
UNTESTED = {"static": "d", "packed": "i"}


def support_table() -> str:
    """Return the table: the versions on which a cell's test passed, or the letter of the reason why there is none."""
    passed = json.loads((ROOT / "docs" / "support.json").read_text())
    versions = sorted(
        (p.stem for p in (ROOT / "tests" / "matrix").glob("*.txt")), key=lambda v: [*map(int, v.split("."))]
    )
    lines = [["family", "class", "tier", *COLUMNS.values()]]
    for family, (title, model_class) in ROWS.items():
        tier = 1 if "static" in passed[family] else 2
        cells = [
            _cell(passed[family].get(mode, []), versions, EMPTY.get((mode, family), UNTESTED.get(mode, "")))
            for mode in COLUMNS
        ]
        lines.append([title, f"`{model_class}`", str(tier), *cells])
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def _cell(found: list[str], versions: list[str], reason: str) -> str:
    return "all" if found == versions else ", ".join(found) if found else f"- ({reason})"
