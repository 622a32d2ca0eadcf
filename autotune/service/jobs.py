"""Routes of jobs and trials: submit, look, cancel, resume.

Owns what is checked before a job is accepted: its shape, its consent to run code, and that
the files it names are here. What happens to it then is the runner's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from autotune.api_types import Job, Trial
from autotune.errors import (
    AutotuneError,
    InvalidData,
    InvalidJob,
    InvalidModel,
    JobNotReady,
    UntrustedCode,
)
from autotune.search.earlier_jobs import AUTO, NONE
from autotune.search.feasibility import require_sensors
from autotune.service import views
from autotune.service.context import Context, ServiceContext
from autotune.service.pools import as_measured
from autotune.service.problems import problem_responses
from autotune.spec import (
    FILE_SCHEMES,
    JobSpec,
    parse_job,
    runs_job_code,
    upload_of,
    warm_started,
)
from storage.errors import NotFound
from storage.records import DeviceRecord, EventRecord, JobRecord, JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_EVENTS_PER_READ = 1000


class ResumeRequest(BaseModel):
    """How a job goes on.

    `trials` are added to what it has tried, however little they promise; `time_s` is how long
    it may search from here on, in place of the job's own `search.time_s`.
    """

    model_config = ConfigDict(extra="forbid")

    trials: int | None = Field(default=None, ge=1, le=1_000_000)
    time_s: float | None = Field(default=None, gt=0)


@router.post(
    "",
    status_code=201,
    operation_id="submit_job",
    responses=problem_responses(403, 422),
)
async def submit(context: Context, document: Annotated[dict[str, Any], Body()]) -> Job:
    """Submit a job. It waits for its device where that is not there yet."""
    return await run_in_threadpool(_submit, context, document)


@router.get("", operation_id="list_jobs")
async def list_jobs(context: Context) -> list[Job]:
    """All jobs, newest first."""
    return await run_in_threadpool(_list, context)


@router.get("/{job_id}", operation_id="get_job", responses=problem_responses(404))
async def get_job(context: Context, job_id: str) -> Job:
    """One job by id, unique start of an id, or name."""
    return await run_in_threadpool(lambda: show(context, context.repository.get_job(job_id)))


@router.post("/{job_id}/cancel", operation_id="cancel_job", responses=problem_responses(404, 409))
async def cancel(context: Context, job_id: str) -> Job:
    """Ask a job to stop; its finished trials stay and its answer is the best of them."""
    return await run_in_threadpool(_cancel, context, job_id)


@router.post("/{job_id}/resume", operation_id="resume_job", responses=problem_responses(404, 409))
async def resume(context: Context, job_id: str, request: ResumeRequest | None = None) -> Job:
    """Take up a job that ended, with more trials or time where given.

    It keeps its trials and what the search learnt from them; its result stays until it has the
    next one.
    """
    return await run_in_threadpool(_resume, context, job_id, request or ResumeRequest())


@router.get("/{job_id}/trials", operation_id="list_trials", responses=problem_responses(404))
async def list_trials(context: Context, job_id: str) -> list[Trial]:
    """The job's trials, by number."""

    def read() -> list[Trial]:
        job = context.repository.get_job(job_id)
        return views.trial_views(job, context.repository.list_trials(job.id))

    return await run_in_threadpool(read)


@router.get(
    "/{job_id}/trials/{reference}", operation_id="get_trial", responses=problem_responses(404)
)
async def get_trial(context: Context, job_id: str, reference: str) -> Trial:
    """One trial by number, id or unique start of an id."""

    def read() -> Trial:
        job = context.repository.get_job(job_id)
        found = context.repository.find_trial(job.id, reference)
        shown = views.trial_views(job, context.repository.list_trials(job.id))
        return next(trial for trial in shown if trial.id == found.id)

    return await run_in_threadpool(read)


def show(context: ServiceContext, job: JobRecord) -> Job:
    """The job with its progress; reads trials, device and notices."""
    events = all_events(context, job.id)
    devices = devices_of(context, job)
    now = context.clock()
    return views.job_view(
        job,
        context.repository.list_trials(job.id),
        devices=[
            views.device_view(device, heartbeat_s=context.settings.heartbeat_s, now=now)
            for device in devices
        ],
        targets=views.target_views(job, {device.id: device for device in devices}),
        events=events,
        now=now,
    )


def check_spec(spec: JobSpec, context: ServiceContext) -> None:
    """Return where the job can be accepted.

    Raises:
        UntrustedCode: it names Python code and this service does not run a job's code.
        InvalidModel: a file of the model is not here.
        InvalidData: a file or folder of the data is not here.
        InvalidJob: a path is relative: whose folder it counts from is not known here; or a
            device that it names cannot measure what it limits.
    """
    if runs_job_code(spec) and not context.settings.trust_job_code:
        raise UntrustedCode(
            "the job names Python code (python:...), and this service does not run a job's "
            "code; start it with --trust-job-code if you trust every user of it"
        )
    require_sensors(spec.model_dump(mode="json"), _named_devices(spec, context))
    named: list[tuple[str, str | None, type[AutotuneError]]] = [
        ("model.source", _path_of(spec.model.source), InvalidModel),
        ("model.weights", spec.model.weights, InvalidModel),
        ("data.evaluation", _path_of(spec.data.evaluation), InvalidData),
        ("data.training", _path_of(spec.data.training), InvalidData),
    ]
    for key, path, error in named:
        if path is None:
            continue
        digest = upload_of(path)
        if digest is not None:
            if not context.artifacts.has(digest):
                raise error(f"{key}: upload {digest} is not here; upload the file first")
        elif not Path(path).is_absolute():
            raise InvalidJob(f"{key}: {path!r} is relative; the service needs an absolute path")
        elif not Path(path).exists():
            raise error(f"{key}: there is no {path}, neither uploaded nor on the service's host")


def _named_devices(spec: JobSpec, context: ServiceContext) -> list[DeviceRecord]:
    """The devices, and the members of the pools, that the job names and that are known."""
    devices = context.repository.list_devices()
    return [
        device
        for name in spec.targets
        for device in (
            [d for d in devices if name in (d.id, d.name)] or [d for d in devices if d.pool == name]
        )
        if name is not None
    ]


def _path_of(reference: str | None) -> str | None:
    scheme, _, path = (reference or "").partition(":")
    return path if scheme in FILE_SCHEMES else None


def _submit(context: ServiceContext, document: dict[str, Any]) -> Job:
    spec = parse_job(document)
    check_spec(spec, context)
    if spec.search.warm_start not in (AUTO, NONE):
        # By id from here on: a name may come to mean another job, this very one for example.
        named = context.repository.get_job(spec.search.warm_start)
        spec = warm_started(spec, named.id)
    job = context.repository.create_job(spec=spec.model_dump(mode="json"), name=spec.name)
    return show(context, job)


def _list(context: ServiceContext) -> list[Job]:
    jobs = sorted(context.repository.list_jobs(), key=lambda job: job.created_at, reverse=True)
    return [show(context, job) for job in jobs]


def _cancel(context: ServiceContext, reference: str) -> Job:
    job = context.repository.get_job(reference)
    if job.state.is_final:
        raise JobNotReady(f"job {job.id} is {job.state.value} already; there is nothing to stop")
    context.repository.request_cancel(job.id)
    context.runner.end_cancelled(job.id)
    return show(context, context.repository.get_job(job.id))


def _resume(context: ServiceContext, reference: str, asked: ResumeRequest) -> Job:
    job = context.repository.get_job(reference)
    if not job.state.is_final:
        raise JobNotReady(f"job {job.id} is {job.state.value}; only a job that ended is resumed")
    spec = parse_job(job.spec)
    check_spec(spec, context)
    if asked == ResumeRequest() and job.state is JobState.FINISHED:
        raise JobNotReady(
            f"{_finished(job)}; say how many trials more, or for how long "
            "(`autotune job resume JOB --trials +20`, `--time 20m`)"
        )
    done = len(context.repository.list_trials(job.id))
    search = spec.search
    if asked.trials is not None and job.state is JobState.FINISHED:
        # Whoever asks for more has seen what little was left to gain.
        search = search.model_copy(update={"least_gain_per_minute": None})
    if asked.trials is not None:
        # From where the job is, not from a budget that it overshot or never reached.
        trials = max(search.trials, done) + asked.trials
        search = search.model_copy(update={"trials": trials})
    elif asked.time_s is not None and done >= search.trials:
        raise JobNotReady(f"job {job.id} has done its {done} trials; say how many more")
    if asked.time_s is not None:
        search = search.model_copy(update={"time_s": asked.time_s})
    spec = spec.model_copy(update={"search": search})
    resumed = context.repository.resume_job(job.id, spec=spec.model_dump(mode="json"))
    return show(context, resumed)


def _finished(job: JobRecord) -> str:
    why = (job.result or {}).get("stopped_because")
    return f"job {job.id} is finished" + (f": {why}" if why else "")


def all_events(context: ServiceContext, job_id: str) -> list[EventRecord]:
    """Everything that was told of a job, oldest first."""
    events: list[EventRecord] = []
    while True:
        after = events[-1].id if events else 0
        page = context.repository.list_events(job_id, after=after, limit=_EVENTS_PER_READ)
        events += page
        if len(page) < _EVENTS_PER_READ:
            return events


def devices_of(context: ServiceContext, job: JobRecord) -> list[DeviceRecord]:
    """The devices that a job measures on, or those that its file names; unknown ones left out."""
    named = job.spec.get("device") or ()
    selectors = [target.device_id for target in job.targets] or (
        [named] if isinstance(named, str) else named
    )
    found = []
    for selector in selectors:
        with contextlib.suppress(NotFound):
            device = context.repository.get_device(selector)
            found.append(as_measured(context.repository, job, device))
    return found
