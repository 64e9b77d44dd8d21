"""From an image and a user's text to model inputs, with the text always encoded as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from safecode_mllm.conversations import Dialogue, Message
from safecode_mllm.errors import PromptError
from safecode_mllm.prompt_text import check_prompt
from safecode_mllm.splicing import blocks, runs_along_tokens, segments, splice

# Stands for any user text: one plain letter, whose tokens no template can change.
HARMLESS_TEXT = "x"
# Characters behind which a piece of text is encoded, so that no tokenizer treats the piece as the start of a text.
_ANCHORS = ("\n", ".", "x", "0", " ")


@dataclass(frozen=True)
class JudgeSuffix:
    """What to feed behind a decode prompt's KV cache to ask the judge's question.

    Attributes:
        drop: how many trailing ids of the decode prompt lie behind the common prefix.
        ids: ids of the conversation with the question behind the common prefix.
        shares_image: whether the image lies in the common prefix; if not, the question needs a prefill of its own.
    """

    drop: int
    ids: list[int]
    shares_image: bool


class PromptBuilder:
    """Turns pictures and texts into a processor's inputs, for any chat processor.

    Special and added tokens that a text spells are encoded as ordinary text: it cannot close its turn, open another, or
    claim an image.

    Args:
        processor: a processor of transformers with a tokenizer and a chat template.

    Raises:
        PromptError: there is no chat template, or it does not take an image.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._template = _chat_template(processor, self.tokenizer)
        self._control = ControlTokens(self.tokenizer)
        self._harmless: dict[Any, list[int]] = {}
        candidates = _placeholder_ids(processor, self.tokenizer)
        ids = self._encode_whole(self._render(as_dialogue(HARMLESS_TEXT)))
        found = [token for token in candidates if ids.count(token) == 1]
        if not found:
            raise PromptError("processor: its chat template writes no image placeholder for an image in the user turn")
        self._placeholder = found[0]

    @property
    def image_processor(self) -> Any:
        """The part of the processor that turns pictures into pixel values."""
        return self.processor.image_processor

    @property
    def pad_token_id(self) -> int:
        """The id to pad with; the end-of-text id for a tokenizer without one."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    def build(self, image: Image | Sequence[Image] | None, prompt: str | Dialogue) -> dict[str, Tensor]:
        """Return the processor's output for one request.

        Args:
            image: RGB, as `load_image` returns it, several in the order of their places, or None.
            prompt: the user's text behind all pictures, or a dialogue with a place for each of them; untrusted.

        Returns:
            Every key of the processor with a batch of 1: input_ids and attention_mask int64 [1, T], pixel values and
            whatever else the model takes.

        Raises:
            PromptError: a text is empty, no string, or cannot be encoded as text with this tokenizer.
        """
        images = [image] if isinstance(image, Image) else list(image or ())
        dialogue = as_dialogue(prompt, len(images))
        ids = self.text_ids(dialogue)
        rendered = self._render(dialogue)
        if ids == self._encode_whole(rendered):
            output = self._process(images, rendered)
            # Some processors replace more strings than the tokenizer knows of; what they did to the text shows here.
            if blocks(segments(ids, self._placeholder), output["input_ids"][0].tolist()) is not None:
                return output
        output = self._process(images, self._render(_harmless(dialogue)))
        return splice(output, self._harmless_ids(dialogue), ids, self._placeholder)

    def judge_suffix(self, prompt: str | Dialogue, question: str) -> JudgeSuffix:
        """Return what to append to the decode prompt of `prompt` to ask `question` about it.

        The ids come from the conversation whose last text is the user's, blank line, question, with the image's
        placeholder not expanded: no image is looked at.
        """
        dialogue = as_dialogue(prompt)
        decode_ids = self.text_ids(dialogue)
        judge_ids = self.text_ids(dialogue.with_question(question))
        shared = 0
        for mine, theirs in zip(decode_ids, judge_ids, strict=False):
            if mine != theirs:
                break
            shared += 1
        return JudgeSuffix(
            drop=len(decode_ids) - shared,
            ids=judge_ids[shared:],
            shares_image=decode_ids[:shared].count(self._placeholder) == decode_ids.count(self._placeholder),
        )

    def text_ids(self, prompt: str | Dialogue) -> list[int]:
        """Return the ids of the whole conversation with image placeholders not expanded; checks the texts."""
        dialogue = as_dialogue(prompt)
        for text in dialogue.texts:
            check_prompt(text)
        ids = self._encode_whole(self._render(dialogue))
        expected = self._control.sequence(self._harmless_ids(dialogue))
        if self._control.sequence(ids) == expected:
            return ids
        ids = self._encode_in_pieces(dialogue)
        if self._control.sequence(ids) != expected:
            raise PromptError(
                "prompt: it spells a special token that this tokenizer cannot encode as text; remove the token"
            )
        return ids

    def _harmless_ids(self, dialogue: Dialogue) -> list[int]:
        if dialogue.layout not in self._harmless:
            self._harmless[dialogue.layout] = self._encode_whole(self._render(_harmless(dialogue)))
        return self._harmless[dialogue.layout]

    def _render(self, dialogue: Dialogue) -> str:
        try:
            return self.processor.apply_chat_template(
                dialogue.for_template(), chat_template=self._template, add_generation_prompt=True
            )
        except Exception as error:
            raise PromptError(f"prompt: the model's chat template failed on it: {error}") from error

    def _encode_whole(self, text: str) -> list[int]:
        return list(self.tokenizer(text, **self._text_options(text))["input_ids"])

    def _text_options(self, text: str) -> dict[str, bool]:
        """As transformers does itself: a template that writes the begin token must not get a second one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _process(self, images: Sequence[Image], text: str) -> dict[str, Tensor]:
        # Several belong to one text: some processors take a flat list for one picture of each of several texts.
        pictures = {"images": list(images) if len(images) == 1 else [list(images)]} if images else {}
        output = self.processor(text=[text], return_tensors="pt", **pictures, **self._text_options(text))
        return dict(output.items())

    def _encode_in_pieces(self, dialogue: Dialogue) -> list[int]:
        """Encode the conversation cut inside every control token that a text spells."""
        fixed, texts = self._around_texts(dialogue)
        pieces = [fixed[0]]
        for text, behind in zip(texts, fixed[1:], strict=True):
            first, *others = self._control.cut(text)
            pieces[-1] += first
            pieces += others
            pieces[-1] += behind
        ids = self._encode_whole(pieces[0])
        for piece in pieces[1:]:
            ids += self._encode_behind(piece)
        return ids

    def _around_texts(self, dialogue: Dialogue) -> tuple[list[str], list[str]]:
        """Return what the template writes around the texts, and the texts as it writes them."""
        marker = _unused_marker(self._render(dialogue))
        markers = [f"{marker}{place}END" for place in range(len(dialogue.texts))]
        rest = self._render(dialogue.with_texts(markers))
        fixed = []
        for mark in markers:
            before, _, rest = rest.partition(mark)
            fixed.append(before)
        fixed.append(rest)
        texts = []
        for place, text in enumerate(dialogue.texts):
            # One text at a time: the others' ends are known, so no text can move the borders.
            rendered = self._render(dialogue.with_texts([*markers[:place], text, *markers[place + 1 :]]))
            before = (
                "".join(part + mark for part, mark in zip(fixed[:place], markers[:place], strict=True)) + fixed[place]
            )
            after = fixed[place + 1] + "".join(
                mark + part for mark, part in zip(markers[place + 1 :], fixed[place + 2 :], strict=True)
            )
            fits = (
                len(before) + len(after) <= len(rendered) and rendered.startswith(before) and rendered.endswith(after)
            )
            if not fits or marker in rest or any(marker in part for part in fixed):
                raise PromptError(
                    "prompt: it spells a special token, and the chat template does not keep it in one piece"
                )
            texts.append(rendered[len(before) : len(rendered) - len(after)])
        return fixed, texts

    def _encode_behind(self, piece: str) -> list[int]:
        """Encode text that other text precedes."""

        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        for anchor in _ANCHORS:
            before, whole = encode(anchor), encode(anchor + piece)
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
        return encode(piece)


class ControlTokens:
    """The tokens that a user's text must not be able to write."""

    def __init__(self, tokenizer: Any) -> None:
        special = {int(tokenizer.convert_tokens_to_ids(str(text))): str(text) for text in tokenizer.all_special_tokens}
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        # Some vocabularies add runs of spaces, or single letters of a script: ordinary text is made of these.
        marked = {i: t.content for i, t in added.items() if t.special or len(t.content) > 1}
        self._tokens = {i: text for i, text in {**marked, **special}.items() if text and not text.isspace()}
        longest_first = sorted(self._tokens.values(), key=len, reverse=True)
        # Normalised tokens match whatever the case; a cut too many changes nothing a reader could see.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)

    def sequence(self, ids: Sequence[int]) -> list[int]:
        """Return the control tokens among `ids`, in order."""
        return [token_id for token_id in ids if token_id in self._tokens]

    def cut(self, text: str) -> list[str]:
        """Cut `text` behind the first character of every control token, so that no piece holds a whole one."""
        pieces, start, search = [], 0, 0
        while match := self._pattern.search(text, search):
            cut = match.start() + 1
            pieces.append(text[start:cut])
            # Searching on from the cut finds tokens that overlap this one.
            start = search = cut
        return [*pieces, text[start:]]


def as_dialogue(prompt: str | Dialogue, images: int = 1) -> Dialogue:
    """Return the dialogue with places for `images` pictures before a text, or one as it is."""
    if not isinstance(prompt, Dialogue):
        check_prompt(prompt)
        return Dialogue((), (Message("user", (*[None] * images, prompt)),))
    return prompt


def _harmless(dialogue: Dialogue) -> Dialogue:
    return dialogue.with_texts([HARMLESS_TEXT] * len(dialogue.texts))


def sequence_keys(rows: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the keys whose tensors run along the tokens: input_ids, attention_mask, token types."""
    return [key for key in rows[0] if all(runs_along_tokens(row[key], row["input_ids"][0]) for row in rows)]


def collate(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Join prompts into one batch.

    Args:
        rows: outputs of `PromptBuilder.build`, batch of 1 each, with the same keys.
        pad_token_id: fills input_ids; every other sequence is filled with 0.

    Returns:
        Sequences left-padded to the longest, [B, T]; image tensors joined along dim 0 in row order, padded with zeros
        at the end where rows differ in number of tiles or size of pictures.

    Raises:
        PromptError: there are no rows, or they have different keys.
    """
    if not rows:
        raise PromptError("rows is empty: a batch needs at least one prompt")
    keys = list(rows[0])
    if any(set(row) != set(keys) for row in rows):
        raise PromptError(f"rows have different keys: {[sorted(row) for row in rows]}; build them with one processor")
    along_tokens = set(sequence_keys(rows))
    batch = {}
    for key in keys:
        values = _padded([row[key] for row in rows], pad_token_id if key == "input_ids" else 0, key in along_tokens)
        batch[key] = torch.cat(values)
    if "aspect_ratio_mask" in batch:
        # As its processor does for pictures that a row lacks: attention over no tile at all has no result.
        batch["aspect_ratio_mask"][..., 0] = 1
    return batch


def _padded(values: list[Tensor], fill: int, along_tokens: bool) -> list[Tensor]:
    """Pad all dimensions but the first to the largest: at the end, and tokens on the left."""
    sizes = [max(value.shape[dim] for value in values) for dim in range(1, values[0].ndim)]
    padded = []
    for value in values:
        missing = [size - present for size, present in zip(sizes, value.shape[1:], strict=True)]
        pad = [edge for dim in reversed(missing) for edge in (0, dim)]
        if along_tokens:
            pad[-2:] = [missing[0], 0]
        padded.append(torch.nn.functional.pad(value, pad, value=fill) if any(missing) else value)
    return padded


def _chat_template(processor: Any, tokenizer: Any) -> str:
    for owner in (processor, tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return template
    raise PromptError("processor has no chat template: set processor.chat_template, or use a checkpoint that has one")


def _placeholder_ids(processor: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that a template may write for an image: the image token, or the one that opens an image."""
    tokens = [getattr(owner, name, None) for name in ("image_token", "boi_token") for owner in (processor, tokenizer)]
    ids = [getattr(processor, "image_token_id", None)]
    ids += [tokenizer.convert_tokens_to_ids(str(token)) for token in tokens if token]
    found = [int(token_id) for token_id in ids if token_id is not None]
    if not found:
        raise PromptError("processor has no image_token: its model does not take an image as a placeholder in the text")
    return found


def _unused_marker(text: str) -> str:
    """Return a word that `text` does not hold."""
    marker = "SAFECODEUSERTEXT"
    while marker in text:
        marker += "X"
    return marker
