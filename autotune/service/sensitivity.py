"""Routes of a job's sensitivities: the entries, and their picture.

Owns who may look and when there is nothing to see. Measuring is the runner's, order and
drawing `autotune.export`'s.
"""

from __future__ import annotations

from enum import StrEnum

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from autotune.api_types import Sensitivity
from autotune.errors import JobNotReady
from autotune.export.sensitivity_table import in_order
from autotune.service.context import Context, ServiceContext
from autotune.service.problems import problem_responses
from autotune.service.security import PAGE_HEADERS
from storage import sensitivity as stored
from storage.records import JobRecord

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["answers"])


class PictureForm(StrEnum):
    """The kinds of file that a heat map comes as."""

    SVG = "svg"
    PNG = "png"
    HTML = "html"


_MEDIA_TYPES = {
    PictureForm.SVG: "image/svg+xml",
    PictureForm.PNG: "image/png",
    PictureForm.HTML: "text/html; charset=utf-8",
}


@router.get(
    "/sensitivity", operation_id="list_sensitivities", responses=problem_responses(404, 409)
)
async def list_sensitivities(context: Context, job_id: str) -> list[Sensitivity]:
    """What each choice for one group does, all else FP32: groups in graph order.

    A running job shows what it has so far; 409 where it has nothing yet.
    """

    def read() -> list[Sensitivity]:
        _, entries = _entries(context, job_id)
        return [
            Sensitivity(
                group=entry.group,
                precision=entry.precision,
                prune_ratio=entry.prune_ratio,
                mean_kl=entry.mean_kl,
                is_estimate=entry.is_estimate,
                accuracy_drop=entry.drop,
                samples=entry.n_samples,
                sqnr_db=entry.sqnr_db,
                removed_share=entry.removed_share,
                wall_s=entry.wall_s,
            )
            for entry in entries
        ]

    return await run_in_threadpool(read)


@router.get(
    "/sensitivity/heat-map",
    operation_id="get_heat_map",
    response_class=Response,
    responses={
        200: {
            "content": {kind.split(";")[0]: {} for kind in _MEDIA_TYPES.values()},
            "description": "The picture",
        },
        **problem_responses(404, 409),
    },
)
async def get_heat_map(
    context: Context, job_id: str, form: PictureForm = PictureForm.SVG
) -> Response:
    """The sensitivities as a picture: groups against choices, coloured by divergence."""

    def draw() -> bytes:
        from autotune.export.heat_map import heat_map  # matplotlib: only for who asks

        job, entries = _entries(context, job_id)
        return heat_map(entries, title=f"{job.name}: sensitivity", form=form.value)

    picture = await run_in_threadpool(draw)
    return Response(picture, media_type=_MEDIA_TYPES[form], headers=PAGE_HEADERS)


def _entries(context: ServiceContext, reference: str) -> tuple[JobRecord, list[stored.Sensitivity]]:
    job = context.repository.get_job(reference)
    if not job.sensitivity:
        phase = "" if job.phase == job.state.value else f", {job.phase}"
        reason = f": {job.reason}" if job.reason else ""
        raise JobNotReady(
            f"job {job.id} has no sensitivities{'' if job.state.is_final else ' yet'}; "
            f"it is {job.state.value.replace('_', ' ')}{phase}{reason}"
        )
    return job, in_order(job.sensitivity, job.inventory)
