"""The source tree's own rules that neither ruff nor mypy nor import-linter can hold."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("autotune", "search_spaces", "device_agents", "storage")
FIXED_FOLDERS = {*PACKAGES, "tests", "examples"}
MAX_LINES = 500
HEAVY = ("torch", "ray", "optuna", "sqlalchemy", "fastapi")
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X{3})\b|NotImplemented" r"Error")


def modules(*folders: str) -> list[Path]:
    """Every Python file below the folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_module = pytest.mark.parametrize("path", modules(*sorted(FIXED_FOLDERS)), ids=identifier)
packaged = pytest.mark.parametrize("path", modules(*PACKAGES), ids=identifier)


@every_module
def test_a_file_stays_short_enough_to_read(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines < MAX_LINES, f"{n_lines} lines; split it by noun"


@packaged
def test_a_module_opens_with_what_it_owns(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), "no module docstring"


@every_module
def test_nothing_is_left_for_later(path: Path) -> None:
    assert UNFINISHED.search(path.read_text(encoding="utf-8")) is None


@packaged
def test_only_the_command_lines_talk_to_the_terminal(path: Path) -> None:
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    is_program = path == ROOT / "autotune/export/run_bundle.py"  # copied into bundles as run.py
    allowed = is_program or "cli" in path.relative_to(ROOT).with_suffix("").parts
    assert allowed or not calls & {"print", "sys.exit", "exit", "quit"}


@packaged
def test_a_module_has_a_name_of_the_design(path: Path) -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handlers"}
    assert path.stem not in vague


@packaged
def test_frozen_records_have_slots_and_keywords(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for call in getattr(node, "decorator_list", []):
            text = ast.unparse(call)
            if text.startswith("dataclass(") and "frozen=True" in text:
                assert "slots=True" in text, f"{identifier(path)}: {text}"


def test_the_top_level_folders_are_the_fixed_ones() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what is tracked is not known")
    folders = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    assert {name for name in folders if not name.startswith(".")} <= FIXED_FOLDERS


@pytest.mark.parametrize("module", ["device_agents", "device_agents.cli", "autotune.client"])
def test_what_a_device_imports_needs_no_heavy_library(module: str, tmp_path: Path) -> None:
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    program = f"import sys\n{blocked}\nimport {module}\n"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)


def test_constraints_are_sorted_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)
    ] == []
    names = [_normal(pin.split("==")[0]) for pin in pins]
    assert names == sorted(names)


def test_every_requirement_of_the_project_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    wanted += [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {_normal(re.split(r"[\[<>=;~! ]", line)[0]) for line in wanted} - {"edge-autotune"}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {_normal(line.split("==")[0]) for line in text.splitlines() if "==" in line}
    assert names <= pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
