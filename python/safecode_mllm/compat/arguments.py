"""Checks the hyper-parameters of the published functions before any work is done."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from safecode_mllm.compat.guided import Steering
from safecode_mllm.decoding.families import image_token_ids
from safecode_mllm.errors import ConfigError

# From here on a safe verdict leaves a refusal token no probability; beyond it the published one is negative.
_FULL_SUPPRESSION = 2.0


def checked_steering(
    model: Any,
    processor: Any,
    tokenizer: Any,
    refusal_prefixes: Sequence[str],
    alpha: float,
    max_steps: int,
    top_k: int,
    lambda_supp: float,
    lambda_boost: float,
    *,
    strict: bool,
) -> Steering:
    """Return the hyper-parameters with the token ids that they are about.

    Raises:
        ConfigError: an argument is out of its range; the message names it.
    """
    for name, value in (("alpha", alpha), ("lambda_supp", lambda_supp), ("lambda_boost", lambda_boost)):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ConfigError(f"{name}={value!r} is not legal: it must be a finite number")
    for name, count in (("max_steps", max_steps), ("top_k", top_k)):
        if not isinstance(count, numbers.Integral) or count < 0:
            raise ConfigError(f"{name}={count!r} is not legal: it must be an integer >= 0")
    if isinstance(refusal_prefixes, str) or not all(isinstance(prefix, str) for prefix in refusal_prefixes):
        raise ConfigError(f"refusal_prefixes={refusal_prefixes!r} is not legal: it must be a list of texts")
    encode = (tokenizer or processor.tokenizer).encode
    refusing = {token for prefix in refusal_prefixes for token in encode(prefix, add_special_tokens=False)}
    return Steering(
        alpha=float(alpha),
        max_steps=int(max_steps),
        top_k=int(top_k),
        lambda_supp=float(lambda_supp if strict else min(lambda_supp, _FULL_SUPPRESSION)),
        lambda_boost=float(lambda_boost),
        refusal_prefixes=list(refusal_prefixes),
        refusal_ids=sorted(refusing),
        banned_ids=image_token_ids(model),
    )
