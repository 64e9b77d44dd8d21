"""Remembered verdicts: what a key holds, what is never kept, many processes, and a process killed at any moment."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from judging import Scripted, picture, request, requests, says
from safecode_mllm.errors import ConfigError, JudgeError
from safecode_mllm.judges import Turn, Verdict
from safecode_mllm.judges.cached import CachedJudge
from safecode_mllm.judges.protocol import failed

WORKER = """
import sys, zlib
from judging import Scripted, request
from safecode_mllm.judges import Verdict
from safecode_mllm.judges.cached import CachedJudge

def answer(request):
    p = zlib.crc32(request.prompt.encode()) / 2**32
    return Verdict("unsafe" if p >= 0.5 else "safe", p, judge="scripted", category="x" * 500)

path, start, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
while True:
    for first in range(start, start + count, 5):
        asked = [request(number) for number in range(first, first + 5)]
        assert [v.p_unsafe for v in CachedJudge(Scripted(answer), path).judge_many(asked)] == [
            answer(r).p_unsafe for r in asked
        ]
    if count < 1000:
        break
"""


def start_worker(path: Path, start: int, count: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORKER, str(path), str(start), str(count)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return [json.loads(text) for (text,) in connection.execute("SELECT verdict FROM verdicts")]


def test_a_question_is_asked_once(tmp_path: Path) -> None:
    judge = says("unsafe", 0.9, category="fall", version="1")
    cached = CachedJudge(judge, tmp_path / "deep" / "v.sqlite")
    first = cached.judge_many(requests(3))
    again = cached.judge_many([*requests(2), request(7), request(7)])
    assert len(judge.asked) == 4
    assert not any(v.cached for v in first)
    assert [v.cached for v in again] == [True, True, False, False]
    assert [replace(v, cached=False, latency_s=None) for v in again[:2]] == first[:2]
    assert (cached.hits, cached.misses) == (3, 4)
    assert CachedJudge(judge, tmp_path / "deep" / "v.sqlite").judge_many([request(7)])[0].cached
    assert cached.judge_many([]) == []


@pytest.mark.parametrize(
    "changed",
    [
        request(prompt="How do I do number 0"),
        request(image=picture(1)),
        request(image=picture(0, (9, 12))),
        request(policy_text=""),
        request(policy_text="x"),
        request(conversation=(Turn("user", "x"),)),
        request(conversation=(Turn("assistant", "x"),)),
        request(conversation=(Turn("user", ""), Turn("user", "x"))),
    ],
)
def test_whatever_a_verdict_depends_on_is_in_the_key(changed: Any, tmp_path: Path) -> None:
    cached = CachedJudge(says("safe"), tmp_path / "v")
    cached.judge_many([request()])
    assert not cached.judge_many([changed])[0].cached
    assert cached.judge_many([request()])[0].cached


def test_parts_of_a_key_cannot_flow_into_each_other(tmp_path: Path) -> None:
    cached = CachedJudge(says("safe"), tmp_path / "v")
    cached.judge_many([request(prompt="b", policy_text="a")])
    for prompt, policy in (("", "ab"), ("ab", ""), ("a", "b")):
        assert not cached.judge_many([request(prompt=prompt, policy_text=policy)])[0].cached


@pytest.mark.parametrize("other", [{"name": "n"}, {"version": "2"}, {"settings": {"threshold": 0.6}}])
def test_another_judge_has_other_keys(other: dict[str, Any], tmp_path: Path) -> None:
    CachedJudge(says("safe"), tmp_path / "v").judge_many([request()])
    judge = Scripted(lambda _: Verdict("safe"), **other)
    assert not CachedJudge(judge, tmp_path / "v").judge_many([request()])[0].cached


@pytest.mark.parametrize(
    "verdict",
    [Verdict("unknown"), failed("j", "x"), Verdict("unsafe", policy="no_bias"), Verdict("safe", 0.9), Verdict("sure")],  # type: ignore[arg-type]
)
def test_what_is_no_verdict_is_never_kept(verdict: Verdict, tmp_path: Path) -> None:
    judge = Scripted(lambda _: verdict)
    cached = CachedJudge(judge, tmp_path / "v")
    for _ in range(2):
        assert cached.judge_many([request()]) == [verdict]
    assert len(judge.asked) == 2
    assert rows(tmp_path / "v") == []


@pytest.mark.parametrize("keep", [False, True])
def test_texts_are_kept_on_request_only(keep: bool, tmp_path: Path) -> None:
    judge = says("unsafe", raw="RAW", reason="REASON", caption="CAPTION", category="fall")
    CachedJudge(judge, tmp_path / "v", keep_texts=keep).judge_many([request()])
    (verdict,) = CachedJudge(judge, tmp_path / "v").judge_many([request()])
    assert verdict.category == "fall"
    assert (verdict.raw, verdict.reason, verdict.caption) == (("RAW", "REASON", "CAPTION") if keep else (None,) * 3)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert (b"CAPTION" in stored) == keep
    assert request().prompt.encode() not in stored and request().image.tobytes()[:20] not in stored


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "v").touch(0o666)
        cached = CachedJudge(says("safe"), tmp_path / "v")
        with closing(sqlite3.connect(tmp_path / "v")) as held:  # keeps SQLite's side files alive
            held.execute("SELECT * FROM verdicts").fetchall()
            cached.judge_many([request()])
            held.execute("SELECT * FROM verdicts").fetchall()
            files = sorted(tmp_path.iterdir())
            assert len(files) == 3
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    finally:
        os.umask(before)


def test_a_judge_without_a_version_cannot_be_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no `version`"):
        CachedJudge(Scripted(lambda _: Verdict("safe"), version=None), tmp_path / "v").judge_many([request()])


def test_a_place_that_cannot_be_used_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 200)
    for path in (tmp_path, tmp_path / "text"):
        with pytest.raises(ConfigError, match=path.name):
            CachedJudge(says("safe"), path)


def test_a_cache_that_breaks_later_loses_no_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached = CachedJudge(says("unsafe", 0.9), tmp_path / "v")
    for path in tmp_path.iterdir():
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert cached.judge_many([request()])[0].label == "unsafe"
    assert "cannot be read" in caplog.text and "cannot be written" in caplog.text
    assert not list(tmp_path.iterdir()), "a file that SQLite creates would be readable for others"


@pytest.mark.parametrize("row", ["", "{", "[]", '{"label": "unknown"}', '{"label": "safe", "p_unsafe": 2}', '{"p": 1}'])
def test_a_spoiled_row_is_asked_for_again(row: str, tmp_path: Path) -> None:
    judge = says("unsafe", 0.9)
    cached = CachedJudge(judge, tmp_path / "v")
    cached.judge_many([request()])
    with closing(sqlite3.connect(tmp_path / "v", isolation_level=None)) as connection:
        connection.execute("UPDATE verdicts SET verdict = ?", (row,))
    assert cached.judge_many([request()])[0].label == "unsafe"
    assert len(judge.asked) == 2
    assert cached.judge_many([request()])[0].cached


def test_a_judge_that_fails_as_a_whole_raises(tmp_path: Path) -> None:
    def down(_: Any) -> Verdict:
        raise JudgeError("no connection")

    cached = CachedJudge(Scripted(down, remote=True), tmp_path / "v")
    assert cached.remote
    with pytest.raises(JudgeError, match="no connection"):
        cached.judge_many([request()])


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    workers = [start_worker(tmp_path / "v", start, 20) for start in (0, 0, 10, 20)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        assert errors == "", "no warning either"
    assert len(rows(tmp_path / "v")) == 40


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill without warning")
def test_a_process_killed_at_any_moment_leaves_a_sound_file(tmp_path: Path) -> None:
    path = tmp_path / "v"
    for round_, delay in enumerate((0.0, 0.013, 0.031, 0.067, 0.11)):
        # Each writes rows that no other has, one batch after the other, until it is killed in the middle of it.
        before = len(rows(path)) if path.exists() and path.stat().st_size else 0
        worker = start_worker(path, round_ * 10_000, 10_000)
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        wait_for_more_than(path, before)
        time.sleep(delay)
        worker.kill()
        _, errors = worker.communicate()
        assert errors == ""
        assert all(len(row["category"]) == 500 for row in rows(path))
    last = start_worker(path, 0, 20)
    assert last.communicate(timeout=120)[1] == ""


def wait_for_more_than(path: Path, count: int) -> None:
    """Wait until a file holds more verdicts than this."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.stat().st_size:
            try:
                if len(rows(path)) > count:
                    return
            except sqlite3.OperationalError:
                pass  # the table is being made
        time.sleep(0.005)
    pytest.fail("nothing was written")
