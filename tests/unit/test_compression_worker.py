"""A worker compresses for the device and in the way that the job names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.compression.accuracy import AccuracyEvaluator
from autotune.compression.racing import LIKE_BASE, Race, Shown
from autotune.search.compression_worker import CompressionWorker
from autotune.spec import JobSpec, parse_job
from search_spaces import INT8, Candidate
from storage.artifacts import ArtifactFile, ArtifactStore
from storage.errors import ArtifactDamaged
from tests.unit.compression_models import tiny_source, tiny_splits
from tests.unit.fakes import description

X86 = {"architecture": "x86_64", "cpu_flags": ("avx2", "avx512f", "avx512_vnni")}
ARM = {"architecture": "aarch64", "cpu_flags": ("asimd", "asimddp")}


def spec() -> JobSpec:
    return parse_job(
        {
            "model": {"source": "python:tests.unit.compression_models:tiny_module"},
            "data": {"evaluation": "npz:none.npz"},
            "recovery": {"epochs": 0},
            "search": {"prune_importance": "l1"},
        }
    )


def worker_for(folder: Path, *devices: dict[str, Any]) -> CompressionWorker:
    described = [description().model_copy(update=device) for device in devices]
    worker = CompressionWorker(spec(), tiny_splits(), str(folder), True, described)
    worker.adopt(tiny_source())
    return worker


@pytest.mark.parametrize(("flags", "multiple"), [(("avx2", "avx512f"), 16), (("avx2",), 8)])
def test_channels_are_rounded_for_the_device(
    tmp_path: Path, flags: tuple[str, ...], multiple: int
) -> None:
    worker = worker_for(tmp_path, {"cpu_flags": flags})
    pruning = worker.prepare_base({"hidden": 0.4})["pruning"]
    assert (pruning["channel_multiple"], pruning["importance"]) == (multiple, "l1")
    assert pruning["channels"]["hidden"][1] == {16: 32, 8: 40}[multiple]


def test_what_is_built_on_a_base_races_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, ratios, races = worker_for(tmp_path, X86), {"hidden": 0.4}, []
    evaluate = AccuracyEvaluator.evaluate

    def noted(self: AccuracyEvaluator, artifact: bytes, **how: Any) -> Any:
        races.append(how["race"])
        return evaluate(self, artifact, **how)

    monkeypatch.setattr(AccuracyEvaluator, "evaluate", noted)
    group = worker.compressor.inventory.groups[0].name
    base = worker.build(Candidate(prune_ratios=ratios)).shown
    assert base is not None
    nothing = Shown(margins=np.zeros(len(base.margins)), divergences=np.zeros(len(base.margins)))
    race = Race(limit=0.01, auxiliary=nothing)
    for pruned in ({}, ratios):
        built = worker.build(Candidate(precisions={group: INT8}, prune_ratios=pruned), race)
        assert built.accuracy is not None and built.shown is None
    by_uniform, by_base = races
    assert by_uniform is race
    assert np.array_equal(by_base.auxiliary.margins, base.margins)
    assert (by_base.limit, by_base.likeness) == (0.01, LIKE_BASE)


def test_one_worker_writes_a_candidate_for_each_kernel_class_as_if_it_had_no_other(
    tmp_path: Path,
) -> None:
    both = worker_for(tmp_path / "both", X86, ARM)
    group = both.compressor.inventory.groups[0].name
    candidate = Candidate(precisions={group: INT8})
    on_x86, on_arm = (both.build(candidate, None, name) for name in ("x86-vnni", "arm-dot"))
    assert on_x86.sha256 != on_arm.sha256
    assert on_arm.compression is not None and on_arm.compression["kernels"] == "arm-dot"
    assert on_arm.sha256 == worker_for(tmp_path / "arm", ARM).build(candidate).sha256
    assert on_x86.sha256 == worker_for(tmp_path / "x86", X86).build(candidate).sha256


def test_a_pruned_base_for_several_devices_suits_the_widest_kernels(tmp_path: Path) -> None:
    worker = worker_for(tmp_path, ARM, X86)
    assert worker.prepare_base({"hidden": 0.4})["pruning"]["channel_multiple"] == 16


def test_a_kept_artifact_is_judged_as_its_bytes_are(tmp_path: Path) -> None:
    worker = worker_for(tmp_path, X86)
    store = ArtifactStore(tmp_path / "artifacts")
    data = worker.compressor.build(Candidate(precisions={"stem.0": INT8})).data
    kept = ArtifactFile(store=store, sha256=store.put(data).sha256)
    reports = [worker.search_accuracy(a, "onnxruntime") for a in (data, kept)]
    first, second = (dataclasses.replace(report, wall_s=0.0) for report in reports)
    assert first == second
    store.path(kept.sha256).write_bytes(b"altered")
    with pytest.raises(ArtifactDamaged):
        worker.held_out(kept, "onnxruntime")
