"""Jobs on a pool: work is shared, the member that is off is drained, crashes are quarantined."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.search import canary
from device_agents.protocol import LatencyReport, Outcome
from search_spaces import Candidate
from storage.database import open_database
from storage.records import DrainCause, JobRecord, JobState, TrialOutcome
from storage.repository import Repository
from tests.unit.fakes import FakeAgent, fake_ms
from tests.unit.records import latency
from tests.unit.tuning_bench import Bench

FP32_NS = 4e6


class Pool:
    """A job's bench with a pool of agents on machines of their own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.repository = bench.repository
        self.agents: dict[str, FakeAgent] = {}

    def add(self, name: str, *, slower: float = 1.0) -> FakeAgent:
        agent = self.bench.agent(name=name, host_id=f"machine of {name}", pool="pi4")
        self.slow_down(agent, slower)
        self.agents[name] = agent
        return agent

    @staticmethod
    def slow_down(agent: FakeAgent, slower: float) -> None:
        def report(candidate: Candidate) -> LatencyReport:
            return latency(fake_ms(candidate), reference_p50_ns=FP32_NS * slower)

        agent.report_of = report

    def run(self, **changes: Any) -> JobRecord:
        job = self.bench.job(device="pi4", **{"search": {"trials": 4}, **changes})
        with contextlib.ExitStack() as running:
            for agent in self.agents.values():
                running.enter_context(agent)
            return self.bench.run(job)

    def measured(self, name: str) -> list[str]:
        """The trials that the member measured."""
        return [trial for trial in self.agents[name].measured if trial is not None]

    def notices(self, job: JobRecord) -> list[str]:
        events = self.repository.list_events(job.id)
        return [str(event.payload["message"]) for event in events if event.kind == "notice"]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(canary, "READINGS", 2)  # fakes do not spread
    with open_database("sqlite://") as database:
        bench = Bench(tmp_path, Repository(database))
        yield Pool(bench)


def test_the_members_share_the_work_and_the_slow_one_gets_none(pool: Pool) -> None:
    for name, slower in (("one", 1.0), ("two", 1.01), ("odd", 1.1)):
        pool.add(name, slower=slower)
    job = pool.run()
    assert job.state is JobState.FINISHED
    assert pool.measured("one") and pool.measured("two")
    assert pool.measured("odd") == []
    odd = pool.repository.get_device("odd")
    assert odd.drained_by is DrainCause.CANARY
    assert "% slower than pool pi4 on the canary" in str(odd.drained_because)
    assert any("device odd is drained" in notice for notice in pool.notices(job))


def test_the_pools_own_reference_latency_calibrates_every_member(pool: Pool) -> None:
    for name, slower in (("one", 1.0), ("two", 1.02), ("three", 1.01)):
        pool.add(name, slower=slower)
    job = pool.run()
    assert job.reference_latency_ns == pytest.approx(1.01 * FP32_NS)
    plans = [plan for agent in pool.agents.values() for plan in agent.plans]
    given = {plan.reference_latency_ns for plan in plans}
    assert given == {None, job.reference_latency_ns}  # None: the canaries that found it


def test_what_a_member_did_before_it_was_found_off_is_measured_by_the_others(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "VALID_S", 0.0)
    for name in ("one", "two", "late"):
        pool.add(name)
    late, has_worked = pool.agents["late"], threading.Event()

    def work(candidate: Candidate) -> tuple[Outcome, str | None]:
        if candidate.precisions and not has_worked.is_set():
            has_worked.set()
            pool.slow_down(late, 1.2)
        return Outcome.OK, None

    def leave_some(candidate: Candidate) -> tuple[Outcome, str | None]:
        if len(set(candidate.precisions.values())) > 1 or candidate.prune_ratios:
            has_worked.wait(10)
        return Outcome.OK, None

    late.outcome_of = work
    pool.agents["one"].outcome_of = pool.agents["two"].outcome_of = leave_some
    job = pool.run(search={"trials": 6})
    assert pool.repository.get_device("late").drained_by is DrainCause.CANARY
    trials = pool.repository.list_trials(job.id)
    quantized = {trial.id for trial in trials if trial.candidate.precisions}
    used = [m for m in pool.repository.list_measurements(job.id) if m.trial_id in quantized]
    # The FP32 model it may have measured in time, before a check that it passed.
    spoiled = [m for m in used if m.device_id == late.device.id]
    assert spoiled and all(m.distrusted_because for m in spoiled if m.outcome is Outcome.OK)
    assert [t.outcome for t in trials] == [TrialOutcome.OK] * len(trials)
    remeasured = {m.trial_id for m in used if m.device_id != late.device.id}
    assert {m.trial_id for m in spoiled} <= remeasured


def test_a_candidate_that_crashes_two_devices_is_quarantined_and_the_search_goes_on(
    pool: Pool,
) -> None:
    for name in ("one", "two", "three"):
        pool.add(name).outcome_of = lambda candidate: (
            (Outcome.RUNTIME_CRASH, "the runtime died of SIGSEGV")
            if candidate.precisions
            else (Outcome.OK, None)
        )
    job = pool.run()
    assert job.state is JobState.FINISHED
    crashed = [t for t in pool.repository.list_trials(job.id) if t.candidate.precisions]
    assert crashed and len(pool.repository.list_trials(job.id)) == 4
    for trial in crashed:
        assert trial.outcome is TrialOutcome.MEASUREMENT_FAILED
        assert str(trial.reason).startswith("quarantined: the artifact crashed 2 devices")
    entries = pool.repository.fleet.list_quarantine()
    assert {e.artifact_sha256 for e in entries} == {t.artifact_sha256 for t in crashed}


def test_a_model_that_no_member_can_measure_is_the_models_fault_and_nobodys(pool: Pool) -> None:
    for name in ("one", "two"):
        pool.add(name).outcome_of = lambda candidate: (Outcome.RUNTIME_CRASH, "SIGSEGV")
    job = pool.run()
    assert job.state is JobState.FAILED
    assert "no member of pool pi4 could measure the FP32 model" in str(job.reason)
    assert "runtime_crash: SIGSEGV" in str(job.reason)
    assert [d.drained_by for d in pool.repository.list_devices()] == [None, None]
    assert pool.repository.fleet.list_quarantine() == []


def test_a_member_that_alone_cannot_measure_the_canary_is_drained(pool: Pool) -> None:
    for name in ("one", "two", "odd"):
        pool.add(name)
    pool.agents["odd"].outcome_of = lambda candidate: (Outcome.RUNTIME_CRASH, "SIGILL")
    assert pool.run(search={"trials": 2}).state is JobState.FINISHED
    odd = pool.repository.get_device("odd")
    assert odd.drained_by is DrainCause.CANARY
    assert "could not measure the canary: runtime_crash: SIGILL" in str(odd.drained_because)


def test_a_single_device_is_crashed_three_times_at_most(pool: Pool) -> None:
    agent = pool.add("alone")
    agent.outcome_of = lambda candidate: (
        (Outcome.RUNTIME_CRASH, "SIGSEGV") if candidate.precisions else (Outcome.OK, None)
    )
    job = pool.run(search={"trials": 2})
    (crashed,) = [t for t in pool.repository.list_trials(job.id) if t.candidate.precisions]
    assert pool.measured("alone").count(crashed.id) == 3
    assert "crashed alone 3 times" in str(crashed.reason)


def test_a_pool_without_anybody_left_says_what_to_do(pool: Pool) -> None:
    pool.add("one"), pool.add("two")
    for agent in pool.agents.values():
        pool.repository.fleet.drain(
            agent.device.id,
            cause=DrainCause.IDENTITY,
            because="two processes use it",
            distrust_since=agent.device.enrolled_at,
        )
    job = pool.bench.job(device="pi4")
    device = pool.bench.fleet.find_device("pi4")
    why = str(pool.bench.fleet.absence(job, "pi4", device))
    assert "is drained: two processes use it" in why
    assert "autotune device resume" in why
