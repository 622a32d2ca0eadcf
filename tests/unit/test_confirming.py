"""What is measured again before a job ends, and who takes the place of what does not confirm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from autotune.search.confirmation import next_to_confirm, overlapping, reopen_unconfirmed
from autotune.search.front import non_dominated
from autotune.search.workers import CallFailed
from device_agents.protocol import Outcome
from search_spaces import Candidate
from storage.artifacts import ArtifactFile
from storage.records import TrialOutcome, TrialRecord
from tests.unit.fakes import FakeAgent, FakePool, fake_ms
from tests.unit.records import accuracy, latency, trial
from tests.unit.tuning_bench import Bench


def front_of(*ms: float) -> list[TrialRecord]:
    """A front, 1 % to either side of each latency."""
    return [trial(n, x, 0.90 + n / 100) for n, x in enumerate(ms)]


def confirmed(one: TrialRecord) -> TrialRecord:
    return replace(one, confirmed_latency=one.latency)


def test_members_whose_intervals_touch_are_the_unclear_ones() -> None:
    front = front_of(1.0, 1.015, 2.0, 3.0, 3.02)
    assert [t.number for t in overlapping(front)] == [0, 1, 3, 4]
    assert overlapping(front_of(1.0)) == overlapping([]) == []


def test_the_winner_is_measured_again_first_then_what_is_unclear_then_the_fastest() -> None:
    front = front_of(1.0, 2.0, 3.0, 4.0, 4.05, 9.0)
    order, tried = [], set()
    while (found := next_to_confirm([front[2]], front, tried=tried)) is not None:
        order.append(found.number)
        tried.add(found.id)
    assert order == [2, 3, 4, 0, 1]


def test_what_is_confirmed_is_not_measured_again() -> None:
    front = [confirmed(one) for one in front_of(1.0, 1.01, 2.0)]
    assert next_to_confirm([front[0]], front, tried=set()) is None


@pytest.fixture
def agent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setattr("autotune.search.fleet.Fleet.is_online", lambda self, device: True)
    with bench.agent() as made:
        yield made


def _unconfirmed(bench: Bench, job_id: str) -> list[TrialRecord]:
    trials = bench.repository.list_trials(job_id)
    return [t for t in trials if t.outcome is TrialOutcome.UNCONFIRMED]


def test_a_member_that_does_not_confirm_leaves_the_front_and_the_next_takes_its_place(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    failing: set[str] = set()

    def outcome(candidate: Candidate) -> tuple[Outcome, str | None]:
        is_first = agent.now.kind == "confirmation" and candidate.prune_ratios and not failing
        if is_first or candidate.digest in failing:
            failing.add(candidate.digest)
            return Outcome.TIMEOUT, "the device hung"
        return Outcome.OK, None

    agent.outcome_of = outcome
    job = bench.run(bench.job(max_accuracy_drop=0.2))
    (left,) = _unconfirmed(bench, job.id)
    front = non_dominated(bench.repository.list_trials(job.id))
    assert "the device hung" in (left.reason or "")
    assert left.id not in {t.id for t in front}
    assert job.result is not None
    assert bench.repository.get_trial(job.result["winner"]).confirmed_latency is not None
    assert all(t.confirmed_latency for t in front[:3])


def test_a_member_that_turns_out_slower_gives_its_place_to_the_next(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    lucky: set[str] = set()

    def report(candidate: Candidate) -> Any:
        is_again = agent.now.kind == "confirmation"
        if is_again and candidate.prune_ratios and not lucky:
            lucky.add(candidate.digest)
        return latency(9.0 if candidate.digest in lucky and is_again else fake_ms(candidate))

    agent.report_of = report
    job = bench.run(bench.job(max_accuracy_drop=0.2))
    trials = bench.repository.list_trials(job.id)
    front = non_dominated(trials)
    assert lucky and not lucky & {t.candidate.digest for t in front}
    assert all(t.confirmed_latency for t in front[:3])
    assert job.result is not None and job.result["verdict"] == "within_budget"


@pytest.mark.parametrize("fails", [True, False], ids=["no judgement", "a far larger drop"])
def test_what_held_out_data_do_not_confirm_leaves_the_front(
    bench: Bench, agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    judge = FakePool._held_out
    doubted: set[str] = set()

    def held_out(self: FakePool, artifact: ArtifactFile, runtime: str) -> Any:
        candidate = Candidate.from_json(json.loads(artifact.read()))
        if not (doubted or candidate.prune_ratios) or (doubted and candidate.digest not in doubted):
            return judge(self, artifact, runtime)
        doubted.add(candidate.digest)
        return CallFailed(error="out of memory") if fails else accuracy(0.5, split="held_out")

    monkeypatch.setattr(FakePool, "_held_out", held_out)
    job = bench.run(bench.job(max_accuracy_drop=0.2))
    (left,) = _unconfirmed(bench, job.id)
    front = non_dominated(bench.repository.list_trials(job.id))
    assert {left.candidate.digest} == doubted
    assert ("out of memory" if fails else "on held-out data it loses") in (left.reason or "")
    assert left.confirmed_latency is None and left.id not in {t.id for t in front}
    notices = [str(e.payload.get("message")) for e in bench.repository.list_events(job.id)]
    assert any(f"trial {left.number} is not confirmed and cannot win" in text for text in notices)


def test_a_baseline_that_turns_out_slower_has_the_next_best_measured_again(
    bench: Bench, agent: FakeAgent
) -> None:
    """Uniform INT8 on two threads looks best and is not; then that on three is the best.

    Mixtures beat them all, so that no baseline is measured again for being on the front.
    """
    baselines: set[str] = set()

    def report(candidate: Candidate) -> Any:
        factors = {1: 1.5, 2: 2.0 if agent.now.kind == "confirmation" else 0.8, 3: 1.0}
        if len(agent.measured) < 6:
            baselines.add(candidate.digest)
        is_mixture = candidate.digest not in baselines
        return latency(fake_ms(candidate) * (0.2 if is_mixture else factors[threads(candidate)]))

    def threads(candidate: Candidate) -> int:
        return candidate.runtime.threads

    agent.report_of = report
    job = bench.run(bench.job(search={"trials": 14, "threads": [1, 2, 3]}, max_accuracy_drop=0.2))
    trials = bench.repository.list_trials(job.id)
    int8 = [t for t in trials if t.proposed_by == "baseline" and t.candidate.precisions]
    front = {t.id for t in non_dominated(trials)}
    assert len(int8) == 3 and not front & {t.id for t in int8}
    assert all(t.confirmed_latency for t in int8)


def test_a_job_that_goes_on_gives_what_did_not_confirm_another_chance(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    job = bench.run(bench.job())
    (winner,) = [t for t in bench.repository.list_trials(job.id) if t.id == job.result["winner"]]  # type: ignore[index]
    bench.repository.update_trial(
        winner.id, outcome=TrialOutcome.UNCONFIRMED, reason="busy", confirmed_latency=None
    )
    reopen_unconfirmed(bench.repository, job)
    found = bench.repository.get_trial(winner.id)
    assert (found.outcome, found.reason) == (TrialOutcome.OK, None)


def test_where_nothing_can_be_measured_again_there_is_still_an_answer(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    agent.outcome_of = lambda c: (
        (Outcome.TIMEOUT, "hung") if agent.now.kind == "confirmation" else (Outcome.OK, None)
    )
    job = bench.run(bench.job())
    assert job.result is not None
    assert bench.repository.get_trial(job.result["winner"]).latency is not None
