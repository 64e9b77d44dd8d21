"""The rules of the house: which room may know what, one version, no stray prints, quick imports, true build files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "safecode_kernels"
MLLM = ROOT / "python" / "safecode_mllm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Importing safecode_mllm, which loads no torch: generous for a busy machine, far below the second that torch takes.
MAX_MLLM_IMPORT_MS = 100
# The places that speak to people: they may print.
SPEAKING = ("__main__.py",)


def sources(*roots: Path) -> list[Path]:
    found = sorted(path for root in roots for path in root.rglob("*.py"))
    assert found, f"no sources under {roots}"
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked_files() -> list[Path]:
    """Every file of the repository as git sees it, new ones included; all files when this is no checkout (an sdist)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / entry for entry in listed.stdout.split("\0") if entry and (ROOT / entry).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not path.relative_to(ROOT).parts[0].startswith(".")]


# ---- rooms ----


def test_kernels_know_torch_only() -> None:
    allowed = {"safecode_kernels", "torch", "triton"} | sys.stdlib_module_names
    for path in sources(KERNELS):
        assert imported_modules(parse(path)) <= allowed, name(path)


def test_only_families_names_a_model_type() -> None:
    from safecode_mllm.decoding.families import FAMILIES

    assert FAMILIES
    # The second speaks the published code's names of its ways to prompt, two of which are also model types.
    allowed = {MLLM / "decoding" / "families.py", MLLM / "compat" / "model_types.py"}
    for path in sources(KERNELS, MLLM):
        if path in allowed:
            continue
        strings = {node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant)}
        assert not strings & set(FAMILIES), name(path)


def test_environment_is_read_in_settings_only() -> None:
    for path in sources(KERNELS, MLLM):
        if path.name == "settings.py":
            continue
        for node in ast.walk(parse(path)):
            reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}
            imports = isinstance(node, ast.ImportFrom) and node.module == "os"
            assert not reads, f"{name(path)}:{node.lineno}"
            if imports:
                names = {alias.name for alias in node.names}
                assert not names & {"environ", "getenv"}, f"{name(path)}:{node.lineno}"


def test_library_code_does_not_print() -> None:
    for path in sources(KERNELS, MLLM):
        if path.name in SPEAKING:
            continue
        for node in ast.walk(parse(path)):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not called, f"{name(path)}:{node.lineno}"


def test_no_pickle_and_no_remote_code() -> None:
    for path in sources(KERNELS, MLLM):
        tree = parse(path)
        assert not imported_modules(tree) & {"pickle", "dill", "cloudpickle"}, name(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), f"{name(path)}:{node.value.lineno}"
                assert node.value.value is False, f"{name(path)}:{node.value.lineno}"


def test_no_machine_paths() -> None:
    # Put together here so that this file does not contain them.
    paths = ["/" + folder + "/" for folder in ("work", "farm", "home", "root")]
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(path)}" for path in paths))
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = pattern.search(text)
        assert found is None, f"{name(path)}: {found.group()}" if found else ""


# ---- shape ----


def test_every_public_function_has_a_docstring() -> None:
    missing = []
    for path in sources(KERNELS, MLLM):
        tree = parse(path)
        if ast.get_docstring(tree) is None and path.read_text().strip():
            missing.append(name(path))
        public_classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        owners: list[ast.Module | ast.ClassDef] = [tree, *public_classes]
        for owner in owners:
            for node in owner.body:
                described = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if described and not node.name.startswith("_") and ast.get_docstring(node) is None:
                    missing.append(f"{name(path)}:{node.lineno} {node.name}")
    assert not missing, missing


def test_files_and_functions_stay_short() -> None:
    long = []
    shipped = sources(KERNELS, MLLM, ROOT / "benchmarks", ROOT / "scripts")
    for path in [*shipped, *sources(ROOT / "tests")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            long.append(f"{name(path)}: {lines} lines")
    # Not in tests: a specification written out in one piece is easier to compare with its text.
    for path in shipped:
        for node in functions(parse(path)):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            length = lines_of(node) - (lines_of(docstring) if docstring else 0)
            if length > MAX_FUNCTION_LINES:
                long.append(f"{name(path)}:{node.lineno} {node.name}: {length} lines without its docstring")
    assert not long, long


# ---- one version, one set of requirements ----


def test_version_stands_in_one_place() -> None:
    import safecode_kernels
    import safecode_mllm

    version = safecode_kernels.__version__
    assert PROJECT["dynamic"] == ["version"]
    assert safecode_mllm.__version__ == metadata.version("safecode-kernels") == version, "run make venv"
    homes = [name(path) for path in sources(KERNELS, MLLM) if f'"{version}"' in path.read_text()]
    assert homes == ["safecode_kernels/__init__.py"]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == version


def test_constraints_pin_every_direct_dependency_inside_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(Requirement(line).name): str(Requirement(line).specifier)[2:] for line in lines}
    assert pins["torch"] == "2.13.0"
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"hf", "judges", "bench", "dev"}
    for text in [*PROJECT["dependencies"], *(text for extra in extras.values() for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_every_module_of_an_extra_is_known() -> None:
    from safecode_mllm.extras import EXTRA_OF_MODULE

    imported = set().union(*(imported_modules(parse(path)) for path in sources(MLLM)))
    # These come with transformers and never without it.
    with_transformers = {"tokenizers", "safetensors", "huggingface_hub", "jinja2"}
    own = {"safecode_kernels", "safecode_mllm", "torch"}
    unknown = imported - own - with_transformers - set(EXTRA_OF_MODULE) - sys.stdlib_module_names
    assert not unknown
    assert set(EXTRA_OF_MODULE.values()) <= set(PROJECT["optional-dependencies"])


def test_matrix_names_what_it_pins() -> None:
    files = sorted((ROOT / "tests" / "matrix").glob("*.txt"))
    assert {"4.57.6", "5.17.0"} < {path.stem for path in files}
    for path in files:
        assert f"transformers=={path.stem}" in path.read_text().splitlines(), name(path)
    newest = max((path.stem for path in files), key=lambda version: tuple(map(int, version.split("."))))
    assert f"transformers=={newest}" in (ROOT / "constraints.txt").read_text().splitlines()


# ---- imports ----


def test_importing_the_package_is_quick_and_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import safecode_mllm\n"
        "ms = (time.perf_counter() - start) * 1000\n"
        "import json; print(json.dumps([ms, sorted({m.partition('.')[0] for m in sys.modules})]))"
    )
    # The best of three: the question is what the import costs, not how busy the machine is.
    runs = [json.loads(run_python(code)) for _ in range(3)]
    assert min(ms for ms, _ in runs) < MAX_MLLM_IMPORT_MS
    assert not {"torch", "transformers", "numpy", "PIL"} & set(runs[0][1])


def test_every_public_name_loads() -> None:
    import safecode_mllm

    for public in safecode_mllm.__all__:
        assert getattr(safecode_mllm, public) is not None
        assert public in dir(safecode_mllm)
    with pytest.raises(AttributeError, match="no attribute 'Safecode'"):
        _ = safecode_mllm.Safecode


@pytest.mark.parametrize("model", ["hazard-world", "owner/model"])
def test_missing_extra_is_a_hint(model: str) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import safecode_mllm\n"
        "try:\n"
        f"    safecode_mllm.SafeCoDe.from_pretrained({model!r})\n"
        "except safecode_mllm.errors.MissingExtraError as error:\n"
        "    print(error)"
    )
    assert run_python(code) == "transformers is not installed: pip install 'safecode-kernels[hf]'\n"


# ---- the build files ----


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    targets = set(phony.group(1).split())
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert described == targets
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in shown for target in targets)


def test_ci_runs_only_known_targets() -> None:
    stages = re.search(r"^for name in (.*); do$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert stages is not None
    for target in stages.group(1).split():
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)
    assert {"test", "lint", "test-matrix", "dist"} <= set(stages.group(1).split())
