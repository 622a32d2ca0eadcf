"""The reference: commands, exit codes, settings and job-file keys, as one Markdown page.

Owns the page's layout. What it says is read from the code itself, so that it cannot fall
behind: help texts from click, codes from the errors, keys from the models. Only the settings'
sentences stand here, because their names alone do not explain them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from autotune.cli.root import cli, exit_codes
from autotune.settings import Settings
from autotune.spec import JobSpec
from device_agents.cli import EXIT_CODES

SETTINGS = {
    "data_dir": "Folder of the database, the artifacts and the token.",
    "database_url": "`sqlite:///PATH` or `postgresql+psycopg://...`; SQLite in the data folder.",
    "host": "Address to listen on; beyond loopback it needs TLS or `insecure`.",
    "port": "Port to listen on; 0 takes a free one.",
    "workers": "Worker processes; one per usable core.",
    "trust_job_code": "Jobs may run Python code that they name.",
    "tls_cert": "Certificate chain, PEM.",
    "tls_key": "Private key, PEM.",
    "insecure": "Listen beyond loopback without TLS; tokens then travel in the clear.",
    "heartbeat_s": "Seconds between two heartbeats of an agent.",
    "lease_ttl_s": "Seconds without a heartbeat after which a measurement goes to another agent.",
    "measurement_attempts": "Leases of one measurement that may run out before it is given up.",
    "max_upload_bytes": "Largest file that a client may upload, in bytes.",
}

_NOTE = """# Reference

Commands, exit codes, settings and job-file keys. This page is generated: `autotune schema
--reference` prints it, and a test fails where it has fallen behind.
"""

_SHARED = """Every command takes `--help`. The options of `autotune` itself are accepted before the
command, and `-o`, `--url` and `--token` also after one that prints data or asks a service.
"""


def reference_text() -> str:
    """The page."""
    shared = [_option(option) for option in cli.params if isinstance(option, click.Option)]
    parts = [
        _NOTE,
        "## Commands\n",
        _SHARED,
        _table(("option", "meaning"), shared),
        *_commands(),
        "## Exit codes\n",
        _exit_codes(),
        _agent_exit_codes(),
    ]
    parts += ["## Settings of the service\n", _settings(), "## Job file\n", *_job_file()]
    return "\n".join(parts)


def commands(
    group: click.Group = cli, path: str = "autotune"
) -> Iterator[tuple[str, click.Command]]:
    """Every command with the words that call it, groups before what they hold."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None:
            continue
        words = f"{path} {name}"
        yield words, command
        if isinstance(command, click.Group):
            yield from commands(command, words)


def job_keys(section: type[BaseModel] = JobSpec, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the job file with its place, sections before what they hold."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}", field
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from job_keys(annotation, f"{path}{name}.")


def _commands() -> Iterator[str]:
    for words, command in commands():
        if isinstance(command, click.Group):
            continue
        arguments = [
            p.make_metavar(click.Context(command)) for p in command.params if _is_argument(p)
        ]
        first = (command.help or "").replace("\b", "").strip().partition("\n\n")[0]
        options = [_option(p) for p in command.params if _is_its_own(p)]
        yield f"### `{' '.join([words, *arguments])}`\n\n{' '.join(first.split())}\n"
        if options:
            yield _table(("option", "meaning"), options)


def _is_argument(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Argument)


def _is_its_own(parameter: click.Parameter) -> TypeGuard[click.Option]:
    """An option that is not one of those which every command takes."""
    shared = {name for option in cli.params for name in option.opts}
    return isinstance(parameter, click.Option) and not shared.issuperset(parameter.opts)


def _option(option: click.Option) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    _, meaning = option.get_help_record(click.Context(cli)) or ("", "")
    return names, meaning


def _exit_codes() -> str:
    return _table(("code", "meaning"), [(str(code), text) for code, text in exit_codes()])


def _agent_exit_codes() -> str:
    listed = " ".join(EXIT_CODES.replace("\b", "").split()).removeprefix("Exit codes: ")
    return f"Those of `autotune-agent`, which is also `autotune agent`: {listed}\n"


def _settings() -> str:
    rows = [
        (f"`{name}`", f"`AUTOTUNE_{name.upper()}`", _default(field, name), SETTINGS[name])
        for name, field in Settings.model_fields.items()
    ]
    return _table(("setting", "environment", "default", "meaning"), rows)


def _job_file() -> Iterator[str]:
    yield "A YAML file. Paths in it are relative to its own folder. The JSON Schema is in"
    yield "[job.schema.json](job.schema.json).\n"
    rows = [
        (f"`{path}`", _default(field, path), field.description or "") for path, field in job_keys()
    ]
    yield _table(("key", "default", "meaning"), rows)


def _default(field: FieldInfo, name: str) -> str:
    """The default as a job file writes it; what depends on the machine says so."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return {"data_dir": "`~/.local/share/edge-autotune`", "workers": "usable cores"}[name]
    if isinstance(field.default, BaseModel):
        return "see below"
    return f"`{_yaml(field.default)}`" if field.default is not None else "none"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    # A cell is one line: the next one would end the table.
    cells = [" | ".join(" ".join(x.split()).replace("|", "\\|") for x in line) for line in lines]
    return "".join(f"| {line} |\n" for line in cells)
