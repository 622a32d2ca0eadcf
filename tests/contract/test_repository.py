"""The repository's contract for jobs, trials, devices, tokens, artifacts and events."""

from __future__ import annotations

import math
from datetime import timedelta, timezone

import pytest

from search_spaces import (
    INT8,
    FloatOperator,
    Layer,
    LayerGroup,
    LayerInventory,
    LayerKind,
    SearchSpace,
)
from storage.errors import DuplicateTrial, InvalidToken, NotFound, StorageError
from storage.records import AccuracyReport, JobState, TrialOutcome, TrialState
from storage.sensitivity import Sensitivity

from .conftest import START, World, candidate, description, latency_report


def inventory() -> LayerInventory:
    layer = Layer(
        name="conv1",
        kind=LayerKind.CONV,
        op_type="Conv",
        macs=100,
        parameters=10,
        weight_shape=(8, 3, 3, 3),
        input_shape=(3, 8, 8),
        output_shape=(8, 8, 8),
    )
    group = LayerGroup(
        name="conv1", layers=(layer,), nodes=("conv1", "relu"), precisions=("fp32", "w8a8")
    )
    softmax = FloatOperator(operator="Softmax", count=1, reason="it has no 8-bit kernel")
    return LayerInventory(model_digest="d" * 64, groups=(group,), float_operators=(softmax,))


def accuracy(value: float = 0.9) -> AccuracyReport:
    return AccuracyReport(
        split="search",
        n_samples=100,
        value=value,
        value_low=value - 0.05,
        value_high=value + 0.05,
        fp32_value=0.95,
        drop=0.95 - value,
        drop_low=0.0,
        drop_high=0.1,
        mean_kl=0.01,
        wall_s=0.2,
    )


def test_a_new_job_is_queued_and_reads_back_as_it_was_written(world: World) -> None:
    job = world.job("first")
    assert (job.state, job.name, job.created_at) == (JobState.QUEUED, "first", START)
    assert world.repository.get_job(job.id) == job
    assert world.repository.list_jobs() == [job]


def test_every_field_of_a_job_survives_the_database(world: World) -> None:
    device, _ = world.agent()
    space = SearchSpace.build(inventory(), precisions=[INT8])
    changes = {
        "name": "other",
        "phase": "sensitivity",
        "reason": "because\u00b5",
        "source": {"digest": "x", "shape": [3, 64, 64]},
        "inventory": inventory(),
        "space": space,
        "device_id": device.id,
        "latency_budget_ns": 1.25e6,
        "reference_latency_ns": 3.5e6,
        "sensitivity": (
            Sensitivity(group="conv1", precision="w8a8", sqnr_db=40.5, mean_kl=0.1),
            Sensitivity(group="conv1", prune_ratio=0.25, mean_kl=0.2, is_estimate=True),
        ),
        "result": {"winner": "t-1", "missed_by_ns": None},
    }
    job = world.repository.update_job(world.job().id, **changes)
    assert {name: getattr(job, name) for name in changes} == changes
    assert world.repository.get_job(job.id) == job


def test_times_come_back_in_utc_whatever_zone_they_went_in_with(world: World) -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    job = world.repository.update_job(world.job().id, started_at=START.astimezone(zone))
    found = world.repository.get_job(job.id)
    assert found.started_at == START
    assert [time.utcoffset() for time in (found.started_at, found.created_at)] == [timedelta(0)] * 2


def test_a_time_without_a_zone_is_refused(world: World) -> None:
    job = world.job()
    with pytest.raises(StorageError, match="no time zone"):
        world.repository.update_job(job.id, started_at=START.replace(tzinfo=None))
    assert world.repository.get_job(job.id) == job


def test_states_set_the_times_that_belong_to_them(world: World) -> None:
    job = world.job()
    world.clock.advance(1)
    running = world.repository.update_job(job.id, state=JobState.RUNNING)
    world.clock.advance(1)
    done = world.repository.update_job(job.id, state=JobState.FINISHED)
    assert running.started_at == done.started_at == START + timedelta(seconds=1)
    assert (running.finished_at, done.finished_at) == (None, START + timedelta(seconds=2))


@pytest.mark.parametrize("name", ["id", "created_at", "serial", "colour"])
def test_what_a_job_does_not_let_change_is_refused(world: World, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        world.repository.update_job(world.job().id, **{name: "x"})


def test_a_job_is_found_by_name_and_the_newest_of_that_name_wins(world: World) -> None:
    world.job("same")
    newest = world.job("same")
    world.job("other")
    assert world.repository.get_job("same") == newest


def test_a_job_is_found_by_the_beginning_of_its_id(world: World) -> None:
    job = world.job("j")
    assert world.repository.get_job(job.id[:-1]) == job
    assert world.repository.get_job(job.id[:-1].upper()) == job


def test_a_beginning_that_fits_two_jobs_names_both(world: World) -> None:
    first, second = world.job("a"), world.job("b")
    with pytest.raises(NotFound, match=f"{first.id}, {second.id}"):
        world.repository.get_job("j-")


@pytest.mark.parametrize("reference", ["", "%", "_", "j_", "nothing"])
def test_a_reference_that_fits_nothing_is_not_found(world: World, reference: str) -> None:
    world.job("digits")
    with pytest.raises(NotFound):
        world.repository.get_job(reference)


def test_a_misspelt_name_is_answered_with_the_close_one(world: World) -> None:
    world.job("mobilenet-digits")
    with pytest.raises(NotFound, match="did you mean mobilenet-digits"):
        world.repository.get_job("mobilnet-digits")


def test_cancelling_asks_a_running_job_and_leaves_a_final_one_alone(world: World) -> None:
    job = world.job()
    assert world.repository.request_cancel(job.id).cancel_requested
    world.repository.update_job(job.id, state=JobState.FINISHED, cancel_requested=False)
    assert not world.repository.request_cancel(job.id).cancel_requested


def test_resuming_queues_a_final_job_again_with_what_is_known(world: World) -> None:
    job = world.job()
    world.repository.update_job(
        job.id, state=JobState.FAILED, reason="disk full", inventory=inventory()
    )
    resumed = world.repository.resume_job(job.id, spec={"trials": 50})
    assert (resumed.state, resumed.reason, resumed.finished_at) == (JobState.QUEUED, None, None)
    assert (resumed.spec, resumed.inventory) == ({"trials": 50}, inventory())


def test_resuming_a_running_job_only_takes_the_cancellation_back(world: World) -> None:
    job = world.job()
    world.repository.update_job(job.id, state=JobState.RUNNING)
    world.repository.request_cancel(job.id)
    resumed = world.repository.resume_job(job.id)
    assert (resumed.state, resumed.cancel_requested) == (JobState.RUNNING, False)


def test_trials_are_numbered_per_job_from_zero(world: World) -> None:
    jobs = [world.job("a"), world.job("b")]
    for n in range(3):
        for job in jobs:
            world.repository.add_trial(job.id, candidate(n), proposed_by="optuna")
    for job in jobs:
        trials = world.repository.list_trials(job.id)
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert [trial.candidate for trial in trials] == [candidate(n) for n in range(3)]
        assert {trial.state for trial in trials} == {TrialState.PROPOSED}


def test_a_candidate_is_tried_once_per_job_and_the_error_names_the_trial(world: World) -> None:
    job, other = world.job(), world.job()
    first = world.repository.add_trial(job.id, candidate(1), proposed_by="baseline")
    with pytest.raises(DuplicateTrial) as caught:
        world.repository.add_trial(job.id, candidate(1), proposed_by="optuna")
    assert caught.value.existing_id == first.id
    assert world.repository.add_trial(other.id, candidate(1), proposed_by="optuna").number == 0
    assert world.repository.add_trial(job.id, candidate(2), proposed_by="optuna").number == 1


def test_a_trial_needs_a_job(world: World) -> None:
    with pytest.raises(NotFound, match="j-none"):
        world.repository.add_trial("j-none", candidate(1), proposed_by="optuna")


def test_every_field_of_a_trial_survives_the_database(world: World) -> None:
    trial = world.repository.add_trial(world.job().id, candidate(1), proposed_by="optuna")
    changes = {
        "state": TrialState.FINISHED,
        "outcome": TrialOutcome.OK,
        "reason": "none",
        "artifact_sha256": "b" * 64,
        "artifact_size_bytes": 5_000_000_000,
        "compression": {"groups": [["conv1", "w8a8", "fp32"]]},
        "accuracy": accuracy(),
        "held_out_accuracy": accuracy(0.8),
    }
    found = world.repository.update_trial(trial.id, **changes)
    assert {name: getattr(found, name) for name in changes} == changes
    assert found.finished_at == START
    assert world.repository.get_trial(trial.id) == found
    assert world.repository.list_trials(trial.job_id) == [found]


def test_a_trial_keeps_its_latency_without_raw_samples(world: World) -> None:
    trial = world.repository.add_trial(world.job().id, candidate(1), proposed_by="optuna")
    report = latency_report()
    found = world.repository.update_trial(trial.id, latency=report, confirmed_latency=report)
    expected = report.model_copy(update={"blocks": ()})
    assert found.latency == found.confirmed_latency == expected
    assert world.repository.get_trial(trial.id).latency == expected


def test_a_report_that_is_not_finite_survives(world: World) -> None:
    trial = world.repository.add_trial(world.job().id, candidate(1), proposed_by="optuna")
    world.repository.update_trial(
        trial.id, accuracy=accuracy(math.nan), latency=latency_report(p50_ns=math.inf)
    )
    found = world.repository.get_trial(trial.id)
    assert math.isnan(found.accuracy.value)
    assert found.latency.p50_ns == math.inf


def test_text_that_a_database_cannot_hold_is_kept_readable(world: World) -> None:
    job = world.repository.update_job(world.job().id, reason="segfault\x00 at \udcff")
    assert world.repository.get_job(job.id).reason == "segfault\ufffd at ?"


def test_a_trial_is_found_by_number_id_and_beginning(world: World) -> None:
    job = world.job()
    world.repository.add_trial(world.job().id, candidate(9), proposed_by="optuna")
    trials = [
        world.repository.add_trial(job.id, candidate(n), proposed_by="optuna") for n in range(2)
    ]
    for reference in (1, "1", "#1", trials[1].id, trials[1].id[:-1]):
        assert world.repository.find_trial(job.id, reference) == trials[1]


@pytest.mark.parametrize("reference", ["2", "-1", "", "t-", "t-none", "99999999999999999999"])
def test_a_trial_that_is_not_there_is_answered_with_the_numbers(
    world: World, reference: str
) -> None:
    job = world.job()
    for n in range(2):
        world.repository.add_trial(job.id, candidate(n), proposed_by="optuna")
    with pytest.raises(NotFound, match=r"numbered 0 to 1|more than one"):
        world.repository.find_trial(job.id, reference)


def test_enrolling_makes_a_device_and_an_agent(world: World) -> None:
    device, agent = world.agent("pi", pool="kitchen")
    assert (device.name, device.pool, device.description) == ("pi", "kitchen", description())
    assert agent.device_id == device.id
    assert world.repository.find_agent(agent.key_hash) == agent
    assert world.repository.get_device("pi") == device
    assert world.repository.list_devices() == [device]


def test_an_enrolment_token_works_once(world: World) -> None:
    world.agent("one")
    with pytest.raises(InvalidToken, match="was used"):
        world.repository.enrol(
            "token-1", name="two", description=description(), agent_key_hash="key"
        )
    assert [device.name for device in world.repository.list_devices()] == ["one"]


def test_an_enrolment_token_expires(world: World) -> None:
    world.repository.add_enrolment_token("late", expires_in_s=60)
    world.clock.advance(60)
    with pytest.raises(InvalidToken, match="expired"):
        world.repository.enrol("late", name="a", description=description(), agent_key_hash="key")


def test_an_unknown_enrolment_token_is_refused(world: World) -> None:
    with pytest.raises(InvalidToken, match="not known"):
        world.repository.enrol("no", name="a", description=description(), agent_key_hash="key")


def test_the_same_device_enrols_again_as_itself_and_its_old_key_dies(world: World) -> None:
    device, old = world.agent("pi", pool="kitchen")
    world.clock.advance(5)
    again, new = world.agent("pi")
    assert (again.id, again.pool, again.enrolled_at) == (device.id, "kitchen", START)
    assert again.last_seen_at == START + timedelta(seconds=5)
    assert world.repository.find_agent(new.key_hash) == new
    with pytest.raises(InvalidToken, match="revoked"):
        world.repository.find_agent(old.key_hash)


def test_another_device_under_a_taken_name_gets_a_number(world: World) -> None:
    world.agent("pi", fingerprint="1" * 64)
    other, _ = world.agent("pi", fingerprint="2" * 64)
    assert other.name == "pi-2"
    assert world.agent("pi", fingerprint="2" * 64)[0].id == other.id


def test_identical_devices_that_were_given_no_names_live_side_by_side(world: World) -> None:
    enrolled = [world.agent("raspberrypi", host_id=card) for card in ("card 1", "card 2")]
    assert [device.name for device, _ in enrolled] == ["raspberrypi", "raspberrypi-2"]
    for device, agent in enrolled:
        assert world.repository.find_agent(agent.key_hash).device_id == device.id
    for n, card in enumerate(("card 1", "card 2")):
        assert world.agent("raspberrypi", host_id=card)[0].id == enrolled[n][0].id
    assert len(world.repository.list_devices()) == 2


def test_a_device_that_was_installed_anew_takes_its_name_back_once_its_agent_is_revoked(
    world: World,
) -> None:
    device, _ = world.agent("pi", host_id="old card")
    world.repository.fleet.revoke("pi")
    again, agent = world.agent("pi", host_id="new card")
    assert (again.id, again.description.host_id) == (device.id, "new card")
    other, _ = world.agent("pi", host_id="another device")
    assert other.name == "pi-2"
    assert world.repository.find_agent(agent.key_hash) == agent


def test_a_device_without_a_name_is_called_after_its_host(world: World) -> None:
    world.repository.add_enrolment_token("t", expires_in_s=60)
    device, _ = world.repository.enrol(
        "t", name=None, description=description(hostname="gate"), agent_key_hash="k"
    )
    assert device.name == "gate"


def test_a_revoked_agent_is_not_found_any_more(world: World) -> None:
    device, agent = world.agent()
    world.repository.fleet.revoke(device.id)
    with pytest.raises(InvalidToken, match="revoked"):
        world.repository.find_agent(agent.key_hash)
    with pytest.raises(InvalidToken):
        world.repository.find_agent("never seen")


def test_a_heartbeat_moves_when_a_device_was_last_seen(world: World) -> None:
    device, _ = world.agent()
    world.clock.advance(7)
    assert world.repository.note_heartbeats([device.id, "d-none"], [], ttl_s=30) == set()
    assert world.repository.get_device(device.id).last_seen_at == START + timedelta(seconds=7)


def test_user_tokens_are_known_by_their_hash(world: World) -> None:
    assert world.repository.count_user_tokens() == 0
    for _ in range(2):
        world.repository.add_user_token("hash", name="first start")
    assert world.repository.has_user_token("hash")
    assert not world.repository.has_user_token("hash2")
    assert world.repository.count_user_tokens() == 1


def test_the_first_note_on_an_artifact_stays(world: World) -> None:
    first = world.repository.record_artifact("c" * 64, 6_000_000_000, "model")
    world.clock.advance(1)
    assert world.repository.record_artifact("c" * 64, 6_000_000_000, "upload") == first
    assert world.repository.get_artifact("c" * 64) == first
    with pytest.raises(NotFound):
        world.repository.get_artifact("d" * 64)


def test_events_count_up_over_all_jobs_and_are_read_per_job(world: World) -> None:
    one, two = world.job("one"), world.job("two")
    for n in range(3):
        world.repository.append_event(one.id, "trial", {"n": n})
        world.repository.append_event(two.id, "phase")
    assert [e.id for e in world.repository.list_events(one.id)] == [1, 3, 5]
    assert [e.id for e in world.repository.list_events(one.id, after=1, limit=1)] == [3]
    assert world.repository.list_events(one.id)[2].payload == {"n": 2}


def test_an_event_of_an_unknown_job_is_refused_and_leaves_no_gap(world: World) -> None:
    with pytest.raises(StorageError):
        world.repository.append_event("j-none", "phase")
    assert world.repository.append_event(world.job().id, "phase").id == 1


def test_listeners_hear_each_change_once_and_nothing_else(world: World) -> None:
    job = world.job()
    trial = world.repository.add_trial(job.id, candidate(1), proposed_by="optuna")
    world.repository.update_trial(trial.id, state=TrialState.RUNNING)
    world.repository.append_event(job.id, "trial")
    world.agent()
    assert world.topics == ["jobs", "trials", "trials", "events", "devices"]
    world.topics.clear()
    world.repository.get_job(job.id)
    world.repository.update_trial(trial.id, state=TrialState.RUNNING)
    world.repository.expire_leases()
    with pytest.raises(DuplicateTrial):
        world.repository.add_trial(job.id, candidate(1), proposed_by="optuna")
    assert world.topics == []
