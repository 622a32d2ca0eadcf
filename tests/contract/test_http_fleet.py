"""Owning a fleet over HTTP: enrolment tokens, keys, copies of an identity, quarantine."""

import secrets
from pathlib import Path
from typing import Any

import httpx
import pytest

from autotune.errors import NotFoundError
from autotune.service import security
from device_agents.protocol import Outcome
from storage.records import DeviceRecord, MeasurementState
from tests.running_service import RunningService, running_service, versioned
from tests.unit import fabricated_job


def beat(agent: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = agent.post("/v1/agent/heartbeat", json=versioned(**fields))
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def enrol(service: RunningService, token: str, **fields: Any) -> httpx.Response:
    device = fabricated_job.device().description.model_dump(mode="json")
    body = versioned(token=token, name=f"pi-{secrets.token_hex(4)}", device=device, **fields)
    return service.http().post("/v1/agent/enrol", json=body)


def crash(service: RunningService, agent: httpx.Client, device: DeviceRecord) -> None:
    """One crash of the artifact of `queue_measurement` on the device."""
    service.queue_measurement(device)
    lease = agent.post("/v1/agent/lease", json=versioned(wait_s=0)).json()
    result = {
        "lease_id": lease["lease_id"],
        "fencing_token": lease["fencing_token"],
        "measurement_id": lease["request"]["measurement_id"],
        "outcome": "runtime_crash",
        "reason": "the runtime died of SIGSEGV",
    }
    assert agent.post("/v1/agent/results", json=result).status_code == 200


def test_a_used_token_is_refused_with_the_way_to_another(service: RunningService) -> None:
    token = service.client.enrolment_token("pi4").token
    assert enrol(service, token).status_code == 201
    again = enrol(service, token)
    assert again.status_code == 401
    assert "was used at" in again.json()["detail"]
    assert "autotune device enroll" in again.json()["detail"]


def test_an_expired_token_says_so(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.service.devices.ENROLMENT_VALID_S", 0.0)
    late = enrol(service, service.client.enrolment_token().token)
    assert late.status_code == 401
    assert "expired at" in late.json()["detail"]


def test_a_token_lasts_an_hour_at_most(service: RunningService) -> None:
    assert service.client.enrolment_token().expires_in_s <= 3600


def test_an_agent_is_told_to_rotate_and_a_lost_answer_costs_nothing(
    service: RunningService,
) -> None:
    agent, device = service.enrol()
    assert beat(agent)["rotate_key"] is False
    service.client.rotate_device_key(device.name)
    assert beat(agent)["rotate_key"] is True
    agent.post("/v1/agent/key")  # this answer is lost
    assert beat(agent)["rotate_key"] is True
    key = agent.post("/v1/agent/key").json()["agent_key"]
    assert beat(service.http(key))["rotate_key"] is False
    assert beat(agent)["rotate_key"] is False  # was under way with the old key


def test_a_key_is_due_after_a_day(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, _ = service.enrol()
    assert security.KEY_VALID_S == 24 * 3600
    monkeypatch.setattr("autotune.service.agents.KEY_VALID_S", -1.0)
    assert beat(agent)["rotate_key"] is True


def test_a_revoked_agent_is_told_so_and_its_work_goes_back(service: RunningService) -> None:
    agent, device = service.enrol()
    record = service.queue_measurement(device)
    agent.post("/v1/agent/lease", json=versioned(wait_s=0))
    service.client.revoke_device(device.id)
    assert service.repository.get_measurement(record.id).state is MeasurementState.QUEUED
    for route, body in (("heartbeat", {}), ("lease", {"wait_s": 0}), ("key", {})):
        refused = agent.post(f"/v1/agent/{route}", json=versioned(**body))
        assert refused.status_code == 401
        assert f"({device.name}) was revoked at" in refused.json()["detail"]


def test_two_processes_with_one_key_are_flagged_and_measure_nothing(
    service: RunningService,
) -> None:
    agent, device = service.enrol()
    record = service.queue_measurement(device)
    agent.post("/v1/agent/lease", json=versioned(wait_s=0))
    replies = [beat(agent, instance=name) for name in ("card", "copy", "card", "copy", "card")]
    told = replies[-1]["drained_because"]
    assert "two processes use the identity" in told
    assert service.client.device(device.id).drained_because == told
    assert beat(agent, instance="copy")["drained_because"] == told
    assert service.repository.get_measurement(record.id).state is MeasurementState.QUEUED
    assert agent.post("/v1/agent/lease", json=versioned(wait_s=0)).status_code == 204
    assert service.client.resume_device(device.id).drained_because is None


def test_an_agent_that_starts_again_is_no_copy(service: RunningService) -> None:
    agent, device = service.enrol()
    for name in ("first", "second", "first", "second", "third", "third"):
        assert beat(agent, instance=name)["drained_because"] is None
    assert service.client.device(device.id).drained_because is None


def test_the_quarantine_is_listed_and_cleared(service: RunningService) -> None:
    agent, device = service.enrol()
    for _ in range(3):
        crash(service, agent, device)
    barred = service.queue_measurement(device)
    assert barred.outcome is Outcome.QUARANTINED
    (entry,) = service.client.quarantine()
    assert f"crashed {device.name} 3 times" in entry.reason
    assert service.client.clear_quarantine(entry.artifact_sha256[:8]) == [entry]
    assert service.client.quarantine() == []


@pytest.mark.parametrize("change", ["revoke_device", "rotate_device_key", "resume_device"])
def test_a_device_that_is_not_there_is_not_found(service: RunningService, change: str) -> None:
    with pytest.raises(NotFoundError, match="d-none"):
        getattr(service.client, change)("d-none")


def test_a_member_of_a_pool_wakes_for_the_pools_work(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        reply = enrol(service, service.client.enrolment_token("pi4").token).json()
        assert service.repository.get_device(reply["device_id"]).pool == "pi4"
        agent = service.http(reply["agent_key"])
        assert agent.post("/v1/agent/lease", json=versioned(wait_s=0)).status_code == 204


def test_a_job_that_a_pool_shares_is_shown_with_the_pool_and_not_with_one_member(
    service: RunningService,
) -> None:
    reply = enrol(service, service.client.enrolment_token("shared").token).json()
    device = service.repository.get_device(reply["device_id"])
    job = service.submit(device="shared")
    service.repository.update_job(job.id, device_id=device.id)
    assert service.client.job(job.id).progress.device_name == "pool shared"
    pinned = service.submit(device=device.name)
    service.repository.update_job(pinned.id, device_id=device.id)
    assert service.client.job(pinned.id).progress.device_name == device.name
