"""From an image and a user's text to model inputs, with the text always encoded as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from safecode_mllm.errors import PromptError
from safecode_mllm.prompt_text import check_prompt

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
    """Turns an image and a user's text into a processor's inputs, image first, for any chat processor.

    Special and added tokens that the user's text spells are encoded as ordinary text: it cannot close its turn, open
    another, or claim an image.

    Args:
        processor: a processor of transformers with a tokenizer and a chat template.

    Raises:
        PromptError: there is no chat template, or it does not take an image.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._template = _chat_template(processor, self.tokenizer)
        self._placeholder = _placeholder_id(processor, self.tokenizer)
        self._control = ControlTokens(self.tokenizer)
        self._harmless_ids = self._encode_whole(self._render(HARMLESS_TEXT))
        if self._harmless_ids.count(self._placeholder) != 1:
            raise PromptError("processor: its chat template writes no image placeholder for an image in the user turn")

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

    def build(self, image: Image, prompt: str) -> dict[str, Tensor]:
        """Return the processor's output for one image and one user text.

        Args:
            image: RGB, as `load_image` returns it.
            prompt: the user's text, untrusted.

        Returns:
            Every key of the processor with a batch of 1: input_ids and attention_mask int64 [1, T], pixel values and
            whatever else the model takes.

        Raises:
            PromptError: the text is empty, no string, or cannot be encoded as text with this tokenizer.
        """
        ids = self.text_ids(prompt)
        rendered = self._render(prompt)
        if ids == self._encode_whole(rendered):
            output = self._process(image, rendered)
            # Some processors replace more strings than the tokenizer knows of; what they did to the text shows here.
            if self._expands(ids, output["input_ids"][0].tolist()):
                return output
        return self._splice(self._process(image, self._render(HARMLESS_TEXT)), ids)

    def judge_suffix(self, prompt: str, question: str) -> JudgeSuffix:
        """Return what to append to the decode prompt of `prompt` to ask `question` about it.

        The ids come from the conversation whose user text is prompt, blank line, question, with the image's
        placeholder not expanded: no image is looked at.
        """
        decode_ids = self.text_ids(prompt)
        judge_ids = self.text_ids(f"{prompt}\n\n{question}")
        shared = 0
        for mine, theirs in zip(decode_ids, judge_ids, strict=False):
            if mine != theirs:
                break
            shared += 1
        return JudgeSuffix(
            drop=len(decode_ids) - shared,
            ids=judge_ids[shared:],
            shares_image=self._placeholder in decode_ids[:shared],
        )

    def text_ids(self, prompt: str) -> list[int]:
        """Return the ids of the whole conversation with one unexpanded image placeholder; checks the prompt."""
        check_prompt(prompt)
        ids = self._encode_whole(self._render(prompt))
        expected = self._control.sequence(self._harmless_ids)
        if self._control.sequence(ids) == expected:
            return ids
        ids = self._encode_in_pieces(prompt)
        if self._control.sequence(ids) != expected:
            raise PromptError(
                "prompt: it spells a special token that this tokenizer cannot encode as text; remove the token"
            )
        return ids

    def _render(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        try:
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=self._template, add_generation_prompt=True
            )
        except Exception as error:
            raise PromptError(f"prompt: the model's chat template failed on it: {error}") from error

    def _encode_whole(self, text: str) -> list[int]:
        return list(self.tokenizer(text, **self._text_options(text))["input_ids"])

    def _text_options(self, text: str) -> dict[str, bool]:
        """As transformers does itself: a template that writes the begin token must not get a second one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _process(self, image: Image, text: str) -> dict[str, Tensor]:
        output = self.processor(images=[image], text=[text], return_tensors="pt", **self._text_options(text))
        return dict(output.items())

    def _encode_in_pieces(self, prompt: str) -> list[int]:
        """Encode the conversation cut inside every control token that the user's text spells."""
        rendered = self._render(prompt)
        before, after = self._around_user_text(rendered)
        user = rendered[len(before) : len(rendered) - len(after)]
        pieces = self._control.cut(user)
        pieces[0] = before + pieces[0]
        pieces[-1] += after
        ids = self._encode_whole(pieces[0])
        for piece in pieces[1:]:
            ids += self._encode_behind(piece)
        return ids

    def _around_user_text(self, rendered: str) -> tuple[str, str]:
        marker = _unused_marker(rendered)
        before, found, after = self._render(marker).partition(marker)
        fits = len(before) + len(after) <= len(rendered) and rendered.startswith(before) and rendered.endswith(after)
        if not found or marker in after or not fits:
            raise PromptError("prompt: it spells a special token, and the chat template does not keep it in one piece")
        return before, after

    def _encode_behind(self, piece: str) -> list[int]:
        """Encode text that other text precedes."""

        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        for anchor in _ANCHORS:
            before, whole = encode(anchor), encode(anchor + piece)
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
        return encode(piece)

    def _expands(self, ids: list[int], expanded: list[int]) -> bool:
        """Whether `expanded` is `ids` with nothing changed but the placeholder."""
        head = ids.index(self._placeholder)
        tail = len(ids) - head - 1
        same_ends = expanded[:head] == ids[:head] and expanded[len(expanded) - tail :] == ids[head + 1 :]
        return same_ends and len(expanded) > head + tail

    def _splice(self, harmless: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
        """Put `ids` in place of the harmless conversation's around its expanded image."""
        expanded = harmless["input_ids"][0]
        if not self._expands(self._harmless_ids, expanded.tolist()):
            raise PromptError("processor: it changes more of a conversation than the image's placeholder")
        head = self._harmless_ids.index(self._placeholder)
        tail = len(self._harmless_ids) - head - 1
        block = slice(head, len(expanded) - tail)
        place = ids.index(self._placeholder)
        output = dict(harmless)
        for key in sequence_keys([harmless]):
            values = harmless[key][0]
            # Any text column serves as the model of the others: the last one is never part of the image.
            text = values[-1:] if tail else values[:1]
            parts = [text.expand(place), values[block], text.expand(len(ids) - place - 1)]
            output[key] = torch.cat(parts)[None]
        new = output["input_ids"][0]
        new[:place] = torch.tensor(ids[:place])
        new[len(new) - (len(ids) - place - 1) :] = torch.tensor(ids[place + 1 :])
        return output


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


def sequence_keys(rows: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the keys whose tensors run along the tokens: input_ids, attention_mask, token types."""
    return [
        key
        for key, value in rows[0].items()
        if not value.is_floating_point() and all(row[key].shape == row["input_ids"].shape for row in rows)
    ]


def collate(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Join prompts into one batch.

    Args:
        rows: outputs of `PromptBuilder.build`, batch of 1 each, with the same keys.
        pad_token_id: fills input_ids; every other sequence is filled with 0.

    Returns:
        Sequences left-padded to the longest, [B, T]; image tensors joined along dim 0 in row order, the second
        dimension (LLaVA-NeXT's tiles) padded with zeros at the end where rows differ.

    Raises:
        PromptError: there are no rows, or they have different keys.
    """
    if not rows:
        raise PromptError("rows is empty: a batch needs at least one prompt")
    keys = list(rows[0])
    if any(set(row) != set(keys) for row in rows):
        raise PromptError(f"rows have different keys: {[sorted(row) for row in rows]}; build them with one processor")
    along_tokens = set(sequence_keys(rows))
    width = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for key in keys:
        values = [row[key] for row in rows]
        if key in along_tokens:
            fill = pad_token_id if key == "input_ids" else 0
            values = [torch.nn.functional.pad(value, (width - value.shape[1], 0), value=fill) for value in values]
        elif values[0].ndim >= 3:
            values = _pad_second_dimension(values)
        batch[key] = torch.cat(values)
    return batch


def _pad_second_dimension(values: list[Tensor]) -> list[Tensor]:
    size = max(value.shape[1] for value in values)
    return [torch.cat([v, v.new_zeros(v.shape[0], size - v.shape[1], *v.shape[2:])], 1) for v in values]


def _chat_template(processor: Any, tokenizer: Any) -> str:
    for owner in (processor, tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            return template
    raise PromptError("processor has no chat template: set processor.chat_template, or use a checkpoint that has one")


def _placeholder_id(processor: Any, tokenizer: Any) -> int:
    token_id = getattr(processor, "image_token_id", None)
    if token_id is None:
        token = getattr(processor, "image_token", None) or getattr(tokenizer, "image_token", None)
        token_id = tokenizer.convert_tokens_to_ids(str(token)) if token else None
    if token_id is None:
        raise PromptError("processor has no image_token: its model does not take an image as a placeholder in the text")
    return int(token_id)


def _unused_marker(text: str) -> str:
    """Return a word that `text` does not hold."""
    marker = "SAFECODEUSERTEXT"
    while marker in text:
        marker += "X"
    return marker
