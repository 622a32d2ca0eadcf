"""Nothing that has a name is undocumented, and nothing documented has gone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from autotune.cli.reference import SETTINGS, commands, job_keys, reference_text
from autotune.cli.root import COMMANDS, cli, exit_codes
from autotune.settings import Settings
from autotune.spec import job_schema_text

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "autotune" / "docs"
ALL = dict(commands())
CALL = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?(autotune(?: .*)?)$", re.MULTILINE)


@pytest.fixture(scope="module")
def reference() -> str:
    return (DOCS / "reference.md").read_text(encoding="utf-8")


def test_the_published_schema_is_current() -> None:
    published = (DOCS / "job.schema.json").read_text(encoding="utf-8")
    assert published == job_schema_text(), "run: autotune schema > autotune/docs/job.schema.json"


def test_the_published_reference_is_current(reference: str) -> None:
    assert reference == reference_text(), (
        "run: autotune schema --reference > autotune/docs/reference.md"
    )


@pytest.mark.parametrize("words", ALL)
def test_a_command_says_what_it_does(words: str) -> None:
    text = (ALL[words].help or "").strip()
    assert text and text.partition("\n\n")[0].rstrip().endswith((".", ";", "winner."))


@pytest.mark.parametrize("words", ALL)
def test_a_list_of_commands_shows_whole_sentences(words: str) -> None:
    if isinstance(group := ALL[words], click.Group):
        with click.Context(group, info_name=words, terminal_width=80) as context:
            assert "..." not in group.get_help(context).partition("Commands:")[2]


@pytest.mark.parametrize("words", ALL)
def test_an_option_says_what_it_means(words: str) -> None:
    options = [p for p in ALL[words].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("words", ALL)
def test_a_command_is_in_the_reference(words: str, reference: str) -> None:
    if not isinstance(ALL[words], click.Group):
        assert re.search(rf"^### `{re.escape(words)}[ `]", reference, re.MULTILINE)


def test_the_reference_tells_the_defaults_that_the_help_tells(reference: str) -> None:
    assert "Seconds of timing after which to stop anyway. [default: 10.0; x>0]" in reference


def test_every_top_level_command_is_reached() -> None:
    assert {words.split()[1] for words in ALL} == set(COMMANDS)


def test_every_exit_code_is_in_the_reference(reference: str) -> None:
    for code, meaning in exit_codes():
        assert f"| {code} | {meaning} |" in reference


def test_a_table_of_the_reference_has_one_line_for_each_row(reference: str) -> None:
    between = re.findall(r"^\|.*\n([^|\n].*)$", reference, re.MULTILINE)
    assert between == []


def test_every_setting_is_in_the_reference_with_its_variable(reference: str) -> None:
    assert set(SETTINGS) == set(Settings.model_fields)
    for name, meaning in SETTINGS.items():
        assert f"| `{name}` | `AUTOTUNE_{name.upper()}` |" in reference and meaning in reference


def test_every_job_file_key_is_in_the_reference_and_described(reference: str) -> None:
    keys = dict(job_keys())
    assert {"model.source", "search.trials", "latency_budget"} <= set(keys)
    assert [path for path, field in keys.items() if not field.description] == []
    assert [path for path in keys if f"| `{path}` |" not in reference] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_a_documented_call_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for call in [line for block in blocks for line in CALL.findall(block.replace("\\\n", " "))]:
        check_call(shlex.split(call, comments=True)[1:])


def check_call(words: list[str]) -> None:
    """Every command and option among the words is one that there is."""
    command: click.Command = cli
    known: set[str] = {"--help", "--version"}
    for word in words:
        known |= {name for p in command.params for name in [*p.opts, *p.secondary_opts]}
        if word.startswith("-"):
            assert word.partition("=")[0] in known, f"{word} in: autotune {' '.join(words)}"
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            assert found is not None, f"{word} in: autotune {' '.join(words)}"
            command = found


def test_a_call_that_does_not_exist_is_noticed() -> None:
    check_call(["front", "JOB", "--budget", "3ms"])
    for wrong in (["fronts"], ["front", "JOB", "--bugdet", "3ms"], ["job", "lst"]):
        with pytest.raises(AssertionError):
            check_call(wrong)
