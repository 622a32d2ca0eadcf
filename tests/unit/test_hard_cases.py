"""Whole searches where something is against them: each ends, and says what it found."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from autotune.search.compression_worker import Inspection
from autotune.search.feasibility import Limits
from autotune.search.proposals import Proposals
from autotune.search.sampler import Sampler
from device_agents.protocol import Outcome
from search_spaces import INT8, Candidate, LayerInventory, SearchSpace
from storage.records import JobRecord, JobState, TrialOutcome, TrialRecord
from tests.unit import fakes
from tests.unit.fakes import FakeAgent, FakePool, fake_accuracy, fake_ms
from tests.unit.records import accuracy, latency, trial
from tests.unit.spaces import group
from tests.unit.tuning_bench import Bench


@pytest.fixture
def agent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setattr("autotune.search.fleet.Fleet.is_online", lambda self, device: True)
    with bench.agent() as made:
        yield made


def pool_of(
    bench: Bench,
    value: Callable[[Candidate], float] = fake_accuracy,
    inventory: LayerInventory | None = None,
) -> None:
    """Workers that find those accuracies, of a model with those groups."""

    class Pool(FakePool):
        def __init__(self) -> None:
            super().__init__()
            self.report_of = lambda candidate, race: accuracy(value(candidate))

        def _inspect(self) -> Inspection:
            found = super()._inspect()
            return found if inventory is None else replace(found, inventory=inventory)

        def _held_out(self, artifact: Any, runtime: str) -> Any:
            data = artifact if isinstance(artifact, bytes) else artifact.read()
            candidate = Candidate.from_json(json.loads(data))
            return accuracy(value(candidate), split="held_out", n_samples=600)

    bench.make_pool = Pool


def of_groups(n: int) -> LayerInventory:
    return LayerInventory(
        model_digest="0" * 64, groups=tuple(group(f"g{i}", 1000 + i) for i in range(n))
    )


def winner_of(bench: Bench, job: JobRecord) -> TrialRecord:
    assert job.state is JobState.FINISHED, job.reason
    assert job.result is not None
    return bench.repository.get_trial(job.result["winner"])


def test_a_limit_that_nobody_meets_ends_with_the_nearest_and_the_distance(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    asked = {"max_size": "10B", "latency_budget": "0.65x", "search": {"trials": 8}}
    job = bench.run(bench.job(**asked))
    winner = winner_of(bench, job)
    assert job.result is not None and job.result["verdict"] == "impossible_budget"
    assert job.result["missed"]["size"] > 0
    assert "no trial at all is inside a file of 10 B" in job.result["explanation"]
    assert winner.artifact_size_bytes is not None


def test_objectives_in_conflict_with_a_limit_nobody_meets_still_end_in_an_answer(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    agent.report_of = lambda c: latency(
        fake_ms(c), peak_memory_bytes=10**9 - 10**6 * int(100 * fake_ms(c))
    )
    search = {"trials": 8, "objectives": ["accuracy", "latency", "memory"]}
    job = bench.run(bench.job(latency_budget="1us", max_memory="1kB", search=search))
    winner_of(bench, job)
    assert job.result is not None and set(job.result["missed"]) == {"latency", "memory"}


def test_a_trial_budget_smaller_than_the_baselines_is_answered_by_a_baseline(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    winner = winner_of(bench, job := bench.run(bench.job(search={"trials": 1})))
    assert winner.proposed_by == "baseline"
    assert job.result is not None and not job.result["beats_baseline"]


def test_where_every_candidate_is_worse_than_fp32_it_wins_itself(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    pool_of(bench, lambda c: 0.95 - 0.3 * bool(c.precisions or c.prune_ratios))
    agent.report_of = lambda c: latency(4.0 + 2.0 * bool(c.precisions or c.prune_ratios))
    job = bench.run(bench.job(latency_budget=None, search={"trials": 10}))
    assert winner_of(bench, job).candidate == Candidate()
    assert job.result is not None and "FP32 model itself" in job.result["explanation"]


def test_with_flat_accuracy_the_fastest_wins(bench: Bench, agent: FakeAgent) -> None:
    pool_of(bench, lambda c: 0.95)
    job = bench.run(bench.job(search={"trials": 10}))
    trials = bench.repository.list_trials(job.id)
    fastest = min(t.latency.p50_ns for t in trials if t.latency and t.outcome is TrialOutcome.OK)
    won = winner_of(bench, job).latency
    assert won is not None and won.p50_ns == fastest


def test_with_flat_latency_nothing_beats_fp32(bench: Bench, agent: FakeAgent) -> None:
    agent.report_of = lambda c: latency(4.0)
    job = bench.run(bench.job(latency_budget=None, max_accuracy_drop=None, search={"trials": 10}))
    assert winner_of(bench, job).candidate == Candidate()


@pytest.mark.parametrize("n", [1, 100])
def test_a_model_of_one_group_and_one_of_a_hundred_are_searched(
    bench: Bench,
    agent: FakeAgent,
    n: int,
) -> None:
    pool_of(bench, lambda c: 0.95 - 0.005 * len(c.precisions) / n, of_groups(n))
    agent.report_of = lambda c: latency(4.0 - 2.0 * len(c.precisions) / n)
    search = {"trials": 8, "prune_ratios": [0.0], "precisions": ["fp32", "w8a8"]}
    job = bench.run(bench.job(search=search))
    winner = winner_of(bench, job)
    assert winner.candidate.precisions and set(winner.candidate.precisions.values()) == {INT8}
    trials = bench.repository.list_trials(job.id)
    assert len(trials) == (2 if n == 1 else 8)


def test_a_device_that_fails_a_third_of_its_runs_delivers_an_answer(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    luck = random.Random(3)
    agent.outcome_of = lambda c: (
        (Outcome.TIMEOUT, "hung")
        if (c.precisions or c.prune_ratios) and luck.random() < 1 / 3
        else (Outcome.OK, None)
    )
    job = bench.run(bench.job(search={"trials": 12}))
    winner = winner_of(bench, job)
    failed = [t for t in bench.repository.list_trials(job.id) if t.outcome is not TrialOutcome.OK]
    assert winner.confirmed_latency is not None
    assert failed and all("hung" in (t.reason or "") for t in failed)


def test_a_cancelled_job_keeps_its_best_and_goes_on_when_it_is_resumed(
    bench: Bench,
    agent: FakeAgent,
) -> None:
    job = bench.job(search={"trials": 9})

    def enough() -> bool:
        if len(bench.repository.list_trials(job.id)) >= 4:
            bench.repository.request_cancel(job.id)
        return False

    bench.should_stop = enough
    cancelled = bench.run(job)
    assert cancelled.state is JobState.CANCELLED and cancelled.result is not None
    n_before = len(bench.repository.list_trials(job.id))
    bench.should_stop = lambda: False
    bench.repository.resume_job(job.id)
    ended = bench.run(job)
    assert winner_of(bench, ended).confirmed_latency is not None
    assert n_before < len(bench.repository.list_trials(job.id)) == 9


def test_a_sampler_that_fails_leaves_the_models_own_proposals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> list[Candidate]:
        raise RuntimeError("the sampler's library is broken")

    monkeypatch.setattr(Sampler, "propose", broken)
    inventory = of_groups(6)
    space = SearchSpace.build(inventory, precisions=[INT8], prune_ratios=())
    proposals = Proposals(
        space=space, inventory=inventory, bases=[], damage={}, seed=0, limits=Limits(latency_ns=3e6)
    )
    trials = [
        trial(0, 4.0, 0.95, candidate=space.fp32(), proposed_by="baseline"),
        trial(1, 2.0, 0.94, candidate=space.uniform_int8(), proposed_by="baseline"),
    ]
    found = proposals.refine(trials)
    assert found and "optuna" not in {p.proposed_by for p in found}


def test_a_limit_that_the_device_cannot_measure_ends_the_job_before_anything_is_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = fakes.description().model_copy(update={"energy_missing": "no RAPL counter"})
    monkeypatch.setattr(fakes, "description", lambda *_: blind)
    with bench.agent():
        job = bench.run(bench.job(max_energy="5mJ"))
    assert job.state is JobState.FAILED
    assert "cannot be measured on local: no RAPL counter" in (job.reason or "")
    assert bench.pools == []
