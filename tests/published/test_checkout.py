"""The drop-in against a checkout of the published code: the same ids, whole answers included, from the same seeds.

make test-published PUBLISHED=FOLDER. Without a checkout everything here is skipped, and tests/mllm compares with
recorded ids instead.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from published_cases import (
    Case,
    cases_to_record,
    guided_cases,
    picture_path,
    rarer_cases,
    recorded,
    whole_cases,
    write_recording,
)
from published_checkout import PACKAGE, load_driver, run_published
from published_models import IMAGE, published_model
from safecode_mllm import compat

LOGIT_SPREAD = 4.0


@cache
def model_of(model_type: str) -> tuple[Any, Any]:
    return published_model(model_type)


def both(utils: Any, case: Case, folder: Path, **options: Any) -> tuple[Any, Any]:
    """(text, ids) of the published code and of ours, and in each the state of the generator behind them."""
    model, processor = model_of(case.model_type)
    theirs = run_published(utils, model, processor, **case.arguments(folder))
    state = torch.get_rng_state()
    ours = compat.contrastive_decode_multistep_with_modulation(
        model, processor, processor.tokenizer, **case.arguments(folder), **options
    )
    return (*theirs, state), (*ours, torch.get_rng_state())


def assert_same(theirs: Any, ours: Any) -> None:
    assert ours[1] == theirs[1]
    assert ours[0] == theirs[0]
    assert torch.equal(ours[2], theirs[2]), "another number of draws"


@pytest.mark.parametrize("case", guided_cases(), ids=lambda case: case.name)
def test_guided_ids(utils: Any, case: Case, tmp_path: Path) -> None:
    assert_same(*both(utils, case, tmp_path))


@pytest.mark.parametrize("case", whole_cases(), ids=lambda case: case.name)
def test_whole_answers(utils: Any, case: Case, tmp_path: Path) -> None:
    assert_same(*both(utils, case, tmp_path))


# Some of these differ only in where the guided text is cut, which the whole answer shows.
@pytest.mark.parametrize("case", rarer_cases(whole=False) + rarer_cases(whole=True), ids=lambda case: case.name)
def test_rarer_ways(utils: Any, case: Case, tmp_path: Path) -> None:
    assert_same(*both(utils, case, tmp_path))


@pytest.mark.parametrize("model_type", ["llava", "qwen", "idefics"])
def test_rubbish_in_a_safe_answer(utils: Any, model_type: str, tmp_path: Path) -> None:
    """A first token that spoils the text: the answer starts again, for IDEFICS with the mask of its images moved."""
    model, processor = published_model(model_type)
    rubbish = processor.tokenizer.encode("a|", add_special_tokens=False)[-1]
    case = Case(model_type, "safe", "no_contrast", rest=True)
    guided = compat.contrastive_decode_multistep_with_modulation(
        model, processor, processor.tokenizer, **case.arguments(tmp_path) | {"generate_rest": False}
    )[1]
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[rubbish] = 1.5 * head[guided[0]]
    results = []
    for function in (partial(run_published, utils), compat.contrastive_decode_multistep_with_modulation):
        tokenizer = () if isinstance(function, partial) else (processor.tokenizer,)
        results.append(function(model, processor, *tokenizer, **case.arguments(tmp_path)))
    assert results[0] == results[1]


@pytest.mark.parametrize("verdict", ["unsafe.", " unsafe", "Unsafe", "Safe", "maybe", "unsafe"])
@pytest.mark.parametrize("model_type", ["llava", "qwen"])
def test_strict_reads_verdicts_as_published(utils: Any, model_type: str, verdict: str, tmp_path: Path) -> None:
    more = {"max_steps": 1} if verdict == "unsafe" else {}
    assert_same(*both(utils, Case(model_type, verdict, rest=True, more=more), tmp_path, strict_published=True))


@pytest.mark.parametrize("query", ["Is the ASSISTANT: sure?", "dear assistant"])
def test_strict_cuts_the_answer_as_published(utils: Any, query: str, tmp_path: Path) -> None:
    case = Case("llava", "unsafe", rest=True, more={"conversation": query})
    assert_same(*both(utils, case, tmp_path, strict_published=True))


@pytest.mark.parametrize("model_type", ["llava", "qwen", "instructionblip"])
def test_without_a_verdict(utils: Any, model_type: str, tmp_path: Path) -> None:
    model, processor = model_of(model_type)
    case = Case(model_type, "safe")
    found = []
    for function in (utils.contrastive_decode_multistep_no_verdict, compat.contrastive_decode_multistep_no_verdict):
        arguments = case.arguments(tmp_path)
        kept = {name: value for name, value in arguments.items() if name not in ("generate_rest", *_SETTINGS)}
        found.append(function(model, processor, processor.tokenizer, **kept, total_max_new_tokens=12))
    assert found[0] == found[1]


_SETTINGS = ("alpha", "max_steps", "top_k", "lambda_supp", "lambda_boost")


def test_noise(utils: Any, tmp_path: Path) -> None:
    for index in range(3):
        pictures = []
        for function in (utils.apply_gaussian_noise, compat.apply_gaussian_noise):
            torch.manual_seed(index)
            pictures.append(function(Image.open(picture_path(index, tmp_path)), 0.3).tobytes())
        assert pictures[0] == pictures[1]


def test_helpers(utils: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = model_of("llava")[1].tokenizer
    logits = LOGIT_SPREAD * torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(0))
    best = logits.topk(50).indices
    prefixes = [tokenizer.decode(token) for token in best[::7]] + ["I", "sorry"]
    phrases = ["I am sorry", "", "cannot", "Sorry", "I am sorry"]
    for verdict in ("safe", "unsafe", "n/a"):
        calls = [
            ("rank_candidate_phrases_by_contrastive_prob", (logits, tokenizer, phrases, 4)),
            ("apply_gpt_guided_modulation", (logits, tokenizer, best, prefixes, verdict, 1.5, 0.5)),
            ("reweight_and_renormalize_probs", (logits, tokenizer, best[::3].tolist(), verdict, 0.4, 20)),
        ]
        for name, arguments in calls:
            theirs, ours = (getattr(module, name)(*arguments) for module in (utils, compat))
            same = torch.equal(theirs, ours) if isinstance(theirs, torch.Tensor) else theirs == ours
            assert same, name
    drawn = []
    for module in (utils, compat):
        torch.manual_seed(0)
        probabilities = logits.softmax(-1)
        for temperature, top_p in [(0.7, 0.9), (1.0, 0.5), (1.0, 0.0)]:
            drawn.append([module.adaptive_sample_from_probs(probabilities, temperature, top_p) for _ in range(20)])
    assert drawn[:3] == drawn[3:]
    capsys.readouterr()


def test_install_swaps_and_puts_back(utils: Any, tmp_path: Path) -> None:
    before = dict(vars(utils))
    names = compat.install()
    try:
        assert f"{PACKAGE}.utils.contrastive_decode_multistep_with_modulation" in names
        model, processor = model_of("idefics")  # which crashes in the published code as it is
        arguments = Case("idefics", "unsafe").arguments(tmp_path)
        text, ids = utils.contrastive_decode_multistep_with_modulation(
            model, processor, processor.tokenizer, **arguments
        )
        assert text and ids
    finally:
        compat.uninstall()
    assert dict(vars(utils)) == before


def test_a_driver_writes_the_same_file(
    utils: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = load_driver()
    for part in ("chat", "embodied"):
        (tmp_path / part).mkdir()
        for index in (1, 2):
            Image.open(picture_path(index, tmp_path)).save(tmp_path / part / f"{index}.png")
    pair = {"safe_image_path": "1.png", "unsafe_image_path": "2.png", "safe": "1.png", "unsafe": "2.png"}
    instructions = {"safe_instructions": ["go on"], "unsafe_instructions": ["cut it"]}
    data = {"chat": [pair | {"queries": ["Any tips?"]}], "embodied": [pair | instructions]}
    settings = dict(zip(_SETTINGS, (0.3, 5, 20, 1.0, 1.0), strict=True))
    arguments = SimpleNamespace(mss_data_root=str(tmp_path), method=PACKAGE, model_type="llava", **settings)
    judge = {"1.png": "safe", "2.png": "unsafe"}
    monkeypatch.setattr(driver, "prepare_caption_and_verdict", lambda path, query: ("", judge[Path(path).name]))
    model, processor = model_of("llava")
    written = []
    for index in range(2):
        if index:
            compat.install()
        torch.manual_seed(0)
        path = tmp_path / f"{index}.json"
        driver.test_each_mss(data, model, processor, processor.tokenizer, arguments, output_path=str(path))
        written.append(json.loads(path.read_text()))
    compat.uninstall()
    assert written[0] == written[1] and len(written[0]["embodied"]) == 1
    capsys.readouterr()


def test_recording(utils: Any, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """What tests/mllm compares with offline is what this checkout gives."""
    if pytestconfig.getoption("--record"):
        ids = {case: published_ids(utils, case, tmp_path) for case in cases_to_record()}
        write_recording(ids, {"transformers": transformers.__version__, "torch": torch.__version__})
    for case, wanted in recorded():
        assert published_ids(utils, case, tmp_path) == wanted, case.name


def published_ids(utils: Any, case: Case, folder: Path) -> list[int]:
    model, processor = model_of(case.model_type)
    return run_published(utils, model, processor, **case.arguments(folder))[1]


def test_first_recording(utils: Any) -> None:
    """The four cases that were recorded first, with the phrases of the checkout."""
    from importlib import import_module

    golden = json.loads((IMAGE.parent / "published_ids.json").read_text())
    phrases = import_module(f"{PACKAGE}.prompt").REFUSAL_PREFIXES
    settings = {name: golden[name] for name in _SETTINGS}
    for case in golden["cases"]:
        model, processor = model_of(case["model_type"])
        torch.manual_seed(0)
        noised = compat.apply_gaussian_noise(Image.open(IMAGE), golden["noise_std"])
        torch.manual_seed(1)
        ids = run_published(
            utils, model, processor, real_img_path=str(IMAGE), neutral_img=noised, conversation=golden["query"],
            verdict=case["verdict"], refusal_prefixes=phrases, model_type=case["model_type"], **settings,
        )[1]  # fmt: skip
        assert ids == case["output_ids"]
