"""`autotune front`: the non-dominated trials of a job, for any budget, at no cost.

With --portability what the winner on each of its devices costs on the others.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.limits import further_limits, limit_options
from autotune.cli.session import Session, shared_options

if TYPE_CHECKING:
    from autotune.api_types import Portability


@click.command()
@click.argument("job", metavar="JOB")
@limit_options("budget")
@click.option(
    "--device",
    metavar="NAME",
    help="The front on one of the job's devices.  [default: on the worst of them]",
)
@click.option(
    "--portability",
    is_flag=True,
    help="Show instead what the winner on each device costs on the others.",
)
@shared_options
@click.pass_obj
def front(
    session: Session,
    /,
    job: str,
    device: str | None,
    portability: bool,
    **limits: Any,
) -> None:
    """Show a job's front and the trial that answers a budget.

    New limits are answered from what was measured; nothing runs again. Of a job on several
    devices it is the front on the worst of them: each trial where its latency is the largest
    share of the device's budget, or of FP32's where there is none.
    """
    client = session.client()
    if portability:
        if device is not None or any(limit is not None for limit in limits.values()):
            raise click.UsageError("--portability is about the winners; it takes no other question")
        _show_portability(session, client.portability(job))
        return
    found = client.front(job, limits["budget"], device=device, **further_limits(limits))
    from autotune.cli.output import print_rows, write_json

    if session.output_format == "json":
        write_json(found.model_dump(mode="json"), sys.stdout)
        return
    from autotune.cli.views.front import FRONT, front_rows, on_devices

    shown = client.job(job)
    rows = front_rows(
        found.trials,
        # On one of several devices the baselines' figures are not those of the whole job.
        client.trials(job) if len(shown.targets) < 2 or found.device_id is None else (),
        result=shown.result,
        answer=found.answer,
    )
    view = on_devices(FRONT, shown.targets) if found.device_id is None else FRONT
    print_rows(view, rows, output_format=session.output_format, to=sys.stdout)
    click.echo(found.explanation, err=session.output_format != "table")


def _show_portability(session: Session, found: Portability) -> None:
    from autotune.cli.output import print_rows, write_json

    if session.output_format == "json":
        write_json(found.model_dump(mode="json"), sys.stdout)
        return
    from autotune.cli.views.portability import portability_view

    view = portability_view(found.targets)
    print_rows(view, found.rows, output_format=session.output_format, to=sys.stdout)
    if session.output_format == "table":
        click.echo("x own winner: how many times as long as the winner on that device takes there")
