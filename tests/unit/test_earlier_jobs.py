"""What a job takes over from earlier ones, and what it leaves to later ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune.search.earlier_jobs import take_over, teach
from autotune.search.landscape import Encoding, Knowledge, fit
from autotune.search.priors import NOTHING, Earlier
from autotune.search.proposals import Proposals
from autotune.spec import parse_job
from search_spaces import INT8, Candidate, LayerInventory
from storage.database import open_database
from storage.records import DeviceRecord, JobRecord, TrialOutcome, TrialState
from storage.repository import Repository
from storage.sensitivity import Sensitivity
from tests.unit.fakes import description, fake_accuracy, fake_ms
from tests.unit.records import accuracy, latency
from tests.unit.spaces import inventory, space

SPEC = {
    "model": {"source": "onnx:/m.onnx"},
    "data": {"evaluation": "npz:/data.npz"},
}
MIXTURE = Candidate(precisions={"body": INT8, "dw": INT8})
PRUNED = replace(MIXTURE, prune_ratios={"body": 0.5})
SENSITIVITY = (Sensitivity(group="body", precision="w8a8", mean_kl=0.01, n_samples=40),)


class World:
    """A repository with one device, and jobs that searched on it."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.notices: list[str] = []
        self.device = self.enrol("local", version="1.31.1")

    def enrol(self, name: str, *, version: str, cpu_flags: tuple[str, ...] = ()) -> DeviceRecord:
        self.repository.add_enrolment_token(f"token-{name}", expires_in_s=60)
        described = description()
        builds = tuple(b.model_copy(update={"version": version}) for b in described.runtimes)
        return self.repository.enrol(
            f"token-{name}",
            name=name,
            description=described.model_copy(update={"runtimes": builds, "cpu_flags": cpu_flags}),
            agent_key_hash=f"key-{name}",
        )[0]

    def job(
        self, *candidates: Candidate, of: LayerInventory | None = None, **changes: Any
    ) -> JobRecord:
        """A job with FP32, uniform INT8 and those candidates measured."""
        spec = parse_job({**SPEC, **changes})
        job = self.repository.create_job(spec=spec.model_dump(mode="json"), name="job")
        own = of or inventory()
        for candidate in (space().fp32(), space().uniform_int8(), *candidates):
            is_baseline = candidate not in candidates
            trial = self.repository.add_trial(
                job.id, candidate, proposed_by="baseline" if is_baseline else "flip"
            )
            self.repository.update_trial(
                trial.id,
                state=TrialState.FINISHED,
                outcome=TrialOutcome.OK,
                accuracy=accuracy(fake_accuracy(candidate)),
                latency=latency(fake_ms(candidate)),
            )
        return self.repository.update_job(
            job.id,
            inventory=own,
            space=space(),
            device_id=self.device.id,
            sensitivity=SENSITIVITY if candidates else (),
        )

    def take_over(self, job: JobRecord, *, on: DeviceRecord | None = None) -> Earlier:
        spec = parse_job(job.spec)
        devices = [on or self.device]
        return take_over(self.repository, job, spec, devices, notice=self.notices.append)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_database(f"sqlite:///{tmp_path / 'test.db'}") as database:
        yield World(Repository(database))


def test_a_job_begins_with_the_results_of_the_newest_job_of_its_model_and_device(
    world: World,
) -> None:
    world.job(MIXTURE)
    newest = world.job(MIXTURE, PRUNED)
    found = world.take_over(world.job())
    assert {t.job_id for t in found.latencies} == {newest.id}
    assert len(found.latencies) == len(found.drops) == 4
    assert [t.candidate for t in found.front] == [PRUNED, MIXTURE]
    assert found.sensitivity == SENSITIVITY
    (notice,) = world.notices
    assert f"job {newest.id} searched this model on local: the latencies of 4 trials" in notice
    assert "none counts as measured by this job" in notice


def test_of_other_data_the_latencies_alone_are_taken_over(world: World) -> None:
    world.job(MIXTURE, data={"evaluation": "npz:/other.npz"})
    found = world.take_over(world.job())
    assert (len(found.latencies), found.drops, found.sensitivity) == (3, (), ())
    assert "accuracies" not in world.notices[0]


def test_of_another_recovery_the_accuracies_of_unpruned_candidates_hold(world: World) -> None:
    world.job(MIXTURE, PRUNED, recovery={"epochs": 1})
    found = world.take_over(world.job())
    assert {t.candidate.prune_ratios == {} for t in found.drops} == {True}
    assert len(found.drops) == 3 and len(found.latencies) == 4


def test_nothing_is_taken_over_where_it_would_not_hold(world: World) -> None:
    world.job(MIXTURE, of=replace(inventory(), model_digest="1" * 64))
    own = world.job()
    assert world.take_over(own) == NOTHING
    world.job(MIXTURE)  # created later
    assert world.take_over(own) == NOTHING
    assert world.notices == []


@pytest.mark.parametrize(
    ("changes", "version", "why"),
    [
        ({"of": replace(inventory(), model_digest="1" * 64)}, "1.31.1", "it is of another model"),
        ({}, "1.32.0", "none of its candidates is in this job's space and runtime version"),
    ],
)
def test_a_named_job_that_does_not_fit_is_told_why(
    world: World, changes: dict[str, Any], version: str, why: str
) -> None:
    named = world.job(MIXTURE, **changes)
    builds = tuple(
        b.model_copy(update={"version": version}) for b in world.device.description.runtimes
    )
    now = world.device.description.model_copy(update={"runtimes": builds})
    own = world.job(search={"warm_start": named.id})
    assert world.take_over(own, on=replace(world.device, description=now)) == NOTHING
    assert world.notices == [f"no result of job {named.id} is taken over: {why}"]


PRUNING = Sensitivity(group="body", prune_ratio=0.5, mean_kl=0.02, n_samples=40)


@pytest.mark.parametrize(
    ("flags", "n_drops", "kept"), [((), 4, 2), (("avx512_vnni",), 0, 1)], ids=["like it", "other"]
)
def test_of_another_device_accuracies_hold_in_the_files_of_its_kernels_and_no_latency_does(
    world: World, flags: tuple[str, ...], n_drops: int, kept: int
) -> None:
    there = world.job(MIXTURE, PRUNED)
    world.repository.update_job(there.id, sensitivity=(PRUNING, *SENSITIVITY))
    elsewhere = world.enrol("elsewhere", version="1.31.1", cpu_flags=flags)
    own = world.repository.update_job(world.job().id, device_id=elsewhere.id)
    found = world.take_over(own, on=elsewhere)
    assert (found.latencies, found.front, len(found.drops)) == ((), (), n_drops)
    assert found.sensitivity == (PRUNING, *SENSITIVITY)[:kept]
    (notice,) = world.notices
    assert f"job {there.id} searched this model on local: the " in notice
    assert "the sensitivities are taken over as priors; none counts" in notice
    assert ("the accuracies of 4 trials and" in notice) is bool(n_drops)


def test_a_job_on_the_same_device_comes_before_a_newer_one_elsewhere(world: World) -> None:
    here = world.job(MIXTURE)
    elsewhere = world.enrol("elsewhere", version="1.31.1")
    world.repository.update_job(world.job(MIXTURE).id, device_id=elsewhere.id)
    assert {t.job_id for t in world.take_over(world.job()).latencies} == {here.id}


def test_a_job_on_another_device_and_of_other_data_is_told_why(world: World) -> None:
    named = world.job(MIXTURE, data={"evaluation": "npz:/other.npz"})
    elsewhere = world.enrol("elsewhere", version="1.31.1")
    own = world.repository.update_job(
        world.job(search={"warm_start": named.id}).id, device_id=elsewhere.id
    )
    assert world.take_over(own, on=elsewhere) == NOTHING
    assert "measured on another device, and no accuracy" in world.notices[0]


def test_who_wants_nothing_gets_nothing(world: World) -> None:
    world.job(MIXTURE)
    assert world.take_over(world.job(search={"warm_start": "none"})) == NOTHING


def test_what_is_taken_over_is_told_once(world: World) -> None:
    world.job(MIXTURE)
    own = world.job()
    world.repository.add_trial(own.id, MIXTURE, proposed_by="earlier")
    assert world.take_over(own).latencies
    assert world.notices == []


def test_earlier_results_teach_the_models_and_are_no_points_of_the_job(world: World) -> None:
    world.job(MIXTURE, PRUNED)
    own = world.job()
    found = world.take_over(own)
    trials = world.repository.list_trials(own.id)
    encoding = Encoding(space=space(), bases=({}, PRUNED.prune_ratios))
    knowledge = Knowledge(inventory=inventory(), damage={})
    alone, warmed = (
        fit(encoding, knowledge, trials, earlier=earlier) for earlier in (NOTHING, found)
    )
    assert alone is not None and warmed is not None
    assert len(warmed.points) == len(alone.points) == 2
    point = encoding.point(PRUNED)
    assert point is not None

    def error(fitted: Any) -> float:
        mean, _ = fitted.landscape.first.predict(point[None])
        return abs(float(mean[0]) - fake_ms(PRUNED) / 4)

    assert error(warmed) < 0.3 * error(alone)


def test_the_earlier_front_is_measured_first_and_then_the_models_propose(world: World) -> None:
    world.job(MIXTURE, PRUNED)
    own = world.job()
    proposals = Proposals(
        space=space(),
        inventory=inventory(),
        bases=[PRUNED.prune_ratios],
        damage={},
        seed=0,
        earlier=world.take_over(own),
    )
    warm = proposals.warm_start(world.repository.list_trials(own.id))
    assert [p.proposed_by for p in warm] == ["earlier", "earlier"]
    assert [p.candidate for p in warm] == [PRUNED, MIXTURE]


def test_what_a_job_taught_its_device_begins_the_next_job_on_it(world: World) -> None:
    first = world.job(MIXTURE, PRUNED)
    teach(world.repository, first, bases=[PRUNED.prune_ratios], taught=None)
    assert world.take_over(first).taught is None
    other = world.job(of=replace(inventory(), model_digest="1" * 64))
    taught = world.take_over(other).taught
    assert taught is not None and taught.n_trials == 4
    assert "local taught the cost of" in world.notices[-1]
    assert world.take_over(other, on=world.enrol("new", version="1.31.1")).taught is None
