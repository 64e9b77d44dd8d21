"""What a user's text must be, whatever is done with it. Imports nothing heavy."""

from __future__ import annotations

from safecode_mllm.errors import PromptError


def check_prompt(prompt: object) -> None:
    """Raise PromptError unless `prompt` is text that says something."""
    if not isinstance(prompt, str):
        raise PromptError(f"prompt is a {type(prompt).__name__}: pass a string")
    if not prompt.strip():
        raise PromptError("prompt is empty: write a question about the image")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompt is not valid Unicode: {error}; decode it with the right encoding") from error
