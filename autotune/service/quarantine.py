"""Routes of the quarantine: artifacts that crashed devices and are not sent to such any more."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.concurrency import run_in_threadpool

from autotune.api_types import Quarantined
from autotune.service.context import Context
from autotune.service.problems import problem_responses
from storage.records import QuarantineRecord

router = APIRouter(prefix="/v1/quarantine", tags=["devices"])

Digest = Annotated[str, Path(pattern="^[0-9a-f]{6,64}$")]


@router.get("", operation_id="list_quarantine")
async def list_quarantine(context: Context) -> list[Quarantined]:
    """The artifacts in quarantine, oldest first."""
    found = await run_in_threadpool(context.repository.fleet.list_quarantine)
    return [_show(entry) for entry in found]


@router.delete("/{digest}", operation_id="clear_quarantine", responses=problem_responses(404))
async def clear_quarantine(context: Context, digest: Digest) -> list[Quarantined]:
    """Let the artifacts whose digest begins so be tried again; answers what was cleared."""
    found = await run_in_threadpool(context.repository.fleet.clear_quarantine, digest)
    return [_show(entry) for entry in found]


def _show(entry: QuarantineRecord) -> Quarantined:
    return Quarantined(
        artifact_sha256=entry.artifact_sha256,
        fingerprint=entry.fingerprint,
        runtime=entry.runtime,
        reason=entry.reason,
        job_id=entry.job_id,
        created_at=entry.created_at,
    )
