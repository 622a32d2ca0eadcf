"""README and CONTRIBUTING tell the truth: their commands, keys, targets and links exist."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from pydantic import BaseModel

from autotune.cli.root import cli
from autotune.client import Client
from autotune.spec import JobSpec, parse_job
from device_agents.cli import main as agent

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BOTH = README + CONTRIBUTING


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[str]:
    """Every line in a code block, and every piece of inline code, that calls the program."""
    lines = [line for block in blocks(BOTH, "") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", BOTH)
    stripped = (line.strip().removeprefix(".venv/bin/") for line in lines)
    return sorted({line for line in stripped if re.match(rf"{program}( |$)", line)})


def require_command(root: click.Command, words: list[str]) -> None:
    """Follow the words down to a command; its options must be ones that it has."""
    command = root
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None
        command = found
    known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("line", commands("autotune"))
def test_a_command_of_the_documentation_exists(line: str) -> None:
    require_command(cli, shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("line", commands("autotune-agent"))
def test_an_agent_command_of_the_documentation_exists(line: str) -> None:
    assert isinstance(agent, click.Group)
    require_command(agent, shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert re.search(rf"^\| `autotune {name}[ `]", README, flags=re.MULTILINE)


def test_every_subcommand_is_in_the_readme() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        group = cli.get_command(context, name)
        row = next(line for line in README.splitlines() if line.startswith(f"| `autotune {name}"))
        if isinstance(group, click.Group):
            missing = [sub for sub in group.list_commands(context) if sub not in row]
            assert missing == [], f"{row} lacks {missing}"


def test_every_make_target_is_documented_and_the_other_way_round() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, flags=re.MULTILINE)) - {"help"}
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", BOTH, flags=re.MULTILINE))
    assert named == targets


def test_the_job_file_of_the_readme_is_valid_and_shows_every_key() -> None:
    (text,) = blocks(README, "yaml")
    document = yaml.safe_load(text)
    parse_job(document)
    for name, field in JobSpec.model_fields.items():
        assert name in document
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert set(document[name]) == set(section.model_fields), name


def test_the_python_example_uses_what_the_client_has() -> None:
    (text,) = blocks(README, "python")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "client":
            assert callable(getattr(Client, node.attr))
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert importlib.util.find_spec(node.module) is not None


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", BOTH))))
def test_a_link_leads_somewhere(link: str) -> None:
    assert re.match(r"https?://", link) or (ROOT / link).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*\.?[a-z]*)`", BOTH)))
)
def test_a_path_that_is_named_exists(path: str) -> None:
    places = (ROOT, ROOT / "autotune")
    assert any((place / path).exists() for place in places)


@pytest.mark.parametrize(
    "module", sorted(set(re.findall(r"python -m (tests\.benchmarks\.[a-z_]+)", BOTH)))
)
def test_a_benchmark_that_is_named_exists(module: str) -> None:
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()
