"""`autotune job`: submit, list, show, watch, cancel, resume, and what each group costs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autotune.cli.limits import limit_options, within
from autotune.cli.parameters import COUNT, SECONDS, WARM_START
from autotune.cli.session import Session, shared_options

if TYPE_CHECKING:
    from autotune.api_types import Job
    from autotune.cli.watching import Ended
    from autotune.client import Client
    from autotune.spec import JobSpec


@click.group()
def job() -> None:
    """Submit, list, show, watch, cancel and resume jobs; show their sensitivities."""


@job.command("submit")
@click.argument("job_file", type=click.Path(path_type=Path), metavar="JOB.yaml")
@click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    help="Measure on this device instead of the file's; repeat it for several.",
)
@click.option("--warm-start", metavar="JOB|none", help=WARM_START)
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@limit_options("latency-budget")
@shared_options
@click.pass_obj
def submit(
    session: Session,
    /,
    job_file: Path,
    devices: tuple[str, ...],
    warm_start: str | None,
    watch: bool,
    **limits: Any,
) -> None:
    """Submit the job of a job file; print its id.

    The files that the job names are uploaded where the service does not have them. A job whose
    device has not enrolled waits for it.
    """
    from autotune.spec import measured_on, read_job, warm_started

    spec = warm_started(measured_on(read_job(job_file), devices), warm_start)
    spec = within(spec, limits)
    client = session.client()
    submitted = client.submit(spec)
    if session.output_format == "table":
        click.echo(submitted.id)
    else:
        _print_job(session, submitted)
    _say_what_is_awaited(client, spec)
    if watch:
        _watch(client, submitted.id)


@job.command("ls")
@shared_options
@click.pass_obj
def list_jobs(session: Session) -> None:
    """List the jobs."""
    from autotune.cli.output import print_rows
    from autotune.cli.views.jobs import JOBS

    jobs = session.client().jobs()
    print_rows(JOBS, jobs, output_format=session.output_format, to=sys.stdout)
    if not jobs:
        click.echo("there is no job yet; `autotune job submit JOB.yaml` makes one", err=True)


@job.command("show")
@click.argument("reference", metavar="JOB")
@shared_options
@click.pass_obj
def show(session: Session, reference: str) -> None:
    """Show one job: its state, its progress and its answer.

    JOB is an id, the unique start of one, or a name.
    """
    _print_job(session, session.client().job(reference))


@job.command("watch")
@click.argument("reference", metavar="JOB")
@shared_options
@click.pass_obj
def watch(session: Session, reference: str) -> None:
    """Follow a job until it ends; exit 0 when it has its answer.

    Ctrl-C stops watching; the job goes on.
    """
    from autotune.cli.watching import require_finished

    client = session.client()
    ended = _follow(client, client.job(reference).id)
    _print_job(session, ended.job)
    require_finished(ended)


@job.command("cancel")
@click.argument("reference", metavar="JOB")
@shared_options
@click.pass_obj
def cancel(session: Session, reference: str) -> None:
    """Ask a job to stop; its trials are kept.

    `autotune job resume` goes on with it.
    """
    cancelled = session.client().cancel(reference)
    click.echo(f"job {cancelled.id} is {cancelled.state}; asked to stop", err=True)
    if session.output_format != "table":
        _print_job(session, cancelled)


@job.command("resume")
@click.argument("reference", metavar="JOB")
@click.option(
    "--trials",
    "extra_trials",
    type=COUNT,
    metavar="+N",
    help="How many trials to run beyond those that are done: +50.",
)
@click.option(
    "--time", "time_s", type=SECONDS, help="How long to search from now on: 90s, 20m or 1.5h."
)
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@shared_options
@click.pass_obj
def resume(
    session: Session,
    reference: str,
    extra_trials: int | None,
    time_s: float | None,
    watch: bool,
) -> None:
    """Go on with a cancelled, failed or finished job.

    Its trials and all it has learnt are kept, and its answer stays until the next one is there.
    A finished job wants more --trials, or more --time where that is what ended it.
    """
    client = session.client()
    resumed = client.resume(reference, extra_trials, time_s=time_s)
    click.echo(f"job {resumed.id} is {resumed.state}", err=True)
    if session.output_format != "table":
        _print_job(session, resumed)
    if watch:
        _watch(client, resumed.id)


@job.command("sensitivity")
@click.argument("reference", metavar="JOB")
@click.option(
    "--heat-map",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the table into FILE: .png, .svg or .html.",
)
@shared_options
@click.pass_obj
def sensitivity(session: Session, reference: str, picture: Path | None) -> None:
    """Show what each choice does to one layer group alone.

    Columns are precisions and prune ratios, rows are groups in graph order; figures are the KL
    divergence of the outputs from FP32's, in nats. A running job shows what it has so far.
    """
    from autotune.cli.output import print_rows
    from autotune.cli.views.sensitivity import ENTRIES, legend, matrix

    form = None if picture is None else _picture_form(picture)
    client = session.client()
    entries = client.sensitivity(reference)
    if session.output_format == "table":
        view, groups = matrix(entries)
        print_rows(view, groups, output_format="table", to=sys.stdout)
        click.echo(legend(entries), err=True)
    else:
        print_rows(ENTRIES, entries, output_format=session.output_format, to=sys.stdout)
    if picture is not None and form is not None:
        from autotune.cli.delivery import write_file

        write_file(picture, client.heat_map(reference, form), what="heat map")
        click.echo(f"heat map: {picture}", err=True)


def _picture_form(path: Path) -> str:
    form = path.suffix.removeprefix(".").lower()
    if form not in ("png", "svg", "html"):
        raise click.BadParameter(
            f"{path.name!r} names no picture; end it in .png, .svg or .html",
            param_hint="--heat-map",
        )
    return form


def _follow(client: Client, job_id: str) -> Ended:
    from autotune.cli.panel import open_display
    from autotune.cli.watching import follow

    with open_display() as display:
        return follow(client, job_id, display)


def _watch(client: Client, job_id: str) -> None:
    """Follow the job; raises when it ends without an answer."""
    from autotune.cli.watching import require_finished

    require_finished(_follow(client, job_id))


def _say_what_is_awaited(client: Client, spec: JobSpec) -> None:
    """A misspelt device is one that may still enroll: the job waits, and the user should know."""
    devices = client.devices()
    known = {name for device in devices for name in (device.id, device.name, device.pool) if name}
    missing = [name for name in spec.targets if name is not None and name not in known]
    if not missing and devices:
        return
    calls = ", ".join(sorted({d.name for d in devices} | {d.pool for d in devices if d.pool}))
    who = f"is called {' or '.join(map(repr, missing))}" if missing else "has enrolled"
    there = f"there are {calls}" if calls else "`autotune device enroll` prints how to add one"
    click.echo(f"no device or pool {who} yet, and the job waits for it; {there}", err=True)


def _print_job(session: Session, shown: Job) -> None:
    from autotune.cli.output import print_one
    from autotune.cli.views.jobs import JOB

    print_one(JOB, shown, output_format=session.output_format, to=sys.stdout)
