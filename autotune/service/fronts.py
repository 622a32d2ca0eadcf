"""Routes of a job's answer: front, export, report, verification.

Owns which trial is meant. Ranking is `autotune.search.front`'s, files are
`autotune.export`'s, measuring again is the runner's.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, Response
from pydantic import Field

from autotune.api_explanation import Explanation
from autotune.api_types import Front, Portability, Verification
from autotune.errors import InvalidJob, JobNotReady, NotFoundError, ServiceError
from autotune.search import targets
from autotune.search.blocking import in_words
from autotune.search.conclusion import blocking_of
from autotune.search.explanation import explain
from autotune.search.feasibility import limits_of
from autotune.search.front import select
from autotune.search.interruption import Stopped
from autotune.search.portability import portability
from autotune.service import views
from autotune.service.context import Context, ServiceContext
from autotune.service.jobs import all_events, devices_of
from autotune.service.pools import as_measured
from autotune.service.problems import Refusal, problem_responses
from autotune.service.questions import Question, asked_of
from autotune.service.security import PAGE_HEADERS
from storage.errors import NotFound
from storage.records import DeviceRecord, JobRecord, TrialRecord

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["answers"])

VERIFIED = "verified"
"""Kind of the event that keeps a verification; the report shows the last one."""

MAX_MODEL_BYTES = 2 * 1024**3
"""An ONNX file is one protobuf message, which cannot be larger than 2 GiB."""

_SELECTIONS = ("knee", "fastest", "most-accurate")

_NAMED = "name or id of one of the job's devices"
Named = Annotated[str | None, Query(description=_NAMED)]


class ExportRequest(Question):
    """Which trial: the answer to a budget and other limits, a place on the front, or any trial.

    `budget` is `3ms` or `0.5x`, limits are as in a job file; `select` is `knee`, `fastest`,
    `most-accurate`, or a trial's number or id. With neither it is the job's winner. `device`
    names one of a job's several devices: the question is then about that one alone, and the
    file is the one for it.
    """

    budget: str | None = None
    select: str | None = None
    device: str | None = None


class FrontQuestion(Question):
    """A question about the front."""

    latency_budget: Annotated[str | None, Field(description="`3ms` or `0.5x`")] = None
    device: Annotated[str | None, Field(description=_NAMED)] = None


@router.get("/front", operation_id="get_front", responses=problem_responses(404, 409, 422))
async def get_front(
    context: Context, job_id: str, question: Annotated[FrontQuestion, Query()]
) -> Front:
    """The trials that none other beats, and the answer to a question that is asked now.

    What is left out is the job's own limit. Of a job on several devices it is the
    front of the worst one, or that of `device`; a budget given here is each device's own.
    """
    return await run_in_threadpool(_front, context, job_id, question)


@router.get("/portability", operation_id="get_portability", responses=problem_responses(404, 409))
async def get_portability(context: Context, job_id: str) -> Portability:
    """What the winner on each device of a job costs on the others."""

    def read() -> Portability:
        job = context.repository.get_job(job_id)
        return _portability(context, job, context.repository.list_trials(job.id))

    return await run_in_threadpool(read)


@router.post(
    "/export",
    operation_id="export_trial",
    response_class=Response,
    responses={
        200: {"content": {"application/zip": {}}, "description": "The bundle"},
        **problem_responses(404, 409, 422),
    },
)
async def export(context: Context, job_id: str, request: ExportRequest | None = None) -> Response:
    """A trial as a bundle: model, candidate, reports, and a program that runs it."""
    return await run_in_threadpool(_export, context, job_id, request or ExportRequest())


@router.get(
    "/report",
    operation_id="get_report",
    response_class=HTMLResponse,
    responses=problem_responses(404),
)
async def get_report(context: Context, job_id: str, device: Named = None) -> HTMLResponse:
    """The job's report: one HTML page that needs nothing else.

    Of a job on several devices it is about the primary one, or about `device`.
    """
    page = await run_in_threadpool(_report, context, job_id, device)
    return HTMLResponse(page, headers=PAGE_HEADERS)


@router.post(
    "/verify",
    operation_id="verify_model",
    responses=problem_responses(404, 409, 413, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def verify(
    context: Context,
    job_id: str,
    request: Request,
    device: Named = None,
    trial: Annotated[str | None, Query(description="whose model it is, if several have it")] = None,
) -> Verification:
    """Measure a bundle's model again: a fresh process on the device, and held-out data.

    A trial of the job that was not confirmed there yet is from now on.
    On several devices it is `device`, else the first one that the file was written for.
    Answers when that is done, which takes as long as a confirmation.
    """
    model = await request.body()
    return await run_in_threadpool(_verify, context, job_id, model, device, trial)


def _front(context: ServiceContext, job_id: str, question: FrontQuestion) -> Front:
    job, trials = _asked(context, job_id, question.device)
    job = asked_of(job, question, question.latency_budget)
    drop, limits = views.max_accuracy_drop(job), limits_of(job)
    members = views.front_of(job, trials)
    ids = {trial.id for trial in members}
    found = targets.own_view(job, trials).answer(max_accuracy_drop=drop)
    winner = next((t for t in trials if found is not None and t.id == found.winner.id), None)
    blocking = [] if found is None else blocking_of(job, found)
    return Front(
        job_id=job.id,
        device_id=None if job.further_targets else job.device_id,
        latency_budget_ns=limits.latency_ns,
        latency_at=limits.at,
        max_accuracy_drop=drop,
        max_size_bytes=limits.size_bytes,
        max_memory_bytes=limits.memory_bytes,
        max_energy_joules=limits.energy_joules,
        trials=[views.trial_view(job, t, front=ids) for t in members],
        answer=None if winner is None else views.trial_view(job, winner, front=ids),
        answer_is_confirmed=found and found.winner.confirmed_latency is not None,
        explanation=_nothing_ranks(job)
        if found is None
        else "; ".join(
            filter(None, (found.explanation, in_words(blocking), _unconfirmed(job, found.winner)))
        ),
        verdict=found and found.verdict,
        missed_by_ns=found and found.missed_by_ns,
        missed=dict(found.missed) if found else {},
        blocking_groups=blocking,
    )


def _unconfirmed(job: JobRecord, winner: TrialRecord) -> str:
    """What an answer that was measured once lacks, and how it is had; empty where nothing."""
    if winner.confirmed_latency is not None or not job.state.is_final:
        return ""
    return (
        f"trial {winner.number} was not confirmed: measured once, and judged on the search data "
        f"alone; `autotune trial confirm {job.id} {winner.number}` makes up for it"
    )


def _portability(context: ServiceContext, job: JobRecord, trials: list[TrialRecord]) -> Portability:
    devices = {device.id: device for device in devices_of(context, job)}
    return views.portability_view(job, portability(job, trials), devices)


def _export(context: ServiceContext, job_id: str, request: ExportRequest) -> Response:
    from autotune.export.bundle import bundle_files, bundle_zip

    job, trials = _asked(context, job_id, request.device)
    trial = choose_trial(context, job, trials, request)
    # A file is for one device: without one named, the primary's.
    job, trials = seen_on(job, trials, job.device_id)
    by_id = {t.id: t for t in trials}
    trial = by_id[trial.id]
    if trial.artifact_sha256 is None:
        outcome = trial.outcome.value if trial.outcome else trial.state.value
        raise JobNotReady(f"trial {trial.number} has no artifact: {outcome}, {trial.reason}")
    result, source = job.result or {}, job.source or {}
    device = _device(context, job)
    files = bundle_files(
        job=job,
        trial=trial,
        device=device,
        model=context.artifacts.read(trial.artifact_sha256),
        fp32_trial=by_id.get(result.get("fp32_trial") or ""),
        int8_trial=by_id.get(result.get("int8_trial") or ""),
        input_name=source.get("input_name"),
        input_shape=source.get("input_shape"),
    )
    where = f"-{_file_name(device.name)}" if request.device and device is not None else ""
    name = f"{_file_name(job.name)}{where}-trial-{trial.number}.zip"
    return Response(
        bundle_zip(files),
        media_type="application/zip",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def choose_trial(
    context: ServiceContext, job: JobRecord, trials: list[TrialRecord], request: ExportRequest
) -> TrialRecord:
    """The trial that a request means.

    Raises:
        InvalidJob: limits and selection at once, or a limit that cannot be read.
        JobNotReady: nothing ranks yet.
        NotFoundError: there is no such trial.
    """
    is_asked = request.budget is not None or request.is_asked
    if is_asked and request.select is not None:
        raise InvalidJob("budget or limits and select exclude each other: each names one trial")
    if request.select in _SELECTIONS:
        chosen = select(targets.as_searched(job, trials), request.select)
    elif request.select is not None:
        try:
            return context.repository.find_trial(job.id, request.select)
        except NotFound as error:
            raise NotFoundError(f"{error}, or named {', '.join(_SELECTIONS)}") from error
    elif not is_asked and job.result is not None:
        return context.repository.get_trial(job.result["winner"])
    else:
        job = asked_of(job, request, request.budget)
        max_drop = views.max_accuracy_drop(job)
        found = targets.own_view(job, trials).answer(max_accuracy_drop=max_drop)
        chosen = found.winner if found else None
    if chosen is None:
        raise JobNotReady(_nothing_ranks(job))
    return chosen


def _report(context: ServiceContext, job_id: str, device: str | None) -> str:
    from autotune.export.report import render_report

    job = context.repository.get_job(job_id)
    trials = context.repository.list_trials(job.id)
    matrix = None
    if job.further_targets and job.result is not None:
        matrix = _portability(context, job, trials)
    asked = named_device(context, job, device) if device is not None else job.device_id
    shown, seen = seen_on(job, trials, asked)
    where = _device(context, shown)
    return render_report(
        shown,
        seen,
        where,
        verification=_last_verification(
            context, job, where.name if where is not None and job.further_targets else None
        ),
        portability=matrix,
        explanation=_explanation(shown, seen, where),
    )


def _explanation(
    job: JobRecord, trials: list[TrialRecord], device: DeviceRecord | None
) -> Explanation | None:
    """The winner's; None where there is none yet, or nothing to explain it against."""
    won = (job.result or {}).get("winner")
    winner = next((trial for trial in trials if trial.id == won), None)
    if winner is None or device is None:
        return None
    with contextlib.suppress(JobNotReady):
        return explain(job, trials, winner, device.description)
    return None


def _verify(
    context: ServiceContext, job_id: str, model: bytes, device: str | None, trial: str | None
) -> Verification:
    job, trials = _asked(context, job_id, device)
    if job.further_targets:
        digest = hashlib.sha256(model).hexdigest()
        made_for = (
            target.device_id
            for target in job.targets
            if any(t.on(target.device_id).artifact_sha256 == digest for t in trials)
        )
        job = targets.job_on(job, next(made_for, job.targets[0].device_id))
    try:
        shown = views.verification_view(context.runner.verify(job, model, trial=trial))
    except Stopped as error:
        stopping = ServiceError("the service is going down; verify again after its next start")
        raise Refusal(503, stopping) from error
    context.repository.append_event(job.id, VERIFIED, shown.model_dump(mode="json"))
    return shown


def _asked(
    context: ServiceContext, job_id: str, device: str | None
) -> tuple[JobRecord, list[TrialRecord]]:
    """The job and its trials; as they are on one of its devices where that is named."""
    job = context.repository.get_job(job_id)
    trials = context.repository.list_trials(job.id)
    if device is None:
        return job, trials
    return seen_on(job, trials, named_device(context, job, device))


def named_device(context: ServiceContext, job: JobRecord, named: str) -> str:
    """The id of the job's device of that name or id.

    Raises:
        NotFoundError: the job does not measure on one.
    """
    devices = devices_of(context, job)
    for device in devices:
        if named in (device.id, device.name) and device.id in {t.device_id for t in job.targets}:
            return device.id
    known = ", ".join(device.name for device in devices) or "none yet"
    raise NotFoundError(f"job {job.id} does not measure on {named!r}; its devices: {known}")


def seen_on(
    job: JobRecord, trials: list[TrialRecord], device_id: str | None
) -> tuple[JobRecord, list[TrialRecord]]:
    """Both as they are on one of the job's devices; as they are where that is None."""
    if device_id is None:
        return job, trials
    return targets.job_on(job, device_id), [trial.on(device_id) for trial in trials]


def _last_verification(
    context: ServiceContext, job: JobRecord, device_name: str | None
) -> Verification | None:
    """The newest one; on that device where one of several is meant."""
    for event in reversed(all_events(context, job.id)):
        is_meant = device_name in (None, event.payload.get("device_name"))
        if event.kind == VERIFIED and is_meant:
            return Verification(**event.payload)
    return None


def _nothing_ranks(job: JobRecord) -> str:
    reason = f": {job.reason}" if job.reason else ""
    return (
        f"no trial of job {job.id} has both accuracy and latency; it is {job.state.value}{reason}"
    )


def _device(context: ServiceContext, job: JobRecord) -> DeviceRecord | None:
    if job.device_id is None:
        return None
    try:
        device = context.repository.get_device(job.device_id)
        return as_measured(context.repository, job, device)
    except NotFound:
        return None


def _file_name(name: str) -> str:
    """A job's name as a file name: no separators, nothing that a shell would expand."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "job"
