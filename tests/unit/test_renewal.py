"""A device that has another runtime in the middle of a job: nothing of two builds is mixed."""

import pytest

from autotune.search.interruption import DeviceAway
from autotune.search.renewal import forget_outdated, require_unchanged
from storage.records import JobState
from tests.unit.fakes import description, fake_ms
from tests.unit.records import latency


def described(version, fingerprint="e" * 64):
    as_was = description()
    (build,) = as_was.runtimes
    return as_was.model_copy(
        update={
            "runtimes": (build.model_copy(update={"version": version}),),
            "fingerprint": fingerprint,
        }
    )


def test_a_job_that_goes_on_measures_again_what_another_runtime_was_measured_with(bench):
    with bench.agent() as agent:
        job = bench.run(bench.job(search={"trials": 6, "prune_ratios": [0]}))
        bench.repository.fleet.describe(agent.device.id, described("1.32.0"))
        agent.report_of = lambda c: latency(2 * fake_ms(c), runtime_version="1.32.0")
        bench.repository.resume_job(job.id)
        device = bench.repository.get_device(agent.device.id)
        forgotten = forget_outdated(bench.repository, bench.repository.get_job(job.id), [device])
        assert forgotten.reference_latency_ns is None
        again = bench.run(forgotten)
    assert again.state is JobState.FINISHED
    reports = [t.latency for t in bench.repository.list_trials(job.id)]
    assert {report.runtime_version for report in reports} == {"1.32.0"}
    assert again.latency_budget_ns == 2 * job.latency_budget_ns
    notices = [e.payload.get("message", "") for e in bench.repository.list_events(job.id)]
    (told,) = [text for text in notices if "measured again" in text]
    assert "device local has onnxruntime 1.32.0 by now, where 1.31.1 was measured" in told


def test_a_job_on_an_unchanged_device_keeps_all_it_has_measured(bench):
    with bench.agent() as agent:
        job = bench.run(bench.job(search={"trials": 4, "prune_ratios": [0]}))
        trials = bench.repository.list_trials(job.id)
        assert forget_outdated(bench.repository, job, [agent.device]) == job
    assert bench.repository.list_trials(job.id) == trials


def test_a_job_stops_where_its_device_changes_under_it(bench):
    with bench.agent() as agent:
        require_unchanged(bench.repository, [agent.device])
        bench.repository.fleet.describe(agent.device.id, described("1.32.0"))
        with pytest.raises(DeviceAway, match="device local has other runtimes"):
            require_unchanged(bench.repository, [agent.device])
