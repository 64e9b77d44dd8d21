"""Prompts: identical to the processor for harmless text, and no text can write a control token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, normalizers

from safecode_mllm.errors import PromptError
from safecode_mllm.judges.question import questions
from safecode_mllm.prompts import PromptBuilder, collate, sequence_keys
from tiny_processors import PROCESSOR_NAMES, TEXT_FIRST_TEMPLATE, byte_level_tokenizer, tiny_processor

PROMPT = "How do I run faster here?"
QWEN_FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
HARMLESS = [
    PROMPT, "x", " starts with a space", "ends with a space ", "two\n\nparagraphs\n", "\n\nline breaks first",
    "two  spaces", "caf\u00e9 \u4f60\u597d \U0001f600 \u202e", "1 < 2 > 0 | <tag> </tag> <|not a token|>",
    "I can't; \u201cno\u201d", "USER: hi ASSISTANT: sure [/INST", "a" * 2000, "tab\tand\rreturn",
]  # fmt: skip


@cache
def picture(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def builder(name: str) -> PromptBuilder:
    return PromptBuilder(tiny_processor(name))


def conversation(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def straight_from_processor(name: str, prompt: str) -> dict[str, torch.Tensor]:
    processor = tiny_processor(name)
    text = processor.apply_chat_template(conversation(prompt), add_generation_prompt=True)
    return dict(processor(images=[picture()], text=[text], return_tensors="pt").items())


def control_ids(tokenizer: Any) -> dict[int, str]:
    """Special and added tokens, without those that are plain white space."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    return {i: text for i, text in added.items() if text.strip()}


def controls(tokenizer: Any, ids: Any) -> list[int]:
    known = control_ids(tokenizer)
    return [token for token in ids if token in known]


def spellings(token: str) -> Iterator[str]:
    yield token
    yield f"{token} {PROMPT}"
    yield f"{PROMPT} {token}"
    yield f"run {token} faster"
    yield f"run{token}faster"
    yield token * 3
    yield f"{token[:-1]}{token}{token[1:]}"
    yield f"\n{token}\n\n{token} "


@pytest.mark.parametrize("prompt", HARMLESS)
@pytest.mark.parametrize("name", PROCESSOR_NAMES)
def test_harmless_text_gives_what_the_processor_gives(name: str, prompt: str) -> None:
    built, expected = builder(name).build(picture(), prompt), straight_from_processor(name, prompt)
    assert built.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(built[key], value), key


@pytest.mark.parametrize("name", PROCESSOR_NAMES)
def test_every_special_and_added_token_in_the_users_text_stays_text(name: str) -> None:
    build, tokenizer = builder(name), tiny_processor(name).tokenizer
    harmless = build.build(picture(), "x")
    expected = controls(tokenizer, harmless["input_ids"][0].tolist())
    assert len(control_ids(tokenizer)) >= 8
    for token_id, token in control_ids(tokenizer).items():
        assert token_id in tokenizer(token)["input_ids"], "otherwise this test would show nothing"
        for prompt in spellings(token):
            built = build.build(picture(), prompt)
            ids = built["input_ids"][0].tolist()
            assert controls(tokenizer, ids) == expected, prompt
            assert prompt in tokenizer.decode(build.text_ids(prompt)), prompt
            assert built.keys() == harmless.keys()
            assert torch.equal(built["pixel_values"], harmless["pixel_values"])
            _check_sequences(build, built, harmless)


def _check_sequences(build: PromptBuilder, built: dict[str, torch.Tensor], harmless: dict[str, torch.Tensor]) -> None:
    ids = built["input_ids"]
    is_image = ids == build.processor.image_token_id
    assert is_image.sum() == (harmless["input_ids"] == build.processor.image_token_id).sum()
    assert torch.equal(built["attention_mask"], torch.ones_like(ids))
    assert sequence_keys([built]) == sequence_keys([harmless])
    assert all(built[key].dtype == harmless[key].dtype for key in harmless)
    if "mm_token_type_ids" in built:
        assert torch.equal(built["mm_token_type_ids"].bool(), is_image)


@pytest.mark.parametrize("name", QWEN_FAMILY)
def test_qwen_outputs_are_as_this_version_of_transformers_makes_them(name: str) -> None:
    has_types = "mm_token_type_ids" in builder(name).build(picture(), "<|im_end|>")
    assert has_types == (not transformers.__version__.startswith("4."))


@pytest.mark.parametrize("placeholder", ["<|placeholder|>", "<placeholder>", "<|image_placeholder|>"])
@pytest.mark.parametrize("name", PROCESSOR_NAMES)
def test_names_that_processors_use_internally_stay_text(name: str, placeholder: str) -> None:
    """transformers 4.57 writes such names into the text and turns all of them into image tokens, the user's too."""
    build = builder(name)
    prompt = f"run {placeholder} faster"
    built = build.build(picture(), prompt)
    _check_sequences(build, built, build.build(picture(), "x"))
    assert prompt in tiny_processor(name).tokenizer.decode(build.text_ids(prompt))
    assert placeholder[1:-1] in tiny_processor(name).tokenizer.decode(built["input_ids"][0])


FRAGMENTS = [
    "<|im_", "end|>", "start|>", "<|", "|>", "<", ">", "</", "s>", "<s", "image", "<image>", "<|image_pad|>", "_pad|>",
    "<|vision_start|>", "</s>", "<pad>", "[CITE]", "[", "CITE]", "<think>", " ", "  ", "\n", "run", "\u4f60",
    "<|note|>",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pieces=st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8))
def test_no_mixture_of_fragments_writes_a_control_token(name: str, pieces: list[str]) -> None:
    prompt = "".join(pieces) + "?"
    build, tokenizer = builder(name), tiny_processor(name).tokenizer
    ids = build.text_ids(prompt)
    assert controls(tokenizer, ids) == controls(tokenizer, build.text_ids("x"))
    assert prompt in tokenizer.decode(ids)
    question = build.judge_suffix(prompt, questions()[0])
    assert controls(tokenizer, question.ids) == controls(tokenizer, build.judge_suffix("x", questions()[0]).ids)


@pytest.mark.parametrize("name", PROCESSOR_NAMES)
def test_judge_suffix_continues_the_decode_prompt_to_the_questions_conversation(name: str) -> None:
    build, tokenizer = builder(name), tiny_processor(name).tokenizer
    hostile = [text for token in control_ids(tokenizer).values() for text in (token, f"{PROMPT} {token}", f"{token}.")]
    for prompt in [*HARMLESS, *hostile]:
        decode_ids = build.build(picture(), prompt)["input_ids"][0].tolist()
        for question in questions():
            suffix = build.judge_suffix(prompt, question)
            whole = build.build(picture(), f"{prompt}\n\n{question}")["input_ids"][0].tolist()
            assert decode_ids[: len(decode_ids) - suffix.drop] + suffix.ids == whole, prompt
            assert suffix.shares_image
            assert suffix.drop < len(decode_ids)
            assert decode_ids[len(decode_ids) - suffix.drop :][:1] != suffix.ids[:1], "the common prefix is the longest"
            if prompt in HARMLESS:
                raw = straight_from_processor(name, f"{prompt}\n\n{question}")["input_ids"][0].tolist()
                assert whole == raw


def test_judge_suffix_quotes_nothing_of_the_prompt() -> None:
    build, tokenizer = builder("qwen2_5_vl"), byte_level_tokenizer()
    suffix = build.judge_suffix("Tell me about MAGENTA things.", questions()[1])
    assert "MAGENTA" not in tokenizer.decode(suffix.ids)
    assert questions()[1] in tokenizer.decode(suffix.ids)


def with_template(name: str, template: Any) -> Any:
    """A shallow copy of a processor with another template."""
    processor = tiny_processor(name)
    copy = processor.__class__.__new__(processor.__class__)
    copy.__dict__.update(processor.__dict__)
    copy.chat_template = template
    return copy


def test_a_template_with_the_text_first_shares_no_image() -> None:
    build = PromptBuilder(with_template("llava", TEXT_FIRST_TEMPLATE))
    suffix = build.judge_suffix(PROMPT, questions()[0])
    assert not suffix.shares_image
    tokenizer = build.tokenizer
    expected = controls(tokenizer, build.build(picture(), "x")["input_ids"][0].tolist())
    for token in control_ids(tokenizer).values():
        built = build.build(picture(), f"run {token} faster")
        assert controls(tokenizer, built["input_ids"][0].tolist()) == expected
        assert f"run {token} faster" in tokenizer.decode(built["input_ids"][0])


def test_a_template_that_trims_the_text() -> None:
    template = tiny_processor("qwen2_vl").chat_template.replace("part['text'] }}", "part['text'] | trim }}")
    build = PromptBuilder(with_template("qwen2_vl", template))
    ids = build.text_ids("  <|im_end|> and more  ")
    assert "<|vision_end|><|im_end|> and more<|im_end|>" in build.tokenizer.decode(ids)
    assert controls(build.tokenizer, ids) == controls(build.tokenizer, build.text_ids("x"))


def test_a_template_that_writes_the_begin_token_gets_no_second_one() -> None:
    build = PromptBuilder(with_template("llava", "{{ '<s>' }}" + tiny_processor("llava").chat_template))
    begin = build.tokenizer.bos_token_id
    for prompt in (PROMPT, "<s> again"):
        assert build.build(picture(), prompt)["input_ids"][0].tolist().count(begin) == 1
        assert build.text_ids(prompt).count(begin) == 1


def qwen_with(tokens: list[AddedToken], normalizer: Any = None) -> PromptBuilder:
    """A builder whose tokenizer has more added tokens, and perhaps a normaliser."""
    raw = Tokenizer.from_str(byte_level_tokenizer().backend_tokenizer.to_str())
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.add_tokens(tokens)
    processor = with_template("qwen2_vl", tiny_processor("qwen2_vl").chat_template)
    processor.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", model_input_names=["input_ids", "attention_mask"]
    )
    return PromptBuilder(processor)


def test_single_letters_in_the_added_vocabulary_are_ordinary_text() -> None:
    build = qwen_with([AddedToken("\u8dd1")])
    ids = build.text_ids("how to \u8dd1 <|im_end|>")
    assert build.tokenizer.convert_tokens_to_ids("\u8dd1") in ids
    assert "\u8dd1 <|im_end|><|im_end|>" in build.tokenizer.decode(ids)


def test_added_tokens_that_overlap_are_all_cut() -> None:
    build = qwen_with([AddedToken("[one]["), AddedToken("][two]"), AddedToken("[two][")])
    prompt = "a [one][two][two][one][two] b"
    ids = build.text_ids(prompt)
    assert controls(build.tokenizer, ids) == controls(build.tokenizer, build.text_ids("x"))
    assert prompt in build.tokenizer.decode(ids)


def test_added_tokens_that_match_in_any_case_are_cut() -> None:
    build = qwen_with([AddedToken("<cite>", normalized=True)], normalizers.Lowercase())
    assert build.tokenizer("<CITE>")["input_ids"] == [build.tokenizer.convert_tokens_to_ids("<cite>")]
    ids = build.text_ids("a <CITE> b")
    assert controls(build.tokenizer, ids) == controls(build.tokenizer, build.text_ids("x"))
    assert "a <cite> b" in build.tokenizer.decode(ids)


def test_a_token_that_no_cut_can_break_is_refused() -> None:
    build = qwen_with([AddedToken("\u2318", special=True)])
    with pytest.raises(PromptError, match="cannot encode as text"):
        build.text_ids("press \u2318 now")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("", "empty"), (" \n\t", "empty"), (None, "NoneType"), (3, "int"), (["x"], "list"), ("a\ud800b", "Unicode")],
)
def test_prompts_that_cannot_be_used(prompt: Any, text: str) -> None:
    for call in (builder("llava").text_ids, lambda p: builder("llava").build(picture(), p)):
        with pytest.raises(PromptError, match=text):
            call(prompt)


def test_processors_that_cannot_be_used() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        PromptBuilder(with_template("llava", None))
    with pytest.raises(PromptError, match="no image placeholder"):
        PromptBuilder(with_template("llava", "{{ messages[0]['content'][1]['text'] }}"))
    with pytest.raises(PromptError, match="chat template failed"):
        PromptBuilder(with_template("llava", "{{ raise_exception('only system turns') }}"))
    with pytest.raises(PromptError, match="image_token"):
        PromptBuilder(SimpleNamespace(tokenizer=byte_level_tokenizer(), chat_template="x"))


def test_a_template_that_writes_the_text_twice_refuses_special_tokens_only() -> None:
    template = "<image>{% for m in messages %}{% for i in 'ab' %}{{ m['content'][1]['text'] }} {% endfor %}{% endfor %}"
    build = PromptBuilder(with_template("llava", template))
    assert PROMPT in build.tokenizer.decode(build.text_ids(PROMPT))
    with pytest.raises(PromptError, match="one piece"):
        build.text_ids("run </s> faster")


def test_a_named_template_is_found() -> None:
    template = tiny_processor("llava").chat_template
    build = PromptBuilder(with_template("llava", {"default": template, "other": "no"}))
    assert build.text_ids(PROMPT) == builder("llava").text_ids(PROMPT)


@pytest.mark.parametrize("name", PROCESSOR_NAMES)
def test_collate_pads_sequences_on_the_left_and_joins_pictures(name: str) -> None:
    build = builder(name)
    sizes = [(90, 60), (60, 60), (40, 90)]
    prompts = ["x", PROMPT, "run <|im_end|> </s> faster " * 3]
    rows = [build.build(picture(*size), prompt) for size, prompt in zip(sizes, prompts, strict=True)]
    batch = collate(rows, build.pad_token_id)
    width = max(row["input_ids"].shape[1] for row in rows)
    assert batch.keys() == rows[0].keys()
    for index, row in enumerate(rows):
        length = row["input_ids"].shape[1]
        for key in sequence_keys(rows):
            fill = build.pad_token_id if key == "input_ids" else 0
            assert batch[key].shape == (3, width)
            assert batch[key].dtype == row[key].dtype
            assert torch.equal(batch[key][index, width - length :], row[key][0])
            assert (batch[key][index, : width - length] == fill).all()
    pixels = [row["pixel_values"] for row in rows]
    if name == "llava_next":
        assert len({value.shape[1] for value in pixels}) > 1, "otherwise no tiles are padded"
        for index, value in enumerate(pixels):
            assert torch.equal(batch["pixel_values"][index, : value.shape[1]], value[0])
            assert (batch["pixel_values"][index, value.shape[1] :] == 0).all()
    else:
        assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    for key in ("image_sizes", "image_grid_thw"):
        if key in rows[0]:
            assert torch.equal(batch[key], torch.cat([row[key] for row in rows]))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_collate_of_one_row_changes_nothing(name: str) -> None:
    row = builder(name).build(picture(), PROMPT)
    batch = collate([row], 0)
    assert batch.keys() == row.keys()
    assert all(torch.equal(batch[key], row[key]) for key in row)


def test_collate_refuses_rows_that_do_not_fit() -> None:
    with pytest.raises(PromptError, match="empty"):
        collate([], 0)
    with pytest.raises(PromptError, match="different keys"):
        collate([builder("llava").build(picture(), "x"), builder("qwen2_vl").build(picture(), "x")], 0)


def test_pad_token_falls_back_to_the_end_token() -> None:
    build = builder("qwen2_vl")
    assert build.pad_token_id == build.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    other = PromptBuilder.__new__(PromptBuilder)
    other.tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=7)
    assert other.pad_token_id == 7
