"""What may reach a terminal."""

from __future__ import annotations

import io

from safecode_mllm.terminal import Console, clean_text, format_table, one_line


def test_clean_text_strips_what_a_terminal_would_obey() -> None:
    assert (
        clean_text("a\tb\nc\x00\x1b\x7f\x9b\u202e\u2066\ud800d\u00e9\u4e2d\U0001f600")
        == "a\tb\ncd\u00e9\u4e2d\U0001f600"
    )


def test_table_sets_words_left_and_numbers_right() -> None:
    table = format_table(("arm", "kind", "rate"), [("plain", "x", "0.5"), ("a", "long", "0.25")], words=2)
    assert table == "arm    kind  rate\n-----  ----  ----\nplain  x      0.5\na      long  0.25"


def test_progress_is_for_terminals_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for quiet, stream, shown in ((False, Terminal(), True), (True, Terminal(), False), (False, io.StringIO(), False)):
        with Console(quiet=quiet, out=io.StringIO(), err=stream).counting("scenes") as counter:
            counter(5, 10, "plain")
        assert ("scenes" in stream.getvalue()) is shown


def test_one_line_is_one_clean_line() -> None:
    assert one_line("a\n  b\t\x1b[0m c \r\n") == "a b [0m c"


def test_a_character_that_the_terminal_lacks_is_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", newline="\n")
    Console(out=stream, err=io.StringIO()).piece("caf\u00e9")
    assert raw.getvalue() == b"caf?"
