"""Whether a processor is that of a model, found out with a grey picture before any request."""

from __future__ import annotations

from typing import Any

from PIL import Image

from safecode_mllm.decoding.families import decoder_of, forward_parameters, image_token_ids
from safecode_mllm.errors import PromptError, SafeCoDeError
from safecode_mllm.prompts import HARMLESS_TEXT, PromptBuilder

# Any picture will do; this one is not too small for a processor that cuts pictures into tiles.
_PICTURE = Image.new("RGB", (64, 64), (127, 127, 127))
_FIX = "use the processor of the same checkpoint as the model"


def check_processor(model: Any, builder: PromptBuilder) -> None:
    """Raise PromptError unless the processor's output is what the model takes.

    Args:
        model: a Hugging Face model of a supported family.
        builder: builds prompts with the processor.
    """
    who, name = type(builder.processor).__name__, type(model).__name__
    rows, known = model.get_input_embeddings().weight.shape[0], len(builder.tokenizer)
    if known > rows + _image_token_beyond(model, rows):
        raise PromptError(f"processor: the tokenizer of {who} has {known} tokens, {name} knows {rows}; {_FIX}")
    try:
        output = builder.build(_PICTURE, HARMLESS_TEXT)
    except SafeCoDeError:
        raise
    except Exception as error:
        raise PromptError(f"processor: {who} fails on a grey picture: {type(error).__name__}: {error}") from error
    model_class: Any = type(model)
    decoder_class: Any = type(decoder_of(model))
    accepted = forward_parameters(model_class) | forward_parameters(decoder_class)
    unknown = sorted(output.keys() - accepted)
    if unknown:
        raise PromptError(f"processor: {who} makes {', '.join(unknown)}, which {name} does not take; {_FIX}")
    tokens = image_token_ids(model)
    if tokens and not any(int((output["input_ids"] == token).sum()) for token in tokens):
        raise PromptError(f"processor: {who} writes none of the image tokens of {name} ({tokens}); {_FIX}")


def _image_token_beyond(model: Any, rows: int) -> int:
    """Some models have no embedding for the image token, which stands behind all others."""
    return sum(token >= rows for token in image_token_ids(model))
