"""The agents' side of the HTTP API, and uploads."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from autotune.service.problems import MEDIA_TYPE
from device_agents.protocol import REQUEST_HEADER
from storage.records import MeasurementState
from tests.running_service import RunningService, running_service, versioned
from tests.unit import fabricated_job

# Devices and agents


def test_a_device_is_online_within_three_heartbeats(tmp_path: Path) -> None:
    with running_service(tmp_path, heartbeat_s=0.05, lease_ttl_s=1) as service:
        agent, device = service.enrol()
        while service.client.device(device.name).is_online:
            threading.Event().wait(0.05)
        agent.post("/v1/agent/heartbeat", json=versioned())
        seen = service.repository.get_device(device.id).last_seen_at
        assert seen > device.last_seen_at


def test_a_lease_carries_the_request_and_its_fencing_token(service: RunningService) -> None:
    agent, device = service.enrol()
    record = service.queue_measurement(device)
    lease = agent.post("/v1/agent/lease", json=versioned(wait_s=0)).json()
    assert lease["request"] == record.request.model_dump(mode="json")
    assert lease["fencing_token"] == 1
    assert lease["ttl_s"] == 15.0


def test_every_answer_bears_the_name_of_its_request(service: RunningService) -> None:
    agent, device = service.enrol()
    service.queue_measurement(device)
    artifact = f"/v1/agent/artifacts/{service.context.artifacts.put(b'a model').sha256}"
    for status, method, path, body in (
        (200, "POST", "/v1/agent/lease", versioned(wait_s=0)),
        (200, "GET", artifact, None),
        (404, "GET", f"/v1/agent/artifacts/{'0' * 64}", None),
        (413, "POST", "/v1/agent/heartbeat", {"name": "x" * 5 * 1024**2}),
        (422, "POST", "/v1/agent/heartbeat", {}),
    ):
        name = f"{status} {path}"
        answer = agent.request(method, path, json=body, headers={REQUEST_HEADER: name})
        assert (answer.status_code, answer.headers[REQUEST_HEADER]) == (status, name)
    assert REQUEST_HEADER not in agent.get(artifact).headers  # an agent that gives no name


def test_no_work_within_the_time_is_204(service: RunningService) -> None:
    agent, _ = service.enrol()
    response = agent.post("/v1/agent/lease", json=versioned(wait_s=0.1))
    assert (response.status_code, response.content) == (204, b"")


def test_a_waiting_agent_is_woken_by_new_work(service: RunningService) -> None:
    agent, device = service.enrol()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(agent.post, "/v1/agent/lease", json=versioned(wait_s=20))
        threading.Event().wait(0.3)
        assert not waiting.done()
        service.queue_measurement(device)
        before = time.monotonic()
        assert waiting.result(timeout=10).status_code == 200
    assert time.monotonic() - before < 5  # far below the 20 s it would wait unwoken


def test_news_for_another_device_does_not_wake_a_waiting_agent(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    lease = service.repository.lease_measurement

    def noted(**asked: Any) -> Any:
        looks.append(asked["device_id"])
        return lease(**asked)

    monkeypatch.setattr(service.repository, "lease_measurement", noted)
    (agent, device), (_, other) = service.enrol(), service.enrol()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(agent.post, "/v1/agent/lease", json=versioned(wait_s=20))
        while not looks:
            threading.Event().wait(0.01)
        service.queue_measurement(other)
        service.queue_measurement(device)
        assert waiting.result(timeout=10).status_code == 200
    assert looks == [device.id] * 2


def test_a_waiting_agent_is_let_go_when_the_service_ends(tmp_path: Path) -> None:
    with running_service(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        agent, _ = service.enrol()
        waiting = pool.submit(agent.post, "/v1/agent/lease", json=versioned(wait_s=60))
        threading.Event().wait(0.2)
        service.context.broadcast.close()
        assert waiting.result(timeout=10).status_code == 204


def test_a_heartbeat_renews_the_lease_and_tells_when_it_is_lost(service: RunningService) -> None:
    agent, device = service.enrol()
    record = service.queue_measurement(device)
    lease = agent.post("/v1/agent/lease", json=versioned(wait_s=0)).json()
    held = versioned(lease_id=lease["lease_id"], fencing_token=lease["fencing_token"])
    kept = agent.post("/v1/agent/heartbeat", json=held).json()
    service.repository.cancel_measurements(record.job_id)
    lost = agent.post("/v1/agent/heartbeat", json=held).json()
    assert (kept["drop_lease"], lost["drop_lease"]) == (False, True)
    assert lost["reason"]


def test_a_lease_that_ran_out_goes_to_the_next_who_asks(tmp_path: Path) -> None:
    with running_service(tmp_path, heartbeat_s=0.02, lease_ttl_s=0.05) as service:
        agent, device = service.enrol()
        record = service.queue_measurement(device)
        agent.post("/v1/agent/lease", json=versioned(wait_s=0))
        while service.repository.get_measurement(record.id).state is MeasurementState.LEASED:
            threading.Event().wait(0.05)
        again = agent.post("/v1/agent/lease", json=versioned(wait_s=5)).json()
        assert again["fencing_token"] == 2


def result_of(lease: dict[str, Any]) -> dict[str, Any]:
    return {
        "lease_id": lease["lease_id"],
        "fencing_token": lease["fencing_token"],
        "measurement_id": lease["request"]["measurement_id"],
        "outcome": "ok",
        "report": fabricated_job.latency(1e6).model_dump(mode="json"),
    }


def test_a_result_is_accepted_once(service: RunningService) -> None:
    agent, device = service.enrol()
    record = service.queue_measurement(device)
    lease = agent.post("/v1/agent/lease", json=versioned(wait_s=0)).json()
    first = agent.post("/v1/agent/results", json=result_of(lease))
    assert first.json() == {"accepted": True}
    report = service.repository.get_measurement(record.id).report
    assert report is not None
    assert report.p50_ns == 1e6


def test_a_late_result_is_a_conflict(service: RunningService) -> None:
    agent, device = service.enrol()
    service.queue_measurement(device)
    lease = agent.post("/v1/agent/lease", json=versioned(wait_s=0)).json()
    late = agent.post("/v1/agent/results", json={**result_of(lease), "fencing_token": 0})
    assert late.status_code == 409
    assert late.headers["content-type"] == MEDIA_TYPE  # else the agent would keep it for ever
    assert "no longer current" in late.json()["detail"]


def test_an_artifact_is_sent_whole_and_by_range(service: RunningService) -> None:
    agent, _ = service.enrol()
    content = bytes(range(256)) * 40
    sha256 = service.context.artifacts.put(content).sha256
    whole = agent.get(f"/v1/agent/artifacts/{sha256}")
    rest = agent.get(f"/v1/agent/artifacts/{sha256}", headers={"Range": "bytes=1000-"})
    assert whole.content == content
    assert (rest.status_code, rest.content) == (206, content[1000:])


def test_the_segments_of_an_artifact_are_listed(service: RunningService) -> None:
    agent, _ = service.enrol()
    sha256 = service.context.artifacts.put(bytes(range(256)) * 40).sha256
    response = agent.get(f"/v1/agent/artifacts/{sha256}/segments")
    assert sum(size for _, size in response.json()["segments"]) == 256 * 40
    assert agent.get(f"/v1/agent/artifacts/{'0' * 64}/segments").status_code == 404


@pytest.mark.parametrize(
    ("name", "status"), [("0" * 64, 404), ("..%2F..%2Ftoken", 404), ("A" * 64, 422)]
)
def test_an_artifact_that_is_not_there_is_not_found(
    service: RunningService, name: str, status: int
) -> None:
    agent, _ = service.enrol()
    assert agent.get(f"/v1/agent/artifacts/{name}").status_code == status


# Uploads


def test_a_submitted_job_brings_its_files(service: RunningService, tmp_path: Path) -> None:
    local = tmp_path / "elsewhere" / "data.npz"
    local.parent.mkdir()
    local.write_bytes(b"arrays")
    job = service.submit(data={"evaluation": f"npz:{local}"})
    digest = hashlib.sha256(b"arrays").hexdigest()
    assert job.spec["data"]["evaluation"] == f"npz:sha256:{digest}"
    assert service.context.artifacts.read(digest) == b"arrays"
    assert service.repository.get_artifact(digest).kind == "upload"


def test_a_file_that_is_there_is_not_sent_again(service: RunningService, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * 10_000_000)
    first = service.client.upload(path)
    stored = service.context.artifacts.path(first.sha256)
    before = stored.stat().st_mtime_ns
    assert service.client.upload(path) == first
    assert stored.stat().st_mtime_ns == before


def test_a_file_that_was_altered_there_is_sent_again(
    service: RunningService, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    digest = service.client.upload(path).sha256
    service.context.artifacts.path(digest).write_bytes(b"Weights")
    service.client.upload(path)
    assert service.context.artifacts.read(digest) == b"weights"


def test_bytes_that_are_not_what_was_announced_are_refused(service: RunningService) -> None:
    response = service.http(service.token).put("/v1/uploads/" + "a" * 64, content=b"other")
    assert (response.status_code, response.json()["error"]) == (422, "InvalidData")
    assert not service.context.artifacts.has("a" * 64)
    assert list((service.context.settings.data_dir / "incoming").iterdir()) == []


@pytest.mark.parametrize("announced", [True, False])
def test_an_upload_over_the_limit_is_413(tmp_path: Path, announced: bool) -> None:
    content = b"x" * 5000
    with running_service(tmp_path, max_upload_bytes=4000) as service:
        response = service.http(service.token).put(
            f"/v1/uploads/{hashlib.sha256(content).hexdigest()}",
            content=content if announced else iter([content[:3000], content[3000:]]),
        )
    assert (response.status_code, response.json()["error"]) == (413, "InvalidData")


def test_a_json_body_over_the_limit_is_413(service: RunningService) -> None:
    response = service.http(service.token).post("/v1/jobs", json={"name": "x" * 5 * 1024**2})
    assert response.status_code == 413
    assert response.headers["content-type"] == MEDIA_TYPE
