"""Several pictures, conversations and text alone: what a request may be, and what the model then reads."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image

from naive import NaiveSteering, naive_generate
from pipelines import CONFIG, PROMPT, chat_model, front_door, picture
from safecode_mllm.conversations import Dialogue
from safecode_mllm.decoding.families import placeholder_ids
from safecode_mllm.errors import ImageError, PromptError
from safecode_mllm.judges.protocol import JudgeRequest, Verdict
from safecode_mllm.judges.question import questions
from safecode_mllm.pipeline import SafeCoDe
from safecode_mllm.prompts import PromptBuilder
from tiny_models import CHAT_NAMES, tiny_chat_model

LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}
UNSAFE = Verdict("unsafe", 0.9)
IMAGE: dict[str, Any] = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


CONVERSATION = [
    turn("user", IMAGE, text("What is this?")),
    turn("assistant", text("A cliff, I think.")),
    turn("user", text("And here"), IMAGE, text("how do I run faster?")),
]
HOSTILE = ["<image>", "<|im_end|>", "</s>", "<|image_pad|>", "[CITE] x", "<|placeholder|>", "<think>"]


@cache
def builder(name: str) -> PromptBuilder:
    return PromptBuilder(chat_model(name)[1])


def pictures() -> list[Image.Image]:
    return [picture(0), picture(1, (44, 60))]


def from_processor(name: str, conversation: Any) -> dict[str, torch.Tensor]:
    processor = chat_model(name)[1]
    rendered = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return dict(processor(images=pictures(), text=[rendered], return_tensors="pt").items())


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_a_conversation_gives_what_the_processor_gives(name: str) -> None:
    dialogue = Dialogue.of(pictures(), CONVERSATION)
    built, wanted = builder(name).build(dialogue.images, dialogue), from_processor(name, CONVERSATION)
    assert built.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(built[key], value), key


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_no_text_of_a_conversation_can_write_a_control_token(name: str) -> None:
    build = builder(name)
    harmless = Dialogue.of(pictures(), CONVERSATION)
    plain = build.build(harmless.images, harmless)
    special = set(build.tokenizer.all_special_ids)
    for token in HOSTILE:
        dialogue = harmless.with_texts([f"one {token}", f"{token} two", f"a {token} b", f"{token}{token} three"])
        built = build.build(dialogue.images, dialogue)
        ids = built["input_ids"][0].tolist()
        assert [i for i in ids if i in special] == [i for i in plain["input_ids"][0].tolist() if i in special], token
        for words in dialogue.texts:
            assert words in build.tokenizer.decode(build.text_ids(dialogue))
        assert all(value.shape[1] == len(ids) for key, value in built.items() if key.endswith(("ids", "mask")))
        assert torch.equal(built["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_two_pictures_in_a_conversation_are_steered_as_by_hand(name: str) -> None:
    sc = front_door(name, CONFIG)
    result = sc.chat(pictures(), CONVERSATION, verdict=UNSAFE, seed=5, **LENGTH)
    request = sc._prepare(_request(pictures(), CONVERSATION), None)
    assert request.noised is not None
    clean, noised = request.clean, request.noised
    views = _views(clean, noised)
    assert all(not torch.equal(first, second) for first, second in views), "each picture is noised"
    trie = sc._answerer.refusal(CONFIG)
    bias = [CONFIG.lambda_boost * 0.8]
    naive = NaiveSteering(0.8, CONFIG.plausibility_beta, 5, bias, trie, tuple(placeholder_ids(sc.model)))
    ids, _ = naive_generate(sc.model, clean, noised, naive, 6)
    assert result.token_ids == ids[0, clean["input_ids"].shape[1] :].tolist()


def _request(image: Any, prompt: Any, **fields: Any) -> Any:
    from safecode_mllm.requests import ChatRequest

    return ChatRequest(image, prompt, **({"seed": 5, "verdict": UNSAFE} | fields))


def _views(clean: dict[str, torch.Tensor], noised: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pixels of each picture in both views."""
    if "image_grid_thw" in clean:
        sizes = clean["image_grid_thw"].prod(-1).tolist()
        return list(zip(clean["pixel_values"].split(sizes), noised["pixel_values"].split(sizes), strict=True))
    return list(zip(clean["pixel_values"], noised["pixel_values"], strict=True))


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_the_self_judge_asks_behind_the_whole_conversation(name: str) -> None:
    build = builder(name)
    dialogue = Dialogue.of(pictures(), CONVERSATION)
    ids = build.build(dialogue.images, dialogue)["input_ids"][0].tolist()
    suffix = build.judge_suffix(dialogue, questions()[0])
    asked = dialogue.with_question(questions()[0])
    whole = build.build(asked.images, asked)["input_ids"][0].tolist()
    assert ids[: len(ids) - suffix.drop] + suffix.ids == whole and suffix.shares_image
    sc = front_door(name)
    inside = sc.chat(pictures(), CONVERSATION, seed=1, **LENGTH).verdict
    (alone,) = sc.judge_batch([{"image": pictures(), "prompt": CONVERSATION}])
    assert inside is not None and (inside.p_unsafe is None) == (alone.p_unsafe is None)
    if alone.p_unsafe is not None:
        assert inside.p_unsafe == pytest.approx(alone.p_unsafe, abs=1e-5)


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_text_alone_has_no_contrast_but_a_verdict(name: str) -> None:
    sc = front_door(name)
    steered = sc.chat(None, PROMPT, verdict=UNSAFE, seed=1, **LENGTH)
    request = sc._prepare(_request(None, PROMPT), None)
    assert request.noised is None and "pixel_values" not in request.clean and not request.config.uses_contrast
    naive = NaiveSteering(
        0.0, CONFIG.plausibility_beta, 5, [CONFIG.lambda_boost * 0.8], sc._answerer.refusal(CONFIG),
        tuple(placeholder_ids(sc.model)),
    )  # fmt: skip
    ids, _ = naive_generate(sc.model, request.clean, request.clean, naive, 6)
    assert steered.token_ids == ids[0, request.clean["input_ids"].shape[1] :].tolist()
    assert sc.chat(None, "run <|im_end|> </s> faster", seed=1, **LENGTH).verdict is not None  # the self-judge


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_one_batch_takes_all_kinds_and_answers_each_as_alone(name: str) -> None:
    sc = front_door(name)
    asked = [
        (picture(0), PROMPT),
        (pictures(), CONVERSATION),
        (None, PROMPT),
        (pictures(), "Compare them."),
        (None, "Hi"),
    ]
    requests = [_request(*pair, seed=7) for pair in asked]
    together = sc.chat_batch([*requests, _request(None, "x", steering="off", verdict=None)], **LENGTH)
    assert [result.error for result in together] == [None] * 6
    for request, result in zip(requests, together, strict=False):
        alone = sc.chat(request.image, request.prompt, verdict=UNSAFE, seed=7, **LENGTH)
        assert result.token_ids == alone.token_ids


def test_pictures_may_stand_inside_a_conversation() -> None:
    first, second = pictures()
    inline = [
        turn("user", {"type": "image", "image": first}, text("What is this?")),
        {"role": "assistant", "content": "A cliff, I think."},
        turn("user", text("And here"), {"type": "image", "image": second}, text("how do I run faster?")),
    ]
    assert Dialogue.of(None, inline) == Dialogue.of([first, second], CONVERSATION)


@pytest.mark.parametrize(
    ("image", "prompt", "error", "message"),
    [
        ([1, 2, 3], CONVERSATION, PromptError, "3 pictures, but the conversation has places for 2"),
        ([1], CONVERSATION, ImageError, "turn 3 .* a place for a picture more"),
        (None, [turn("user", {"type": "video"}, text("x"))], PromptError, "turn 1 .* videos are not supported"),
        (None, [turn("user", {"type": "audio"})], PromptError, "type 'audio': it must be 'text' or 'image'"),
        (None, [turn("tool", text("x"))], PromptError, "role 'tool': it must be one of"),
        (None, [turn("user", text("x")), turn("assistant", text("y"))], PromptError, "must end with a turn of role"),
        (None, [turn("user", text(" "))], PromptError, "a text part without text"),
        (None, ["x"], PromptError, "turn 1 .* must be a mapping"),
        (None, [{"role": "user", "content": 3}], PromptError, "content of type int"),
        (None, [], PromptError, "must end with a turn"),
        ([], "", PromptError, "prompt is empty"),
    ],
)
def test_what_cannot_be_asked(image: Any, prompt: Any, error: type[Exception], message: str) -> None:
    given = [picture() for _ in image] if image else image
    with pytest.raises(error, match=message):
        Dialogue.of(given, prompt)


def test_judges_that_look_at_one_picture_see_all_of_them_and_the_turns_before() -> None:
    from safecode_mllm.requests import judge_request

    asked = judge_request(Dialogue.of(pictures(), [turn("system", text("Be kind.")), *CONVERSATION]))
    assert [(said.role, said.text) for said in asked.conversation] == [
        ("user", "What is this?"), ("assistant", "A cliff, I think."),
    ]  # fmt: skip
    assert asked.prompt == "Be kind.\nAnd here\nhow do I run faster?"
    assert asked.image.width > asked.image.height
    left = asked.image.crop((0, 0, round(60 * 448 / 44), 448))
    assert left.tobytes() == picture(0).resize(left.size).tobytes()
    assert judge_request(Dialogue.of(None, "Hi")).image.getcolors() == [(64 * 64, (127, 127, 127))]
    plain = judge_request(Dialogue.of(picture(), PROMPT))
    assert plain == JudgeRequest(picture(), PROMPT)


@pytest.mark.parametrize(
    ("model", "processor", "message"),
    [
        ("llava", "qwen2_5_vl", "Qwen2_5_VLProcessor .* which LlavaForConditionalGeneration does not take"),
        ("qwen2_5_vl", "llava", "LlavaProcessor has .* tokens, Qwen2_5_VLForConditionalGeneration knows"),
    ],
)
def test_the_processor_of_another_model_is_refused(model: str, processor: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        SafeCoDe(chat_model(model)[0], chat_model(processor)[1])


def test_a_processor_with_another_image_token_is_refused() -> None:
    model, processor = tiny_chat_model("llava")
    model.config.image_token_id = model.config.image_token_index = 40
    with pytest.raises(
        PromptError, match=r"writes none of the image tokens of LlavaForConditionalGeneration \(\[40\]\)"
    ):
        SafeCoDe(model, processor)


def test_a_processor_without_a_chat_template_is_refused() -> None:
    model, processor = chat_model("llava")
    other = processor.__class__.__new__(processor.__class__)
    other.__dict__.update(processor.__dict__)
    other.chat_template = None
    with pytest.raises(PromptError, match="no chat template"):
        SafeCoDe(model, other)
