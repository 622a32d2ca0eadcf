"""Jobs on several devices: measured on each, the best on the worst, and what a winner costs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.errors import InvalidJob, JobNotReady, NotFoundError
from autotune.search.compression_worker import Built
from autotune.search.feasibility import Limits
from autotune.search.front import answer, is_feasible, non_dominated
from autotune.search.portability import portability, ratio
from autotune.search.targets import job_on, on_worst_target, views, worst_target
from autotune.spec import measured_on, parse_job
from device_agents.protocol import LatencyReport, Outcome
from search_spaces import INT8, Candidate
from storage.records import (
    JobRecord,
    JobState,
    JobTarget,
    TargetFigures,
    TrialOutcome,
    TrialRecord,
    TrialState,
)
from tests.unit.fakes import FakeAgent, FakePool, fake_accuracy, fake_ms
from tests.unit.records import NOW, accuracy, latency, trial
from tests.unit.tuning_bench import Bench, benched

BUDGETS = {"gateway": "4.5ms", "pi4": "25ms"}
ON_ARM = b" "
"""What the fake workers add to an artifact for Arm: other bytes, the same candidate."""


def within(latency_ns: float | None) -> Limits:
    return Limits(latency_ns=latency_ns)


def gateway_ms(candidate: Candidate) -> float:
    """8 bits pay in the head alone, elsewhere they cost; pruning saves a little."""
    eight = [name for name, p in candidate.precisions.items() if p == INT8]
    saved = 0.1 * sum(candidate.prune_ratios.values())
    return (4.0 + sum(-0.3 if name == "head" else 0.2 for name in eight)) * (1 - saved)


def pi4_ms(candidate: Candidate) -> float:
    """Ten times as slow, and 8 bits pay everywhere."""
    return 10 * fake_ms(candidate)


class TwoClasses(FakePool):
    """Arm's artifacts are other files and lose a little more."""

    def _build(self, candidate: Candidate, race: Any = None, kernels: str | None = None) -> Any:
        built = super()._build(candidate, race, kernels)
        if not isinstance(built, Built) or built.artifact is None or kernels != "arm-dot":
            return built
        worse = accuracy(fake_accuracy(candidate) - 0.003 * bool(candidate.precisions))
        return replace(built, artifact=built.artifact + ON_ARM, accuracy=worse)


@contextmanager
def two_classes(folder: Path) -> Iterator[Bench]:
    with benched(folder) as made:
        made.make_pool = TwoClasses
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with two_classes(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[JobRecord, list[TrialRecord]]]:
    """A job on both devices, without a budget, and its trials."""
    with two_classes(tmp_path_factory.mktemp("finished")) as made:
        yield run_on_both(made)


def two_agents(bench: Bench) -> tuple[FakeAgent, FakeAgent]:
    """A gateway with VNNI and a slower Arm board; neither is running yet."""
    gateway, pi4 = bench.agent(name="gateway", host_id="a"), bench.agent(name="pi4", host_id="b")
    gateway.report_of = lambda candidate: on_reference(gateway_ms(candidate), 4.0)
    pi4.report_of = lambda candidate: on_reference(pi4_ms(candidate), 40.0)
    describe(bench, gateway, architecture="x86_64", cpu_flags=("avx512_vnni",))
    describe(bench, pi4, architecture="aarch64", cpu_flags=("asimddp",))
    return gateway, pi4


def describe(bench: Bench, agent: FakeAgent, **changes: Any) -> None:
    """Find the device with another description, as one that enrolled so."""
    changed = agent.device.description.model_copy(update=changes)
    agent.device = replace(agent.device, description=changed)
    find = bench.fleet.find_device

    def found(selector: str | None) -> Any:
        device = find(selector)
        is_it = device is not None and device.id == agent.device.id
        return agent.device if is_it else device

    bench.fleet.find_device = found  # type: ignore[method-assign]


def on_reference(ms: float, reference_ms: float) -> LatencyReport:
    share = ms / reference_ms
    return latency(
        ms,
        ratio=share,
        ratio_low=share * 0.99,
        ratio_high=share * 1.01,
        reference_p50_ns=reference_ms * 1e6,
        reference_latency_ns=reference_ms * 1e6,
    )


def run_on_both(bench: Bench, **changes: Any) -> tuple[JobRecord, list[TrialRecord]]:
    gateway, pi4 = two_agents(bench)
    wanted = {"device": ["gateway", "pi4"], "latency_budget": None, "max_accuracy_drop": 0.5}
    with gateway, pi4:
        job = bench.run(bench.job(**{**wanted, **changes}))
    return job, bench.repository.list_trials(job.id)


# A whole job


def test_every_trial_has_figures_on_each_device_in_the_file_for_its_kernels(
    finished: tuple[JobRecord, list[TrialRecord]],
) -> None:
    job, trials = finished
    assert job.state is JobState.FINISHED and len(trials) == 14
    _, pi4 = job.targets
    for made in trials:
        there = made.on(pi4.device_id)
        assert made.latency and there.latency and made.accuracy and there.accuracy
        assert made.latency.p50_ns == pytest.approx(gateway_ms(made.candidate) * 1e6)
        assert there.latency.p50_ns == pytest.approx(pi4_ms(made.candidate) * 1e6)
        assert there.artifact_sha256 != made.artifact_sha256
        assert (there.accuracy.drop > made.accuracy.drop) == bool(made.candidate.precisions)


def test_the_winner_on_each_device_is_that_of_its_own_front(
    finished: tuple[JobRecord, list[TrialRecord]],
) -> None:
    job, trials = finished
    assert job.result is not None
    by_id = {made.id: made for made in trials}
    for target, found in zip(job.targets, job.result["targets"], strict=True):
        seen = [made.on(target.device_id) for made in trials]
        best = non_dominated(seen)[0]
        assert found["winner"] == best.id
        assert all(
            by_id[found["winner"]].on(other.device_id).confirmed_latency for other in job.targets
        )
    first, second = (found["winner"] for found in job.result["targets"])
    assert first != second


def test_the_best_on_the_worst_device_wins_the_job(
    finished: tuple[JobRecord, list[TrialRecord]],
) -> None:
    job, trials = finished
    assert job.result is not None
    shares = {
        made.id: max(gateway_ms(made.candidate) / 4, pi4_ms(made.candidate) / 40) for made in trials
    }
    assert shares[job.result["winner"]] == pytest.approx(min(shares.values()))


def test_within_the_budget_means_within_it_on_every_device(bench: Bench) -> None:
    job, trials = run_on_both(bench, latency_budget=BUDGETS, search={"trials": 8})
    assert job.result is not None and job.result["verdict"] == "within_budget"
    assert [target.latency_budget_ns for target in job.targets] == [4.5e6, 25e6]
    winner = next(made for made in trials if made.id == job.result["winner"])
    for target in job.targets:
        assert is_feasible(winner.on(target.device_id), within(target.latency_budget_ns))
    assert "inside the budget on every device" in job.result["explanation"]


def test_a_budget_that_one_device_cannot_keep_is_missed_by_a_share(bench: Bench) -> None:
    job, _ = run_on_both(
        bench, latency_budget={"gateway": "4.5ms", "pi4": "1ms"}, search={"trials": 6}
    )
    assert job.result is not None and job.result["verdict"] == "impossible_budget"
    assert job.result["missed_by_ns"] is None and "of it" in job.result["explanation"]
    verdicts = [found["verdict"] for found in job.result["targets"]]
    assert verdicts == ["within_budget", "impossible_budget"]


def test_what_crashes_on_one_device_may_still_win_on_the_other(bench: Bench) -> None:
    gateway, pi4 = two_agents(bench)
    pi4.outcome_of = lambda candidate: (
        (Outcome.RUNTIME_CRASH, "SIGSEGV") if candidate.precisions else (Outcome.OK, None)
    )
    with gateway, pi4:
        job = bench.run(
            bench.job(
                device=["gateway", "pi4"],
                latency_budget=None,
                max_accuracy_drop=0.5,
                search={"trials": 8},
            )
        )
    trials = bench.repository.list_trials(job.id)
    assert job.result is not None and {t.state for t in trials} == {TrialState.FINISHED}
    on_gateway, on_pi4 = (
        bench.repository.get_trial(found["winner"]) for found in job.result["targets"]
    )
    assert on_gateway.candidate.precisions and not on_pi4.candidate.precisions
    assert not bench.repository.get_trial(job.result["winner"]).candidate.precisions
    row = portability(job, trials)[0]
    assert row.cells[1].over_own_winner is None and "SIGSEGV" in (row.cells[1].reason or "")


def test_devices_with_the_same_kernels_share_an_artifact(bench: Bench) -> None:
    gateway, pi4 = two_agents(bench)
    describe(bench, pi4, architecture="x86_64", cpu_flags=("avx512_vnni",))
    gateway.outcome_of = lambda candidate: (
        (Outcome.OOM, "killed") if candidate.precisions else (Outcome.OK, None)
    )
    with gateway, pi4:
        job = bench.run(bench.job(device=["gateway", "pi4"], search={"trials": 5}))
    trials = bench.repository.list_trials(job.id)
    assert all(made.further[0].artifact_sha256 == made.artifact_sha256 for made in trials)
    assert sum(call.method == "build" for call in bench.pools[0].calls) == len(trials)
    assert job.result is not None
    won = bench.repository.get_trial(job.result["targets"][1]["winner"]).on(pi4.device.id)
    assert won.candidate.precisions and won.held_out_accuracy is not None


def test_a_device_that_goes_away_is_named_and_nothing_is_measured_twice(bench: Bench) -> None:
    gateway, pi4 = two_agents(bench)
    bench.fleet._online_within_s = 1.0
    job = bench.job(
        device=["gateway", "pi4"], latency_budget=None, max_accuracy_drop=0.5, search={"trials": 4}
    )
    pi4.limit = 2
    with gateway, pi4:
        waiting = bench.run(job)
        assert waiting.state is JobState.WAITING_FOR_DEVICE
        assert "pi4" in (waiting.reason or "") and "gateway" not in (waiting.reason or "")
        pi4.limit = None
        assert wait_for(lambda: bench.fleet.is_online(bench.repository.get_device("pi4")))
        ended = bench.run(job)
    assert ended.state is JobState.FINISHED
    screened = [
        (record.trial_id, record.device_id)
        for record in bench.repository.list_measurements(job.id)
        if record.request.plan.kind == "screening" and record.outcome is Outcome.OK
    ]
    assert len(screened) == len(set(screened)) == 2 * 4


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it holds within ten seconds."""
    deadline = time.monotonic() + 10
    pause = threading.Event()
    while not condition() and time.monotonic() < deadline:
        pause.wait(0.02)
    return condition()


def test_one_device_under_two_names_is_refused(bench: Bench) -> None:
    gateway, pi4 = two_agents(bench)
    with gateway, pi4:
        job = bench.run(bench.job(device=["gateway", gateway.device.id]))
    assert job.state is JobState.FAILED and "name it once" in (job.reason or "")


# The views of finished records


def job_record(*budgets_ns: float | None) -> JobRecord:
    primary, *further = (
        JobTarget(device_id=f"d-{n}", latency_budget_ns=budget, reference_latency_ns=ms * 1e6)
        for n, (budget, ms) in enumerate(zip(budgets_ns, (4.0, 40.0), strict=True))
    )
    return JobRecord(
        id="j-1",
        name="job",
        state=JobState.FINISHED,
        phase="finished",
        reason=None,
        spec={},
        cancel_requested=False,
        device_id=primary.device_id,
        latency_budget_ns=primary.latency_budget_ns,
        reference_latency_ns=primary.reference_latency_ns,
        further_targets=tuple(further),
        created_at=NOW,
    )


def on_two(number: int, ms: float, further_ms: float | None, value: float = 0.95) -> TrialRecord:
    figures = TargetFigures(
        device_id="d-1",
        outcome=TrialOutcome.OK if further_ms is not None else TrialOutcome.MEASUREMENT_FAILED,
        reason=None if further_ms is not None else "oom: killed",
        artifact_size_bytes=2000,
        accuracy=accuracy(value - 0.01),
        latency=None if further_ms is None else on_reference(further_ms, 40.0),
    )
    return trial(
        number, None, value, latency=on_reference(ms, 4.0), further=(figures,),
        artifact_size_bytes=1000,
    )  # fmt: skip


@pytest.mark.parametrize("ms", [2.9, 3.0, 3.1])
@pytest.mark.parametrize("further_ms", [19.0, 19.8, 20.5])
def test_inside_in_the_worst_view_is_inside_on_each_device(ms: float, further_ms: float) -> None:
    job, made = job_record(3e6, 20e6), on_two(1, ms, further_ms)
    inside = all(
        is_feasible(made.on(t.device_id), within(t.latency_budget_ns)) for t in job.targets
    )
    assert is_feasible(on_worst_target(job, made), within(job.latency_budget_ns)) == inside


def test_without_a_budget_the_worst_is_the_largest_share_of_fp32() -> None:
    job, made = job_record(None, None), on_two(1, 3.0, 24.0)
    seen, worst = on_worst_target(job, made), worst_target(job, made)
    assert seen.latency is not None and worst is not None
    assert (seen.latency.ratio, worst.device_id) == (0.75, "d-0")
    assert seen.latency.p50_ns == pytest.approx(3e6)
    slower = on_worst_target(job, on_two(2, 3.0, 36.0))
    assert slower.latency is not None and slower.latency.p50_ns == pytest.approx(0.9 * 4e6)


def test_the_worst_view_takes_the_lowest_accuracy_and_the_largest_file() -> None:
    seen = on_worst_target(job_record(None, None), on_two(1, 3.0, 24.0, value=0.94))
    assert seen.accuracy is not None and seen.accuracy.value == pytest.approx(0.93)
    assert seen.artifact_size_bytes == 2000


def test_a_trial_that_failed_on_one_device_ranks_in_the_other_view_alone() -> None:
    job, made = job_record(None, None), on_two(1, 3.0, None)
    worst, here, there = views(job, [made])
    assert [bool(non_dominated(view.trials)) for view in (worst, here, there)] == [0, 1, 0]
    assert worst.trials[0].reason == "oom: killed"


def test_a_job_on_one_device_is_seen_as_it_is() -> None:
    job = replace(job_record(3e6, None), further_targets=())
    made = trial(1, 2.0, 0.9)
    (view,) = views(job, [made])
    assert view.trials == [made] and not view.is_of_worst
    assert job_on(job, "d-0") is job


def test_a_job_on_one_of_its_devices_has_that_ones_budget_and_answer() -> None:
    there = {"device_id": "d-1", "winner": "t-2", "verdict": "within_budget"}
    job = replace(job_record(3e6, 20e6), result={"winner": "t-1", "targets": [there]})
    seen = job_on(job, "d-1")
    assert (seen.device_id, seen.latency_budget_ns, seen.further_targets) == ("d-1", 20e6, ())
    assert seen.result is not None and seen.result["winner"] == "t-2"
    with pytest.raises(NotFoundError):
        job_on(job, "d-9")


# Portability


def answered(*winners: str) -> JobRecord:
    found = [{"device_id": f"d-{n}", "winner": winner} for n, winner in enumerate(winners)]
    return replace(job_record(3e6, 20e6), result={"winner": winners[0], "targets": found})


def test_the_matrix_has_a_row_per_winner_and_a_column_per_device() -> None:
    first, second = on_two(1, 2.0, 24.0), on_two(2, 3.2, 12.0)
    rows = portability(answered("t-1", "t-2"), [first, second])
    found = [
        [round(cell.over_own_winner.value, 6) if cell.over_own_winner else None for cell in r.cells]
        for r in rows
    ]
    assert found == [[1.0, 2.0], [1.6, 1.0]]
    assert [[cell.is_feasible for cell in r.cells] for r in rows] == [[True, False], [False, True]]


def test_a_ratio_of_two_latencies_has_the_interval_of_both() -> None:
    found = ratio(latency(3.0, half_width=0.03), latency(2.0, half_width=0.04))
    assert found.value == pytest.approx(1.5)
    up = math.exp(math.hypot(math.log(1.03), math.log(1 / 0.96)))
    down = math.exp(-math.hypot(math.log(1 / 0.97), math.log(1.04)))
    assert (found.low, found.high) == pytest.approx((1.5 * down, 1.5 * up))


def test_a_job_on_one_device_has_no_matrix() -> None:
    with pytest.raises(JobNotReady, match="measures on one device"):
        portability(replace(answered("t-1", "t-2"), further_targets=()), [])


# The job file and the stored form


BASE = {"model": {"source": "onnx:a.onnx"}, "data": {"evaluation": "npz:b.npz"}}


def test_one_name_and_a_list_of_one_mean_the_same() -> None:
    for device in ("gateway", ["gateway"]):
        spec = parse_job({**BASE, "device": device, "latency_budget": "3ms"})
        assert spec.targets == ("gateway",)
        budget = spec.budget_on("gateway")
        assert budget is not None and budget.absolute_ns == 3e6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": []}, "device: must be the name of a device, or a list of different names"),
        ({"device": ["a", "a"]}, "different names"),
        ({"device": "a", "latency_budget": {"b": "3ms"}}, "one budget for each of a"),
        ({"latency_budget": {"a": "3ms"}}, "for a device that the job names"),
        ({"device": ["a"], "latency_budget": {"a": "soon"}}, "'soon' is not a latency budget"),
    ],
)
def test_devices_and_budgets_that_do_not_fit_are_explained(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidJob, match=said):
        parse_job({**BASE, **changes})


def test_a_job_is_moved_to_other_devices_with_its_common_budget() -> None:
    spec = parse_job({**BASE, "latency_budget": "0.5x"})
    assert measured_on(spec, ()) is spec
    assert measured_on(spec, ["a"]).device == "a"
    assert measured_on(spec, ["a", "b"]).targets == ("a", "b")


def test_figures_on_a_further_target_are_stored_and_read_back() -> None:
    (figures,) = on_two(1, 2.0, 24.0).further
    assert TargetFigures.from_json(figures.to_json()) == figures
    target = job_record(3e6, 20e6).further_targets[0]
    assert JobTarget.from_json(target.to_json()) == target


def test_the_answer_on_every_device_says_so() -> None:
    found = answer(
        [trial(1, 2.0, 0.9)],
        limits=within(3e6),
        max_accuracy_drop=None,
        on_every_device=True,
    )
    assert found is not None and "inside the budget on every device" in found.explanation
