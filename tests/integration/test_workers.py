"""Ray workers on a tiny real model: warm, equal, and replaced when they die."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autotune.compression.data import split_data
from autotune.errors import InvalidModel
from autotune.search.compression_worker import Built
from autotune.search.interruption import Stopped
from autotune.search.workers import Call, CallFailed, WorkerPool, start_ray, stop_ray
from autotune.spec import JobSpec, read_job
from search_spaces import INT8, Candidate
from storage.artifacts import ArtifactFile, ArtifactStore
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and files of its own open for the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    start_ray(n_workers=2)
    yield
    stop_ray()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return read_job(tiny.write_job(tmp_path_factory.mktemp("job")))


@pytest.fixture(scope="module")
def pool(spec: JobSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    splits = split_data(spec.data, seed=0, trust_job_code=True)
    cache_dir = tmp_path_factory.mktemp("bases")
    made = WorkerPool(spec, splits, cache_dir=cache_dir, n_workers=2, trust=True)
    yield made
    made.close()


def _worker_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie counts as one
            if "ray::WorkerProcess" in " ".join(process.cmdline()):
                found.append(process)
    return found


def _uniform_int8(pool: WorkerPool) -> Candidate:
    ((_, inspection),) = pool.run([Call(method="inspect")])
    return Candidate(precisions={g.name: INT8 for g in inspection.inventory.groups})


# First, because the workers that the other tests share take both processors.
def test_a_model_that_does_not_fit_the_data_is_an_error_of_ours(
    spec: JobSpec, tmp_path: Path
) -> None:
    wrong = spec.model_copy(
        update={"model": spec.model.model_copy(update={"source": "onnx:/nowhere.onnx"})}
    )
    splits = split_data(spec.data, seed=0, trust_job_code=True)
    pool = WorkerPool(wrong, splits, cache_dir=tmp_path, n_workers=1, trust=True)
    ((_, result),) = pool.run([Call(method="inspect")])
    pool.close()
    assert isinstance(result, CallFailed)
    assert isinstance(result.exception, InvalidModel)


def test_two_workers_build_the_same_bytes_and_find_the_same_accuracy(pool: WorkerPool) -> None:
    candidate = _uniform_int8(pool)
    calls = [Call(method="build", arguments=(candidate,))] * 4
    results = [result for _, result in pool.run(calls)]
    assert all(isinstance(result, Built) and result.failure is None for result in results)
    assert len({result.sha256 for result in results}) == 1
    assert len({result.accuracy.value for result in results}) == 1


def test_a_worker_that_dies_costs_one_retry(pool: WorkerPool) -> None:
    candidate = _uniform_int8(pool)
    killed: list[int] = []

    def kill_one_worker() -> bool:
        if not killed:
            victim = _worker_processes()[0]
            killed.append(victim.pid)
            os.kill(victim.pid, signal.SIGKILL)
        return False

    calls = [Call(method="build", arguments=(candidate,))] * 3
    results = [result for _, result in pool.run(calls, should_stop=kill_one_worker)]
    assert killed
    assert [isinstance(result, Built) for result in results] == [True] * 3


def test_what_kills_two_workers_is_that_calls_failure(pool: WorkerPool) -> None:
    _uniform_int8(pool)

    def kill_all_workers() -> bool:
        for process in _worker_processes():
            os.kill(process.pid, signal.SIGKILL)
        return False

    slow = Call(method="prepare_base", arguments=({"stem.0": 0.5},))
    ((_, result),) = pool.run([slow], should_stop=kill_all_workers)
    assert isinstance(result, CallFailed)
    assert "died" in result.error


def test_a_stop_ends_calls_in_the_middle_and_the_pool_still_works(pool: WorkerPool) -> None:
    candidate = _uniform_int8(pool)
    with pytest.raises(Stopped):
        list(pool.run([Call(method="build", arguments=(candidate,))] * 8, should_stop=lambda: True))
    ((_, result),) = pool.run([Call(method="build", arguments=(candidate,))])
    assert isinstance(result, Built)


def test_a_caller_who_has_seen_enough_leaves_every_worker_usable(pool: WorkerPool) -> None:
    calls = [Call(method="inspect")] * 4
    next(iter(pool.run(calls)))
    assert len(list(pool.run(calls))) == 4


def test_workers_measure_sensitivities_entry_by_entry(pool: WorkerPool) -> None:
    ((_, inspection),) = pool.run([Call(method="inspect")])
    groups = [group.name for group in inspection.inventory.groups]
    calls = [Call(method="noise", arguments=(group, [INT8])) for group in groups]
    calls += [Call(method="divergence", arguments=(group, INT8)) for group in groups]
    entries = [entry for _, result in pool.run(calls) for entry in result]
    assert {e.group for e in entries if e.sqnr_db is not None} == set(groups)
    assert {e.group for e in entries if e.is_measured} == set(groups)


def test_a_kept_artifact_is_read_by_the_worker_or_sent_to_one_elsewhere(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((_, built),) = pool.run([Call(method="build", arguments=(_uniform_int8(pool),))])
    store = ArtifactStore(tmp_path / "artifacts")
    kept = ArtifactFile(store=store, sha256=store.put(built.artifact).sha256)
    judge = Call(method="search_accuracy", arguments=(kept, "onnxruntime"))
    ((_, here),) = pool.run([judge])
    assert here.value == built.accuracy.value
    monkeypatch.setattr(pool, "_shares_files", False)
    ((_, elsewhere),) = pool.run([judge])
    assert elsewhere.value == here.value
