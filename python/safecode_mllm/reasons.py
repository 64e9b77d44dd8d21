"""The words that make a model give its reason after a refusal. Hazard World's model is trained on them."""

from __future__ import annotations

from safecode_mllm.judges.categories import CATEGORIES
from safecode_mllm.judges.protocol import Verdict

# Follows the model's own refusal; the model ends the sentence itself, from what it sees.
REASON_OPENING = " This is because the image shows"
_OPENING_WITH_CATEGORY = " The reason is {category}: the image shows"


def reason_opening(verdict: Verdict) -> str:
    """Return how the reason begins; names the kind of danger where the judge named one of the list.

    Nothing else of a verdict goes into an answer: what a judge wrote may repeat what an attacker wrote.
    """
    if verdict.category in CATEGORIES:
        return _OPENING_WITH_CATEGORY.format(category=CATEGORIES[verdict.category])
    return REASON_OPENING
