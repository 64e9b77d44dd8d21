"""What a model is asked: pictures and turns, with the places of the pictures among the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from safecode_mllm.errors import ImageError, PromptError
from safecode_mllm.images import load_image
from safecode_mllm.prompt_text import check_prompt

_ROLES = ("system", "user", "assistant")
# Under these names the parts of a conversation bring their picture themselves.
_INLINE = ("image", "path", "url")
# Height at which several pictures are shown side by side to judges that look at one.
_SHEET_HEIGHT = 448
# What such judges see where there is no picture.
_NO_PICTURE = Image.new("RGB", (64, 64), (127, 127, 127))


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user" or "assistant".
        parts: texts, and None for the place of the next picture.
    """

    role: str
    parts: tuple[str | None, ...]


@dataclass(frozen=True)
class Dialogue:
    """Everything that a model is asked in one request, all of it untrusted.

    Attributes:
        images: RGB, in the order of their places.
        messages: the turns, oldest first; the last one is the user's.
    """

    images: tuple[Image.Image, ...]
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, image: Any, prompt: Any) -> Dialogue:
        """Return the dialogue that a user's two arguments mean, checked.

        Args:
            image: a picture as `load_image` takes it, a list of them, or None for a request of text alone.
            prompt: the user's text, behind all pictures; or a conversation in the form of transformers: mappings with
                "role" and "content", the content a text or a list of {"type": "text", "text": ..} and
                {"type": "image"}, which takes the next of `image` or brings its own under "image" or "path".

        Raises:
            ImageError: a picture cannot be used.
            PromptError: a text or a turn cannot be used, or pictures and their places differ in number.
        """
        given = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
        if isinstance(prompt, Dialogue):
            return prompt
        if isinstance(prompt, str) or not isinstance(prompt, Sequence):
            check_prompt(prompt)
            return cls(tuple(map(load_image, given)), (Message("user", (*[None] * len(given), prompt)),))
        waiting = iter(given)
        images: list[Any] = []
        messages = tuple(_message(turn, number, waiting, images) for number, turn in enumerate(prompt, start=1))
        left = len(list(waiting))
        if left:
            raise PromptError(
                f"image: {len(given)} pictures, but the conversation has places for {len(given) - left} of them; add a "
                'part {"type": "image"} for each'
            )
        if not messages or messages[-1].role != "user" or not any(messages[-1].parts):
            raise PromptError("prompt: a conversation must end with a turn of role 'user' that has a text")
        return cls(tuple(map(load_image, images)), messages)

    @property
    def layout(self) -> tuple[tuple[str, tuple[bool, ...]], ...]:
        """Roles, and for each part whether it is a text."""
        return tuple((turn.role, tuple(part is not None for part in turn.parts)) for turn in self.messages)

    @property
    def is_plain(self) -> bool:
        """Whether it is one picture with one text behind it."""
        return self.layout == (("user", (False, True)),)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, in order."""
        return tuple(part for turn in self.messages for part in turn.parts if part is not None)

    @property
    def request(self) -> str:
        """The text of the last turn."""
        return "\n".join(part for part in self.messages[-1].parts if part is not None)

    def with_texts(self, texts: Sequence[str]) -> Dialogue:
        """Return the same dialogue with other texts in the same places."""
        new = iter(texts)
        turns = [
            Message(turn.role, tuple(None if part is None else next(new) for part in turn.parts))
            for turn in self.messages
        ]
        return replace(self, messages=tuple(turns))

    def with_images(self, images: Sequence[Image.Image]) -> Dialogue:
        """Return the same dialogue about other pictures."""
        return replace(self, images=tuple(images))

    def with_question(self, question: str) -> Dialogue:
        """Return the dialogue whose last text goes on with a blank line and a question."""
        return self.with_texts([*self.texts[:-1], f"{self.texts[-1]}\n\n{question}"])

    def for_template(self) -> list[dict[str, Any]]:
        """Return the turns as chat templates take them."""
        return [
            {
                "role": turn.role,
                "content": [
                    {"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts
                ],
            }
            for turn in self.messages
        ]

    def sheet(self) -> Image.Image:
        """Return all pictures as one, side by side, for a judge that looks at one; grey if there is none."""
        if len(self.images) < 2:
            return self.images[0] if self.images else _NO_PICTURE
        scaled = [
            image.resize((max(1, round(image.width * _SHEET_HEIGHT / image.height)), _SHEET_HEIGHT))
            for image in self.images
        ]
        sheet = Image.new("RGB", (sum(image.width for image in scaled), _SHEET_HEIGHT))
        left = 0
        for image in scaled:
            sheet.paste(image, (left, 0))
            left += image.width
        return sheet


def _message(turn: Any, number: int, waiting: Iterator[Any], images: list[Any]) -> Message:
    where = f"prompt: turn {number} of the conversation"
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise PromptError(f"{where} must be a mapping with 'role' and 'content', got {type(turn).__name__}")
    if turn["role"] not in _ROLES:
        raise PromptError(f"{where} has role {turn['role']!r}: it must be one of {', '.join(_ROLES)}")
    content = turn["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence):
        raise PromptError(f"{where} has a content of type {type(content).__name__}: pass a text or a list of parts")
    return Message(turn["role"], tuple(_part(part, where, waiting, images) for part in parts))


def _part(part: Any, where: str, waiting: Iterator[Any], images: list[Any]) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "video":
        raise PromptError(f"{where} has a video: videos are not supported; pass some of its frames as pictures")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{where} has a text part without text: write one, or leave it out")
        check_prompt(text)
        return text
    if kind != "image":
        raise PromptError(f"{where} has a part of type {kind!r}: it must be 'text' or 'image'")
    inline = next((part[name] for name in _INLINE if part.get(name) is not None), None)
    try:
        images.append(next(waiting) if inline is None else inline)
    except StopIteration:
        raise ImageError(f"{where} has a place for a picture more than image has pictures: pass image=[...]") from None
    return None
