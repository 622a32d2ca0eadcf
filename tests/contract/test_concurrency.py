"""The repository's contract when many threads, and two repositories, work at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy

from storage.database import open_database
from storage.errors import DuplicateTrial, InvalidToken
from storage.records import MeasurementState
from storage.repository import Repository

from .conftest import World, candidate, description, result_of

THREADS = 8


def race(action: Callable[[int], Any], *, threads: int = THREADS) -> list[Any]:
    """What the action returned in each of the threads, which start it together."""
    start = threading.Barrier(threads)

    def run(n: int) -> Any:
        start.wait()
        return action(n)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_racing_proposals_are_numbered_without_gaps(world: World) -> None:
    job = world.job()

    def propose(n: int) -> list[int]:
        return [
            world.repository.add_trial(job.id, candidate(10 * n + k), proposed_by="optuna").number
            for k in range(5)
        ]

    numbers = [number for mine in race(propose) for number in mine]
    assert sorted(numbers) == list(range(5 * THREADS))


def test_of_racing_proposals_of_one_candidate_one_wins(world: World) -> None:
    job = world.job()

    def propose(_: int) -> tuple[str, bool]:
        try:
            return world.repository.add_trial(job.id, candidate(1), proposed_by="x").id, True
        except DuplicateTrial as error:
            return error.existing_id, False

    answers = race(propose)
    assert len({trial_id for trial_id, _ in answers}) == 1
    assert sum(won for _, won in answers) == 1


def test_racing_agents_never_share_a_measurement(world: World) -> None:
    device, _ = world.agent()
    job = world.job()
    agents = [_another_agent(world, f"pi-{n}", device.id) for n in range(THREADS)]
    for n in range(2 * THREADS):
        world.enqueue(job, device, f"m-{n}")

    def work(n: int) -> list[tuple[str, int]]:
        done = []
        while (lease := _lease(world, device.id, agents[n])) is not None:
            world.repository.accept_result(result_of(lease), agent_id=agents[n])
            done.append((lease.id, lease.fencing_token))
        return done

    leases = [lease for mine in race(work) for lease in mine]
    # An agent that found nothing because another transaction held the row may stop early.
    leases += work(0)
    assert sorted(leases) == sorted((f"m-{n}", 1) for n in range(2 * THREADS))
    records = world.repository.list_measurements(job.id)
    assert {record.state for record in records} == {MeasurementState.DONE}


def test_one_agent_that_asks_from_many_threads_holds_one_lease(world: World) -> None:
    device, agent = world.agent()
    job = world.job()
    for n in range(THREADS):
        world.enqueue(job, device, f"m-{n}")
    race(lambda _: world.lease(agent))
    records = world.repository.list_measurements(job.id)
    assert sum(record.state is MeasurementState.LEASED for record in records) == 1


def test_a_result_sent_many_times_at_once_is_accepted_once(world: World) -> None:
    agent, lease = world.leased()
    world.topics.clear()
    records = race(lambda _: world.repository.accept_result(result_of(lease), agent_id=agent.id))
    assert all(record == records[0] for record in records)
    assert world.topics == ["measurements"]


def test_racing_sweeps_take_a_lease_back_once(world: World) -> None:
    world.leased()
    world.clock.advance(60)
    swept = race(lambda _: world.repository.expire_leases())
    assert [record.id for records in swept for record in records] == ["m-1"]
    assert world.repository.get_measurement("m-1").attempts == 1


def test_events_from_many_threads_have_no_gaps(world: World) -> None:
    job = world.job()

    def append(n: int) -> list[int]:
        return [world.repository.append_event(job.id, "x", {"n": n}).id for _ in range(5)]

    ids = [event_id for mine in race(append) for event_id in mine]
    assert sorted(ids) == list(range(1, 5 * THREADS + 1))


def test_a_follower_of_events_misses_none(world: World) -> None:
    job = world.job()
    seen: list[int] = []

    def take_part(n: int) -> None:
        for _ in range(10):
            if n > 0:
                world.repository.append_event(job.id, "x")
            else:
                after = seen[-1] if seen else 0
                events = world.repository.list_events(job.id, after=after)
                seen.extend(event.id for event in events)

    race(take_part)
    rest = world.repository.list_events(job.id, after=seen[-1] if seen else 0)
    seen.extend(event.id for event in rest)
    assert seen == list(range(1, 10 * (THREADS - 1) + 1))


def test_an_enrolment_token_is_used_once_however_many_try(world: World) -> None:
    world.repository.add_enrolment_token("token", expires_in_s=60)

    def enrol(n: int) -> bool:
        try:
            world.repository.enrol(
                "token", name=f"pi-{n}", description=description(), agent_key_hash=f"key-{n}"
            )
        except InvalidToken:
            return False
        return True

    assert sum(race(enrol)) == 1
    assert len(world.repository.list_devices()) == 1


def test_devices_that_enrol_together_under_one_name_get_names_of_their_own(world: World) -> None:
    race(lambda n: _enrol(world, n))
    names = {device.name for device in world.repository.list_devices()}
    assert names == {"pi", *(f"pi-{n}" for n in range(2, THREADS + 1))}


def test_changes_of_different_fields_do_not_undo_each_other(world: World) -> None:
    job = world.job()
    fields = ("name", "phase", "reason", "latency_budget_ns")
    values = ("other", "search", "why", 1.0)
    race(lambda n: world.repository.update_job(job.id, **{fields[n]: values[n]}), threads=4)
    found = world.repository.get_job(job.id)
    assert tuple(getattr(found, name) for name in fields) == values


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_two_services_on_one_server_share_the_work(world: World, database_url: str) -> None:
    device, _ = world.agent()
    job = world.job()
    agents = [_another_agent(world, f"pi-{n}", device.id) for n in range(4)]
    for n in range(12):
        world.enqueue(job, device, f"m-{n}")
    with open_database(database_url) as second:
        repositories = [world.repository, Repository(second, clock=world.clock)]

        def work(n: int) -> list[str]:
            repository, names = repositories[n % 2], []
            for _ in range(3):
                lease = repository.lease_measurement(
                    device_id=device.id, agent_id=agents[n], ttl_s=30
                )
                if lease is not None:
                    repository.accept_result(result_of(lease), agent_id=agents[n])
                    names.append(lease.id)
            return names

        names = [name for mine in race(work, threads=4) for name in mine]
    assert len(names) == len(set(names)) == 12


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_job_is_one_services_until_it_lets_go_of_it(world: World, database_url: str) -> None:
    job, other_job = world.job(), world.job()
    first = world.repository
    with open_database(database_url) as database:
        second = Repository(database)
        claim = first.claim_job(job.id)
        assert claim is not None and second.claim_job(job.id) is None
        other_claim = second.claim_job(other_job.id)
        assert other_claim is not None and first.claim_job(other_job.id) is None
        claim.release()
        with other_claim, second.claim_job(job.id) or pytest.fail("nobody has it"):
            assert first.claim_job(job.id) is None


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_service_that_dies_lets_go_of_its_job(world: World, database_url: str) -> None:
    job = world.job()
    claim = world.repository.claim_job(job.id)
    assert claim is not None
    engine = sqlalchemy.create_engine(database_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as connection:
        killed = "SELECT pg_terminate_backend(pid, 9999) FROM pg_locks WHERE locktype = 'advisory'"
        assert connection.execute(sqlalchemy.text(killed)).scalars().all() == [True]
    with open_database(database_url) as database:
        other_claim = Repository(database).claim_job(job.id)
        assert other_claim is not None
        claim.release()
        other_claim.release()


def _another_agent(world: World, name: str, device_id: str) -> str:
    """An agent of a device of its own; leases are asked for on the shared device."""
    _, agent = world.agent(name, fingerprint=name.ljust(64, "0"))
    assert agent.device_id != device_id
    return agent.id


def _lease(world: World, device_id: str, agent_id: str) -> Any:
    return world.repository.lease_measurement(device_id=device_id, agent_id=agent_id, ttl_s=30)


def _enrol(world: World, n: int) -> None:
    world.repository.add_enrolment_token(f"t-{n}", expires_in_s=60)
    fingerprint = str(n).ljust(64, "0")
    world.repository.enrol(
        f"t-{n}", name="pi", description=description(fingerprint=fingerprint), agent_key_hash=f"{n}"
    )
