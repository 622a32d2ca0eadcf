"""Route of a trial's explanation.

Owns which trial is meant, and on which device. The figures and the sentences are
`autotune.search.explanation`'s, from stored records alone.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool

from autotune.api_explanation import Explanation
from autotune.errors import JobNotReady
from autotune.search.explanation import explain
from autotune.search.targets import worst_target
from autotune.service.context import Context, ServiceContext
from autotune.service.fronts import ExportRequest, choose_trial, named_device, seen_on
from autotune.service.problems import problem_responses

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["answers"])


@router.get("/explanation", operation_id="get_explanation", responses=problem_responses(404, 409))
async def get_explanation(
    context: Context,
    job_id: str,
    trial: Annotated[
        str | None, Query(description="number or id, knee, fastest or most-accurate")
    ] = None,
    device: Annotated[str | None, Query(description="one of the job's devices")] = None,
) -> Explanation:
    """Why a trial is what it is, group by group, by the model fitted to all trials so far.

    The job's winner where no trial is named, or the best so far. Of a job on several devices
    it is about the one where the trial takes the largest share of the budget, or about `device`.
    """
    return await run_in_threadpool(_explain, context, job_id, trial, device)


def _explain(
    context: ServiceContext, job_id: str, reference: str | None, device: str | None
) -> Explanation:
    job = context.repository.get_job(job_id)
    if job.device_id is None:
        raise JobNotReady(
            f"job {job.id} has measured nothing yet, so there is nothing to explain; it is "
            f"{job.state.value.replace('_', ' ')}"
        )
    stored = context.repository.list_trials(job.id)
    asked = None if device is None else named_device(context, job, device)
    trial = choose_trial(context, *seen_on(job, stored, asked), ExportRequest(select=reference))
    found = next(t for t in stored if t.id == trial.id)
    worst = worst_target(job, found)
    where = asked or (worst.device_id if worst else job.device_id)
    device_there = context.repository.get_device(where).description
    return explain(*seen_on(job, stored, where), found.on(where), device_there)
