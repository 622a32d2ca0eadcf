"""The share of a job's time in which its device stood idle for nothing but the control plane."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from storage.records import EventRecord, MeasurementRecord, MeasurementState, TrialRecord
from tests import running_service
from tests.benchmarks.control_time import ControlTime, control_time
from tests.unit.records import NOW, accuracy, latency, trial


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def measured(
    number: int,
    queued_s: float,
    stored_s: float | None,
    wall_s: float | None,
    *,
    kind: str = "screening",
    device_id: str = "d-1",
) -> MeasurementRecord:
    """Of trial `number`; without a report where it has no `wall_s`."""
    request = running_service.request()
    return MeasurementRecord(
        id=f"m-{number}-{queued_s}-{device_id}",
        job_id="j-1",
        trial_id=f"t-{number}",
        device_id=device_id,
        request=request.model_copy(update={"plan": request.plan.model_copy(update={"kind": kind})}),
        state=MeasurementState.QUEUED if stored_s is None else MeasurementState.DONE,
        fencing_token=1,
        attempts=1,
        report=None if wall_s is None else latency(4.0, wall_s=wall_s),
        created_at=at(queued_s),
        finished_at=None if stored_s is None else at(stored_s),
    )


def opened(number: int, seconds: float, held_out_s: float | None = None) -> TrialRecord:
    held_out = None if held_out_s is None else accuracy(0.94, split="held_out", wall_s=held_out_s)
    made = trial(number, 4.0, 0.94, held_out_accuracy=held_out)
    return replace(made, created_at=at(seconds))


def entered(name: str, seconds: float, *, kind: str = "phase") -> EventRecord:
    return EventRecord(
        id=int(seconds), job_id="j-1", kind=kind, payload={kind: name}, created_at=at(seconds)
    )


def test_what_reports_leave_of_the_time_in_the_queue_is_dispatch() -> None:
    """Two were queued at once: the second waits while the first is measured."""
    found = control_time([], [measured(1, 0, 9, 3.0), measured(0, 0, 5, 4.0)], [])
    assert found == ControlTime(measuring_s=7.0, dispatch_s=2.0, planning_s=0.0, n=2)
    assert found.ratio == pytest.approx(2 / 7)


def test_between_measurements_only_what_comes_before_a_trial_is_opened_is_planning() -> None:
    measurements = [measured(0, 0, 5, 5.0), measured(1, 20, 24, 4.0)]
    trials = [opened(0, -3), opened(1, 6.5), opened(2, 6.6)]
    found = control_time(trials, measurements, [])
    assert (found.planning_s, found.dispatch_s) == (1.5, 0.0)


def test_the_phases_of_the_workers_are_no_planning() -> None:
    measurements = [measured(0, 0, 5, 5.0), measured(1, 60, 64, 4.0)]
    events = [entered("sensitivity", 6), entered("pruning", 20), entered("search", 50)]
    events.append(EventRecord(id=9, job_id="j-1", kind="notice", payload={}, created_at=at(30)))
    assert control_time([opened(1, 50.5)], measurements, events).planning_s == 1.5


def test_a_confirmation_waits_for_its_accuracies() -> None:
    """All samples of the front before the first, held-out ones alone before the others."""
    measurements = [
        measured(0, 0, 5, 5.0),
        measured(0, 12, 16, 4.0, kind="confirmation"),
        measured(1, 19, 23, 4.0, kind="confirmation"),
    ]
    trials = [opened(0, -3, held_out_s=1.0), opened(1, -3, held_out_s=2.5)]
    found = control_time(trials, measurements, [entered("search", -4), entered("confirming", 5.25)])
    assert found.planning_s == pytest.approx(0.25 + 0.5)


def test_the_process_that_measures_is_the_devices_own_work_from_its_start() -> None:
    found = measured(0, 0, 5, 4.0)
    assert found.report is not None
    told = replace(found, report=found.report.model_copy(update={"process_s": 4.75}))
    assert control_time([], [told], []).dispatch_s == 0.25


def test_a_job_that_is_over_or_waits_has_nothing_to_plan() -> None:
    """Its bundle is measured once more, after it was made."""
    measurements = [measured(0, 0, 5, 5.0), measured(0, 20, 24, 4.0)]
    states = [entered("running", -1, kind="state"), entered("finished", 6, kind="state")]
    assert control_time([], measurements, states).planning_s == 1.0
    again = entered("running", 17, kind="state")
    assert control_time([], measurements, [again, *states]).planning_s == 4.0


def test_a_repeated_measurement_and_one_without_a_report_are_not_taken_for_each_other() -> None:
    """What the second held the device for is unknown; to ask for the third took a second."""
    measurements = [measured(0, 0, 5, 4.0), measured(0, 5, 45, None), measured(0, 46, 50, 4.0)]
    found = control_time([], measurements, [])
    assert found == ControlTime(measuring_s=8.0, dispatch_s=1.0, planning_s=1.0, n=2)


def test_each_device_has_its_own_time() -> None:
    measurements = [
        measured(0, 0, 5, 5.0),
        measured(0, 0, 9, 8.0, device_id="d-2"),
        measured(1, 10, 12, 2.0),
    ]
    found = control_time([opened(1, 9.5)], measurements, [])
    assert (found.measuring_s, found.dispatch_s, found.planning_s) == (15.0, 1.0, 4.5)


def test_a_job_that_measured_nothing_has_no_ratio() -> None:
    assert control_time([opened(0, 0)], [measured(0, 0, None, None)], []).ratio is None
