"""The repository's contract for measurements: leases, fencing tokens, results."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from device_agents.protocol import Outcome
from storage.errors import InvalidToken, NotFound, StaleLease, StorageError
from storage.records import MeasurementState, queue_topic

from .conftest import START, World, latency_report, measurement_request, result_of


def test_a_queued_measurement_reads_back_as_it_was_asked_for(world: World) -> None:
    device, _ = world.agent()
    measurement = world.enqueue(world.job(), device, "m-1")
    assert (measurement.id, measurement.state) == ("m-1", MeasurementState.QUEUED)
    assert (measurement.fencing_token, measurement.attempts) == (0, 0)
    assert measurement.request == measurement_request("m-1")
    assert world.repository.get_measurement("m-1") == measurement


def test_the_same_request_twice_is_one_measurement(world: World) -> None:
    device, agent = world.agent()
    job = world.job()
    world.enqueue(job, device, "m-1")
    lease = world.lease(agent)
    assert world.enqueue(job, device, "m-1") == lease
    assert [m.id for m in world.repository.list_measurements(job.id)] == ["m-1"]


def test_another_request_under_a_taken_id_is_refused(world: World) -> None:
    device, _ = world.agent()
    world.enqueue(world.job(), device, "m-1")
    with pytest.raises(StorageError, match="other contents"):
        world.enqueue(world.job(), device, "m-1")


def test_a_measurement_of_an_unknown_device_is_refused(world: World) -> None:
    with pytest.raises(StorageError):
        world.repository.enqueue_measurement(
            job_id=world.job().id,
            trial_id=None,
            device_id="d-none",
            request=measurement_request("m-1"),
        )


def test_the_oldest_measurement_of_the_device_is_leased_first(world: World) -> None:
    device, agent = world.agent("one")
    other, _ = world.agent("two")
    job = world.job()
    world.enqueue(job, other, "m-other")
    for name in ("m-2", "m-1", "m-3"):
        world.enqueue(job, device, name)
    lease = world.lease(agent, ttl_s=30)
    assert lease is not None
    assert (lease.id, lease.state, lease.leased_by) == ("m-2", MeasurementState.LEASED, agent.id)
    assert (lease.fencing_token, lease.attempts) == (1, 1)
    assert lease.lease_expires_at == START + timedelta(seconds=30)
    assert world.repository.get_measurement("m-2") == lease


def test_news_of_a_queue_goes_to_the_device_that_it_belongs_to(world: World) -> None:
    pi, agent = world.agent("pi")
    world.agent("jetson", fingerprint="e" * 64)
    job = world.job()
    world.topics.clear()
    world.enqueue(job, pi, "m-1")
    assert world.topics == ["measurements", queue_topic(pi.id)]
    world.topics.clear()
    world.lease(agent, ttl_s=30)
    assert world.topics == ["measurements"]
    world.topics.clear()
    world.clock.advance(31)
    world.repository.expire_leases()
    assert world.topics == ["measurements", queue_topic(pi.id)]


def test_a_request_sent_again_brings_its_lease_again(world: World) -> None:
    device, agent = world.agent()
    world.enqueue(job := world.job(), device, "m-1")
    world.enqueue(job, device, "m-2")
    ask = partial(
        world.repository.lease_measurement, device_id=device.id, agent_id=agent.id, ttl_s=30
    )
    first = ask(request_id="r-1")
    world.clock.advance(20)
    again = ask(request_id="r-1")
    assert first is not None
    assert again == replace(first, lease_expires_at=START + timedelta(seconds=50))
    # Another request is another lease, and the end of the first.
    other = ask(request_id="r-2")
    assert other is not None
    assert (other.id, other.attempts, other.fencing_token) == ("m-1", 2, 2)


def test_nothing_queued_is_no_lease_and_no_notification(world: World) -> None:
    _, agent = world.agent()
    world.topics.clear()
    assert world.lease(agent) is None
    assert world.topics == []


def test_only_a_known_agent_that_is_not_revoked_gets_a_lease(world: World) -> None:
    device, agent = world.agent()
    world.repository.fleet.revoke(device.id)
    with pytest.raises(InvalidToken):
        world.lease(agent)
    with pytest.raises(NotFound):
        world.repository.lease_measurement(device_id=device.id, agent_id="a-none", ttl_s=1)


def test_an_agent_that_asks_again_has_lost_its_first_lease(world: World) -> None:
    agent, first = world.leased()
    second = world.lease(agent)
    assert second is not None
    assert (second.id, second.fencing_token, second.attempts) == (first.id, 2, 2)
    assert second.lease_id != first.lease_id
    with pytest.raises(StaleLease):
        world.repository.accept_result(result_of(first), agent_id=agent.id)
    assert world.repository.accept_result(result_of(second), agent_id=agent.id).outcome == "ok"


def test_a_measurement_that_always_stops_its_agent_is_lost_in_the_end(world: World) -> None:
    agent, _ = world.leased()
    assert [world.lease(agent) is not None for _ in range(3)] == [True, True, False]
    lost = world.repository.get_measurement("m-1")
    assert (lost.state, lost.outcome) == (MeasurementState.DONE, Outcome.LOST)
    assert "attempt 3 of 3" in str(lost.reason)


def test_renewing_moves_the_end_of_the_lease_silently(world: World) -> None:
    _, lease = world.leased()
    world.topics.clear()
    world.clock.advance(20)
    held = {(str(lease.lease_id), lease.fencing_token)}
    assert world.repository.note_heartbeats([], held, ttl_s=30) == held
    found = world.repository.get_measurement(lease.id)
    assert found.lease_expires_at == START + timedelta(seconds=50)
    assert world.topics == []


def test_a_lease_that_is_not_current_is_not_renewed(world: World) -> None:
    agent, lease = world.leased()
    lease_id = str(lease.lease_id)
    current = {(lease_id, lease.fencing_token)}
    wrong = {(lease_id, lease.fencing_token + 1), ("l-none", 1)}
    assert world.repository.note_heartbeats([], wrong, ttl_s=30) == set()
    assert world.repository.note_heartbeats([], current | wrong, ttl_s=30) == current
    world.repository.accept_result(result_of(lease), agent_id=agent.id)
    assert world.repository.note_heartbeats([], current, ttl_s=30) == set()


def test_an_accepted_result_is_kept_with_its_raw_samples(world: World) -> None:
    agent, lease = world.leased()
    done = world.repository.accept_result(result_of(lease), agent_id=agent.id)
    assert (done.state, done.outcome, done.finished_at) == ("done", Outcome.OK, START)
    assert done.report == latency_report()
    assert world.repository.get_measurement(lease.id) == done
    listed = world.repository.list_measurements(lease.job_id)
    assert [m.report for m in listed] == [latency_report().model_copy(update={"blocks": ()})]


def test_a_result_without_a_report_keeps_its_reason(world: World) -> None:
    agent, lease = world.leased()
    result = result_of(lease, report=None, outcome=Outcome.OOM, reason="used 2 GiB of 1 GiB")
    done = world.repository.accept_result(result, agent_id=agent.id)
    assert (done.outcome, done.reason, done.report) == (Outcome.OOM, "used 2 GiB of 1 GiB", None)


def test_the_accepted_result_sent_again_changes_nothing(world: World) -> None:
    agent, lease = world.leased()
    first = world.repository.accept_result(result_of(lease), agent_id=agent.id)
    world.topics.clear()
    world.clock.advance(60)
    assert world.repository.accept_result(result_of(lease), agent_id=agent.id) == first
    assert world.topics == []
    assert world.repository.list_late_results(lease.id) == []


@pytest.mark.parametrize(
    "changes", [{"lease_id": "l-other"}, {"fencing_token": 0}, {"fencing_token": 2}]
)
def test_a_result_of_another_lease_is_set_aside(world: World, changes: dict[str, object]) -> None:
    agent, lease = world.leased()
    with pytest.raises(StaleLease):
        world.repository.accept_result(result_of(lease, **changes), agent_id=agent.id)
    assert world.repository.get_measurement(lease.id) == lease


def test_a_result_from_another_agent_is_set_aside(world: World) -> None:
    _, lease = world.leased()
    _, stranger = world.agent("stranger", fingerprint="2" * 64)
    with pytest.raises(StaleLease):
        world.repository.accept_result(result_of(lease), agent_id=stranger.id)
    assert world.repository.get_measurement(lease.id) == lease


def test_a_late_result_is_kept_once_for_audit(world: World) -> None:
    agent, lease = world.leased()
    world.clock.advance(31)
    world.repository.expire_leases()
    late = result_of(lease)
    for _ in range(2):
        with pytest.raises(StaleLease, match=lease.id):
            world.repository.accept_result(late, agent_id=agent.id)
    (kept,) = world.repository.list_late_results(lease.id)
    assert (kept.result, kept.agent_id) == (late, agent.id)
    assert kept.received_at == START + timedelta(seconds=31)


def test_a_result_of_an_unknown_measurement_is_not_found(world: World) -> None:
    agent, lease = world.leased()
    with pytest.raises(NotFound, match="m-none"):
        world.repository.accept_result(result_of(lease, measurement_id="m-none"), agent_id=agent.id)


def test_a_lease_that_ran_out_goes_back_to_its_place_in_the_queue(world: World) -> None:
    agent, lease = world.leased("m-1")
    job = world.repository.get_job(lease.job_id)
    world.enqueue(job, world.repository.get_device(lease.device_id), "m-2")
    world.clock.advance(29.9)
    assert world.repository.expire_leases() == []
    world.clock.advance(0.1)
    (expired,) = world.repository.expire_leases()
    assert (expired.id, expired.state, expired.lease_id) == ("m-1", "queued", None)
    again = world.lease(agent)
    assert again is not None
    assert (again.id, again.fencing_token, again.attempts) == ("m-1", 2, 2)


def test_a_measurement_is_lost_after_its_last_attempt(world: World) -> None:
    agent, lease = world.leased()
    world.clock.advance(31)
    (lost,) = world.repository.expire_leases(max_attempts=1)
    assert (lost.state, lost.outcome, lost.fencing_token) == ("done", Outcome.LOST, 1)
    assert agent.id in str(lost.reason)
    with pytest.raises(StaleLease):
        world.repository.accept_result(result_of(lease), agent_id=agent.id)


def test_a_lease_past_its_time_is_current_until_it_is_taken_back(world: World) -> None:
    agent, lease = world.leased()
    world.clock.advance(3600)
    assert world.repository.accept_result(result_of(lease), agent_id=agent.id).outcome == "ok"
    assert world.repository.expire_leases() == []


def test_cancelling_ends_what_is_open_and_nothing_else(world: World) -> None:
    agent, done = world.leased("m-done")
    world.repository.accept_result(result_of(done), agent_id=agent.id)
    job, device = world.repository.get_job(done.job_id), world.repository.get_device("pi")
    for name in ("m-leased", "m-queued"):
        world.enqueue(job, device, name)
    lease = world.lease(agent)
    world.enqueue(world.job("other"), device, "m-other")
    assert world.repository.cancel_measurements(job.id) == 2
    outcomes = [m.outcome for m in world.repository.list_measurements(job.id)]
    assert outcomes == [Outcome.OK, Outcome.CANCELLED, Outcome.CANCELLED]
    assert world.repository.cancel_measurements(job.id) == 0
    assert lease is not None
    with pytest.raises(StaleLease):
        world.repository.accept_result(result_of(lease), agent_id=agent.id)
    following = world.lease(agent)
    assert following is not None
    assert following.id == "m-other"
