"""The HTTP API, over a real socket and a real database; only the runner stands still."""

from pathlib import Path
from typing import Any

import pytest

from autotune.errors import (
    AuthenticationError,
    InvalidData,
    InvalidJob,
    InvalidModel,
    JobNotReady,
    NotFoundError,
    UntrustedCode,
)
from autotune.service.problems import MEDIA_TYPE
from storage.records import JobState
from tests.running_service import RunningService, job_document, running_service, versioned
from tests.unit import fabricated_job

# Who may do what


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/jobs"), ("GET", "/v1/devices"), ("POST", "/v1/devices/enrolment-tokens")],
)
@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_user_route_needs_a_user_token(
    service: RunningService, method: str, path: str, token: str | None
) -> None:
    response = service.http(token).request(method, path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"] == "AuthenticationError"


def test_a_user_token_opens_no_agent_route(service: RunningService) -> None:
    response = service.http(service.token).post("/v1/agent/lease", json=versioned(wait_s=0))
    assert response.status_code == 401


def test_an_agent_key_opens_no_user_route(service: RunningService) -> None:
    agent, _ = service.enrol()
    assert agent.get("/v1/jobs").status_code == 401
    assert agent.get("/v1/uploads/" + "a" * 64).status_code in (401, 405)


def test_a_revoked_agent_is_turned_away(service: RunningService) -> None:
    agent, _ = service.enrol("twin")
    service.enrol("twin")  # the same device again: its first agent is revoked
    response = agent.post("/v1/agent/heartbeat", json=versioned())
    assert response.status_code == 401
    assert "enrol the agent again" in response.json()["detail"]


def test_health_needs_no_token(service: RunningService) -> None:
    assert service.http().get("/v1/health").json()["status"] == "ok"


def test_the_token_is_stored_hashed_only(service: RunningService) -> None:
    data_dir = service.context.settings.data_dir
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    found = [path for path in files if service.token.encode() in path.read_bytes()]
    assert found == [data_dir / "token"]
    assert found[0].stat().st_mode & 0o777 == 0o600


def test_an_enrolment_token_works_once(service: RunningService) -> None:
    body = versioned(
        token=service.client.enrolment_token("pi4").token,
        device=fabricated_job.device().description.model_dump(mode="json"),
    )
    first = service.http().post("/v1/agent/enrol", json=body)
    second = service.http().post("/v1/agent/enrol", json=body)
    assert (first.status_code, second.status_code) == (201, 401)
    assert service.client.device(first.json()["device_id"]).pool == "pi4"


# Jobs


def test_a_submitted_job_comes_back_with_its_defaults(service: RunningService) -> None:
    job = service.submit(name="first", latency_budget="0.5x")
    assert (job.state, job.name) == ("queued", "first")
    assert job.progress.trials_total == 40
    assert service.client.job(job.id) == job
    assert "jobs" in service.runner.topics


def test_a_job_is_found_by_the_start_of_its_id(service: RunningService) -> None:
    job = service.submit()
    assert service.client.job(job.id[:-1]).id == job.id


def test_a_job_is_found_by_a_name_with_blanks(service: RunningService) -> None:
    job = service.submit(name="my job #1?")
    assert service.client.job("my job #1?").id == job.id


def test_jobs_are_listed_newest_first(service: RunningService) -> None:
    for name in ("one", "two", "three"):
        service.submit(name=name)
    assert [job.name for job in service.client.jobs()[:3]] == ["three", "two", "one"]


def test_a_misspelt_key_is_told_its_nearest(service: RunningService) -> None:
    response = service.http(service.token).post("/v1/jobs", json=job_document(latency_bugdet="3ms"))
    assert response.status_code == 422
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["error"] == "InvalidJob"
    assert "did you mean 'latency_budget'?" in response.json()["detail"]


def test_a_jobs_code_is_refused(service: RunningService) -> None:
    with pytest.raises(UntrustedCode, match="--trust-job-code"):
        service.submit(name="code", model={"source": "python:mine:build"})
    assert "code" not in {job.name for job in service.client.jobs()}


def test_a_jobs_code_is_taken_where_it_is_trusted(tmp_path: Path) -> None:
    with running_service(tmp_path, trust_job_code=True) as service:
        assert service.submit(model={"source": "python:mine:build"}).state == "queued"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": {"source": "onnx:/no/model.onnx"}}, InvalidModel, "/no/model.onnx"),
        ({"data": {"evaluation": "npz:/no/data.npz"}}, InvalidData, "data.evaluation"),
        ({"data": {"evaluation": "npz:data.npz"}}, InvalidJob, "absolute"),
        ({"data": {"evaluation": "npz:sha256:" + "0" * 64}}, InvalidData, "upload"),
    ],
)
def test_a_file_that_is_nowhere_is_said_at_once(
    service: RunningService, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        service.submit(**changes)


def test_a_device_that_does_not_exist_yet_is_accepted(service: RunningService) -> None:
    job = service.submit(device="not-there-yet")
    assert job.progress.device_name == "not-there-yet"
    assert job.progress.device_online is None


def test_an_unknown_job_is_not_found(service: RunningService) -> None:
    with pytest.raises(NotFoundError, match="no job"):
        service.client.job("nobody")


@pytest.mark.parametrize("reference", ["../devices", "..%2Fdevices", "a/b", "."])
def test_a_reference_never_leaves_its_place(service: RunningService, reference: str) -> None:
    with pytest.raises(NotFoundError):
        service.client.job(reference)


def test_cancel_asks_and_resume_takes_back(service: RunningService) -> None:
    job = service.submit()
    service.client.cancel(job.id)
    assert service.repository.get_job(job.id).cancel_requested
    service.repository.update_job(job.id, state=JobState.CANCELLED)
    assert service.client.resume(job.id, 10).spec["search"]["trials"] == 50
    assert not service.repository.get_job(job.id).cancel_requested


def test_a_running_job_is_not_resumed(service: RunningService) -> None:
    job = service.submit()
    with pytest.raises(JobNotReady, match="queued"):
        service.client.resume(job.id)


def test_a_finished_job_is_extended_by_trials_or_time_and_shows_its_answer_meanwhile(
    service: RunningService,
) -> None:
    job = service.finished_job(service.enrol()[1])
    service.repository.update_job(job.id, spec=job_document())
    with pytest.raises(JobNotReady, match="say how many trials more, or for how long"):
        service.client.resume(job.id)
    with pytest.raises(JobNotReady, match="has done its 40 trials"):
        service.client.resume(job.id, time_s=60)
    resumed = service.client.resume(job.id, 5, time_s=60)
    assert (resumed.state, resumed.progress.trials_total) == ("queued", 45)
    assert resumed.spec["search"]["time_s"] == 60
    assert resumed.result is not None and resumed.result.winner == (job.result or {})["winner"]


def test_a_job_to_begin_with_is_found_when_a_job_is_submitted(service: RunningService) -> None:
    earlier = service.submit()
    job = service.submit(search={"warm_start": earlier.name})
    assert job.spec["search"]["warm_start"] != earlier.name
    assert service.client.job(job.spec["search"]["warm_start"]).name == earlier.name
    with pytest.raises(NotFoundError, match="no-such-job"):
        service.submit(search={"warm_start": "no-such-job"})


def test_more_trials_of_a_finished_job_are_spent_however_little_they_promise(
    service: RunningService,
) -> None:
    job = service.submit(search={"least_gain_per_minute": 0.01})
    service.repository.update_job(job.id, state=JobState.FINISHED)
    assert service.client.resume(job.id, 5).spec["search"]["least_gain_per_minute"] is None


def test_an_ended_job_is_not_cancelled(service: RunningService) -> None:
    job = service.submit()
    service.repository.update_job(job.id, state=JobState.FAILED, reason="no data")
    with pytest.raises(JobNotReady, match="failed"):
        service.client.cancel(job.id)


# Errors


def test_an_unknown_route_is_a_problem(service: RunningService) -> None:
    response = service.http(service.token).get("/v1/nothing")
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["error"] == "NotFoundError"


def test_a_wrong_method_is_a_problem(service: RunningService) -> None:
    response = service.http(service.token).delete("/v1/jobs")
    assert response.status_code == 405
    assert response.json()["detail"] == "DELETE /v1/jobs: this address does not take DELETE"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null"])
def test_a_body_that_is_no_job_is_a_problem(service: RunningService, body: bytes) -> None:
    response = service.http(service.token).post(
        "/v1/jobs", content=body, headers={"Content-Type": "application/json"}
    )
    assert (response.status_code, response.json()["error"]) == (422, "InvalidJob")


def test_a_wrong_token_is_told_to_the_python_client(service: RunningService) -> None:
    from autotune.client import Client

    with Client(service.url, "wrong") as stranger, pytest.raises(AuthenticationError):
        stranger.jobs()


def test_the_runner_lives_as_long_as_the_service(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        assert service.runner.is_running
    assert not service.runner.is_running
