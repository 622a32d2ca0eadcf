"""The repository's contract for devices that are not what they were: latencies are not mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_agents.protocol import DeviceDescription, KernelSpeed, RuntimeBuild
from search_spaces import Candidate
from storage.errors import StaleLease
from storage.records import (
    AgentRecord,
    CanaryRecord,
    DeviceRecord,
    DrainCause,
    JobRecord,
    JobState,
    JobTarget,
    MeasurementState,
    TrialOutcome,
    TrialRecord,
    TrialState,
)

from .conftest import START, World, description, latency_report, measurement_request, result_of

UPDATED = description(fingerprint="e" * 64).model_copy(
    update={
        "runtimes": (
            RuntimeBuild(name="onnxruntime", version="1.32.0", providers=("CPUExecutionProvider",)),
        )
    }
)


def measured(world: World) -> tuple[DeviceRecord, AgentRecord, JobRecord, TrialRecord]:
    """A job whose one trial was measured and confirmed on its device."""
    device, agent = world.agent()
    repository = world.repository
    job = repository.update_job(
        world.job().id,
        state=JobState.RUNNING,
        device_id=device.id,
        reference_latency_ns=3e6,
        latency_budget_ns=1.5e6,
    )
    trial = repository.add_trial(job.id, Candidate(), proposed_by="program")
    for name, p50_ns in (("screening", 1.5e6), ("confirmation", 1.6e6)):
        repository.enqueue_measurement(
            job_id=job.id, trial_id=trial.id, device_id=device.id, request=measurement_request(name)
        )
        lease = world.lease(agent)
        assert lease is not None
        result = result_of(lease, report=latency_report(p50_ns=p50_ns))
        repository.accept_result(result, agent_id=agent.id)
    trial = repository.update_trial(
        trial.id,
        state=TrialState.FINISHED,
        outcome=TrialOutcome.OK,
        artifact_sha256="a" * 64,
        latency=latency_report(),
        confirmed_latency=latency_report(p50_ns=1.6e6),
    )
    return device, agent, job, trial


def test_a_device_with_another_runtime_has_what_it_measured_opened_again(world: World) -> None:
    device, _, job, trial = measured(world)
    assert world.repository.fleet.describe(device.id, UPDATED)
    after = world.repository.get_trial(trial.id)
    assert (after.state, after.outcome) == (TrialState.RUNNING, None)
    assert (after.latency, after.confirmed_latency) == (None, None)
    for record in world.repository.list_measurements(job.id):
        assert record.distrusted_because == (
            "device pi is not what it was: onnxruntime 1.31.1 before, 1.32.0 now"
        )


def test_the_calibration_of_the_runtime_before_is_forgotten(world: World) -> None:
    device, _, job, _ = measured(world)
    target = JobTarget(device_id="d-other", latency_budget_ns=1e6, reference_latency_ns=2e6)
    world.repository.update_job(job.id, further_targets=(target,))
    world.repository.fleet.describe(device.id, UPDATED)
    after = world.repository.get_job(job.id)
    assert (after.reference_latency_ns, after.latency_budget_ns) == (None, None)
    assert after.further_targets == (target,)


def test_a_further_target_that_changed_loses_its_own_calibration_alone(world: World) -> None:
    device, _, job, _ = measured(world)
    other, _ = world.agent("gateway")
    target = JobTarget(device_id=other.id, latency_budget_ns=1e6, reference_latency_ns=2e6)
    world.repository.update_job(job.id, further_targets=(target,))
    world.repository.fleet.describe(other.id, UPDATED)
    after = world.repository.get_job(job.id)
    assert (after.device_id, after.reference_latency_ns) == (device.id, 3e6)
    uncalibrated = replace(target, reference_latency_ns=None, latency_budget_ns=None)
    assert after.further_targets == (uncalibrated,)


def test_a_job_that_is_over_keeps_its_figures(world: World) -> None:
    device, _, job, trial = measured(world)
    world.repository.update_job(job.id, state=JobState.FINISHED)
    world.repository.fleet.describe(device.id, UPDATED)
    assert world.repository.get_trial(trial.id) == trial
    assert world.repository.get_job(job.id).reference_latency_ns == 3e6


def test_what_is_outdated_in_a_job_that_goes_on_is_opened_again(world: World) -> None:
    device, _, job, trial = measured(world)
    world.repository.fleet.outdate(job.id, device.id, because="other runtime")
    assert world.repository.get_trial(trial.id).latency is None
    assert world.repository.get_job(job.id).reference_latency_ns is None


def test_what_a_changed_device_is_at_goes_back_and_its_result_comes_too_late(world: World) -> None:
    agent, lease = world.leased()
    world.repository.fleet.describe(agent.device_id, UPDATED)
    assert world.repository.get_measurement(lease.id).state is MeasurementState.QUEUED
    with pytest.raises(StaleLease):
        world.repository.accept_result(result_of(lease), agent_id=agent.id)


def test_a_newer_agent_or_kernel_changes_no_latency(world: World) -> None:
    device, _, _, trial = measured(world)
    upgraded = description().model_copy(update={"agent_version": "0.2.0", "kernel": "6.12"})
    assert not world.repository.fleet.describe(device.id, upgraded)
    assert world.repository.get_device(device.id).description == upgraded
    assert world.repository.get_trial(trial.id) == trial


@pytest.mark.parametrize(("described", "kept"), [(description(), True), (UPDATED, False)])
def test_speeds_that_were_not_measured_anew_stay_while_the_fingerprint_does(
    world: World, described: DeviceDescription, kept: bool
) -> None:
    speed = KernelSpeed(runtime="onnxruntime", operator="matmul", precision="w8", ratio=0.5)
    device, _ = world.agent()
    with_speeds = description().model_copy(update={"kernel_speeds": (speed,)})
    world.repository.fleet.describe(device.id, with_speeds)
    world.repository.fleet.describe(device.id, described)
    after = world.repository.get_device(device.id).description
    assert after.kernel_speeds == ((speed,) if kept else ())


def test_a_changed_device_is_compared_with_its_pool_anew(world: World) -> None:
    device, _ = world.agent(pool="pi4")
    canary = CanaryRecord(
        artifact_sha256="a" * 64, latency_ns=4e6, ratio=1.2, ratio_low=1.1, ratio_high=1.3, n=6
    )
    world.repository.fleet.record_canary(device.id, canary, passed=False)
    world.repository.fleet.drain(
        device.id, cause=DrainCause.CANARY, because="20 % slower", distrust_since=START
    )
    world.repository.fleet.describe(device.id, UPDATED)
    after = world.repository.get_device(device.id)
    assert (after.canary, after.canary_at, after.drained_by) == (None, None, None)


def test_enrolling_again_after_two_devices_came_to_be_alike_finds_the_one_seen_last(
    world: World,
) -> None:
    world.agent(fingerprint="e" * 64)
    world.clock.advance(60)
    device, _ = world.agent()
    world.repository.fleet.describe(device.id, UPDATED)
    world.clock.advance(60)
    world.repository.note_heartbeats([device.id], [], ttl_s=30)
    again, _ = world.agent(fingerprint="e" * 64)
    assert again.id == device.id
