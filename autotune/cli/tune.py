"""`autotune tune`: from a job file to a verified bundle, on this machine, in one command.

Owns the order of the steps and what is kept between two calls. The service and the agent are
`embedded.py`'s, the waiting `watching.py`'s, the answer's presentation `delivery.py`'s.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click

from autotune.cli.limits import limit_options, within
from autotune.cli.parameters import WARM_START
from autotune.cli.session import Session, shared_options

if TYPE_CHECKING:
    from autotune.api_types import Job
    from autotune.cli.ledger import Ledger
    from autotune.cli.panel import Display
    from autotune.cli.watching import Ended
    from autotune.client import Client
    from autotune.spec import JobSpec

# A cancelled job ends its running measurement first, which takes four time caps at most: 60 s of a
# confirmation by default, and loading.
_CANCEL_PATIENCE_S = 75.0


@click.command()
@click.argument("job_file", type=click.Path(path_type=Path), metavar="JOB.yaml")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where database, artifacts and logs are kept.  [default: .autotune beside the job file]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The bundle: a folder, or a file that ends in .zip.  [default: ./NAME-bundle]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The HTML report.  [default: NAME-report.html beside the bundle]",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Start anew: resume no job, and begin with nothing of earlier ones unless --warm-start "
    "names one.",
)
@click.option("--warm-start", metavar="JOB|none", help=WARM_START)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that build and evaluate candidates.  [default: one per usable core]",
)
@click.option(
    "--trust-job-code/--no-trust-job-code",
    default=True,
    help="Run Python code that the job names (`python:` sources and data).  [default: yes]",
)
@click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    help="Measure on this device of the service at --url, not on this machine; repeat it for "
    "several.",
)
@limit_options("latency-budget")
@shared_options
@click.pass_obj
def tune(
    session: Session,
    /,
    job_file: Path,
    data_dir: Path | None,
    out: Path | None,
    report: Path | None,
    fresh: bool,
    warm_start: str | None,
    workers: int | None,
    trust_job_code: bool,
    devices: tuple[str, ...],
    **limits: Any,
) -> None:
    """Tune a model on this machine, from job file to bundle.

    Starts a service and one agent for the time of the call, runs the job, prints its front,
    exports the winner, loads it back, measures it again and writes a report. Called again
    with the same job file after an interruption, it goes on where it was.

    With --device the service at --url runs the job on devices that enrolled there; on several
    each one's winner is exported.
    """
    from autotune.cli.delivery import deliver
    from autotune.cli.embedded import EmbeddedService
    from autotune.cli.ledger import Ledger
    from autotune.cli.panel import open_display
    from autotune.cli.preflight import require_runnable
    from autotune.cli.watching import require_finished
    from autotune.spec import measured_on, read_job, warm_started

    if devices and workers is not None:
        raise click.UsageError("--workers is for this machine; with --device the service has them")
    spec = warm_started(measured_on(read_job(job_file), devices), warm_start)
    spec = within(spec, limits)
    require_runnable(spec, trust_job_code=trust_job_code, on_this_machine=not devices)
    data_dir = (data_dir or job_file.parent / ".autotune").resolve()
    out = out or Path(f"{spec.name}-bundle")
    report = report or out.parent / f"{spec.name}-report.html"
    ledger = Ledger(data_dir / "tune.json")
    serving: contextlib.AbstractContextManager[Serving]
    if devices:
        serving = contextlib.nullcontext(RunningElsewhere(client=session.client()))
    else:
        serving = EmbeddedService(
            data_dir, trust_job_code=trust_job_code, workers=workers, say=_say
        )
    with _stop_signals(), serving as service:
        started = datetime.now(UTC)
        job = _submit_or_resume(service.client, spec, ledger, fresh=fresh)
        with open_display() as display:
            ended = _run(service, job, display, since=started)
        finished = require_finished(ended)
        deliver(
            service.client, finished, out=out, report=report, output_format=session.output_format
        )
        ledger.set_delivered(spec)


class Serving(Protocol):
    """The service that runs the job."""

    @property
    def client(self) -> Client:
        """Its client."""

    def check(self) -> None:
        """Return while there is something to wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningElsewhere:
    """A service that is not of this call: it lives on when the call ends."""

    client: Client

    def check(self) -> None:
        """Nothing of it can die here; the client says when it does not answer."""


def _say(text: str) -> None:
    click.echo(text, err=True)


def _submit_or_resume(client: Client, spec: JobSpec, ledger: Ledger, *, fresh: bool) -> Job:
    """The job to wait for: an earlier one of the same spec that is not done, or a new one."""
    from autotune.errors import NotFoundError
    from autotune.spec import warm_started

    earlier = None if fresh else ledger.undelivered(spec)
    if earlier is not None:
        with contextlib.suppress(NotFoundError):
            job = client.job(earlier)
            _say(
                f"resuming job {job.id} ({job.state}, {job.progress.trials_finished} trials "
                "finished); --fresh starts anew"
            )
            return client.resume(job.id) if job.state in ("cancelled", "failed") else job
    # What is resumed goes by the file; that it was begun with nothing is its own business.
    alone = fresh and spec.search.warm_start == "auto"
    job = client.submit(warm_started(spec, "none" if alone else None))
    ledger.set_submitted(spec, job.id)
    _say(f"submitted job {job.id}")
    return job


def _run(service: Serving, job: Job, display: Display, *, since: datetime) -> Ended:
    """Wait for the job; Ctrl-C asks it to stop in good order, a second one leaves at once."""
    from autotune.cli.watching import follow

    try:
        return follow(service.client, job.id, display, since=since, check=service.check)
    except KeyboardInterrupt:
        display.say("stopping after the measurement that runs; Ctrl-C again leaves at once")
        _cancel(service, job.id)
        display.say("its finished trials are kept: the same command resumes the job")
        raise


def _cancel(service: Serving, job_id: str) -> None:
    from autotune.cli.children import wait_until
    from autotune.client import FINAL_STATES

    service.client.cancel(job_id)

    def ended() -> bool:
        service.check()
        return service.client.job(job_id).state in FINAL_STATES

    wait_until(ended, timeout_s=_CANCEL_PATIENCE_S, poll_s=0.5)


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like an exception, so that the children are stopped."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
