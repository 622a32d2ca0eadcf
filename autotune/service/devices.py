"""Routes of devices: what enrolled, tokens to enrol more, and what their owner does to them."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from autotune.api_types import Device, EnrolmentToken
from autotune.service import views
from autotune.service.context import Context, ServiceContext
from autotune.service.problems import problem_responses
from autotune.service.security import ENROLMENT_VALID_S, hash_secret, new_secret
from storage.records import DeviceRecord

router = APIRouter(prefix="/v1/devices", tags=["devices"])


class EnrolmentTokenRequest(BaseModel):
    """For which pool of identical devices, if any."""

    model_config = ConfigDict(extra="forbid")

    pool: str | None = Field(default=None, min_length=1, max_length=100)


@router.get("", operation_id="list_devices")
async def list_devices(context: Context) -> list[Device]:
    """All devices that enrolled, by name."""

    def read() -> list[Device]:
        devices = context.repository.list_devices()
        return [_show(context, device) for device in sorted(devices, key=lambda d: d.name)]

    return await run_in_threadpool(read)


@router.get("/{device_id}", operation_id="get_device", responses=problem_responses(404))
async def get_device(context: Context, device_id: str) -> Device:
    """One device by id, unique start of an id, or name."""
    return await run_in_threadpool(lambda: _show(context, context.repository.get_device(device_id)))


@router.post("/enrolment-tokens", status_code=201, operation_id="make_enrolment_token")
async def make_enrolment_token(
    context: Context, request: EnrolmentTokenRequest | None = None
) -> EnrolmentToken:
    """A token that enrols one agent, once, within the hour. It is shown here and never again."""
    token = new_secret("een")
    await run_in_threadpool(
        context.repository.add_enrolment_token,
        hash_secret(token),
        pool=request.pool if request else None,
        expires_in_s=ENROLMENT_VALID_S,
    )
    return EnrolmentToken(token=token, expires_in_s=ENROLMENT_VALID_S)


@router.post("/{device_id}/revoke", operation_id="revoke_device", responses=problem_responses(404))
async def revoke_device(context: Context, device_id: str) -> Device:
    """The key of the device's agent is worth nothing from now on; its work goes back."""
    return await _changed(context, context.repository.fleet.revoke, device_id)


@router.post(
    "/{device_id}/rotate", operation_id="rotate_device_key", responses=problem_responses(404)
)
async def rotate_device_key(context: Context, device_id: str) -> Device:
    """The device's agent gets a new key with its next heartbeat, as it does once a day."""
    return await _changed(context, context.repository.fleet.request_rotation, device_id)


@router.post("/{device_id}/resume", operation_id="resume_device", responses=problem_responses(404))
async def resume_device(context: Context, device_id: str) -> Device:
    """A drained device gets work again."""
    return await _changed(context, context.repository.fleet.resume, device_id)


async def _changed(
    context: Context, change: Callable[[str], DeviceRecord], device_id: str
) -> Device:
    return await run_in_threadpool(
        lambda: _show(context, context.repository.get_device(change(device_id).id))
    )


def _show(context: ServiceContext, device: DeviceRecord) -> Device:
    return views.device_view(device, heartbeat_s=context.settings.heartbeat_s, now=context.clock())
