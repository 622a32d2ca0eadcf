"""The repository's contract for fleets: keys, pools, drained devices, quarantine."""

from __future__ import annotations

import pytest

from device_agents.protocol import KernelTime, LatencyReport, Outcome, Profile
from search_spaces import Candidate
from storage.agents import PREVIOUS_KEY_GRACE_S
from storage.database import Database
from storage.errors import InvalidToken, NotFound, StaleLease
from storage.records import (
    AgentRecord,
    CanaryRecord,
    DeviceRecord,
    DrainCause,
    JobRecord,
    JobState,
    MeasurementRecord,
    MeasurementState,
    TrialOutcome,
    TrialState,
)

from .conftest import (
    START,
    World,
    description,
    latency_report,
    measurement_request,
    result_of,
)

IN_LINE = CanaryRecord(
    artifact_sha256="a" * 64, latency_ns=4e6, ratio=1.0, ratio_low=0.99, ratio_high=1.01, n=6
)
CRASH = {"outcome": Outcome.RUNTIME_CRASH, "reason": "SIGSEGV", "report": None}


class Pool:
    """Devices of one pool that are in line, and a job."""

    def __init__(self, world: World, *names: str) -> None:
        self.world = world
        self.repository = world.repository
        self.job: JobRecord = world.job()
        self.agents: dict[str, AgentRecord] = {}
        self.devices: dict[str, DeviceRecord] = {}
        for name in names:
            device, self.agents[name] = world.agent(name, pool="pi4")
            self.devices[name] = self.pass_canary(device)

    def pass_canary(self, device: DeviceRecord) -> DeviceRecord:
        return self.repository.fleet.record_canary(device.id, IN_LINE, passed=True)

    def enqueue(self, name: str, **options: object) -> MeasurementRecord:
        request = measurement_request(name)
        options = {"is_shared": True, "trial_id": None, "request": request, **options}
        first = next(iter(self.devices.values()))
        return self.repository.enqueue_measurement(
            job_id=self.job.id,
            device_id=first.id,
            **options,  # type: ignore[arg-type]
        )

    def lease(self, name: str) -> MeasurementRecord | None:
        return self.world.lease(self.agents[name])

    def crash(self, measurement: str, on: str, **options: object) -> MeasurementRecord:
        self.enqueue(measurement, **options)
        return self.answer(on, **CRASH)

    def answer(self, name: str, **changes: object) -> MeasurementRecord:
        """The result of what the device leases next."""
        lease = self.lease(name)
        assert lease is not None
        result = result_of(lease, **changes)
        return self.repository.accept_result(result, agent_id=self.agents[name].id)

    def trial(self) -> str:
        """The id of a trial that is yet to be measured."""
        return self.repository.add_trial(self.job.id, Candidate(), proposed_by="optuna").id

    def fail(self, trial_id: str, measured: MeasurementRecord) -> None:
        """The trial ends as the search ends one whose measurement went wrong."""
        self.repository.update_trial(
            trial_id,
            state=TrialState.FINISHED,
            outcome=TrialOutcome.MEASUREMENT_FAILED,
            reason=f"{measured.outcome}: {measured.reason}",
            artifact_sha256="a" * 64,
            artifact_size_bytes=12,
        )

    def drain(self, name: str, *, cause: DrainCause = DrainCause.CANARY) -> DeviceRecord:
        return self.repository.fleet.drain(
            self.devices[name].id, cause=cause, because="12 % slower", distrust_since=START
        )


# Pools


def test_any_member_takes_what_a_pool_shares_and_its_name_stays_with_it(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.enqueue("m-1"), pool.enqueue("m-2")
    first, second = pool.lease("two"), pool.lease("one")
    assert first is not None
    assert second is not None
    assert [first.id, second.id] == ["m-1", "m-2"]
    assert first.device_id == pool.devices["two"].id
    assert pool.lease("one") is not None  # its own again: it asked while it held it


def test_other_hardware_another_pool_or_no_canary_yet_gets_nothing_of_a_pool(world: World) -> None:
    pool = Pool(world, "one")
    pool.enqueue("m-1")
    other, odd = world.agent("odd", pool="pi4", fingerprint="0" * 64)
    pool.pass_canary(other)
    elsewhere, stranger = world.agent("stranger", pool="kitchen")
    pool.pass_canary(elsewhere)
    new, newcomer = world.agent("newcomer", pool="pi4")
    assert [world.lease(agent) for agent in (odd, stranger, newcomer)] == [None] * 3
    pool.pass_canary(new)
    assert world.lease(newcomer) is not None


def test_the_device_to_avoid_leaves_a_shared_measurement_to_the_others(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.enqueue("m-1", avoid_device_id=pool.devices["one"].id)
    assert pool.lease("one") is None
    assert pool.lease("two") is not None


def test_queued_work_of_a_pool_is_news_for_the_pool(world: World) -> None:
    pool = Pool(world, "one")
    world.topics.clear()
    pool.enqueue("m-1")
    assert world.topics.count(f"queue of pi4/{'f' * 64}") == 1


# Drained devices


def test_a_drained_device_gives_back_what_it_has_and_gets_canaries_alone(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.enqueue("m-1")
    pool.lease("one")
    drained = pool.drain("one")
    assert (drained.drained_by, drained.drained_because) == (DrainCause.CANARY, "12 % slower")
    given_back = pool.repository.get_measurement("m-1")
    assert (given_back.state, given_back.attempts) == (MeasurementState.QUEUED, 0)
    assert pool.lease("one") is None
    pool.enqueue("m-canary", is_shared=False, is_canary=True)
    canary, moved = pool.lease("one"), pool.lease("two")
    assert canary is not None
    assert moved is not None
    assert (canary.id, moved.id) == ("m-canary", "m-1")


def test_a_canary_that_passes_resumes_what_a_canary_drained(world: World) -> None:
    pool = Pool(world, "one")
    pool.drain("one")
    world.clock.advance(60)
    resumed = pool.pass_canary(pool.devices["one"])
    assert (resumed.drained_by, resumed.drained_because) == (None, None)
    assert resumed.canary == IN_LINE
    assert resumed.canary_passed_at == world.clock.now


def test_two_processes_with_one_identity_get_nothing_whatever_a_canary_says(world: World) -> None:
    pool = Pool(world, "one")
    pool.drain("one", cause=DrainCause.IDENTITY)
    pool.drain("one")
    pool.pass_canary(pool.devices["one"])
    pool.enqueue("m-canary", is_shared=False, is_canary=True)
    assert pool.lease("one") is None
    resumed = pool.repository.fleet.resume("one")
    assert resumed.drained_by is None
    assert pool.lease("one") is not None


def test_enrolling_anew_ends_a_clash_of_identities(world: World) -> None:
    pool = Pool(world, "one")
    pool.drain("one", cause=DrainCause.IDENTITY)
    again, _ = world.agent("one")
    assert (again.id, again.drained_by) == (pool.devices["one"].id, None)


CONV1 = KernelTime(name="conv1", operator="Conv", time_ns=1e6)


def measured_trial(pool: Pool, *, report: LatencyReport | None = None) -> str:
    """A trial with the latency that device `one` reported for it; its id."""
    trial_id = pool.trial()
    pool.enqueue("m-1", trial_id=trial_id)
    done = pool.answer("one", report=report or latency_report())
    pool.repository.update_trial(
        trial_id,
        state=TrialState.FINISHED,
        outcome=TrialOutcome.OK,
        artifact_sha256="a" * 64,
        artifact_size_bytes=12,
        latency=done.report,
    )
    return trial_id


def test_what_a_drained_device_measured_is_open_again(world: World) -> None:
    pool = Pool(world, "one", "two")
    trial_id = measured_trial(pool)
    pool.drain("one")
    trial = pool.repository.get_trial(trial_id)
    assert (trial.state, trial.outcome, trial.latency) == (TrialState.RUNNING, None, None)
    assert trial.artifact_sha256 == "a" * 64
    assert pool.repository.get_measurement("m-1").distrusted_because == "12 % slower"


def test_what_failed_on_a_drained_device_is_open_again(world: World) -> None:
    pool = Pool(world, "one", "two")
    trial_id = pool.trial()
    pool.enqueue("m-1", trial_id=trial_id)
    pool.fail(trial_id, pool.answer("one", outcome=Outcome.TIMEOUT, reason="it hung", report=None))
    pool.drain("two")
    assert pool.repository.get_trial(trial_id).state is TrialState.FINISHED
    pool.drain("one")
    trial = pool.repository.get_trial(trial_id)
    assert (trial.state, trial.outcome, trial.reason) == (TrialState.RUNNING, None, None)


def test_a_confirmation_by_a_drained_device_goes_and_the_rest_of_the_trial_stays(
    world: World,
) -> None:
    pool = Pool(world, "one", "two")
    trial_id = measured_trial(pool)
    other = latency_report(p50_ns=1e6)
    pool.repository.update_trial(trial_id, latency=other, confirmed_latency=latency_report())
    pool.drain("one")
    trial = pool.repository.get_trial(trial_id)
    assert (trial.state, trial.outcome) == (TrialState.FINISHED, TrialOutcome.OK)
    assert trial.confirmed_latency is None
    assert trial.latency is not None


@pytest.mark.parametrize(
    ("reason", "after"),
    [
        ("it could not be measured again: timeout: it hung", TrialOutcome.OK),
        ("on held-out data it loses 3 points", TrialOutcome.UNCONFIRMED),
    ],
)
def test_a_trial_that_a_drained_device_could_not_confirm_may_be_confirmed(
    world: World, reason: str, after: TrialOutcome
) -> None:
    pool = Pool(world, "one", "odd")
    trial_id = measured_trial(pool)
    request = measurement_request("m-2")
    again = request.plan.model_copy(update={"kind": "confirmation"})
    pool.enqueue("m-2", trial_id=trial_id, request=request.model_copy(update={"plan": again}))
    pool.answer("odd", outcome=Outcome.TIMEOUT, reason="it hung", report=None)
    pool.repository.update_trial(trial_id, outcome=TrialOutcome.UNCONFIRMED, reason=reason)
    pool.drain("odd")
    trial = pool.repository.get_trial(trial_id)
    assert (trial.state, trial.outcome) == (TrialState.FINISHED, after)
    assert trial.latency is not None


def test_a_report_whose_kernels_were_given_their_groups_is_still_the_same(world: World) -> None:
    pool = Pool(world, "one", "two")
    sent, kept = (
        latency_report().model_copy(update={"profile": Profile(kernels=(kernel,))})
        for kernel in (CONV1, CONV1.model_copy(update={"group": "conv1"}))
    )
    trial_id = measured_trial(pool, report=sent)
    pool.repository.update_trial(trial_id, latency=kept, confirmed_latency=kept)
    pool.drain("one")
    trial = pool.repository.get_trial(trial_id)
    assert (trial.outcome, trial.latency, trial.confirmed_latency) == (None, None, None)


def test_what_was_measured_before_or_for_a_finished_job_stays(world: World) -> None:
    pool = Pool(world, "one", "two")
    trial_id = measured_trial(pool)
    world.clock.advance(60)
    device_id = pool.devices["one"].id
    drain = pool.repository.fleet.drain
    drain(device_id, cause=DrainCause.CANARY, because="slow", distrust_since=world.clock.now)
    assert pool.repository.get_trial(trial_id).outcome is TrialOutcome.OK
    pool.repository.update_job(pool.job.id, state=JobState.FINISHED)
    drain(device_id, cause=DrainCause.CANARY, because="slow", distrust_since=START)
    assert pool.repository.get_trial(trial_id).outcome is TrialOutcome.OK


# Quarantine


def test_an_artifact_that_crashes_two_devices_is_sent_to_none_like_them(world: World) -> None:
    pool = Pool(world, "one", "two")
    assert pool.crash("m-1", on="one").outcome is Outcome.RUNTIME_CRASH
    assert pool.repository.fleet.list_quarantine() == []
    pool.crash("m-2", on="two")
    (entry,) = pool.repository.fleet.list_quarantine()
    assert (entry.artifact_sha256, entry.fingerprint) == ("a" * 64, "f" * 64)
    assert "2 devices (one, two), at last: SIGSEGV" in entry.reason
    barred = pool.enqueue("m-3")
    assert (barred.state, barred.outcome) == (MeasurementState.DONE, Outcome.QUARANTINED)
    assert "--clear aaaaaaaaaaaa" in str(barred.reason)


def test_three_crashes_of_one_device_are_enough_and_two_are_not(world: World) -> None:
    pool = Pool(world, "one")
    pool.crash("m-1", on="one"), pool.crash("m-2", on="one")
    assert pool.enqueue("m-3").state is MeasurementState.QUEUED
    lease = pool.lease("one")
    assert lease is not None
    pool.repository.accept_result(result_of(lease, **CRASH), agent_id=pool.agents["one"].id)
    (entry,) = pool.repository.fleet.list_quarantine()
    assert "crashed one 3 times" in entry.reason


def test_a_quarantine_ends_what_another_job_has_queued_of_it(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.crash("m-1", on="one")
    pool.enqueue("m-2")
    lease = pool.lease("two")
    other = world.job("other")
    world.enqueue(other, pool.devices["one"], "m-other")
    assert lease is not None
    pool.repository.accept_result(result_of(lease, **CRASH), agent_id=pool.agents["two"].id)
    assert pool.repository.get_measurement("m-other").outcome is Outcome.QUARANTINED


def test_a_quarantine_holds_for_its_runtime_and_its_kind_of_device_alone(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.crash("m-1", on="one"), pool.crash("m-2", on="two")
    other, _ = world.agent("other", fingerprint="0" * 64)
    assert world.enqueue(pool.job, other, "m-3").state is MeasurementState.QUEUED
    request = measurement_request("m-4")
    openvino = request.runtime.model_copy(update={"runtime": "openvino"})
    elsewhere = pool.repository.enqueue_measurement(
        job_id=pool.job.id,
        trial_id=None,
        device_id=pool.devices["one"].id,
        request=request.model_copy(update={"runtime": openvino}),
    )
    assert elsewhere.state is MeasurementState.QUEUED


def test_a_quarantine_that_rests_on_a_drained_device_ends_and_its_trial_is_open(
    world: World,
) -> None:
    pool = Pool(world, "one", "odd")
    trial_id = pool.trial()
    for n in range(3):
        pool.crash(f"m-{n}", on="odd", trial_id=trial_id)
    barred = pool.enqueue("m-3", trial_id=trial_id)
    assert (barred.outcome, barred.device_id) == (Outcome.QUARANTINED, pool.devices["one"].id)
    pool.fail(trial_id, barred)
    pool.drain("odd")
    assert pool.repository.fleet.list_quarantine() == []
    trial = pool.repository.get_trial(trial_id)
    assert (trial.state, trial.outcome, trial.reason) == (TrialState.RUNNING, None, None)
    assert pool.repository.get_measurement("m-3").distrusted_because == "12 % slower"
    assert pool.enqueue("m-4", trial_id=trial_id).state is MeasurementState.QUEUED
    assert pool.lease("one") is not None


def test_a_quarantine_that_holds_without_the_drained_device_stays(world: World) -> None:
    pool = Pool(world, "one", "two", "odd")
    late = pool.enqueue("m-0")
    assert pool.lease("odd") is not None
    pool.crash("m-1", on="one"), pool.crash("m-2", on="two")
    world.repository.accept_result(
        result_of(world.repository.get_measurement(late.id), **CRASH),
        agent_id=pool.agents["odd"].id,
    )
    trial_id = pool.trial()
    pool.fail(trial_id, pool.enqueue("m-3", trial_id=trial_id))
    pool.drain("odd")
    assert len(pool.repository.fleet.list_quarantine()) == 1
    assert pool.repository.get_trial(trial_id).outcome is TrialOutcome.MEASUREMENT_FAILED


def test_an_agent_that_died_counts_and_its_measurement_is_queued_again(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.enqueue("m-1")
    for name in ("one", "two"):
        lease = pool.lease(name)
        assert lease is not None
        died = result_of(lease, outcome=Outcome.LOST, reason="killed", report=None)
        after = pool.repository.accept_result(died, agent_id=pool.agents[name].id)
        with pytest.raises(StaleLease):
            pool.repository.accept_result(died, agent_id=pool.agents[name].id)
    assert after.fencing_token == 2
    assert pool.repository.get_measurement("m-1").outcome is Outcome.QUARANTINED


def test_clearing_by_the_beginning_of_the_digest_forgets_the_crashes(world: World) -> None:
    pool = Pool(world, "one", "two")
    pool.crash("m-1", on="one"), pool.crash("m-2", on="two")
    with pytest.raises(NotFound, match="bbbbbb"):
        pool.repository.fleet.clear_quarantine("bbbbbb")
    assert len(pool.repository.fleet.clear_quarantine("aaaaaa")) == 1
    pool.crash("m-3", on="one")
    assert pool.repository.fleet.list_quarantine() == []


# Keys


def test_an_old_key_is_good_until_the_new_one_was_used(world: World) -> None:
    _, agent = world.agent()
    repository = world.repository
    repository.fleet.offer_key(agent.id, "lost on the way")
    repository.fleet.offer_key(agent.id, "new")
    assert repository.find_agent(agent.key_hash).id == agent.id
    with pytest.raises(InvalidToken):
        repository.find_agent("lost on the way")
    assert repository.find_agent("new").id == agent.id
    assert repository.find_agent("new").key_changed_at == START


def test_a_replaced_key_still_serves_requests_under_way_and_later_shows_a_copy(
    world: World,
) -> None:
    device, agent = world.agent()
    world.repository.fleet.offer_key(agent.id, "new")
    world.repository.find_agent("new")
    world.clock.advance(PREVIOUS_KEY_GRACE_S)
    assert world.repository.find_agent(agent.key_hash).id == agent.id
    assert world.repository.get_device(device.id).drained_by is None
    world.clock.advance(1)
    with pytest.raises(InvalidToken, match="copy"):
        world.repository.find_agent(agent.key_hash)
    assert world.repository.get_device(device.id).drained_by is DrainCause.IDENTITY


def test_a_key_that_nobody_has_costs_no_write(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Database, "writing", lambda _: pytest.fail("the database was written to"))
    with pytest.raises(InvalidToken, match="no agent has this key"):
        world.repository.find_agent("never seen")


def test_a_rotation_that_was_asked_for_is_due_until_the_new_key_is_used(world: World) -> None:
    device, agent = world.agent()
    world.repository.fleet.request_rotation(device.name)
    assert world.repository.find_agent(agent.key_hash).is_rotation_due
    world.repository.fleet.offer_key(agent.id, "new")
    world.repository.find_agent("new")
    assert not world.repository.find_agent("new").is_rotation_due


def test_revoking_ends_the_lease_and_there_is_nothing_to_revoke_after(world: World) -> None:
    agent, lease = world.leased()
    world.repository.fleet.revoke("pi")
    queued = world.repository.get_measurement(lease.id)
    assert (queued.state, queued.lease_id) == (MeasurementState.QUEUED, None)
    with pytest.raises(InvalidToken, match="revoked"):
        world.repository.find_agent(agent.key_hash)
    with pytest.raises(NotFound, match="no agent"):
        world.repository.fleet.revoke("pi")


def test_a_token_serves_the_process_that_used_it_again_and_no_other(world: World) -> None:
    repository = world.repository
    repository.add_enrolment_token("t", expires_in_s=60)
    asked = {"name": "pi", "description": description()}
    device, _ = repository.enrol("t", agent_key_hash="lost", instance="i-1", **asked)
    again, agent = repository.enrol("t", agent_key_hash="kept", instance="i-1", **asked)
    assert again.id == device.id
    assert repository.find_agent("kept") == agent
    for other in ("i-2", None):
        with pytest.raises(InvalidToken, match="was used at"):
            repository.enrol("t", agent_key_hash="k", instance=other, **asked)
