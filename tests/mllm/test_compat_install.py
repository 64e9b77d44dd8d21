"""`install` swaps functions wherever the published package holds them, and `uninstall` leaves no trace."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safecode_mllm import compat
from safecode_mllm.compat import __main__ as command
from safecode_mllm.compat import installing
from safecode_mllm.errors import ConfigError

UTILS = tuple(installing._DECODING["utils"])
# A package of the published one's shape: functions in `utils`, drivers that import them by name.
FILES = {
    "__init__.py": "",
    "utils.py": "\n".join(f"def {name}(*args, **kwargs):\n    return 'theirs'" for name in UTILS),
    "judge.py": "\n".join(
        f"def {name}(*args):\n    return 'theirs'" for name in ("set_judge", "get_judge", "prepare_caption_and_verdict")
    ),
    "load_models.py": "def load_model(args):\n    return 'theirs'",
    "eval.py": "from safecode.utils import apply_gaussian_noise as noise\n"
    "from safecode.utils import contrastive_decode_multistep_with_modulation\nfrom safecode.judge import get_judge",
    "main.py": "import sys\nfrom safecode import eval\nfrom safecode.load_models import load_model\n"
    "print(sys.argv[1:], eval.noise.__module__, load_model.__module__)",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in package, importable inside the test."""
    folder = tmp_path / "safecode"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text + "\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "safecode"}
    _forget()
    yield tmp_path
    compat.uninstall()
    _forget()
    sys.modules.update(kept)


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "safecode"]:
        del sys.modules[name]


def test_every_module_gets_ours_and_theirs_back(package: Path) -> None:
    utils, driver = importlib.import_module("safecode.utils"), importlib.import_module("safecode.eval")
    before = dict(vars(utils)), dict(vars(driver))
    names = compat.install()
    assert names == [f"safecode.utils.{name}" for name in UTILS]
    for name in UTILS:
        assert getattr(utils, name).__wrapped__ is getattr(compat, name)
    assert driver.noise is utils.apply_gaussian_noise
    assert driver.get_judge() == "theirs"
    compat.install()  # again: still one layer
    assert utils.apply_gaussian_noise.__wrapped__ is compat.apply_gaussian_noise
    compat.uninstall()
    assert (dict(vars(utils)), dict(vars(driver))) == before
    compat.uninstall()


def test_judge_and_loader_are_swapped_when_asked(package: Path) -> None:
    driver = importlib.import_module("safecode.eval")
    assert "safecode.judge.get_judge" in compat.install(judge=True)
    assert driver.get_judge.__wrapped__ is compat.get_judge
    assert "safecode.load_models.load_model" in compat.install(loader=True)
    assert driver.get_judge() == "theirs"


def test_options_reach_the_decoding_function(package: Path) -> None:
    compat.install(strict_published=True, on_unknown="treat_as_unsafe")
    utils = importlib.import_module("safecode.utils")
    swapped = utils.contrastive_decode_multistep_with_modulation
    assert swapped.keywords == {"strict_published": True, "on_unknown": "treat_as_unsafe"}
    assert utils.contrastive_decode_multistep_no_verdict.keywords == {"strict_published": True}
    assert utils.apply_gaussian_noise.keywords == {}


def test_what_cannot_be_swapped_is_named(package: Path) -> None:
    (package / "safecode" / "utils.py").write_text("def apply_gaussian_noise(): ...\n")
    with pytest.raises(ConfigError, match=r"safecode\.utils has no contrastive_decode.*another version"):
        compat.install()
    (package / "safecode" / "utils.py").unlink()
    _forget()
    with pytest.raises(ConfigError, match=r"cannot import safecode\.utils.*PYTHONPATH"):
        compat.install()


def test_a_driver_runs_unchanged(package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(package)
    assert command.main(["--loader", "safecode.main", "--alpha", "0.3"]) == 0
    shown = capsys.readouterr().out
    assert shown == "['--alpha', '0.3'] safecode_mllm.compat.noise safecode_mllm.compat.loading\n"
    (package / "demo.py").write_text(
        "import sys, safecode.utils as u\nprint(sys.argv, u.apply_gaussian_noise.__module__)"
    )
    assert command.main([str(package / "demo.py"), "x"]) == 0
    assert capsys.readouterr().out == f"[{str(package / 'demo.py')!r}, 'x'] safecode_mllm.compat.noise\n"


def test_without_the_published_package_the_command_says_so(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (package / "safecode" / "utils.py").unlink()
    assert command.main(["safecode.main"]) == 2
    assert "error: cannot import safecode.utils" in capsys.readouterr().err


def test_published_names_are_all_there() -> None:
    for name in (*UTILS, "load_model", "set_judge", "get_judge", "prepare_caption_and_verdict"):
        assert name in compat.__all__ and callable(getattr(compat, name))
