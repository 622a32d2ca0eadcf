"""`autotune export`: a trial as a bundle that runs on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from autotune.cli.limits import further_limits, limit_options
from autotune.cli.session import Session, shared_options


@click.command()
@click.argument("job", metavar="JOB")
@limit_options("budget")
@click.option(
    "--select",
    metavar="knee|fastest|most-accurate|TRIAL",
    help="knee, fastest or most-accurate of the front (the knee is where accuracy begins to cost "
    "much latency), or any trial by its number or id.",
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
    /,
    job: str,
    select: str | None,
    device: str | None,
    out: Path | None,
    **limits: Any,
) -> None:
    """Write a trial as a bundle: model, candidate, reports, and a program that runs it.

    With a budget or other limits it is the trial that answers them; without them and without
    --select it is the job's winner. Of a job on several devices that is the winner on the worst of
    them, in the file for the first, unless --device names one. Prints the path.
    """
    if select is not None and any(limit is not None for limit in limits.values()):
        raise click.UsageError("limits and --select exclude each other: each names one trial")
    client = session.client()
    named = [client.job(job).name, *([device] if device else []), "bundle"]
    target = out or Path("-".join(named))
    select = select.removeprefix("#") if select is not None else None
    if any(limit is not None for limit in limits.values()):
        # An answer may be past the limits, where no trial keeps them: that has to be said.
        asked = client.front(job, limits["budget"], device=device, **further_limits(limits))
        click.echo(asked.explanation, err=True)
    written = client.export(
        job,
        target,
        budget=limits["budget"],
        select=select,
        device=device,
        **further_limits(limits),
    )
    click.echo(str(written))
