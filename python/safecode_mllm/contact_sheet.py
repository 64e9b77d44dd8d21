"""Answers side by side, for people: one picture, and one self-contained page."""

from __future__ import annotations

import base64
import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .terminal import clean_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

    Font = FreeTypeFont | BitmapFont


@dataclass(frozen=True)
class Answer:
    """One answer and whether it was right; None when there is no truth to compare with."""

    text: str
    right: bool | None = None

    @property
    def mark(self) -> str:
        """The word that goes with the answer: "right", "wrong" or nothing."""
        return {True: "right", False: "wrong", None: ""}[self.right]

    @property
    def shown(self) -> str:
        """The text, or a word that says there is none."""
        return self.text if self.text.strip() else "(empty)"


@dataclass(frozen=True)
class SheetRow:
    """One scene with both answers.

    Attributes:
        image: the scene, any size and mode.
        question: what was asked.
        plain: the model's own answer.
        steered: the answer with SafeCoDe.
        verdict: the judge's verdict in words, for instance "unsafe (p = 0.97)".
        heading: a few words over the question, for instance the truth about the scene.
    """

    image: Image
    question: str
    plain: Answer
    steered: Answer
    verdict: str
    heading: str = ""


@dataclass(frozen=True)
class Sheet:
    """A whole contact sheet.

    Attributes:
        title: the heading.
        note: one sentence under the title that says what this shows and what it doesn't.
        rows: the scenes.
        table: optional summary, header first; shown on the page only.
    """

    title: str
    note: str
    rows: Sequence[SheetRow]
    table: Sequence[Sequence[str]] = ()


# ---- the page ----

# The policy lets nothing load or run, whatever got into the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --right: #1a7f37; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --right: #4cc46a; --wrong: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1.5rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .5rem; }
th, td { text-align: left; vertical-align: top; padding: .6rem .8rem; border-bottom: 1px solid var(--line); }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; }
img { width: 9rem; image-rendering: pixelated; border-radius: .4rem; display: block; }
small { opacity: .75; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.mark { font-weight: 600; white-space: nowrap; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
@media (max-width: 48rem) {
  .scenes, .scenes tbody, .scenes tr, .scenes td { display: block; }
  .scenes thead { display: none; }
}
"""
_SYMBOLS = {True: "\u2713", False: "\u2717"}


def write_html(sheet: Sheet, path: str | Path) -> Path:
    """Write the sheet as one page without scripts or outside resources; all text is escaped.

    Args:
        sheet: what to show.
        path: the file to write; its folder must exist.

    Returns:
        The path written.
    """
    rows = "\n".join(_html_row(row) for row in sheet.rows)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(sheet.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(sheet.title)}</h1>
<p>{_text(sheet.note)}</p>
{_html_table(sheet.table)}
<table class="scenes">
<caption>Scenes</caption>
<thead><tr><th scope="col">Scene</th><th scope="col">Question</th><th scope="col">Plain answer</th>\
<th scope="col">SafeCoDe answer</th><th scope="col">Verdict</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
</body>
</html>
"""
    target = Path(path)
    target.write_text(page, encoding="utf-8")
    return target


def _text(text: str) -> str:
    return escape(clean_text(text))


def _html_row(row: SheetRow) -> str:
    buffer = io.BytesIO()
    row.image.convert("RGB").save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    heading = f"<small>{_text(row.heading)}</small><br>" if row.heading else ""
    return (
        f'<tr><td><img alt="Scene for: {_text(row.question)}" src="data:image/png;base64,{data}"></td>'
        f"<td>{heading}{_text(row.question)}</td>{_html_answer(row.plain)}{_html_answer(row.steered)}"
        f"<td>{_text(row.verdict)}</td></tr>"
    )


def _html_answer(answer: Answer) -> str:
    mark = ""
    if answer.right is not None:
        mark = f'<span class="mark {answer.mark}">{_SYMBOLS[answer.right]} {answer.mark}</span><br>'
    return f'<td>{mark}<span class="answer">{_text(answer.shown)}</span></td>'


def _html_table(table: Sequence[Sequence[str]]) -> str:
    if not table:
        return ""
    header, *rows = table
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<table class="numbers">\n<caption>All arms, same scenes</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )


# ---- the picture ----

_WIDTH = 1400
_MARGIN = 32
_GAP = 24
_SCENE = 144
_TEXT_SIZE = 18
_SMALL_SIZE = 15
_TITLE_SIZE = 30
_LINE = 25
_COLUMNS = (("Question", 300), ("Plain answer", 330), ("SafeCoDe answer", 330), ("Verdict", 140))
_INK, _FAINT, _RULE, _PAPER = (28, 30, 33), (95, 99, 104), (218, 220, 224), (255, 255, 255)
_MARK_INK = {True: (26, 127, 55), False: (179, 38, 30)}
# An answer longer than this is cut with an ellipsis; the page shows all of it.
_MAX_LINES = 6
# More than _MAX_LINES of the widest column hold of the narrowest letter.
_MAX_CHARACTERS = 1000


def write_png(sheet: Sheet, path: str | Path) -> Path:
    """Write the sheet as one PNG; right and wrong differ in word, symbol and colour.

    Args:
        sheet: what to show; the summary table is left to the page.
        path: the file to write; its folder must exist.

    Returns:
        The path written.
    """
    from PIL import Image, ImageDraw, ImageFont

    text, small, title = (ImageFont.load_default(size) for size in (_TEXT_SIZE, _SMALL_SIZE, _TITLE_SIZE))
    note = _wrap(sheet.note, text, _WIDTH - 2 * _MARGIN)
    blocks = [_row_blocks(row, text, small) for row in sheet.rows]
    heights = [max(_SCENE, *(len(block) * _LINE for block in row)) + _GAP for row in blocks]
    top = _MARGIN + 2 * _LINE + len(note) * _LINE + _GAP
    canvas = Image.new("RGB", (_WIDTH, top + 2 * _LINE + sum(heights) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), clean_text(sheet.title), _INK, title)
    for index, line in enumerate(note):
        draw.text((_MARGIN, _MARGIN + 2 * _LINE + index * _LINE), line, _FAINT, text)
    for (name, _), left in zip(_COLUMNS, _column_lefts(), strict=True):
        draw.text((left, top), name, _FAINT, text)
    y = top + _LINE + _GAP // 2
    for row, columns, height in zip(sheet.rows, blocks, heights, strict=True):
        draw.line((_MARGIN, y, _WIDTH - _MARGIN, y), _RULE)
        scene = row.image.convert("RGB").resize((_SCENE, _SCENE), Image.Resampling.NEAREST)
        canvas.paste(scene, (_MARGIN, y + _GAP // 2))
        for left, block in zip(_column_lefts(), columns, strict=True):
            for index, line_of_text in enumerate(block):
                line_of_text.paint(draw, left, y + _GAP // 2 + index * _LINE)
        y += height
    target = Path(path)
    canvas.save(target, format="PNG", optimize=True)
    return target


@dataclass(frozen=True)
class _Line:
    text: str
    font: Font
    ink: tuple[int, int, int] = _INK
    mark: bool | None = None

    def paint(self, draw: ImageDraw, left: int, top: int) -> None:
        if self.mark is not None:
            _paint_mark(draw, left, top, self.mark)
            left += 26
        draw.text((left, top), self.text, self.ink, self.font)


def _paint_mark(draw: ImageDraw, left: int, top: int, right: bool) -> None:
    """Draw a tick or a cross; drawn, because the font need not have them."""
    ink = _MARK_INK[right]
    if right:
        draw.line([(left + 1, top + 12), (left + 7, top + 18), (left + 18, top + 4)], ink, 3, joint="curve")
    else:
        draw.line([(left + 3, top + 5), (left + 16, top + 18)], ink, 3)
        draw.line([(left + 16, top + 5), (left + 3, top + 18)], ink, 3)


def _column_lefts() -> list[int]:
    lefts, left = [], _MARGIN + _SCENE + _GAP
    for _, width in _COLUMNS:
        lefts.append(left)
        left += width + _GAP
    return lefts


def _row_blocks(row: SheetRow, text: Font, small: Font) -> list[list[_Line]]:
    """Return the lines of the four text columns of a row."""
    widths = [width for _, width in _COLUMNS]
    question = [_Line(row.heading, small, _FAINT)] if row.heading else []
    question += [_Line(line, text) for line in _wrap(row.question, text, widths[0])]
    columns = [question]
    for answer, width in zip((row.plain, row.steered), widths[1:3], strict=True):
        block = [] if answer.right is None else [_Line(answer.mark, text, _MARK_INK[answer.right], answer.right)]
        columns.append(block + [_Line(line, text) for line in _wrap(answer.shown, text, width)])
    columns.append([_Line(line, text) for line in _wrap(row.verdict, text, widths[3])])
    return columns


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break text into at most _MAX_LINES lines of at most `width` pixels, at spaces where that is possible."""
    lines = [""]
    for word in clean_text(text[:_MAX_CHARACTERS]).split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        while word:
            fitting = bisect_right(
                range(1, len(word) + 1), float(width), key=lambda count: font.getlength(word[:count])
            )
            lines[-1], word = word[: max(1, fitting)], word[max(1, fitting) :]
            if word:
                lines.append("")
    if len(lines) <= _MAX_LINES and len(text) <= _MAX_CHARACTERS:
        return lines
    return [*lines[: _MAX_LINES - 1], lines[min(_MAX_LINES, len(lines)) - 1] + " \u2026"]
