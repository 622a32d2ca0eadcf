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
    "--device",
    metavar="NAME",
    help="One of the job's devices: its own winner, in the file for its kernels.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder, or file that ends in .zip.  [default: ./NAME-bundle]",
)
@shared_options
@click.pass_obj
def export(
    session: Session,
    job: str,
    budget: str | None,
    select: str | None,
    device: str | None,
    out: Path | None,
) -> None:
    """Write a trial as a bundle: model, candidate, reports, and a program that runs it.

    Without --budget or --select it is the job's winner: of a job on several devices the one on
    the worst of them, in the file for the first, unless --device names one. Prints the path.
    """
    if budget is not None and select is not None:
        raise click.UsageError("--budget and --select exclude each other: each names one trial")
    client = session.client()
    named = [client.job(job).name, *([device] if device else []), "bundle"]
    target = out or Path("-".join(named))
    select = select.removeprefix("#") if select is not None else None
    click.echo(str(client.export(job, target, budget=budget, select=select, device=device)))
