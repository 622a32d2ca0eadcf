"""The root command: lazily loaded subcommands, and errors turned into exit codes.

Imports click and the error classes, nothing else. A subcommand's module is imported when it
is called; its line in `--help` stands here, so that listing the commands imports none.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import click

from autotune.cli.session import FORMATS, Session, shared_options
from autotune.errors import (
    AddressInUse,
    AuthenticationError,
    AutotuneError,
    DatabaseInUse,
    DiskFull,
    NotFoundError,
    UntrustedCode,
)

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Entry(NamedTuple):
    """Where a subcommand lives, and its line in `autotune --help`."""

    module: str
    attribute: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "tune": Entry("tune", "tune", "Tune a model on this machine, from job file to bundle."),
    "serve": Entry("serve", "serve", "Run the service that jobs and agents talk to."),
    "agent": Entry("agent", "agent", "Run the agent that measures on this device."),
    "job": Entry("job", "job", "Submit, list, show, watch, cancel and resume jobs."),
    "trial": Entry("trial", "trial", "List, show and confirm the trials of a job."),
    "front": Entry("front", "front", "Show a job's front; answer any latency budget."),
    "explain": Entry("explain", "explain", "Say why a trial is what it is, group by group."),
    "export": Entry("export", "export", "Write a trial as a bundle that runs on its own."),
    "export-optuna": Entry(
        "export_optuna", "export_optuna", "Write a job's trials as an Optuna study."
    ),
    "device": Entry(
        "device", "device", "Enroll, list, show and revoke devices; clear quarantines."
    ),
    "model": Entry("model", "model", "Look into a model: its layer groups."),
    "doctor": Entry("doctor", "doctor", "Check this machine and say what to repair."),
    "schema": Entry("schema", "schema", "Print the JSON Schema of the job file."),
    "completion": Entry("completion", "completion", "Print the completion script of a shell."),
}

# Errors whose message may come from far away, and the command that gets the user on.
_HINTS: dict[type[AutotuneError], str] = {
    UntrustedCode: "pass --trust-job-code if you trust the code that the job names",
    NotFoundError: "`autotune job ls`, `trial ls` and `device ls` list what there is",
    AuthenticationError: "pass --token or set AUTOTUNE_TOKEN; `autotune serve` shows where it lies",
    AddressInUse: "choose another port with --port, or 0 for a free one",
    DatabaseInUse: "stop the other service, or give this one its own --data-dir",
    DiskFull: "free some space, then run the same command; a job that failed goes on with "
    "`autotune job resume JOB`",
}


class LazyGroup(click.Group):
    """A group that imports a subcommand only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """The names in the order of the table: the usual path first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # click's signature
        """The command, imported now; None where there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(f"autotune.cli.{entry.module}")
        command: click.Command = getattr(module, entry.attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command named first; a mistyped name is told the nearest one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "`autotune --help` lists them"
            ctx.fail(f"no such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; a reader that went away ends the command quietly, with its own exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes stdout once more at exit, and would then complain.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  # click's signature
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  # click's signature
        """The exit codes, one line each."""
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in exit_codes()])


def exit_codes() -> list[tuple[int, str]]:
    """Every exit code with its meaning, in rising order.

    The ones between 1 and 127 are the `exit_code` of an error class, and its docstring.
    """
    codes = {
        0: "Done.",
        INTERRUPTED: "Interrupted (Ctrl-C); a job that ran can be resumed.",
        BROKEN_PIPE: "Whoever read the output went away.",
        TERMINATED: "Told to stop (SIGTERM).",
        AutotuneError.exit_code: "Any other error; --debug shows where.",
    }
    for error in AutotuneError.__subclasses__():
        text = " ".join((error.__doc__ or "").split())
        codes[error.exit_code] = text
    codes[2] = "The command line or the job file is not valid; the message says what is allowed."
    return sorted(codes.items())


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edge-autotune", prog_name="autotune")
@click.option("--debug", is_flag=True, envvar="AUTOTUNE_DEBUG", help="Show tracebacks.")
@shared_options
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Find the most accurate version of a model that runs inside a latency budget.

    Precision per layer, pruning and runtime options are searched together, and every
    candidate is measured on the device it is meant for.

    Start with `autotune tune JOB.yaml`. Data goes to stdout, progress to stderr.
    """
    ctx.ensure_object(Session).debug |= debug


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its documented exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None, session: Session | None = None) -> int:
    """Run the command line; every error becomes lines on stderr and an exit code."""
    session = session or Session()
    try:
        result = cli.main(
            None if arguments is None else list(arguments),
            prog_name="autotune",
            standalone_mode=False,
            obj=session,
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:  # noqa: BLE001  # the last door: nothing may reach the user raw
        return _explain(error, debug=session.debug)
    return result if isinstance(result, int) else 0


def _explain(error: Exception, *, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = DiskFull(f"no room is left for {error.filename or 'what has to be written'}")
    if not isinstance(error, AutotuneError):
        click.echo(f"error: unexpected {type(error).__name__}: {error}", err=True)
        if not debug:
            click.echo("hint: `autotune --debug ...` shows where; please report it", err=True)
        return AutotuneError.exit_code
    click.echo(f"error: {error}", err=True)
    hint = _HINTS.get(type(error))
    if hint is not None and hint not in str(error):
        click.echo(f"hint: {hint}", err=True)
    return error.exit_code


__all__ = ["COMMANDS", "FORMATS", "cli", "exit_codes", "main", "run"]
