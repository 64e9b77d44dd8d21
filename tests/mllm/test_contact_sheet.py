"""The contact sheet: nothing in it can run or load, nothing is told by colour alone."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from safecode_mllm.contact_sheet import Answer, Sheet, SheetRow, write_html, write_png

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\"'&\x1b[31m\u202e"
VOID_TAGS = {"meta", "img", "br"}


def scene(colour: tuple[int, int, int] = (200, 30, 30)) -> Image.Image:
    return Image.new("RGB", (48, 48), colour)


def row(
    question: str = "May I?", plain: bool | None = False, steered: bool | None = True, text: str = "No."
) -> SheetRow:
    return SheetRow(scene(), question, Answer(text, plain), Answer(text, steered), "unsafe (p = 0.97)", "unsafe here")


class Reader(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read_page(sheet: Sheet, folder: Path) -> Reader:
    reader = Reader()
    reader.feed(write_html(sheet, folder / "sheet.html").read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_the_page_shows_every_text_as_text(tmp_path: Path) -> None:
    hostile_row = SheetRow(scene(), HOSTILE, Answer(HOSTILE, True), Answer(HOSTILE), HOSTILE, HOSTILE)
    page = read_page(Sheet(HOSTILE, HOSTILE, [hostile_row], [[HOSTILE], [HOSTILE]]), tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert tags.count("img") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") == 10
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    page = read_page(Sheet("Title", "Note", [row()]), tmp_path)
    sources = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    (source,) = sources
    assert source is not None
    assert source.startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size == (48, 48)
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "sheet.html").read_text())


def test_right_and_wrong_are_words_and_symbols(tmp_path: Path) -> None:
    page = read_page(Sheet("Title", "Note", [row(plain=False, steered=True)]), tmp_path)
    assert "\u2717 wrong" in page.text
    assert "\u2713 right" in page.text
    assert "right" not in read_page(Sheet("Title", "Note", [row(plain=None, steered=None)]), tmp_path).text


def test_an_empty_answer_is_said_to_be_empty(tmp_path: Path) -> None:
    assert read_page(Sheet("Title", "Note", [row(text=" ")]), tmp_path).text.count("(empty)") == 2


def test_the_page_has_the_summary_table(tmp_path: Path) -> None:
    page = read_page(Sheet("Title", "Note", [row()], [["arm", "rate"], ["plain", "0.53"]]), tmp_path)
    assert "plain" in page.text
    assert "0.53" in page.text


def test_the_picture_differs_without_colour(tmp_path: Path) -> None:
    def grey(plain: bool) -> bytes:
        path = write_png(Sheet("Title", "Note", [row(plain=plain)]), tmp_path / "sheet.png")
        # Any ink counts as black: what is left are shapes and words.
        return Image.open(path).convert("L").point(lambda value: 255 if value > 250 else 0).tobytes()

    assert grey(True) != grey(False)


@pytest.mark.parametrize("text", ["", "word " * 400, "x" * 3000, "\u4e2d\u6587 " * 50, HOSTILE])
def test_the_picture_takes_any_text(text: str, tmp_path: Path) -> None:
    short = Image.open(write_png(Sheet("Title", "Note", [row()]), tmp_path / "short.png"))
    path = write_png(Sheet("Title", text, [row(question=text, text=text)]), tmp_path / "sheet.png")
    picture = Image.open(path)
    assert picture.width == short.width
    assert picture.height < 2 * short.height, "long answers are cut, so the sheet stays a sheet"


def test_the_picture_shows_the_scene_enlarged(tmp_path: Path) -> None:
    picture = Image.open(write_png(Sheet("Title", "Note", [row()]), tmp_path / "sheet.png"))
    colours = {colour: count for count, colour in picture.getcolors(maxcolors=100_000) or []}
    assert colours[(200, 30, 30)] == 144 * 144
