"""The command line: arguments, streams, exit codes, JSON, and text that nobody trusts."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from judging import says
from safecode_mllm import cli
from safecode_mllm.cli import chat as chat_module
from safecode_mllm.cli import judge as judge_module
from safecode_mllm.cli.codes import exit_code
from safecode_mllm.cli.parser import PRESET_NAMES, build_parser
from safecode_mllm.config import PRESETS
from safecode_mllm.errors import (
    ConfigError,
    DecodeError,
    ImageError,
    JudgeError,
    MissingExtraError,
    PromptError,
    SafeCoDeError,
    UnknownVerdictError,
    UnsupportedModelError,
)
from safecode_mllm.judges.protocol import Verdict

REQUEST = ["--model", "m", "--image", "i.png", "--prompt", "p"]
ESCAPE = "\x1b[31mred\x1b]0;title\x07\r\x08"


class FakeResult:
    """Stands for ChatResult."""

    def __init__(self, text: str, steering: str = "on"):
        self.text = text
        self.steering = steering
        self.verdict = Verdict("unsafe", 0.9) if steering == "on" else None
        self.steering_effective = False if steering == "on" else None
        self.record = [1, 2] if steering == "on" else None
        self.seed = 7

    def audit(self) -> dict[str, Any]:
        return {"text": self.text, "steering": self.steering, "timings": {"judge": float("nan")}}


class FakeStream:
    """Stands for ChatStream."""

    result = FakeResult("one two")

    def __iter__(self) -> Any:
        yield "one \x1b"
        yield "[31mtwo"


class FakePipeline:
    """Stands for SafeCoDe: answers, or raises what it is given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def chat(self, **arguments: Any) -> FakeResult:
        self.calls.append(arguments)
        if self.error:
            raise self.error
        steering = arguments.get("steering", "on")
        return FakeResult(f"answer {steering} {ESCAPE}", steering)

    def stream(self, **arguments: Any) -> FakeStream:
        self.calls.append(arguments)
        return FakeStream()


@pytest.fixture(autouse=True)
def picture_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of REQUEST: it is looked at before a model is loaded."""
    Image.new("RGB", (8, 8)).save(tmp_path / "i.png")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setattr(chat_module, "load_pipeline", lambda args, console: fake)
    return fake


def run(*argv: str) -> int:
    return cli.main(list(argv))


def module(*argv: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; `code` runs before it."""
    program = f"{code}\nimport sys\nfrom safecode_mllm.cli import main\nsys.exit(main({list(argv)!r}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


# ---- chat and judge ----


def test_chat_writes_the_answer_to_stdout_and_the_rest_to_stderr(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", *REQUEST, "--seed", "3", "--temperature", "0.5", "--max-new-tokens", "9") == 0
    out, err = capsys.readouterr()
    assert out == "answer on [31mred]0;title\n"
    assert "verdict: unsafe (p = 0.90)" in err
    assert "no effect" in err
    (call,) = pipeline.calls
    assert call.pop("image").size == (8, 8)
    assert call == {"prompt": "p", "seed": 3, "max_new_tokens": 9, "do_sample": True, "temperature": 0.5}


def test_chat_is_greedy_by_default_and_quiet_says_nothing_else(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", *REQUEST, "--quiet") == 0
    (call,) = pipeline.calls
    assert call.pop("image").size == (8, 8)
    assert call == {"prompt": "p", "seed": None, "do_sample": False}
    assert capsys.readouterr().err == ""


def test_compare_shows_both_answers(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", *REQUEST, "--compare") == 0
    out = capsys.readouterr().out
    assert out.startswith("plain:    answer off")
    assert "\nSafeCoDe: answer on" in out
    assert [call.get("steering", "on") for call in pipeline.calls] == ["off", "on"]


def test_stream_cleans_an_escape_sequence_split_over_two_pieces(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", *REQUEST, "--stream") == 0
    assert capsys.readouterr().out == "one [31mtwo\n"


def test_json_without_a_file_replaces_the_text(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", *REQUEST, "--json") == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"text": f"answer on {ESCAPE}", "steering": "on", "timings": {"judge": None}}
    assert "\x1b" not in out
    assert run("chat", *REQUEST, "--json", "--compare") == 0
    assert {key: value["steering"] for key, value in json.loads(capsys.readouterr().out).items()} == {
        "plain": "off",
        "safecode": "on",
    }


def test_json_with_a_file_comes_besides_the_text(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "result.json"
    assert run("chat", *REQUEST, "--json", str(target)) == 0
    assert capsys.readouterr().out.startswith("answer on")
    assert json.loads(target.read_text())["steering"] == "on"


@pytest.mark.parametrize("char", ["\x1b", "\x7f", "\x9b", "\u202e"])
def test_json_on_stdout_holds_no_control_character(
    char: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge_module, "load_judge", lambda args, console: says("unsafe", raw=f"a{char}b"))
    assert run("judge", *REQUEST, "--json") == 0
    out = capsys.readouterr().out
    assert set(out) <= {"\n", *map(chr, range(0x20, 0x7F))}
    assert json.loads(out)["raw"] == f"a{char}b"


@pytest.mark.parametrize("command", [["chat", *REQUEST], ["judge", *REQUEST], ["info"], ["world", "eval"], ["demo"]])
@pytest.mark.parametrize(
    ("target", "message"), [("folder", "is a folder"), ("i.png/result.json", "i.png is no folder")]
)
def test_a_json_target_that_cannot_be_written_ends_before_the_work(
    command: list[str],
    target: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cli, "_handler", lambda name: pytest.fail("the command ran"))
    (tmp_path / "folder").mkdir()
    assert run(*command, "--json", target) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["demo"], ["world", "train"]])
@pytest.mark.parametrize("target", ["i.png", "i.png/out"])
def test_an_out_folder_that_cannot_be_made_ends_before_the_work(
    command: list[str], target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_handler", lambda name: pytest.fail("the command ran"))
    assert run(*command, "--out", target) == 2
    assert f"--out {target}" in capsys.readouterr().err


def test_a_read_only_place_ends_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "_handler", lambda name: pytest.fail("the command ran"))
    # Not by chmod: root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    assert run("info", "--json", "new/folder/result.json") == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- errors ----


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (ImageError("x"), 2),
        (PromptError("x"), 2),
        (UnsupportedModelError("x"), 2),
        (SafeCoDeError("x"), 2),
        (JudgeError("x"), 3),
        (UnknownVerdictError("x"), 3),
        (DecodeError("x"), 1),
        (MissingExtraError("x"), 1),
        (OSError("disk full"), 1),
        (RuntimeError("x"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_an_error_is_one_clean_line(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.error = ImageError("image='a\x1b.png':\n  not an image; give a PNG")
    assert run("chat", *REQUEST) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "safecode-mllm: error: image='a.png': not an image; give a PNG\n"


def test_an_unexpected_error_names_its_type_and_debug_shows_where(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.error = RuntimeError("boom")
    assert run("chat", *REQUEST) == 1
    assert capsys.readouterr().err.startswith("safecode-mllm: error: RuntimeError: boom (unexpected")
    assert run("chat", *REQUEST, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_ends_without_a_traceback(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.error = KeyboardInterrupt()
    assert run("chat", *REQUEST) == 128 + signal.SIGINT
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required"),
        (["chat"], "--model"),
        (["chat", *REQUEST, "--compare", "--stream"], "not allowed with"),
        (["chat", *REQUEST, "--preset", "a", "--config", "b"], "not allowed with"),
        (["chat", *REQUEST, "--seed", "-1"], "[0, 2^63)"),
        (["chat", *REQUEST, "--temperature", "nan"], "finite"),
        (["chat", *REQUEST, "--max-new-tokens", "0"], "at least 1"),
        (["demo", "--n", "1"], "at least 2"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_bad_settings_end_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("chat", *REQUEST, "--preset", "safcode") == 2
    assert "'safecode'" in capsys.readouterr().err
    settings = tmp_path / "settings.json"
    settings.write_text('{"contrast_wieght": 1}')
    assert run("chat", *REQUEST, "--config", str(settings)) == 2
    assert "'contrast_weight'" in capsys.readouterr().err
    assert run("chat", *REQUEST, "--config", str(tmp_path / "none.json")) == 2
    assert "--config" in capsys.readouterr().err
    assert run("chat", *REQUEST, "--judge", "nobody") == 2
    assert "'nobody' is unknown" in capsys.readouterr().err
    assert run("chat", *REQUEST, "--stream", "--json") == 2
    assert "--stream and --json" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["bogus", "cpu:x"])
def test_a_device_that_is_not_there_is_bad_input(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("judge", *REQUEST, "--device", device) == 2
    assert f"--device {device} cannot be used here" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("chat", "--model", str(tmp_path), "--image", "i.png", "--prompt", "p", "--quiet") == 2
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert err.count("\n") == 1


def test_a_warning_is_shown_once(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    def warn(**_: Any) -> FakeResult:
        for _ in range(3):
            logging.getLogger("safecode_mllm.judges").warning("judge %r failed", "self")
        return FakeResult("answer")

    pipeline.chat = warn  # type: ignore[method-assign]
    assert run("chat", *REQUEST) == 0
    assert capsys.readouterr().err.count("safecode-mllm: judge 'self' failed\n") == 1
    assert run("chat", *REQUEST, "--quiet") == 0
    assert capsys.readouterr().err == ""


# ---- processes ----


@pytest.mark.parametrize("argv", [["chat", *REQUEST], ["demo"], ["world", "eval"], ["info", "--model", "hazard-world"]])
def test_a_missing_extra_is_a_hint(argv: list[str]) -> None:
    done = module(*argv, code="import sys; sys.modules['transformers'] = None")
    assert done.returncode == 1
    assert done.stderr == ("safecode-mllm: error: transformers is not installed: pip install 'safecode-kernels[hf]'\n")


def test_help_and_version_need_neither_torch_nor_transformers() -> None:
    block = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"
    for argv in (["--help"], ["chat", "--help"], ["demo", "--help"], ["world", "eval", "--help"]):
        done = module(*argv, code=block)
        assert done.returncode == 0, done.stderr
        assert "examples:" in done.stdout
    done = module("--version", code=block)
    assert done.stdout.startswith("safecode-mllm ")


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    program = [sys.executable, "-m", "safecode_mllm", "info"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 128 + signal.SIGPIPE


def test_help_names_every_preset() -> None:
    assert tuple(PRESETS) == tuple(PRESET_NAMES.split(", "))


def test_every_handler_exists() -> None:
    lines = (["demo"], ["chat", *REQUEST], ["judge", *REQUEST], ["info"], ["world", "train"], ["world", "eval"])
    for argv in lines:
        assert callable(cli._handler(build_parser().parse_args(argv).handler))
