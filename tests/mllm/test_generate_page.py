"""docs/generate.md is true: its examples run, in order, on the small model that ships with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from safecode_mllm.hazard_world.paths import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "generate.md").read_text()
HUB_ID, OWN_PICTURE = '"llava-hf/llava-1.5-7b-hf"', '"kitchen.jpg"'


def sections() -> dict[str, list[str]]:
    """The python blocks of each section, by its title."""
    parts = re.split(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)[1:]
    found = {
        title: re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }
    return {title: blocks for title, blocks in found.items() if blocks}


FIRST, *OTHERS = sections()


def test_every_habit_has_an_example() -> None:
    assert len(OTHERS) == 9
    examples = "".join(block for blocks in sections().values() for block in blocks)
    habits = """custom_generate=RECIPE pipeline( SafeCoDeLogitsProcessor( TextIteratorStreamer( stop_strings= max_time=
        bad_words_ids= prefix_allowed_tokens_fn= generation_config.safecode return_dict_in_generate= output_scores=
        output_logits= num_return_sequences= seed= noised= requests= verdict="""
    for habit in habits.split():
        assert habit in examples, habit


@pytest.mark.parametrize("title", OTHERS)
def test_examples_run(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    names: dict[str, Any] = {}
    (setup,) = sections()[FIRST]
    assert setup.count(HUB_ID) == 2 and setup.count(OWN_PICTURE) == 1
    scene = ROOT / "docs" / "images" / "scene.png"
    exec(setup.replace(HUB_ID, repr(str(WEIGHTS))).replace(OWN_PICTURE, repr(str(scene))), names)
    for block in sections()[title]:
        exec(block, names)
    if "output" in names:
        output = names["output"]
        assert getattr(output, "sequences", output).shape[1] > names["inputs"]["input_ids"].shape[1]
    else:
        assert capsys.readouterr().out.strip()
