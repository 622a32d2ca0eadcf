"""Heartbeats that arrive together are written together."""

import asyncio
import threading

import pytest

from autotune.service.attendance import Attendance
from storage.errors import DatabaseUnavailable


class SlowRepository:
    """Notes what it is asked to write; the first write waits until the test lets it go."""

    def __init__(self):
        self.writes = []
        self.has_begun = threading.Event()
        self.may_go = threading.Event()
        self.failure = None

    def note_heartbeats(self, device_ids, leases, *, ttl_s):
        self.writes.append(sorted(device_ids))
        self.has_begun.set()
        assert self.may_go.wait(20)
        if self.failure is not None:
            raise self.failure
        return {lease for lease in leases if lease[1] == 1}


async def note_during_a_write(attendance, repository, notes):
    """One heartbeat whose write is under way when `notes` arrive; all their answers."""
    first = asyncio.create_task(attendance.note("d-0", None))
    await asyncio.to_thread(repository.has_begun.wait, 20)
    later = [asyncio.create_task(attendance.note(*note)) for note in notes]
    await asyncio.sleep(0)
    repository.may_go.set()
    return await asyncio.gather(first, *later, return_exceptions=True)


def test_heartbeats_that_arrive_during_a_commit_share_the_next_one():
    repository = SlowRepository()
    attendance = Attendance(repository, ttl_s=15, heartbeat_s=3, gather_s=0)
    notes = [(f"d-{n}", None) for n in range(1, 1000)]
    answers = asyncio.run(note_during_a_write(attendance, repository, notes))
    assert answers == [True] * 1000
    assert [len(written) for written in repository.writes] == [1, 999]


def test_each_heartbeat_hears_of_its_own_lease():
    repository = SlowRepository()
    attendance = Attendance(repository, ttl_s=15, heartbeat_s=3, gather_s=0)
    notes = [("d-1", ("l-1", 1)), ("d-2", ("l-2", 2)), ("d-3", None)]
    answers = asyncio.run(note_during_a_write(attendance, repository, notes))
    assert answers == [True, True, False, True]


def test_a_write_that_fails_is_told_to_all_whose_heartbeats_it_held():
    repository = SlowRepository()
    repository.failure = DatabaseUnavailable("gone")
    attendance = Attendance(repository, ttl_s=15, heartbeat_s=3, gather_s=0)
    answers = asyncio.run(note_during_a_write(attendance, repository, [("d-1", None)] * 2))
    assert [type(answer) for answer in answers] == [DatabaseUnavailable] * 3
    repository.failure = None
    assert asyncio.run(attendance.note("d-1", None))


def test_an_agent_that_hangs_up_does_not_cost_the_others_their_answer():
    repository = SlowRepository()
    attendance = Attendance(repository, ttl_s=15, heartbeat_s=3, gather_s=0)

    async def hang_up():
        first = asyncio.create_task(attendance.note("d-0", None))
        await asyncio.to_thread(repository.has_begun.wait, 20)
        gone, there = (asyncio.create_task(attendance.note(f"d-{n}", None)) for n in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        repository.may_go.set()
        with pytest.raises(asyncio.CancelledError):
            await gone
        return await first, await there

    assert asyncio.run(hang_up()) == (True, True)


def test_heartbeats_that_come_shortly_after_a_commit_wait_for_company():
    repository = SlowRepository()
    repository.may_go.set()
    attendance = Attendance(repository, ttl_s=15, heartbeat_s=3, gather_s=0.2)

    async def one_after_the_other():
        await attendance.note("d-0", None)
        await asyncio.gather(*(attendance.note(f"d-{n}", None) for n in range(1, 4)))

    asyncio.run(one_after_the_other())
    assert repository.writes == [["d-0"], ["d-1", "d-2", "d-3"]]


@pytest.mark.parametrize(
    ("n_agents", "ttl_s", "expected_s"),
    [(1, 15, 3), (300, 15, 3), (400, 15, 4), (900, 15, 5), (900, 600, 6)],
)
def test_idle_agents_of_a_large_fleet_beat_more_slowly(n_agents, ttl_s, expected_s):
    repository = SlowRepository()
    repository.may_go.set()
    attendance = Attendance(repository, ttl_s=ttl_s, heartbeat_s=3, gather_s=0)

    async def beat():
        await asyncio.gather(*(attendance.note(f"d-{i}", None) for i in range(n_agents)))

    asyncio.run(beat())
    assert attendance.period_s(is_measuring=False) == pytest.approx(expected_s)
    assert attendance.period_s(is_measuring=True) == 3
