"""`autotune trial`: the trials of a job, and one of them in full."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.cli.session import Session, shared_options

if TYPE_CHECKING:
    from autotune.api_types import Trial
    from autotune.client import Client


@click.group()
def trial() -> None:
    """List, show and confirm the trials of a job."""


@trial.command("ls")
@click.argument("job", metavar="JOB")
@shared_options
@click.pass_obj
def list_trials(session: Session, job: str) -> None:
    """List the trials of a job, in the order they were proposed."""
    from autotune.cli.output import print_rows
    from autotune.cli.views.trials import TRIALS

    trials = session.client().trials(job)
    print_rows(TRIALS, trials, output_format=session.output_format, to=sys.stdout)


@trial.command("show")
@click.argument("job", metavar="JOB")
@click.argument("reference", metavar="TRIAL")
@shared_options
@click.pass_obj
def show(session: Session, job: str, reference: str) -> None:
    """Show one trial: its figures, and what each layer group runs as.

    For each group that is its planned and its executed precision and the time of its kernels.
    TRIAL is a number, an id or the unique start of one.
    """
    from autotune.cli.output import print_one, print_rows
    from autotune.cli.views.trials import BETWEEN_GROUPS, GROUPS, PRUNING, TRIAL

    client = session.client()
    shown = client.trial(job, reference.removeprefix("#"))
    print_one(TRIAL, shown, output_format=session.output_format, to=sys.stdout)
    if session.output_format != "table":
        return
    if shown.targets:
        from autotune.cli.views.targets import targets_view

        click.echo()
        view = targets_view(client.job(job).targets)
        print_rows(view, shown.targets, output_format="table", to=sys.stdout)
    if shown.groups:
        click.echo()
        print_rows(GROUPS, shown.groups, output_format="table", to=sys.stdout)
    if shown.profile is not None and shown.profile.other_ns:
        click.echo()
        between = sorted(shown.profile.other_ns.items(), key=lambda entry: -entry[1])
        print_rows(BETWEEN_GROUPS, between, output_format="table", to=sys.stdout)
    pruned = sorted(shown.prune_ratios.items())
    if pruned:
        click.echo()
        print_rows(PRUNING, pruned, output_format="table", to=sys.stdout)


@trial.command("confirm")
@click.argument("job", metavar="JOB")
@click.argument("reference", metavar="TRIAL")
@shared_options
@click.pass_obj
def confirm(session: Session, job: str, reference: str) -> None:
    """Measure a trial again, in a fresh process, on held-out data.

    A job does so with its baselines, its winner and a part of its front; the answer to a budget
    that is asked later may be another trial. Its figures are kept. TRIAL as in `trial show`.
    """
    from autotune.cli.output import print_one
    from autotune.cli.views.trials import TRIAL
    from autotune.errors import DeviceUnavailable

    client = session.client()
    shown = client.trial(job, reference.removeprefix("#"))
    devices: list[str | None] = [
        target.device_id for target in shown.targets if target.confirmed_latency_ns is None
    ]
    if shown.confirmed_latency_ns is not None and not devices:
        click.echo(f"trial {shown.number} is confirmed already", err=True)
    else:
        for device in devices or [None]:
            _confirm_on(client, job, shown, device=device)
        shown = client.trial(job, shown.id)
        if shown.confirmed_latency_ns is None:
            why = shown.reason or (
                "its measurement was not steady, or the device was lost; try again when nothing "
                "else runs there"
            )
            raise DeviceUnavailable(f"trial {shown.number} could not be confirmed: {why}")
    print_one(TRIAL, shown, output_format=session.output_format, to=sys.stdout)


def _confirm_on(client: Client, job: str, confirmed: Trial, *, device: str | None) -> None:
    """Have the trial's own bytes measured again; on `device`, one of the job's several."""
    from autotune.export.bundle import read_bundle

    click.echo(f"measuring trial {confirmed.number} again, in a fresh process", err=True)
    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        path = client.export(job, Path(folder) / "trial.zip", select=confirmed.id, device=device)
        model = read_bundle(path).model
    found = client.verify(job, model, device=device, trial=confirmed.id)
    if found.reason:
        click.echo(f"{found.outcome} on {found.device_name}: {found.reason}", err=True)
