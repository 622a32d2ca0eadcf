"""`autotune explain`: why a trial is what it is, by layer group."""

from __future__ import annotations

import sys

import click

from autotune.cli.session import Session, shared_options


@click.command()
@click.argument("job", metavar="JOB")
@click.argument("trial", metavar="[TRIAL]", required=False)
@click.option(
    "--device",
    metavar="NAME",
    help="One of the job's devices.  [default: where the trial takes most of the budget]",
)
@shared_options
@click.pass_obj
def explain(session: Session, job: str, trial: str | None, device: str | None) -> None:
    """Say why a trial has the precisions that it has, and what others would do.

    TRIAL is a number, an id, knee, fastest or most-accurate; left out, it is the job's winner.
    The figures are those of a model fitted to the job's trials, each with its 95 % interval and
    with how much of it the trials told; nothing runs again.
    """
    from autotune.cli.output import print_rows, write_json
    from autotune.cli.views.explanation import CHOICES, choice_rows, model_lines, trial_lines

    reference = None if trial is None else trial.removeprefix("#")
    found = session.client().explain(job, reference, device=device)
    if session.output_format == "json":
        write_json(found.model_dump(mode="json"), sys.stdout)
        return
    is_table = session.output_format == "table"
    for line in trial_lines(found):
        click.echo(line, err=not is_table)
    print_rows(
        CHOICES,
        choice_rows(found.groups, with_fp32=not is_table),
        output_format=session.output_format,
        to=sys.stdout,
    )
    for line in model_lines(found):
        click.echo(line, err=not is_table)
