"""One job's phases on the real repository, with instant workers and an instant agent."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.compression.racing import Race
from autotune.errors import DiskFull
from autotune.search.front import non_dominated
from autotune.search.interruption import Stopped
from autotune.search.races import race_of
from autotune.search.workers import CallFailed
from device_agents.protocol import Outcome
from search_spaces import INT8, Candidate
from storage.errors import DatabaseFull
from storage.records import AccuracyReport, JobState, TrialOutcome, TrialState
from tests.unit.fakes import FakePool, fake_accuracy, fake_ms, shown_of
from tests.unit.records import accuracy, latency
from tests.unit.tuning_bench import Bench


def test_the_baselines_come_first_and_the_budget_is_a_fraction_of_fp32(bench: Bench) -> None:
    with bench.agent():
        job = bench.run(bench.job())
    first, second, *_ = bench.repository.list_trials(job.id)
    assert [first.proposed_by, second.proposed_by] == ["baseline", "baseline"]
    assert first.candidate.precisions == {}
    assert set(second.candidate.precisions.values()) == {INT8}
    assert first.latency is not None
    assert job.latency_budget_ns == pytest.approx(0.65 * first.latency.p50_ns)


def test_the_a_a_run_says_once_what_the_noise_is(bench: Bench) -> None:
    with bench.agent() as agent:
        agent.report_of = lambda candidate: latency(fake_ms(candidate), half_width=0.02)
        job = bench.run(bench.job())
        bench.repository.resume_job(job.id)
        bench.run(job)
    notices = [e.payload for e in bench.repository.list_events(job.id) if e.kind == "notice"]
    found = [n["message"] for n in notices if n["message"].startswith("A/A run")]
    assert len(found) == 1
    assert "1.000 [0.980, 1.020] of its own latency" in found[0] and "2.0% for sure" in found[0]


def test_the_trial_budget_is_kept_and_no_candidate_is_measured_twice(bench: Bench) -> None:
    with bench.agent() as agent:
        job = bench.run(bench.job())
    trials = bench.repository.list_trials(job.id)
    assert len(trials) == 14
    assert len({t.candidate.digest for t in trials}) == 14
    screened = Counter(
        trial
        for trial, plan in zip(agent.measured, agent.plans, strict=True)
        if plan.kind == "screening"
    )
    assert set(screened.values()) == {1}
    assert {t.proposed_by for t in trials} >= {"baseline", "sensitivity", "optuna", "program"}


def test_later_measurements_are_scaled_by_the_pinned_reference(bench: Bench) -> None:
    with bench.agent() as agent:
        job = bench.run(bench.job())
    assert agent.plans[0].reference_latency_ns is None
    assert [p.is_calibration for p in agent.plans] == [True] + [False] * (len(agent.plans) - 1)
    assert {p.reference_latency_ns for p in agent.plans[1:]} == {job.reference_latency_ns}


def test_a_candidate_that_cannot_be_built_is_a_trial_with_a_reason(bench: Bench) -> None:
    class Picky(FakePool):
        def __init__(self) -> None:
            super().__init__()
            self.fail_build_of = lambda c: "no kernel for stem" if c.prune_ratios else None

    bench.make_pool = Picky
    with bench.agent():
        job = bench.run(bench.job())
    failed = [t for t in bench.repository.list_trials(job.id) if t.candidate.prune_ratios]
    assert job.state is JobState.FINISHED
    assert failed
    assert {(t.outcome, t.reason) for t in failed} == {
        (TrialOutcome.COMPRESSION_FAILED, "no kernel for stem")
    }


def test_a_candidate_that_crashes_the_device_does_not_end_the_job(bench: Bench) -> None:
    with bench.agent() as agent:
        agent.outcome_of = lambda c: (
            (Outcome.RUNTIME_CRASH, "signal 11") if c.prune_ratios else (Outcome.OK, None)
        )
        job = bench.run(bench.job())
    crashed = [t for t in bench.repository.list_trials(job.id) if t.candidate.prune_ratios]
    assert job.state is JobState.FINISHED
    assert {t.outcome for t in crashed} == {TrialOutcome.MEASUREMENT_FAILED}
    assert all("signal 11" in (t.reason or "") for t in crashed)


def test_an_unstable_measurement_is_tried_once_more(bench: Bench) -> None:
    seen: Counter[str] = Counter()

    def outcome(candidate: Any) -> tuple[Outcome, str | None]:
        seen[candidate.digest] += 1
        return (Outcome.UNSTABLE, "drift") if seen[candidate.digest] == 1 else (Outcome.OK, None)

    with bench.agent() as agent:
        agent.outcome_of = outcome
        job = bench.run(bench.job())
    assert {t.outcome for t in bench.repository.list_trials(job.id)} == {TrialOutcome.OK}


def test_a_model_that_does_not_run_on_the_device_fails_the_job_and_says_why(bench: Bench) -> None:
    with bench.agent() as agent:
        agent.outcome_of = lambda c: (Outcome.UNSUPPORTED, "opset 99")
        job = bench.run(bench.job())
    assert job.state is JobState.FAILED
    assert "opset 99" in (job.reason or "")


@pytest.mark.parametrize("after", [0, 4])  # 0: while the FP32 baseline is measured
def test_a_device_that_goes_away_leaves_the_job_waiting_and_it_goes_on_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    job = bench.job()
    online = True
    monkeypatch.setattr("autotune.search.fleet.Fleet.is_online", lambda self, device: online)
    with bench.agent() as agent:
        agent.limit = after

        def gone() -> bool:
            nonlocal online
            online = len(agent.measured) < after
            return False

        bench.should_stop = gone
        waiting = bench.run(job)
        assert waiting.state is JobState.WAITING_FOR_DEVICE
        assert "device local is offline" in (waiting.reason or "")
        agent.limit, online = None, True
        bench.should_stop = lambda: False
        assert bench.run(job).state is JobState.FINISHED


@pytest.mark.parametrize("after", [1, 3, 6, 10, 13])
def test_a_stopped_service_goes_on_without_losing_or_repeating_a_trial(
    bench: Bench, after: int
) -> None:
    job = bench.job()

    def enough() -> bool:
        done = [t for t in bench.repository.list_trials(job.id) if t.state is TrialState.FINISHED]
        return len(done) >= after

    with bench.agent() as agent:
        bench.should_stop = enough
        with pytest.raises(Stopped):
            bench.run(job)
        before = {
            t.id: t for t in bench.repository.list_trials(job.id) if t.state is TrialState.FINISHED
        }
        bench.should_stop = lambda: False
        ended = bench.run(job)
        screened = Counter(
            t for t, p in zip(agent.measured, agent.plans, strict=True) if p.kind == "screening"
        )
    trials = bench.repository.list_trials(job.id)
    assert ended.state is JobState.FINISHED
    assert len(trials) == 14
    assert all(bench.repository.get_trial(i).latency == t.latency for i, t in before.items())
    # One that was under way at the stop may be measured again; what was finished may not.
    assert {screened[trial_id] for trial_id in before} <= {1}


def test_a_cancelled_job_keeps_its_trials_and_answers_with_them(bench: Bench) -> None:
    job = bench.job()

    def cancel_after_five() -> bool:
        done = [t for t in bench.repository.list_trials(job.id) if t.state is TrialState.FINISHED]
        if len(done) >= 5 and not bench.repository.get_job(job.id).cancel_requested:
            bench.repository.request_cancel(job.id)
        return False

    bench.should_stop = cancel_after_five
    with bench.agent():
        ended = bench.run(job)
    assert ended.state is JobState.CANCELLED
    assert ended.result is not None
    assert ended.result["stopped_because"] == "cancelled by hand"


def test_wrong_data_fails_the_job_with_the_reason(bench: Bench, tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 1, 8, 8), np.float32), y=np.zeros(0, int))
    with bench.agent():
        job = bench.run(bench.job(data={"evaluation": f"npz:{tmp_path / 'empty.npz'}"}))
    assert job.state is JobState.FAILED
    assert job.reason
    assert bench.repository.list_trials(job.id) == []


def test_a_full_disk_fails_the_job_under_its_name_and_it_goes_on_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise DatabaseFull("no room for the database; free some space and resume")

    with bench.agent():
        with monkeypatch.context() as patched:
            patched.setattr(bench.repository, "record_artifact", full)
            job = bench.run(bench.job())
        assert (job.state, bench.made_room) == (JobState.FAILED, [True])
        assert bench.repository.list_events(job.id)[-1].payload["error"] == "DiskFull"
        bench.repository.resume_job(job.id)
        assert bench.run(job).state is JobState.FINISHED


def test_a_failure_names_the_key_of_the_job_and_not_the_services_copy(bench: Bench) -> None:
    upload = bench.artifacts.put(b"no archive")
    with bench.agent():
        job = bench.run(bench.job(data={"evaluation": f"npz:sha256:{upload.sha256}"}))
    assert (job.reason or "").startswith("data.evaluation is not an .npz file")
    assert str(bench.artifacts.root) not in (job.reason or "")


def test_an_upload_altered_in_the_store_is_never_tuned(bench: Bench) -> None:
    upload = bench.artifacts.put(b"weights")
    bench.artifacts.path(upload.sha256).write_bytes(b"Weights")
    with bench.agent():
        job = bench.run(bench.job(model={"source": f"onnx:sha256:{upload.sha256}"}))
    assert (job.state, bench.pools) == (JobState.FAILED, [])
    assert f"sha256:{upload.sha256} was altered" in (job.reason or "")
    assert bench.repository.list_events(job.id)[-1].payload["error"] == "ServiceError"


def test_an_answer_of_fp32_alone_says_so_and_names_no_int8(bench: Bench) -> None:
    search = {"trials": 1, "precisions": ["fp32"], "prune_ratios": [0]}
    with bench.agent():
        job = bench.run(bench.job(search=search, latency_budget=None))
    assert job.result is not None
    assert job.result["int8_trial"] is None
    assert "it is the FP32 model itself" in job.result["explanation"]
    assert "held-out" not in job.result["explanation"]


def test_a_job_that_failed_for_want_of_its_fp32_latency_can_be_resumed(bench: Bench) -> None:
    with bench.agent() as agent:
        agent.outcome_of = lambda candidate: (Outcome.ARTIFACT_CORRUPT, "altered on its way")
        job = bench.run(bench.job())
        assert job.state is JobState.FAILED
        agent.outcome_of = lambda candidate: (Outcome.OK, None)
        bench.repository.resume_job(job.id)
        assert bench.run(job).state is JobState.FINISHED
    assert len(bench.repository.list_trials(job.id)) == 14


def test_a_job_in_which_nothing_is_steady_fails_and_says_why(bench: Bench) -> None:
    with bench.agent() as agent:
        agent.report_of = lambda c: latency(
            fake_ms(c), is_steady=False, unsteady_reason="the reference spread by 40 %"
        )
        job = bench.run(bench.job())
    assert job.state is JobState.FAILED
    assert "the reference spread by 40 %" in (job.reason or "")


def test_a_winner_that_does_not_confirm_gives_way_to_the_next(bench: Bench) -> None:
    def outcome(candidate: Any) -> tuple[Outcome, str | None]:
        is_lucky = dict(candidate.prune_ratios).get("stem") == 0.5
        is_again = agent.now.kind == "confirmation"
        return (Outcome.TIMEOUT, "hung") if is_lucky and is_again else (Outcome.OK, None)

    with bench.agent() as agent:
        agent.outcome_of = outcome
        job = bench.run(bench.job(max_accuracy_drop=0.1))
    assert job.result is not None
    winner = bench.repository.get_trial(job.result["winner"])
    assert winner.confirmed_latency is not None
    assert winner.candidate.prune_ratio("stem") != 0.5


def test_what_an_interrupted_run_left_with_the_device_is_withdrawn(bench: Bench) -> None:
    job = bench.job()
    with bench.agent() as agent:
        bench.interrupt(job, agent, after=3)
        left = [m for m in bench.repository.list_measurements(job.id) if m.outcome is None]
        assert left == []


def test_a_full_disk_in_a_worker_ends_the_job_and_no_trial(bench: Bench) -> None:
    class Full(FakePool):
        def _build(self, candidate: Any, race: Any = None, kernels: Any = None) -> Any:
            if candidate.prune_ratios:
                return CallFailed(error="no room", exception=DiskFull("no room in /bases"))
            return super()._build(candidate, race, kernels)

    bench.make_pool = Full
    with bench.agent():
        job = bench.run(bench.job())
    assert job.state is JobState.FAILED
    assert "no room in /bases" in (job.reason or "")
    open_trials = [t for t in bench.repository.list_trials(job.id) if t.candidate.prune_ratios]
    assert open_trials
    assert all(t.state is not TrialState.FINISHED for t in open_trials)


def raced(candidate: Candidate, race: Race | None) -> AccuracyReport:
    """What workers answer: everything that may stop early does, looking a little worse."""
    report = accuracy(fake_accuracy(candidate) - (0.0 if race is None else 0.004))
    return report if race is None else replace(report, stopped_early="32 of 100 were enough")


def test_fp32_and_the_front_are_evaluated_on_all_samples(bench: Bench) -> None:
    pool = FakePool()
    pool.report_of = raced
    bench.make_pool = lambda: pool
    with bench.agent():
        job = bench.run(bench.job())
    trials = bench.repository.list_trials(job.id)
    full = {t.number for t in trials if t.accuracy and t.accuracy.stopped_early is None}
    assert full >= {t.number for t in trials if not t.candidate.precisions}
    assert full >= {t.number for t in non_dominated(trials)}
    assert full >= {t.number for t in trials if t.id == (job.result or {}).get("winner")}
    assert len(full) < len(trials), "what is dominated keeps its short report"


def test_without_int8_candidates_race_by_their_margins_alone(bench: Bench) -> None:
    pool = FakePool()
    bench.make_pool = lambda: pool
    search = {"trials": 6, "precisions": ["fp32", "fp16"], "prune_ratios": [0]}
    with bench.agent():
        bench.run(bench.job(search=search))
    races = [call.arguments[1] for call in pool.calls if call.method == "build"]
    assert races[0] is None and None not in races[1:]
    assert all(race.auxiliary is None for race in races[1:])


def test_candidates_race_by_what_uniform_int8_does_to_each_sample(bench: Bench) -> None:
    pools = [FakePool(), FakePool()]
    waiting = iter(pools)
    bench.make_pool = lambda: next(waiting)
    job = bench.job()
    with bench.agent() as agent:
        bench.interrupt(job, agent, after=6)
        assert bench.run(job).state is JobState.FINISHED
    first, second = ([c for c in pool.calls if c.method == "build"] for pool in pools)
    int8 = bench.repository.list_trials(job.id)[1].candidate
    assert [c.arguments[1] for c in first[:2]] == [None, None], "FP32 and INT8 see all"
    for call in [*first[2:], *second]:
        assert np.array_equal(call.arguments[1].auxiliary.margins, shown_of(int8).margins)
    asked = [c.method for pool in pools for c in pool.calls].count("shown")
    assert asked == 1, "the run that went on asked what the one before it knew"


@pytest.mark.parametrize(("drop", "limit"), [(0.01, 0.01), (None, 0.03)])
def test_candidates_race_against_the_drop_that_the_job_allows(
    drop: float | None, limit: float
) -> None:
    race = race_of(max_accuracy_drop=drop, seed=4)
    assert (race.limit, race.seed) == (limit, 4)


def test_rounding_is_learned_for_the_winner_alone_and_only_on_demand(bench: Bench) -> None:
    with bench.agent():
        plain = bench.run(bench.job())
        alone = {"trials": 14, "warm_start": "none"}
        asked = bench.run(bench.job(rounding={"adaround": True}, search=alone))
    before, after = (bench.repository.list_trials(job.id) for job in (plain, asked))
    assert [t.candidate for t in after[:-1]] == [t.candidate for t in before]
    assert plain.result is not None and asked.result is not None
    origin = bench.repository.get_trial(plain.result["winner"]).candidate
    winner = bench.repository.get_trial(asked.result["winner"])
    assert winner.candidate == replace(origin, rounding="adaround")
    assert winner.proposed_by == "adaround"
    assert winner.confirmed_latency is not None and winner.held_out_accuracy is not None
    assert "no worse than trial" in asked.result["explanation"]


def test_a_learned_rounding_that_loses_more_leaves_the_winner(bench: Bench) -> None:
    def pool() -> FakePool:
        made = FakePool()
        made.report_of = lambda candidate, race: accuracy(
            fake_accuracy(candidate) - (0.001 if candidate.rounding else 0)
        )
        return made

    bench.make_pool = pool
    with bench.agent():
        job = bench.run(bench.job(rounding={"adaround": True}))
    assert job.result is not None
    assert bench.repository.get_trial(job.result["winner"]).candidate.rounding is None
    assert bench.repository.list_trials(job.id)[-1].candidate.rounding == "adaround"
    notices = [e.payload for e in bench.repository.list_events(job.id) if e.kind == "notice"]
    assert any("AdaRound leaves trial" in notice["message"] for notice in notices)


def test_with_size_as_an_objective_small_files_are_tried_and_kept_on_the_front(
    bench: Bench,
) -> None:
    search = {"trials": 16, "objectives": ["accuracy", "latency", "size"]}
    with bench.agent():
        job = bench.run(bench.job(search=search))
    trials = bench.repository.list_trials(job.id)
    assert {"size", "optuna", "program"} <= {t.proposed_by for t in trials}
    assert any(p.name == "w4" for t in trials for p in t.candidate.precisions.values())
