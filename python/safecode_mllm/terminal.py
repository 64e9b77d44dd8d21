"""What reaches a terminal: text without control characters, plain tables, progress only where somebody watches."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

# Controls (Cc: escape sequences, carriage return, backspace), lone surrogates, characters that reorder what is shown.
_STRIPPED_CATEGORIES = frozenset({"Cc", "Cs"})
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_KEPT_CONTROLS = frozenset("\n\t")

Counter = Callable[[int, int, str], None]


def clean_text(text: str) -> str:
    """Return `text` without control characters, so that untrusted text can be shown in a terminal.

    Works character by character, so pieces of a stream can be cleaned one at a time: an escape sequence split over two
    pieces loses its escape character all the same.

    Args:
        text: any text, for instance a model's output. Newline and tab are kept.

    Returns:
        The text without characters of the Unicode categories Cc and Cs and without bidirectional controls.
    """
    return "".join(
        char
        for char in text
        if char in _KEPT_CONTROLS
        or (unicodedata.category(char) not in _STRIPPED_CATEGORIES and char not in _BIDI_CONTROLS)
    )


def one_line(text: str) -> str:
    """Return `text` cleaned and with every run of white space turned into one space."""
    return " ".join(clean_text(text).split())


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a plain-text table with a rule under the header.

    Args:
        header: the column titles.
        rows: the cells, each row as long as the header.
        words: how many columns, from the left, hold words and are set flush left; the others are set flush right.

    Returns:
        Lines joined by newlines, without trailing spaces or a final newline.
    """
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        placed = zip(cells, widths, strict=True)
        return "  ".join(c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(placed)).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


class Console:
    """Results to one stream, everything else to another.

    Args:
        quiet: leave out notes and progress bars.
        out: where results go, stdout by default.
        err: where notes, progress and errors go, stderr by default.
    """

    def __init__(self, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr
        for stream in (self._out, self._err):
            # A character that the terminal's encoding lacks is no reason to end with a traceback.
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are wanted: stderr is a terminal and the console is not quiet."""
        return not self.quiet and self._err.isatty()

    def result(self, text: str, end: str = "\n") -> None:
        """Write untrusted or own text to the results, cleaned."""
        self._out.write(clean_text(text) + end)

    def piece(self, text: str) -> None:
        """Write one piece of a stream and let it be seen at once."""
        self.result(text, end="")
        self._out.flush()

    def note(self, text: str) -> None:
        """Write one line about what is going on, unless quiet."""
        if not self.quiet:
            self.problem(text)

    def problem(self, text: str) -> None:
        """Write one line that must be seen."""
        self._err.write(one_line(text) + "\n")
        self._err.flush()

    @contextlib.contextmanager
    def counting(self, title: str) -> Iterator[Counter]:
        """Yield a function (done, total, label) that moves a progress bar; it does nothing when nobody watches."""
        if not self.shows_progress:
            yield lambda done, total, label: None
            return
        from tqdm import tqdm

        with tqdm(desc=title, file=self._err, leave=False) as bar:

            def show(done: int, total: int, label: str) -> None:
                bar.total = total
                bar.set_postfix_str(label, refresh=False)
                bar.update(done - bar.n)

            yield show
