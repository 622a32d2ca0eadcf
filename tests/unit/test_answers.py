"""What a job answers at its end: a winner inside the budget, the nearest, or a baseline."""

from __future__ import annotations

from typing import Any

from search_spaces import INT8
from storage.records import AccuracyReport, JobState
from tests.unit.fakes import FakePool, fake_accuracy, fake_ms
from tests.unit.records import accuracy, latency
from tests.unit.tuning_bench import Bench


def test_a_job_ends_with_a_confirmed_winner_inside_budget_and_drop(bench: Bench) -> None:
    with bench.agent():
        job = bench.run(bench.job())
    assert (job.state, job.result and job.result["verdict"]) == (JobState.FINISHED, "within_budget")
    assert job.result is not None
    winner = bench.repository.get_trial(job.result["winner"])
    assert winner.confirmed_latency is not None and winner.held_out_accuracy is not None
    assert winner.confirmed_latency.p50_high_ns <= (job.latency_budget_ns or 0)
    assert winner.held_out_accuracy.drop <= 0.01
    assert bench.pools[0].is_closed


def test_an_impossible_budget_ends_with_the_fastest_the_distance_and_the_blockers(
    bench: Bench,
) -> None:
    with bench.agent():
        job = bench.run(bench.job(latency_budget="1us"))
    assert job.state is JobState.FINISHED
    assert job.result is not None
    assert job.result["verdict"] == "impossible_budget"
    assert job.result["missed_by_ns"] > 0
    first = job.result["blocking_groups"][0]
    assert first["group"] == "body" and 0 < first["cost_ns"] < 4e6 and not first["is_profiled"]
    assert "the groups that hold it back: body (" in job.result["explanation"]
    assert job.reason is not None and "misses it by" in job.reason


def test_a_winner_by_a_hair_that_loses_more_gives_way_to_the_baseline(bench: Bench) -> None:
    """Planted: what is searched is 0.5 % faster than uniform INT8, and half a point worse."""
    int8 = 0.95 - 0.02 - 3 * 0.002

    class Worse(FakePool):
        def _held_out(self, artifact: Any, runtime: str) -> AccuracyReport:
            report: AccuracyReport = super()._held_out(artifact, runtime)
            is_baseline = any(abs(report.value - known) < 1e-6 for known in (0.95, int8))
            return report if is_baseline else accuracy(0.919, split="held_out", n_samples=600)

    bench.make_pool = Worse
    with bench.agent() as agent:
        agent.report_of = lambda c: latency(fake_ms(c) if len(c.precisions) in (0, 4) else 1.99)
        search = {"trials": 8, "precisions": ["fp32", "w8a8"], "prune_ratios": [0.0]}
        job = bench.run(bench.job(max_accuracy_drop=0.05, search=search))
    assert job.result is not None
    winner = bench.repository.get_trial(job.result["winner"])
    assert fake_accuracy(winner.candidate) == int8
    assert winner.proposed_by == "baseline" and set(winner.candidate.precisions.values()) == {INT8}
    assert not job.result["beats_baseline"] and job.result["best_baseline"] == winner.id
    assert "neither certainly faster nor certainly more accurate" in job.result["explanation"]
    assert "it is a baseline: nothing that was searched beats it" in job.result["explanation"]
