"""The HTTP API, over a real socket and a real database; only the runner stands still."""

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import (
    AuthenticationError,
    BundleError,
    DeviceUnavailable,
    InvalidData,
    InvalidJob,
    InvalidModel,
    JobNotReady,
    NotFoundError,
    ServiceError,
    UntrustedCode,
)
from autotune.search.interruption import Stopped
from autotune.service.problems import MEDIA_TYPE
from autotune.spec import parse_job
from device_agents.protocol import PROTOCOL_VERSION
from storage.records import JobRecord, JobState, MeasurementState, TrialState
from tests.running_service import RunningService, job_document, running_service
from tests.unit import fabricated_job


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One for all: a test meets its own jobs and devices alone, not an empty database."""
    with running_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def finished(service: RunningService) -> JobRecord:
    """A finished job, to look at only."""
    _, device = service.enrol()
    return service.finished_job(device)


def submitted(service: RunningService, **changes: Any) -> Any:
    return service.client.submit(parse_job(job_document(**changes)))


def versioned(**fields: Any) -> dict[str, Any]:
    return {"protocol_version": PROTOCOL_VERSION, **fields}


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
    assert "enrol the device again" in response.json()["detail"]


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
    job = submitted(service, name="first", latency_budget="0.5x")
    assert (job.state, job.name) == ("queued", "first")
    assert job.progress.trials_total == 40
    assert service.client.job(job.id) == job
    assert "jobs" in service.runner.topics


def test_a_job_is_found_by_the_start_of_its_id(service: RunningService) -> None:
    job = submitted(service)
    assert service.client.job(job.id[:-1]).id == job.id


def test_a_job_is_found_by_a_name_with_blanks(service: RunningService) -> None:
    job = submitted(service, name="my job #1?")
    assert service.client.job("my job #1?").id == job.id


def test_jobs_are_listed_newest_first(service: RunningService) -> None:
    for name in ("one", "two", "three"):
        submitted(service, name=name)
    assert [job.name for job in service.client.jobs()[:3]] == ["three", "two", "one"]


def test_a_misspelt_key_is_told_its_nearest(service: RunningService) -> None:
    response = service.http(service.token).post("/v1/jobs", json=job_document(latency_bugdet="3ms"))
    assert response.status_code == 422
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["error"] == "InvalidJob"
    assert "did you mean 'latency_budget'?" in response.json()["detail"]


def test_a_jobs_code_is_refused(service: RunningService) -> None:
    with pytest.raises(UntrustedCode, match="--trust-job-code"):
        submitted(service, name="code", model={"source": "python:mine:build"})
    assert "code" not in {job.name for job in service.client.jobs()}


def test_a_jobs_code_is_taken_where_it_is_trusted(tmp_path: Path) -> None:
    with running_service(tmp_path, trust_job_code=True) as service:
        assert submitted(service, model={"source": "python:mine:build"}).state == "queued"


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
        submitted(service, **changes)


def test_a_device_that_does_not_exist_yet_is_accepted(service: RunningService) -> None:
    job = submitted(service, device="not-there-yet")
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
    job = submitted(service)
    service.client.cancel(job.id)
    assert service.repository.get_job(job.id).cancel_requested
    service.repository.update_job(job.id, state=JobState.CANCELLED)
    assert service.client.resume(job.id, 10).spec["search"]["trials"] == 50
    assert not service.repository.get_job(job.id).cancel_requested


def test_a_running_job_is_not_resumed(service: RunningService) -> None:
    job = submitted(service)
    with pytest.raises(JobNotReady, match="queued"):
        service.client.resume(job.id)


def test_a_finished_job_is_resumed_only_with_more_trials(service: RunningService) -> None:
    job = submitted(service)
    service.repository.update_job(job.id, state=JobState.FINISHED)
    with pytest.raises(JobNotReady, match="how many more"):
        service.client.resume(job.id)
    assert service.client.resume(job.id, 5).progress.trials_total == 45


def test_an_ended_job_is_not_cancelled(service: RunningService) -> None:
    job = submitted(service)
    service.repository.update_job(job.id, state=JobState.FAILED, reason="no data")
    with pytest.raises(JobNotReady, match="failed"):
        service.client.cancel(job.id)


# Views


def test_progress_counts_and_ranks_the_trials(service: RunningService, finished: JobRecord) -> None:
    job = service.client.job(finished.id)
    assert job.progress.trials_finished == 40
    assert job.progress.time_left_s == 0
    assert job.progress.elapsed_s == 191
    assert job.progress.device_name == service.repository.get_device(finished.device_id or "").name
    assert job.progress.best_trial is not None
    assert job.progress.best_trial.is_feasible
    assert 0 < (job.progress.hypervolume or 0) < 1
    assert job.result is not None
    assert job.result.winner == service.client.trial(job.id, 7).id


def test_time_left_follows_the_pace_of_the_last_trials(service: RunningService) -> None:
    job = service.finished_job()
    service.repository.update_job(job.id, state=JobState.RUNNING, finished_at=None)
    spec = {**job.spec, "search": {"trials": 50}}
    service.repository.update_job(job.id, spec=spec)
    for trial in service.repository.list_trials(job.id):
        made = fabricated_job.trials(fabricated_job.inventory())[trial.number]
        service.repository.update_trial(trial.id, finished_at=made.finished_at)
    assert service.client.job(job.id).progress.time_left_s == pytest.approx(10 * 10.0)


def test_the_time_budget_bounds_the_time_left(service: RunningService) -> None:
    job = submitted(service, search={"time_s": 3600})
    service.repository.update_job(job.id, state=JobState.RUNNING)
    left_s = service.client.job(job.id).progress.time_left_s
    assert left_s == pytest.approx(3600, abs=60)


def test_notices_of_a_job_are_shown(service: RunningService) -> None:
    job = submitted(service)
    service.repository.append_event(job.id, "notice", {"message": "going on without pruning"})
    service.repository.append_event(job.id, "phase", {"phase": "search"})
    assert service.client.job(job.id).notices == ["going on without pruning"]


def test_a_trial_shows_what_the_runtime_really_runs(
    service: RunningService, finished: JobRecord
) -> None:
    trial = service.client.trial(finished.id, "#7")
    undone = [g for g in trial.groups if g.planned != g.effective]
    assert trial.number == 7
    assert {g.reason for g in undone} <= {"a float consumer keeps the unit from fusing"}
    assert trial.held_out_samples == 600
    assert trial.confirmed_latency_ns is not None
    assert trial.latency_ns is not None
    assert trial.latency_ns.low < trial.latency_ns.value < trial.latency_ns.high


def test_trials_say_which_are_on_the_front(service: RunningService, finished: JobRecord) -> None:
    trials = service.client.trials(finished.id)
    front = service.client.front(finished.id)
    assert {t.id for t in trials if t.is_on_front} == {t.id for t in front.trials}
    assert [t.number for t in trials] == list(range(40))


def test_a_failed_trial_has_a_reason_and_no_figures(
    service: RunningService, finished: JobRecord
) -> None:
    trial = service.client.trial(finished.id, 39)
    assert trial.outcome == "compression_failed"
    assert "its range is zero" in (trial.reason or "")
    assert (trial.accuracy, trial.latency_ns, trial.is_feasible) == (None, None, None)


# Answers


def test_any_budget_is_answered_after_the_fact(
    service: RunningService, finished: JobRecord
) -> None:
    wide = service.client.front(finished.id, budget="1x", max_drop=1.0)
    narrow = service.client.front(finished.id, budget="0.6x", max_drop=1.0)
    assert wide.latency_budget_ns == pytest.approx(fabricated_job.FP32_NS)
    assert narrow.answer is not None
    assert narrow.answer.latency_ns is not None
    assert narrow.answer.latency_ns.high <= 0.6 * fabricated_job.FP32_NS
    assert [t.latency_ns.value for t in wide.trials if t.latency_ns] == sorted(
        t.latency_ns.value for t in wide.trials if t.latency_ns
    )


def test_an_impossible_budget_gets_the_fastest_trial_and_the_distance(
    service: RunningService,
    finished: JobRecord,
) -> None:
    front = service.client.front(finished.id, budget="1us")
    assert front.answer is not None
    assert "misses it by" in front.explanation
    assert front.answer.id == front.trials[0].id


def test_a_budget_that_cannot_be_read_is_an_invalid_job(
    service: RunningService, finished: JobRecord
) -> None:
    with pytest.raises(InvalidJob, match="'fast' is not a latency budget"):
        service.client.front(finished.id, budget="fast")


def test_a_fraction_needs_a_measured_fp32_model(service: RunningService) -> None:
    with pytest.raises(JobNotReady, match="FP32"):
        service.client.front(submitted(service).id, budget="0.5x")


def test_a_job_without_trials_has_an_empty_front_that_says_so(service: RunningService) -> None:
    front = service.client.front(submitted(service).id)
    assert (front.trials, front.answer) == ([], None)
    assert "queued" in front.explanation


def test_the_winner_is_exported_by_default(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    path = service.client.export(finished.id, tmp_path / "out" / "bundle.zip")
    with zipfile.ZipFile(path) as archive:
        assert {"model.onnx", "candidate.json", "reports.json", "run.py"} <= set(archive.namelist())
        assert archive.read("model.onnx") == fabricated_job.linear_model()
    left = [p.name for p in service.context.settings.data_dir.glob("bundle-*")]
    assert left == []


def test_an_exported_folder_holds_the_same_files(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    folder = service.client.export(finished.id, tmp_path / "bundle", select="7")
    again = service.client.export(finished.id, tmp_path / "bundle", select="#7")
    assert folder == again
    assert (folder / "model.onnx").read_bytes() == fabricated_job.linear_model()


def test_a_folder_that_is_no_bundle_is_left_alone(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(BundleError, match="left alone"):
        service.client.export(finished.id, precious.parent)
    assert precious.read_text() == "years of work"


def test_a_trial_without_an_artifact_is_not_exported(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    with pytest.raises(JobNotReady, match="compression_failed"):
        service.client.export(finished.id, tmp_path / "b.zip", select="39")


def test_budget_and_selection_exclude_each_other(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    with pytest.raises(InvalidJob, match="exclude"):
        service.client.export(finished.id, tmp_path / "b.zip", budget="1ms", select="knee")


def test_the_report_is_one_page_that_runs_nothing(
    service: RunningService, finished: JobRecord
) -> None:
    response = service.http(service.token).get(f"/v1/jobs/{finished.id}/report")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "digits on a Pi" in response.text


def test_a_verification_is_answered_and_kept(service: RunningService) -> None:
    _, device = service.enrol()
    job = service.finished_job(device)
    service.runner.verification = service.verification(job, device)
    found = service.client.verify(job.id, b"model bytes")
    assert service.runner.verified == [b"model bytes"]
    assert (found.outcome, found.device_name) == ("ok", device.name)
    assert found.held_out_samples == 600
    assert [e.kind for e in service.repository.list_events(job.id)] == ["verified"]
    assert service.client.report(job.id) != ""


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (BundleError("not one of this job's"), BundleError),
        (DeviceUnavailable("device pi is offline"), DeviceUnavailable),
        (Stopped(), ServiceError),
    ],
)
def test_a_verification_that_fails_says_why(
    service: RunningService,
    finished: JobRecord,
    failure: Exception,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service.runner, "failure", failure)
    with pytest.raises(error, match=str(failure) or "going down"):
        service.client.verify(finished.id, b"x")


def test_an_error_inside_the_service_shows_no_details(
    service: RunningService, finished: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.runner, "failure", RuntimeError("secret state"))
    with pytest.raises(ServiceError, match="inside the service") as caught:
        service.client.verify(finished.id, b"x")
    assert "secret" not in str(caught.value)


# Events


def test_events_are_a_list_on_request(service: RunningService) -> None:
    job = submitted(service)
    for number in range(3):
        service.repository.append_event(job.id, "phase", {"n": number})
    http = service.http(service.token)
    all_events = http.get(f"/v1/jobs/{job.id}/events?follow=false").json()
    rest = http.get(f"/v1/jobs/{job.id}/events?follow=false&after={all_events[0]['id']}").json()
    assert [e["payload"]["n"] for e in all_events] == [0, 1, 2]
    assert rest == all_events[1:]


def test_a_stream_goes_on_until_the_job_has_ended(service: RunningService) -> None:
    job = submitted(service)
    service.repository.append_event(job.id, "phase", {"phase": "loading"})
    stream = service.client.events(job.id)
    assert next(stream).payload == {"phase": "loading"}
    service.repository.append_event(job.id, "phase", {"phase": "search"})
    assert next(stream).payload == {"phase": "search"}
    service.repository.update_job(job.id, state=JobState.FINISHED)
    service.repository.append_event(job.id, "state", {"state": "finished"})
    assert [e.kind for e in stream] == ["state"]


def test_a_stream_resumes_after_the_last_event_id(service: RunningService) -> None:
    job = submitted(service)
    events = [service.repository.append_event(job.id, "phase", {"n": n}) for n in range(4)]
    service.repository.update_job(job.id, state=JobState.FAILED)
    response = service.http(service.token).get(
        f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": str(events[1].id)}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    ids = [line for line in response.text.splitlines() if line.startswith("id: ")]
    assert ids == [f"id: {event.id}" for event in events[2:]]
    assert response.text.endswith("event: end\ndata: {}\n\n")


def test_a_last_event_id_that_is_no_number_is_refused(service: RunningService) -> None:
    job = submitted(service)
    response = service.http(service.token).get(
        f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": "x"}
    )
    assert response.status_code == 422


def test_a_long_history_arrives_whole_and_in_order(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.service.events._EVENTS_PER_READ", 7)
    job = submitted(service)
    for number in range(30):
        service.repository.append_event(job.id, "notice", {"message": str(number)})
    service.repository.update_job(job.id, state=JobState.FINISHED)
    told = [event.payload["message"] for event in service.client.events(job.id)]
    assert told == [str(number) for number in range(30)]


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
    assert "no longer current" in late.json()["detail"]


@pytest.mark.parametrize("route", ["heartbeat", "lease", "enrol"])
def test_another_protocol_version_is_told_to_upgrade(service: RunningService, route: str) -> None:
    agent, _ = service.enrol()
    body = {"protocol_version": PROTOCOL_VERSION - 1, "token": "x"}
    body["device"] = fabricated_job.device().description.model_dump(mode="json")  # type: ignore[assignment]
    response = agent.post(f"/v1/agent/{route}", json=body)
    assert response.status_code == 426
    assert "upgrade the agent" in response.json()["detail"]


def test_an_artifact_is_sent_whole_and_by_range(service: RunningService) -> None:
    agent, _ = service.enrol()
    content = bytes(range(256)) * 40
    sha256 = service.context.artifacts.put(content).sha256
    whole = agent.get(f"/v1/agent/artifacts/{sha256}")
    rest = agent.get(f"/v1/agent/artifacts/{sha256}", headers={"Range": "bytes=1000-"})
    assert whole.content == content
    assert (rest.status_code, rest.content) == (206, content[1000:])


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
    job = submitted(service, data={"evaluation": f"npz:{local}"})
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


def test_an_open_trial_shows_its_state(service: RunningService) -> None:
    job = service.finished_job()
    trial = service.repository.list_trials(job.id)[0]
    service.repository.update_trial(trial.id, state=TrialState.RUNNING, outcome=None)
    assert service.client.trial(job.id, trial.id).state == "running"


def test_a_bundle_zip_of_a_strange_name_has_a_plain_one(
    service: RunningService, finished: JobRecord
) -> None:
    response = service.http(service.token).post(f"/v1/jobs/{finished.id}/export", json={})
    assert 'filename="digits-on-a-Pi-trial-7.zip"' in response.headers["content-disposition"]
    assert zipfile.is_zipfile(io.BytesIO(response.content))
