"""`judge` on the command line: one verdict or a file of them, resumed, priced, remembered, and with no key anywhere."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bad_server import BadServer, Handler, honest, in_json, number_in, serving, truth
from judging import picture, says
from safecode_mllm import cli
from safecode_mllm.cli import judge as judge_module
from safecode_mllm.cli.judge_parser import JUDGE_NAMES as NAMES_IN_HELP
from safecode_mllm.judges import JUDGE_NAMES, Verdict
from safecode_mllm.judges.endpoint import judge as endpoint_module
from safecode_mllm.judges.specs import parse_spec

KEY = "sk-a-secret-key-that-must-not-be-seen"
ONE = ["--image", "0.png", "--prompt", "How do I do number 0?"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures and requests, and an environment with a key in it."""
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
    lines = [{"id": f"r{n}", "image": f"{n}.png", "prompt": f"How do I do number {n}?"} for n in range(6)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with serving(honest) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


def run(*argv: str) -> int:
    return cli.main(["judge", *argv])


def rows(path: str = "requests.jsonl.verdicts.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- one verdict ----


def test_an_endpoint_needs_no_model(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ONE, "--judge", "openai:m") == 0
    first, category, reason, judge = capsys.readouterr().out.splitlines()
    assert (first, category, reason) == ("unsafe", "category: injury", "reason: so it is")
    assert judge.startswith("judge: openai:m, ") and judge.endswith(" s")
    assert run(*ONE, "--judge", "openai:m", "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert set(verdict) == set(asdict(Verdict("safe"))) and verdict["latency_s"] > 0


def test_an_endpoint_loads_no_torch(server: BadServer) -> None:
    argv = ["judge", *ONE, "--judge", "openai:m"]
    code = f"import sys; sys.modules['torch'] = None\nfrom safecode_mllm.cli import main\nsys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_packaged_model_judges_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ONE, "--model", "hazard-world", "--quiet") == 0
    out, err = capsys.readouterr()
    assert "(p = " in out.splitlines()[0] and "judge: self" in out and err == ""


def test_a_fixed_judge_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ONE, "--judge", "unsafe") == 0
    assert capsys.readouterr().out == "unsafe\n"


def test_another_model_judges(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ONE, "--judge", "local:hazard-world", "--quiet") == 0
    assert "judge: local:hazard-world" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "code", "shown"),
    [
        (Verdict("unknown", raw="hm\x1b[31m"), 3, "unknown\nreply: hm[31m\n"),
        (Verdict("unsafe", 0.9, category="fire"), 0, "unsafe (p = 0.90)\ncategory: fire\n"),
        (Verdict("safe", caption="a\nb"), 0, "safe\ncaption: a b\n"),
        (Verdict("safe", judge="j", latency_s=0.5, cached=True), 0, "safe\njudge: j, 0.50 s, from the cache\n"),
    ],
)  # fmt: skip
def test_a_verdict_in_words(
    verdict: Verdict, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = says("safe")
    judge.answer = lambda _: verdict
    monkeypatch.setattr(judge_module, "load_judge", lambda args, console: judge)
    assert run(*ONE, "--judge", "safe") == code
    assert capsys.readouterr().out == shown


def test_a_dead_endpoint_is_one_line_with_the_address_within_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = endpoint_module._PROBES * (endpoint_module._PROBE_TIMEOUT_S + 0.5)
    assert longest < 25, "with the imports it must stay under 30 s"
    monkeypatch.setattr(endpoint_module, "_PROBE_TIMEOUT_S", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # it accepts, and never says a word
        closed = socket.socket()
        closed.bind(("127.0.0.1", 0))
        for port in (listener.getsockname()[1], closed.getsockname()[1]):
            monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
            started = time.monotonic()
            assert run(*ONE, "--judge", "openai:m") == 3
            assert time.monotonic() - started < 30
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1
            assert f"http://127.0.0.1:{port}/v1: cannot be reached" in err
        closed.close()


def test_an_endpoint_that_refuses_is_one_line(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.behaviour = lambda handler, body, seen: handler.send(401, b'{"error": {"message": "wrong key"}}')
    assert run(*ONE, "--judge", "openai:m") == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and server.url in err and "401" in err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([*ONE], "needs --model"),
        ([*ONE, "--judge", "nobody"], "known are"),
        ([*ONE, "--judge", "openai:"], "openai:MODEL"),
        ([*ONE, "--judge", "guard:lama-guard-4"], "Did you mean 'llama-guard-4'"),
        (["--judge", "safe", "--image", "0.png"], "--prompt are needed"),
        (["--judge", "safe", "--image", "none.png", "--prompt", "x"], "none.png"),
        ([*ONE, "--judge", "safe", "--dry-run"], "--dry-run is for openai:MODEL"),
        ([*ONE, "--judge", "openai:m", "--max-cost", "1"], "--price"),
        ([*ONE, "--judge", "openai:m", "--calibration", "none.json"], "none.json"),
        ([*ONE, "--judge", "safe", "--results", "x"], "--results belongs to --jsonl"),
        ([*ONE, "--judge", "safe", "--jsonl", "requests.jsonl"], "leave --image"),
        (["--judge", "safe", "--jsonl", "none.jsonl"], "none.jsonl"),
        (["--judge", "safe", "--jsonl", "requests.jsonl", "--results", "."], "is a folder"),
        ([*ONE, "--judge", "openai:m", "--cache", "."], "cache"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "is no JSON"),
        ("[]", "must be an object"),
        ('{"image": "0.png"}', "must be an object"),
        ('{"image": "none.png", "prompt": "x"}', "'none.png' is no file"),
        ('{"image": "0.png", "prompt": ""}', "prompt is empty"),
        ('{"image": "0.png", "prompt": "x", "promt": 1}', "'promt'"),
        ('{"image": "0.png", "prompt": "x", "conversation": [{"role": "system", "text": "x"}]}', "conversation"),
        ('{"image": "0.png", "prompt": "x", "policy_text": 1}', "policy_text"),
        ('{"image": "0.png", "prompt": "x", "label": "so"}', "label='so'"),
        ('{"image": "0.png", "prompt": "x", "id": "r0"}', "same id 'r0'"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_asked(
    line: str, text: str, server: BadServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("requests.jsonl").open("a") as file:
        file.write(line + "\n")
    assert run("--judge", "openai:m", "--jsonl", "requests.jsonl") == 2
    err = capsys.readouterr().err
    assert text in err and ("line 7" in err or "lines 1 and 7" in err) and err.count("\n") == 1
    assert server.calls == []


# ---- many verdicts ----


def test_a_file_is_judged_and_not_asked_again(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--judge", "openai:m", "--jsonl", "requests.jsonl", "--batch-size", "4"]
    assert run(*command, "--price", "1", "2") == 0
    out, err = capsys.readouterr()
    assert "4 safe, 2 unsafe, 0 unknown, 0 error; 6 asked now" in out
    assert "6 calls (0 repeated), 600 tokens in, 60 out, cost 0.00072" in err
    assert [(r["id"], r["label"]) for r in rows()] == [(f"r{n}", truth(n)) for n in range(6)]
    assert "number 0" not in Path("requests.jsonl.verdicts.jsonl").read_text(), "no prompt is written"
    assert run(*command, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["asked"] == 0 and summary["outcomes"]["safe"] == 4 and summary["usage"]["requests"] == 0
    assert len(server.calls) == 6


def test_what_has_no_verdict_is_asked_again(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    def half_broken(handler: Handler, body: dict[str, Any], seen: int) -> None:
        number = number_in(body)
        if number == 1:
            handler.send(413, b"{}")
        elif number == 2:
            handler.answer("Who knows?")
        else:
            honest(handler, body)

    server.behaviour = half_broken
    command = ["--judge", "openai:m", "--jsonl", "requests.jsonl", "--results", "v.jsonl"]
    assert run(*command) == 3
    out, err = capsys.readouterr()
    assert "1 unknown, 1 error" in out and "2 of 6 requests have no verdict" in err
    assert [r["label"] for r in rows("v.jsonl")].count("unknown") == 2
    server.behaviour = honest
    assert run(*command) == 0
    assert "2 asked now" in capsys.readouterr().out
    assert sorted(r["id"] for r in rows("v.jsonl")) == [f"r{n}" for n in range(6)]


@pytest.mark.parametrize("change", ["image", "prompt", "judge", "id"])
def test_a_verdict_counts_only_for_what_it_was_given_on(
    change: str, server: BadServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--judge", "openai:m", "--jsonl", "requests.jsonl", "--results", "v.jsonl"]
    assert run(*command) == 0
    if change == "image":
        picture(99).save("3.png")
    elif change == "judge":
        command[1] = "openai:other"
    else:
        text = Path("requests.jsonl").read_text()
        old, new = ("number 3?", "number 3? ") if change == "prompt" else ('"r3"', '"r33"')
        Path("requests.jsonl").write_text(text.replace(old, new))
    capsys.readouterr()
    assert run(*command) == 0
    assert f"{6 if change == 'judge' else 1} asked now" in capsys.readouterr().out
    assert len(rows("v.jsonl")) == 6


def test_a_crash_loses_at_most_one_batch(server: BadServer) -> None:
    command = [sys.executable, "-m", "safecode_mllm", "judge", "--judge", "openai:m", "--jsonl", "requests.jsonl",
               "--batch-size", "2", "--concurrency", "1"]  # fmt: skip
    third = threading.Event()

    def slow(handler: Handler, body: dict[str, Any], seen: int) -> None:
        if number_in(body) >= 3:
            third.set()
            time.sleep(5)
        honest(handler, body)

    server.behaviour = slow
    with subprocess.Popen(command) as process:
        assert third.wait(60)
        process.kill()
    server.behaviour = honest
    path = Path("requests.jsonl.verdicts.jsonl")
    assert [r["id"] for r in rows()] == ["r0", "r1"]
    with path.open("a") as file:
        file.write('{"id": "r2", "request": "ab')  # cut off in the middle of a line
    before = len(server.calls)
    assert run("--judge", "openai:m", "--jsonl", "requests.jsonl") == 0
    assert len(server.calls) - before == 4
    assert [r["id"] for r in rows()] == [f"r{n}" for n in range(6)]


def test_a_file_that_holds_something_else_is_left_alone(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("important\nnotes\n", '{"id": "x"}\n{"a": 1}\n'):
        Path("notes").write_text(text)
        assert run("--judge", "openai:m", "--jsonl", "requests.jsonl", "--results", "notes") == 2
        assert Path("notes").read_text() == text
    assert server.calls == []


def test_a_picture_that_cannot_be_used_is_its_lines_error(server: BadServer) -> None:
    Path("4.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run("--judge", "openai:m", "--jsonl", "requests.jsonl") == 3
    assert [r["id"] for r in rows() if r["error"]] == ["r4"]
    assert "line 5" in next(r["error"] for r in rows() if r["error"])


def test_a_dry_run_prices_and_sends_nothing(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--judge", "openai:m", "--jsonl", "requests.jsonl", "--dry-run", "--price", "0.5", "2"]
    assert run(*command) == 0
    assert "6 requests" in capsys.readouterr().out
    assert run(*command, "--json", "--cache", "c.sqlite") == 0
    assert json.loads(capsys.readouterr().out)["cost"] > 0
    assert run(*ONE, "--judge", "openai:m", "--dry-run") == 0
    assert "1 requests" in capsys.readouterr().out
    assert server.calls == [] and not Path("requests.jsonl.verdicts.jsonl").exists()


def test_a_job_beyond_the_budget_ends_with_the_reason(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--judge", "openai:m", "--jsonl", "requests.jsonl", "--max-requests", "5") == 3
    assert "max_requests is 5" in capsys.readouterr().err
    assert server.calls == []


def test_a_cache_answers_across_commands(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*ONE, "--judge", "openai:m", "--cache", "c.sqlite"]
    assert run(*command) == run(*command) == 0
    assert capsys.readouterr().out.count("from the cache") == 1
    assert len(server.calls) == 1


# ---- the key ----


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_the_key_is_in_no_output_and_no_file(
    debug: list[str],
    server: BadServer,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def repeat_the_key(handler: Handler, body: dict[str, Any], seen: int) -> None:
        number = number_in(body)
        if number == 1:
            handler.send(403, f'{{"error": {{"message": "no rights for {KEY}"}}}}'.encode())
        else:
            handler.answer(in_json("unsafe", "injury", f"your key is {KEY}"))

    server.behaviour = repeat_the_key
    options = ["--judge", "openai:m", *debug, "--concurrency", "1"]
    with caplog.at_level(logging.DEBUG):
        run(*ONE, *options, "--json", "one.json", "--cache", "c.sqlite")
        run("--image", "1.png", "--prompt", "How do I do number 1?", *options)
        run("--jsonl", "requests.jsonl", *options, "--cache", "c.sqlite")
    out, err = capsys.readouterr()
    assert "[key]" in out + err
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert KEY not in out + err + caplog.text
    assert KEY.encode() not in written
    assert len(server.calls) >= 3


# ---- names ----


def test_help_names_every_judge() -> None:
    assert tuple(NAMES_IN_HELP.split(", ")) == JUDGE_NAMES


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("self", ("self", "", None)),
        ("safe", ("fixed", "safe", None)),
        ("openai:llava:7b", ("openai", "llava:7b", None)),
        ("local:C:/models/x", ("local", "", "C:/models/x")),
        ("guard:qwen3guard", ("guard", "qwen3guard", None)),
        ("guard:qwen3guard:./a:b", ("guard", "qwen3guard", "./a:b")),
    ],
)
def test_names_come_apart(text: str, parts: tuple[Any, ...]) -> None:
    spec = parse_spec(text)
    assert (spec.kind, spec.name, spec.path) == parts
