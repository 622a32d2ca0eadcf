"""Jobs that go on: extended, restarted, begun with what earlier ones know, ended early."""

from __future__ import annotations

from typing import Any

import pytest

from autotune.errors import DiskFull
from autotune.search.interruption import Stopped
from autotune.search.workers import CallFailed
from storage.records import JobRecord, JobState, TrialState
from tests.unit.fakes import FakePool
from tests.unit.tuning_bench import Bench


def test_an_extended_job_goes_on_with_what_it_learnt_and_keeps_its_answer_meanwhile(
    bench: Bench,
) -> None:
    with bench.agent():
        job = bench.run(bench.job())
        spec = {**job.spec, "search": {"trials": 18}}
        waiting = bench.repository.resume_job(job.id, spec=spec)
        assert (waiting.state, waiting.result) == (JobState.QUEUED, job.result)
        again = bench.run(job)
    assert again.state is JobState.FINISHED
    assert again.result is not None and "18 trials" in again.result["stopped_because"]
    assert bench.repository.get_trial(again.result["winner"]).confirmed_latency is not None
    added = bench.repository.list_trials(job.id)[14:]
    assert len(added) == 4
    assert {t.proposed_by for t in added} <= {"program", "flip", "random", "optuna"}
    assert not [c for c in bench.pools[1].calls if c.method in ("noise", "divergence", "pruning")]


def test_a_second_job_on_the_model_begins_with_the_front_of_the_first(bench: Bench) -> None:
    with bench.agent():
        first = bench.run(bench.job())
        second = bench.run(bench.job())
    assert second.state is JobState.FINISHED
    trials = bench.repository.list_trials(second.id)
    after_baselines = next(t for t in trials if t.proposed_by != "baseline")
    assert after_baselines.proposed_by == "earlier"
    assert all(t.job_id == second.id and t.latency is not None for t in trials)
    assert not [c for c in bench.pools[1].calls if c.method in ("noise", "divergence", "pruning")]
    told = [
        e.payload["message"] for e in bench.repository.list_events(second.id) if e.kind == "notice"
    ]
    assert [m for m in told if f"job {first.id} searched this model" in m]
    assert [m for m in told if "taught the cost of" in m]


def test_a_search_ends_when_little_is_left_to_gain(bench: Bench) -> None:
    search = {"trials": 30, "least_gain_per_minute": 1e6}
    with bench.agent():
        job = bench.run(bench.job(search=search))
    assert job.state is JobState.FINISHED
    assert job.result is not None
    assert "more hypervolume per minute of the device" in job.result["stopped_because"]
    assert len(bench.repository.list_trials(job.id)) < 30


def test_a_job_that_fails_while_it_is_extended_still_has_its_answer(bench: Bench) -> None:
    class Broken(FakePool):
        def _inspect(self) -> Any:
            return CallFailed(error="gone", exception=DiskFull("no room for the model"))

    with bench.agent():
        job = bench.run(bench.job())
        bench.repository.resume_job(job.id, spec={**job.spec, "search": {"trials": 18}})
        bench.make_pool = Broken
        failed = bench.run(job)
    assert failed.state is JobState.FAILED
    assert failed.result is not None and job.result is not None
    assert failed.result["winner"] == job.result["winner"]


@pytest.mark.parametrize("after", [3, 9])
def test_a_restart_changes_no_proposal(bench: Bench, after: int) -> None:
    def candidates(job: JobRecord) -> list[str]:
        return [t.candidate.digest for t in bench.repository.list_trials(job.id)]

    def enough() -> bool:
        done = bench.repository.list_trials(job.id)
        return sum(t.state is TrialState.FINISHED for t in done) >= after

    alone = {"trials": 14, "warm_start": "none"}
    with bench.agent():
        whole = bench.run(bench.job(search=alone))
        job = bench.job(search=alone)
        bench.should_stop = enough
        with pytest.raises(Stopped):
            bench.run(job)
        bench.should_stop = lambda: False
        bench.run(job)
    assert candidates(job) == candidates(whole)
