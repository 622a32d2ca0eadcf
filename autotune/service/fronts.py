"""Routes of a job's answer: front, export, report, verification.

Owns which trial is meant. Ranking is `autotune.search.front`'s, files are
`autotune.export`'s, measuring again is the runner's.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ConfigDict

from autotune.api_types import Front, Verification
from autotune.errors import InvalidJob, JobNotReady, ServiceError
from autotune.search.front import answer, counts_size, non_dominated, select
from autotune.search.interruption import Stopped
from autotune.service import views
from autotune.service.context import Context, ServiceContext
from autotune.service.problems import Refusal, problem_responses
from autotune.spec import LatencyBudget
from storage.errors import NotFound
from storage.records import DeviceRecord, JobRecord, TrialRecord

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["answers"])

VERIFIED = "verified"
"""Kind of the event that keeps a verification; the report shows the last one."""

MAX_MODEL_BYTES = 2 * 1024**3
"""An ONNX file is one protobuf message, which cannot be larger than 2 GiB."""

_SELECTIONS = ("knee", "fastest", "most-accurate")
_EVENTS_PER_READ = 1000

# The page is one file without a script; whatever a name in it holds cannot become one.
_REPORT_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
}


class ExportRequest(BaseModel):
    """Which trial: the answer to a budget, a place on the front, or any trial.

    `budget` is `3ms` or `0.5x`; `select` is `knee`, `fastest`, `most-accurate`, or a trial's
    number or id. With neither it is the job's winner.
    """

    model_config = ConfigDict(extra="forbid")

    budget: str | None = None
    select: str | None = None


@router.get("/front", operation_id="get_front", responses=problem_responses(404, 409, 422))
async def get_front(
    context: Context,
    job_id: str,
    latency_budget: Annotated[str | None, Query(description="`3ms` or `0.5x`")] = None,
    max_accuracy_drop: Annotated[float | None, Query(ge=0, le=1)] = None,
) -> Front:
    """The trials that none other beats, and the answer to a question that is asked now.

    What is left out is the job's own budget and drop.
    """
    return await run_in_threadpool(_front, context, job_id, latency_budget, max_accuracy_drop)


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
async def get_report(context: Context, job_id: str) -> HTMLResponse:
    """The job's report: one HTML page that needs nothing else."""
    page = await run_in_threadpool(_report, context, job_id)
    return HTMLResponse(page, headers=_REPORT_HEADERS)


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
async def verify(context: Context, job_id: str, request: Request) -> Verification:
    """Measure a bundle's model again: a fresh process on the device, and held-out data.

    Answers when that is done, which takes as long as a confirmation.
    """
    model = await request.body()
    return await run_in_threadpool(_verify, context, job_id, model)


def _front(
    context: ServiceContext, job_id: str, budget: str | None, max_drop: float | None
) -> Front:
    job = context.repository.get_job(job_id)
    trials = context.repository.list_trials(job.id)
    budget_ns = job.latency_budget_ns if budget is None else _nanoseconds(job, budget)
    drop = views.max_accuracy_drop(job) if max_drop is None else max_drop
    members = non_dominated(trials, by_size=counts_size(job.spec))
    ids = {trial.id for trial in members}
    found = answer(trials, latency_budget_ns=budget_ns, max_accuracy_drop=drop)
    return Front(
        job_id=job.id,
        latency_budget_ns=budget_ns,
        max_accuracy_drop=drop,
        trials=[views.trial_view(t, budget_ns=budget_ns, front=ids) for t in members],
        answer=None
        if found is None
        else views.trial_view(found.winner, budget_ns=budget_ns, front=ids),
        explanation=_nothing_ranks(job) if found is None else found.explanation,
    )


def _export(context: ServiceContext, job_id: str, request: ExportRequest) -> Response:
    from autotune.export.bundle import bundle_files, bundle_zip

    job = context.repository.get_job(job_id)
    trials = context.repository.list_trials(job.id)
    trial = choose_trial(context, job, trials, request)
    if trial.artifact_sha256 is None:
        outcome = trial.outcome.value if trial.outcome else trial.state.value
        raise JobNotReady(f"trial {trial.number} has no artifact: {outcome}, {trial.reason}")
    result, source = job.result or {}, job.source or {}
    by_id = {t.id: t for t in trials}
    files = bundle_files(
        job=job,
        trial=trial,
        device=_device(context, job),
        model=context.artifacts.read(trial.artifact_sha256),
        fp32_trial=by_id.get(result.get("fp32_trial") or ""),
        int8_trial=by_id.get(result.get("int8_trial") or ""),
        input_name=source.get("input_name"),
        input_shape=source.get("input_shape"),
    )
    name = f"{_file_name(job.name)}-trial-{trial.number}.zip"
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
        InvalidJob: budget and selection at once, or a budget that cannot be read.
        JobNotReady: nothing ranks yet.
        NotFound: there is no such trial.
    """
    if request.budget is not None and request.select is not None:
        raise InvalidJob("budget and select exclude each other: each names one trial")
    if request.select in _SELECTIONS:
        chosen = select(trials, request.select)
    elif request.select is not None:
        return context.repository.find_trial(job.id, request.select)
    elif request.budget is None and job.result is not None:
        return context.repository.get_trial(job.result["winner"])
    else:
        budget = request.budget
        budget_ns = job.latency_budget_ns if budget is None else _nanoseconds(job, budget)
        found = answer(
            trials,
            latency_budget_ns=budget_ns,
            max_accuracy_drop=views.max_accuracy_drop(job),
        )
        chosen = found.winner if found else None
    if chosen is None:
        raise JobNotReady(_nothing_ranks(job))
    return chosen


def _report(context: ServiceContext, job_id: str) -> str:
    from autotune.export.report import render_report

    job = context.repository.get_job(job_id)
    return render_report(
        job,
        context.repository.list_trials(job.id),
        _device(context, job),
        verification=_last_verification(context, job),
    )


def _verify(context: ServiceContext, job_id: str, model: bytes) -> Verification:
    job = context.repository.get_job(job_id)
    try:
        shown = views.verification_view(context.runner.verify(job, model))
    except Stopped as error:
        stopping = ServiceError("the service is going down; verify again after its next start")
        raise Refusal(503, stopping) from error
    context.repository.append_event(job.id, VERIFIED, shown.model_dump(mode="json"))
    return shown


def _last_verification(context: ServiceContext, job: JobRecord) -> Verification | None:
    last, after = None, 0
    while True:
        page = context.repository.list_events(job.id, after=after, limit=_EVENTS_PER_READ)
        for event in page:
            last = event if event.kind == VERIFIED else last
        if len(page) < _EVENTS_PER_READ:
            return None if last is None else Verification(**last.payload)
        after = page[-1].id


def _nanoseconds(job: JobRecord, text: str) -> float:
    try:
        budget = LatencyBudget.parse(text)
    except ValueError as error:
        raise InvalidJob(str(error)) from error
    if budget.absolute_ns is None and job.reference_latency_ns is None:
        raise JobNotReady(
            f"job {job.id} has not measured its FP32 model yet, so {text} of it is not known"
        )
    return budget.nanoseconds(fp32_latency_ns=job.reference_latency_ns or 0.0)


def _nothing_ranks(job: JobRecord) -> str:
    reason = f": {job.reason}" if job.reason else ""
    return (
        f"no trial of job {job.id} has both accuracy and latency; it is {job.state.value}{reason}"
    )


def _device(context: ServiceContext, job: JobRecord) -> DeviceRecord | None:
    if job.device_id is None:
        return None
    try:
        return context.repository.get_device(job.device_id)
    except NotFound:
        return None


def _file_name(name: str) -> str:
    """A job's name as a file name: no separators, nothing that a shell would expand."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "job"
