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
TERMINAL = {"print", "sys.exit", "exit", "quit"}
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X{3})\b|NotImplemented" r"Error")


def modules(*folders: str) -> list[Path]:
    """Every Python file below the folders, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


EVERYWHERE = modules(*sorted(FIXED_FOLDERS))
PACKAGED = modules(*PACKAGES)


def test_there_is_something_to_look_at() -> None:
    assert len(PACKAGED) > 20


def test_a_file_stays_short_enough_to_read() -> None:
    lines = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in EVERYWHERE}
    assert {name: n for name, n in lines.items() if n >= MAX_LINES} == {}, "split by noun"


def test_a_module_opens_with_what_it_owns() -> None:
    trees = {name_of(path): tree_of(path) for path in PACKAGED}
    assert [name for name, t in trees.items() if t.body and not ast.get_docstring(t)] == []


def test_nothing_is_left_for_later() -> None:
    found = {name_of(p): UNFINISHED.search(p.read_text(encoding="utf-8")) for p in EVERYWHERE}
    assert {name: match[0] for name, match in found.items() if match} == {}


def test_only_the_command_lines_talk_to_the_terminal() -> None:
    talking = {name_of(p) for p in PACKAGED if _calls(tree_of(p)) & TERMINAL}
    talking -= {"autotune/export/run_bundle.py"}  # a program: copied into every bundle as run.py
    outside = {n for n in talking if "cli" not in Path(n).with_suffix("").parts}
    assert outside == set()


def test_a_module_has_a_name_of_the_design() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "handlers"}
    assert [name_of(path) for path in PACKAGED if path.stem in vague] == []


def test_frozen_records_have_slots() -> None:
    decorators = [
        (name_of(path), ast.unparse(decorator))
        for path in PACKAGED
        for node in ast.walk(tree_of(path))
        for decorator in getattr(node, "decorator_list", [])
    ]
    frozen = [(n, text) for n, text in decorators if re.match(r"dataclass\(.*frozen=True", text)]
    assert len(frozen) > 10
    assert [(n, text) for n, text in frozen if "slots=True" not in text] == []


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


def _calls(tree: ast.Module) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
