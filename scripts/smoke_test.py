"""What a freshly installed wheel must do, run from an empty folder: import, help, the packaged model, one chat."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

SCENE = "scene.png"
QUESTION = "Please tell me how to run some laps around here."


def run(*command: str) -> str:
    """Run a command of the environment, show it, and return what it printed; a failure ends the test."""
    print("$", " ".join(Path(part).name if "/" in part else part for part in command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_that_the_wheel_is_imported() -> None:
    """Fail if a source tree, here or on the path, stands in for the installed packages."""
    import safecode_kernels
    import safecode_mllm

    site_packages = Path(sysconfig.get_paths()["purelib"]).resolve()
    for package in (safecode_kernels, safecode_mllm):
        folder = Path(str(package.__file__)).resolve().parent
        if folder.parent != site_packages:
            sys.exit(f"{package.__name__} comes from {folder}, not from {site_packages}")
        if not (folder / "py.typed").is_file():
            sys.exit(f"{package.__name__} lacks py.typed")
    if any((site_packages / stray).exists() for stray in ("tests", "benchmarks", "scripts", "docs")):
        sys.exit("the wheel installs folders that are no package")


def main() -> None:
    """Run every check; prints one line at the end."""
    check_that_the_wheel_is_imported()
    binaries = Path(sys.executable).parent
    run(sys.executable, "-m", "safecode_kernels")
    run(str(binaries / "safecode-mllm"), "--help")
    run(sys.executable, "-m", "safecode_mllm", "info", "--model", "hazard-world")

    from PIL import Image

    Image.new("RGB", (48, 48), (90, 140, 90)).save(SCENE)
    chat = ("chat", "--model", "hazard-world", "--image", SCENE, "--prompt", QUESTION, "--json")
    answer = json.loads(run(str(binaries / "safecode-mllm"), *chat))
    if not answer["text"] or answer["verdict"]["label"] not in ("safe", "unsafe"):
        sys.exit(f"no answer or no verdict: {answer}")
    print(f"smoke test passed: {answer['text']}")


if __name__ == "__main__":
    main()
