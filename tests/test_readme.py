"""The README is true: its commands exist, those that need no network run, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safecode_mllm.cli.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
# In the README, stand for a model and a picture of the reader's own.
HUB_ID, OWN_PICTURE = "llava-hf/llava-1.5-7b-hf", "kitchen.jpg"
PACKAGED_MODEL, SCENE = "hazard-world", str(ROOT / "docs" / "images" / "scene.png")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"README has no {language} block"
    return found


def shell_lines() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("sh") for line in block.splitlines() if line.strip()]


def command_lines() -> list[list[str]]:
    return [line for line in shell_lines() if line[0] == "safecode-mllm"]


def offline(text: str) -> str:
    """Put the packaged model and a scene in the place of what a reader would download or own."""
    return text.replace(HUB_ID, PACKAGED_MODEL).replace(OWN_PICTURE, SCENE)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_every_shell_line_is_a_known_command() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {line[0] for line in shell_lines()} == {"make", "pip", "safecode-mllm"}
    for line in shell_lines():
        if line[0] == "make":
            run(["make", "--dry-run", *line[1:]])
        elif line[0] == "pip":
            assert re.fullmatch(r"safecode-kernels\[(\w+)\]", line[-1])[1] in extras  # type: ignore[index]
        else:
            build_parser().parse_args(line[1:])


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: line[1])
def test_command_lines_run(line: list[str]) -> None:
    arguments = [offline(argument) for argument in line[1:]]
    assert run([sys.executable, "-m", "safecode_mllm", *arguments]).strip()


def test_python_block_runs() -> None:
    (block,) = blocks("python")
    assert HUB_ID in block
    answer, verdict, plain = run([sys.executable, "-c", offline(block)]).strip().splitlines()
    assert answer
    assert plain
    assert verdict.startswith("Verdict(label='")


def test_python_block_is_short() -> None:
    (block,) = blocks("python")
    assert len(block.splitlines()) <= 8


def test_python_block_of_the_kernels_page_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert "tensor([0, 0, 0, 0, 0, 0, 0, 0]" in run([sys.executable, "-c", block])


def test_measured_tables_are_those_of_the_results() -> None:
    run([sys.executable, "scripts/update_docs.py", "--check"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
