"""`autotune front`: the non-dominated trials of a job, for any budget, at no cost."""

from __future__ import annotations

import sys

import click

from autotune.cli.parameters import BUDGET, FRACTION
from autotune.cli.session import Session, shared_options


@click.command()
@click.argument("job", metavar="JOB")
@click.option(
    "--budget",
    type=BUDGET,
    help="Latency budget to answer: 3ms, 800us, or 0.5x of FP32.  [default: the job's own]",
)
@click.option(
    "--max-drop",
    type=FRACTION,
    help="Largest acceptable loss of accuracy against FP32: 1% or 0.01.  [default: the job's own]",
)
@shared_options
@click.pass_obj
def front(session: Session, job: str, budget: str | None, max_drop: float | None) -> None:
    """Show a job's front and the trial that answers a budget.

    A new budget is answered from what was measured; nothing runs again.
    """
    client = session.client()
    found = client.front(job, budget=budget, max_drop=max_drop)
    if session.output_format == "json":
        import json

        click.echo(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return
    from autotune.cli.output import print_rows
    from autotune.cli.views.front import FRONT, front_rows

    rows = front_rows(
        found.trials,
        client.trials(job),
        result=client.job(job).result,
        answer=found.answer,
    )
    print_rows(FRONT, rows, output_format=session.output_format, to=sys.stdout)
    click.echo(found.explanation, err=session.output_format != "table")
