"""Limits over HTTP: what a device cannot measure is refused, and any limit is asked afterwards."""

from pathlib import Path

import pytest

from autotune.errors import InvalidJob
from autotune.spec import JobSpec
from storage.records import JobRecord
from tests.running_service import RunningService
from tests.unit import fabricated_job


def test_any_limit_is_answered_after_the_fact(service: RunningService, finished: JobRecord) -> None:
    wide = service.client.front(finished.id, "1x", 1.0)
    narrow = service.client.front(finished.id, "1x", 1.0, max_size="8MB")
    assert narrow.max_size_bytes == 8e6 and wide.max_size_bytes is None
    assert narrow.answer is not None and wide.answer is not None
    assert (narrow.answer.artifact_size_bytes or 0) <= 8e6
    assert narrow.verdict == "within_budget"
    assert "a file of 8 MB" in narrow.explanation
    assert narrow.trials[0].is_feasible == ((narrow.trials[0].artifact_size_bytes or 0) <= 8e6)


def test_a_tail_that_was_not_measured_has_no_answer_inside(
    service: RunningService, finished: JobRecord
) -> None:
    front = service.client.front(finished.id, "1x", latency_at="p99")
    assert (front.latency_at, front.verdict) == ("p99", "impossible_budget")
    assert "too few samples for an upper bound at p99" in front.explanation


def test_a_limit_that_nobody_meets_is_answered_with_the_nearest_and_the_distance(
    service: RunningService, finished: JobRecord
) -> None:
    front = service.client.front(finished.id, "1x", 1.0, max_size="1B")
    assert front.verdict == "impossible_budget"
    assert front.missed["size"] > 0 and front.answer is not None


def test_limits_that_cannot_be_read_are_an_invalid_job(
    service: RunningService, finished: JobRecord
) -> None:
    with pytest.raises(InvalidJob, match="'3' is not a size"):
        service.client.front(finished.id, max_size="3")


def test_an_export_answers_limits_or_a_selection_and_not_both(
    service: RunningService, finished: JobRecord, tmp_path: Path
) -> None:
    with pytest.raises(InvalidJob, match="exclude each other"):
        service.client.export(finished.id, tmp_path / "b.zip", max_size="3MB", select="knee")


def test_energy_on_a_device_without_a_sensor_is_refused_where_the_job_enters(
    service: RunningService,
) -> None:
    _, device = service.enrol()
    described = device.description.model_copy(update={"energy_missing": "no RAPL counter"})
    token = service.client.enrolment_token().token
    reply = service.http().post(
        "/v1/agent/enrol",
        json={
            "protocol_version": 2,
            "token": token,
            "name": "dark",
            "device": described.model_dump(mode="json"),
        },
    )
    assert reply.status_code == 201
    spec = {**service.submit().spec, "device": "dark", "max_energy": "5mJ"}
    with pytest.raises(InvalidJob, match="cannot be measured on dark: no RAPL counter"):
        service.client.submit(JobSpec.model_validate(spec))


def test_a_report_names_the_limits_of_its_job(service: RunningService) -> None:
    inventory = fabricated_job.inventory()
    record = fabricated_job.job(inventory)
    from dataclasses import replace

    from autotune.export.report import render_report

    spec = {**record.spec, "latency_at": "p90", "max_size": "8MB"}
    page = render_report(
        replace(record, spec=spec), fabricated_job.trials(inventory), fabricated_job.device()
    )
    assert "at p90" in page and "at most 8MB of size" in page
