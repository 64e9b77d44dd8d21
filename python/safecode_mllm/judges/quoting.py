"""Untrusted text inside a text that a judge reads: quoted, on one line, and unable to spell a delimiter."""

from __future__ import annotations

# Chat formats and the fields of judges' answers are spelled with these; letters and ordinary punctuation stay readable.
_STRUCTURAL = frozenset('<>[]{}|&#`\\"')


def quote(text: str) -> str:
    """Return `text` as a JSON string on one line in which no special token, role mark or delimiter can be spelled.

    Args:
        text: untrusted text of any kind.

    Returns:
        Valid JSON that decodes to `text` itself. Inside the quotes stand letters, digits, spaces and harmless
        punctuation as they are, and everything else as escapes.
    """
    return '"' + "".join(char if _is_plain(char) else _escape(char) for char in text) + '"'


def one_line(text: str) -> str:
    """Return `text` without quotes around it, for formats that were trained on bare text.

    Everything that could open a line, a role or a special token is replaced: white space by one space, structural
    characters by look-alikes, invisible characters by nothing.
    """
    visible = "".join(" " if char.isspace() else char for char in text)
    kept = (_LOOK_ALIKES.get(char, char) for char in visible if char.isprintable())
    return " ".join("".join(kept).split())


def _is_plain(char: str) -> bool:
    # Not printable: controls, zero-width and bidirectional characters, surrogates, every white space but the space.
    return char.isprintable() and char not in _STRUCTURAL


def _escape(char: str) -> str:
    """Return the \\u escape of a character, in two halves beyond the basic plane as JSON wants it."""
    code = ord(char)
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


# What a reader takes for the same sign and no tokenizer or template does.
_LOOK_ALIKES = {
    "<": "\u2039",
    ">": "\u203a",
    "[": "\u27e6",
    "]": "\u27e7",
    "{": "\u2774",
    "}": "\u2775",
    "|": "\u00a6",
    "#": "\uff03",
    "`": "\u2019",
    "\\": "\u2216",
}
