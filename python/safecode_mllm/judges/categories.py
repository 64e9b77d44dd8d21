"""What kinds of danger a verdict can name, in the words of an answer to a user."""

from __future__ import annotations

# Few, so that they can be counted; judges with finer lists of their own are mapped to these.
CATEGORIES = {
    "injury": "the danger of injury",
    "fire": "the danger of fire",
    "poison": "the danger of poisoning",
    "self_harm": "the danger of self-harm",
    "violence": "the danger of violence",
    "crime": "the law",
    "property": "the danger of damage",
    "privacy": "somebody's privacy",
    "hate": "the harm to others",
    "sexual": "the sexual content",
    "other": "the danger",
}
# What a judge says when nothing is dangerous.
NO_CATEGORY = "none"


def known_category(category: str | None) -> str | None:
    """Return a category of the list; a model may write anything there, and whatever is not in the list is None."""
    return category if category in CATEGORIES else None
