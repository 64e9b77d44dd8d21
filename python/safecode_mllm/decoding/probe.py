"""Whether the branches of a model class that nobody tested do what the model does alone: asked once, of the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from safecode_mllm.decoding import kv
from safecode_mllm.decoding.families import decoder_of, family_of, has_encoder
from safecode_mllm.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Tokens that both sides write: the prompt's pass, and enough steps to show a wrong position or mask.
PROBE_TOKENS = 4
# Largest difference of two logits, as a share of their spread over the vocabulary. Rounding of float32 stays below 1e-4
# on every tested family; a wrong position, mask or row of the images is a large part of one.
FLOAT32_SHARE = 1e-3
# Half precision rounds each layer to about 1 part in 256 (bfloat16), other matrix kernels in another order.
HALF_SHARE = 0.25
_NOISE_SEED = 0

# For each model which requests were compared: with pictures (True), of text alone (False).
_verified: WeakKeyDictionary[Any, set[bool]] = WeakKeyDictionary()


def verify_once(
    model: Any, clean: Mapping[str, Tensor], noised: Mapping[str, Tensor] | None, make: Callable[..., Any]
) -> None:
    """Compare both branches of a model of an untested class with its own `generate`, the first time it is seen
    with pictures, and the first time without.

    Args:
        model: a Hugging Face model.
        clean, noised: the inputs that it is about to be used with; without `noised` the pixels get some noise.
        make: makes branches from (model, clean, noised, cache).

    Raises:
        UnsupportedModelError: they differ, or one of them fails; the message says where and by how much.
    """
    has_images = any(value.is_floating_point() for value in clean.values())
    if family_of(model).verified or has_images in _verified.get(model, ()):
        return
    name = type(model).__name__
    try:
        with torch.no_grad():
            for found, wanted, where in _comparisons(model, clean, noised or _noised(clean), make):
                _compare(found, wanted, where, name)
    except UnsupportedModelError:
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"{name} is no tested class, and its branches could not be checked against its own generate: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    _verified.setdefault(model, set()).add(has_images)
    logger.info("%s is no tested class; its branches equal its own generate on the first request", name)


def _comparisons(
    model: Any, clean: Mapping[str, Tensor], noised: Mapping[str, Tensor], make: Callable[..., Any]
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield logits of the branches, those of `generate`, and what they are."""
    for first, second, what in ((clean, noised, "clean"), (noised, clean, "noised")):
        stock = model.generate(
            **first, max_new_tokens=PROBE_TOKENS, min_new_tokens=PROBE_TOKENS, do_sample=False, num_beams=1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        tokens = stock.sequences[:, -PROBE_TOKENS:]
        branches = make(model, first, second, kv.new_cache(model))
        logits, _ = branches.prefill()
        yield logits, stock.logits[0], f"behind the prompt, {what} rows"
        if what == "clean":
            rows = range(len(tokens))
            # What was written, asked as a question behind the prompt, and behind the prompt without its last token.
            written = tokens[:, :-1].tolist()
            if not has_encoder(decoder_of(model)):
                cut = [[int(ids[-1]), *row] for ids, row in zip(first["input_ids"], written, strict=True)]
                asked = branches.ask([*written, *cut], [0] * len(rows) + [1] * len(rows), [*rows, *rows])
                yield asked, stock.logits[-1].repeat(2, 1), "of a question on the prompt's cache"
        for step in range(1, PROBE_TOKENS):
            logits, _ = branches.step(tokens[:, step - 1])
            yield logits, stock.logits[step], f"at step {step}, {what} rows"


def _compare(found: Tensor, wanted: Tensor, where: str, name: str) -> None:
    share = FLOAT32_SHARE if found.dtype == torch.float32 else HALF_SHARE
    found, wanted = found.float(), wanted.float().to(found.device)
    seen = torch.isfinite(wanted)
    difference = float((found - wanted)[seen].abs().max())
    spread = float(wanted[seen].std())
    if not difference <= share * spread:
        raise UnsupportedModelError(
            f"{name} is no tested class, and clean and noised rows in one batch do not give what its own generate "
            f"does: the logits {where} differ by {difference:.3g}, at a spread of {spread:.3g} ({share:g} times it)"
        )


def _noised(clean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same inputs with noise on what is no exact zero."""
    generator = torch.Generator().manual_seed(_NOISE_SEED)

    def spoil(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
        return torch.where(values == 0, values, values + noise)

    return {key: spoil(value) if value.is_floating_point() else value for key, value in clean.items()}
