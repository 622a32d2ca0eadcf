"""Routes of uploads: files of a job that lie where the client is.

A file is named by its content, so that the same one is sent once. It goes to disk as it
comes, is verified, and enters the artifact store only whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi import Path as UrlPath
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from autotune.api_types import Upload
from autotune.errors import DiskFull, InvalidData, ServiceError
from autotune.service.context import Context, ServiceContext
from autotune.service.problems import problem_responses
from autotune.settings import Settings
from device_agents.files import NO_ROOM
from storage.errors import ArtifactDamaged, ArtifactStoreFull, NotFound

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

KIND = "upload"
_FREE = "free some space on the service's disk and send the file again"
WRITE_BYTES = 4 * 1024**2
"""Chunks are gathered to this size: a thread per chunk off the wire would cost more."""

Sha256 = Annotated[str, UrlPath(pattern="^[0-9a-f]{64}$")]


@router.head(
    "/{sha256}",
    operation_id="find_upload",
    response_class=Response,
    responses={404: {"description": "Not here"}},
)
async def find_upload(context: Context, sha256: Sha256) -> Response:
    """Whether the service has a file of this content already, unaltered."""
    try:
        await run_in_threadpool(context.artifacts.verified_path, sha256)
    except (NotFound, ArtifactDamaged):
        return Response(status_code=404)
    return Response(status_code=200)


@router.put(
    "/{sha256}",
    status_code=201,
    operation_id="upload_file",
    responses=problem_responses(413, 422, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def upload(context: Context, sha256: Sha256, request: Request) -> Upload:
    """Keep a file; a job names it as `sha256:HEX` wherever it takes a path."""
    folder = incoming(context.settings)
    part = folder / f"{sha256[:16]}-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = await _receive(request, part)
        if found != sha256:
            raise InvalidData(
                f"the bytes received have sha256 {found}, not {sha256} as announced; "
                "the file changed while it was sent, or on its way. Send it again"
            )
        return await run_in_threadpool(_keep, context, part)
    except ArtifactStoreFull as error:
        raise DiskFull(f"no room to keep the upload: {_FREE}") from error
    except ClientDisconnect as error:
        raise ServiceError("the client went away in the middle of the upload") from error
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"no room for the upload below {folder}: {_FREE}") from error
        raise ServiceError(f"cannot keep the upload below {folder}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def incoming(settings: Settings) -> Path:
    """Where uploads lie until they are whole."""
    return settings.data_dir / "incoming"


async def _receive(request: Request, part: Path) -> str:
    """Write the body to a file; returns its sha256."""
    digest, gathered = hashlib.sha256(), bytearray()
    with contextlib.closing(await run_in_threadpool(part.open, "xb")) as file:
        os.fchmod(file.fileno(), 0o600)
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= WRITE_BYTES:
                await run_in_threadpool(file.write, gathered)
                digest.update(gathered)
                gathered = bytearray()
        await run_in_threadpool(file.write, gathered)
        digest.update(gathered)
    return digest.hexdigest()


def _keep(context: ServiceContext, part: Path) -> Upload:
    stored = context.artifacts.put_file(part)
    context.repository.record_artifact(stored.sha256, stored.size_bytes, KIND)
    return Upload(sha256=stored.sha256, size_bytes=stored.size_bytes)
