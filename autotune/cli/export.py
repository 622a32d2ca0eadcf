"""`autotune export`: a trial as a bundle that runs on its own."""

from __future__ import annotations

from pathlib import Path

import click

from autotune.cli.parameters import BUDGET
from autotune.cli.session import Session, shared_options


@click.command()
@click.argument("job", metavar="JOB")
@click.option("--budget", type=BUDGET, help="The trial that answers this latency budget: 3ms.")
@click.option(
    "--select",
    metavar="knee|fastest|most-accurate|TRIAL",
    help="A trial of the front by its place, or any trial by number or id.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder, or file that ends in .zip.  [default: ./NAME-bundle]",
)
@shared_options
@click.pass_obj
def export(
    session: Session, job: str, budget: str | None, select: str | None, out: Path | None
) -> None:
    """Write a trial as a bundle: model, candidate, reports, and a program that runs it.

    Without --budget or --select it is the job's winner. Prints the path.
    """
    if budget is not None and select is not None:
        raise click.UsageError("--budget and --select exclude each other: each names one trial")
    client = session.client()
    target = out or Path(f"{client.job(job).name}-bundle")
    select = select.removeprefix("#") if select is not None else None
    click.echo(str(client.export(job, target, budget=budget, select=select)))
