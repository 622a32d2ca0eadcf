"""A device has the base install and nothing else; and the agent's parent stays small."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

BLOCKED = ("torch", "ray", "optuna", "sqlalchemy", "fastapi", "rich", "onnx", "autotune", "storage")
MODULES = (
    "device_agents.agent",
    "device_agents.cli",
    "device_agents.measurement",
    "device_agents.measurement_child",
    "device_agents.runtimes.onnxruntime",
    "device_agents.runtimes.simulated",
)


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_device_needs_the_base_install_alone(module):
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in BLOCKED)
    done = run(f"import sys\n{block}import {module}\n")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["device_agents.agent", "device_agents.measurement"])
def test_the_parent_loads_neither_numpy_nor_a_runtime(module):
    done = run(f"import sys, {module}\nprint({{'numpy', 'onnxruntime'}} & sys.modules.keys())")
    assert done.stdout.strip() == "set()", done.stderr


def test_the_child_loads_neither_pydantic_nor_httpx():
    program = (
        "import sys, device_agents.measurement_child as child\n"
        "child.load_runtime('onnxruntime')\n"
        "print({'pydantic', 'httpx', 'click'} & sys.modules.keys())"
    )
    assert run(program).stdout.strip() == "set()"


def test_the_command_line_imports_nothing_heavy_before_a_command_runs():
    program = (
        "import sys, device_agents.cli\n"
        "print({'numpy', 'pydantic', 'httpx', 'onnxruntime'} & sys.modules.keys())"
    )
    assert run(program).stdout.strip() == "set()"


def base_install():
    """The distributions that `pip install edge-autotune` brings, by name."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted, found = [Requirement(text) for text in project["dependencies"]], {}
    while wanted:
        requirement = wanted.pop()
        if requirement.name in found or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        found[requirement.name] = distribution(requirement.name)
        wanted += [Requirement(text) for text in found[requirement.name].requires or ()]
    return found


def test_nothing_of_the_base_install_wants_a_compiler():
    """A wheel that was built here would name this very platform, not one of the portable ones."""
    portable = re.compile(r"^Tag: \S+-(any|manylinux\S*|musllinux\S*|macosx\S*)$", re.MULTILINE)
    installed = base_install()
    assert {"httpx", "pydantic", "numpy", "onnxruntime"} <= installed.keys()
    assert "torch" not in installed
    for name, found in installed.items():
        assert portable.search(found.read_text("WHEEL") or ""), name
