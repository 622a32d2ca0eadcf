"""What the HTTP API shows of a job: views, front, export, report, verification, events."""

import io
import zipfile
from pathlib import Path

import pytest

from autotune.errors import (
    BundleError,
    DeviceUnavailable,
    InvalidJob,
    JobNotReady,
    ServiceError,
)
from autotune.search.interruption import Stopped
from storage.records import JobRecord, JobState, TrialState
from tests.running_service import RunningService
from tests.unit import fabricated_job

# Sensitivities


def test_sensitivities_come_in_graph_order_with_their_figures(
    service: RunningService, finished: JobRecord
) -> None:
    entries = service.client.sensitivity(finished.id)
    assert finished.inventory is not None
    assert [e.group for e in entries] == [g.name for g in finished.inventory.groups]
    assert entries[0].precision == "w8a8" and entries[0].samples == 400
    assert (entries[0].mean_kl or 0) > 0 and not entries[0].is_estimate


@pytest.mark.parametrize(
    ("form", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("html", b"<!d")]
)
def test_the_heat_map_is_a_file_of_the_form_asked_for(
    service: RunningService, finished: JobRecord, form: str, start: bytes
) -> None:
    assert service.client.heat_map(finished.id, form).startswith(start)


def test_a_job_without_sensitivities_says_in_which_state_it_is(service: RunningService) -> None:
    job = service.repository.create_job(spec={"version": 1}, name="new")
    with pytest.raises(JobNotReady, match="no sensitivities yet; it is queued"):
        service.client.sensitivity(job.id)
    with pytest.raises(JobNotReady, match="no sensitivities yet"):
        service.client.heat_map(job.id)


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
    progress = service.client.job(job.id).progress
    # Ten more trials, and two of the five confirmations, which have taken 3.4 s each.
    assert progress.time_left_s == pytest.approx(10 * 10.0 + 2 * 3.4)
    assert progress.time_left_error_s == pytest.approx(3.4)
    assert progress.hypervolume_history[-1].hypervolume == pytest.approx(progress.hypervolume)
    assert progress.proposers["baseline"].trials == 2


def test_the_time_budget_bounds_the_time_left(service: RunningService) -> None:
    job = service.submit(search={"time_s": 3600})
    service.repository.update_job(job.id, state=JobState.RUNNING)
    left_s = service.client.job(job.id).progress.time_left_s
    assert left_s == pytest.approx(3600, abs=60)


def test_notices_of_a_job_are_shown(service: RunningService) -> None:
    job = service.submit()
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


def test_an_open_trial_shows_its_state(service: RunningService) -> None:
    job = service.finished_job()
    trial = service.repository.list_trials(job.id)[0]
    service.repository.update_trial(trial.id, state=TrialState.RUNNING, outcome=None)
    assert service.client.trial(job.id, trial.id).state == "running"


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
    assert front.verdict == "impossible_budget" and (front.missed_by_ns or 0) > 0
    costs = [group.cost_ns or 0.0 for group in front.blocking_groups]
    assert costs == sorted(costs, reverse=True) and costs[-1] > 0
    assert f"the groups that hold it back: {front.blocking_groups[0].group} (" in front.explanation


def test_a_budget_that_cannot_be_read_is_an_invalid_job(
    service: RunningService, finished: JobRecord
) -> None:
    with pytest.raises(InvalidJob, match="'fast' is not a latency budget"):
        service.client.front(finished.id, budget="fast")


def test_a_fraction_needs_a_measured_fp32_model(service: RunningService) -> None:
    with pytest.raises(JobNotReady, match="FP32"):
        service.client.front(service.submit().id, budget="0.5x")


def test_a_job_without_trials_has_an_empty_front_that_says_so(service: RunningService) -> None:
    front = service.client.front(service.submit().id)
    assert (front.trials, front.answer) == ([], None)
    assert "queued" in front.explanation


def test_the_winner_is_exported_by_default(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    path = service.client.export(finished.id, tmp_path / "out" / "bundle.zip")
    with zipfile.ZipFile(path) as archive:
        assert {"model.onnx", "candidate.json", "reports.json", "run.py"} <= set(archive.namelist())
        assert archive.read("model.onnx") == fabricated_job.linear_model()


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


def test_a_bundle_zip_of_a_strange_name_has_a_plain_one(
    service: RunningService, finished: JobRecord
) -> None:
    response = service.http(service.token).post(f"/v1/jobs/{finished.id}/export", json={})
    assert 'filename="digits-on-a-Pi-trial-7.zip"' in response.headers["content-disposition"]
    assert zipfile.is_zipfile(io.BytesIO(response.content))


# Events


def test_events_are_a_list_on_request(service: RunningService) -> None:
    job = service.submit()
    for number in range(3):
        service.repository.append_event(job.id, "phase", {"n": number})
    http = service.http(service.token)
    all_events = http.get(f"/v1/jobs/{job.id}/events?follow=false").json()
    rest = http.get(f"/v1/jobs/{job.id}/events?follow=false&after={all_events[0]['id']}").json()
    assert [e["payload"]["n"] for e in all_events] == [0, 1, 2]
    assert rest == all_events[1:]


def test_a_stream_goes_on_until_the_job_has_ended(service: RunningService) -> None:
    job = service.submit()
    service.repository.append_event(job.id, "phase", {"phase": "loading"})
    stream = service.client.events(job.id)
    assert next(stream).payload == {"phase": "loading"}
    service.repository.append_event(job.id, "phase", {"phase": "search"})
    assert next(stream).payload == {"phase": "search"}
    service.repository.update_job(job.id, state=JobState.FINISHED)
    service.repository.append_event(job.id, "state", {"state": "finished"})
    assert [e.kind for e in stream] == ["state"]


def test_a_stream_resumes_after_the_last_event_id(service: RunningService) -> None:
    job = service.submit()
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
    job = service.submit()
    response = service.http(service.token).get(
        f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": "x"}
    )
    assert response.status_code == 422


def test_a_long_history_arrives_whole_and_in_order(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.service.events._EVENTS_PER_READ", 7)
    job = service.submit()
    for number in range(30):
        service.repository.append_event(job.id, "notice", {"message": str(number)})
    service.repository.update_job(job.id, state=JobState.FINISHED)
    told = [event.payload["message"] for event in service.client.events(job.id)]
    assert told == [str(number) for number in range(30)]
