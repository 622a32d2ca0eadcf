"""The compressor: bases made once, identical bytes, honest facts, clear failures."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from autotune.compression.bases import Base, BaseFacts, BaseStore
from autotune.compression.calibration import Calibration, Range
from autotune.compression.compressor import Compressor
from autotune.compression.graph import model_bytes
from autotune.compression.kernels import ARM_DOT, X86, as_checked_here
from autotune.compression.recovery import MOST_PASSES
from autotune.compression.rounding import RoundedWeight, Rounding
from autotune.errors import CompressionError, DiskFull
from autotune.spec import RecoverySpec
from search_spaces import INT8, W4, Candidate, Precision, RuntimeOptions
from tests.unit.compression_models import run, samples, tiny_source, tiny_splits

RATIOS = {"block1.expand.0": 0.5}


def compressor(folder: Path, *, training: bool = True, **changes: object) -> Compressor:
    return Compressor(
        changes.pop("source", tiny_source()),  # type: ignore[arg-type]
        tiny_splits(training=training),
        recovery=changes.pop("recovery", RecoverySpec(epochs=1, batch_size=16)),  # type: ignore[arg-type]
        cache_dir=folder,
        **changes,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Compressor:
    return compressor(tmp_path_factory.mktemp("cache"))


def test_fp32_is_the_source_model(warm: Compressor) -> None:
    artifact = warm.build(Candidate())
    x = samples(3)
    assert (run(artifact.data, x) == run(tiny_source().fp32_bytes, x)).all()
    assert artifact.base.prune_ratios == {}


def test_an_artifact_knows_its_bytes_its_candidate_and_its_groups(warm: Compressor) -> None:
    candidate = Candidate(precisions={"head": INT8, "hidden": W4})
    artifact = warm.build(candidate)
    assert artifact.size_bytes == len(artifact.data)
    assert artifact.candidate_digest == candidate.digest
    effective = {g.group: g.effective for g in artifact.groups}
    assert effective.keys() == {g.name for g in warm.inventory.groups}
    assert (effective["head"], effective["hidden"], effective["stem.0"]) == ("w8a8", "w4", "fp32")
    assert artifact.compression["base"]["macs"] == sum(g.macs for g in warm.inventory.groups)


def test_groups_of_a_file_for_other_kernels_say_that_a_stand_in_was_looked_at(
    warm: Compressor,
) -> None:
    if as_checked_here(ARM_DOT) == ARM_DOT:
        pytest.skip("this machine has the kernels of the class")
    quantized = warm.build(Candidate(precisions={"head": INT8}), kernels=ARM_DOT)
    assert all("u8s8 stand-in for the s8s8" in (g.seen_in or "") for g in quantized.groups)
    plain = warm.build(Candidate(), kernels=ARM_DOT)
    assert not any("stand-in" in (g.seen_in or "") for g in plain.groups), "the file itself"


def test_reduced_range_gets_rounded_weights_made_once_per_base(tmp_path: Path) -> None:
    candidate, x = Candidate(precisions={"head": INT8, "hidden": INT8}), samples(32, seed=5)
    first = compressor(tmp_path, training=False, kernels=X86)
    artifact = first.build(candidate)
    again = compressor(tmp_path, training=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("autotune.compression.compressor.reduced_rounding")
        assert again.build(candidate, kernels=X86).data == artifact.data == first.emit(candidate)
    graph = first._base({}).graph
    nearest = graph.emit(candidate.precisions, kernels=X86, rounding=Rounding())
    exact = run(tiny_source().fp32_bytes, x)
    rounded, plain = (np.square(run(m, x) - exact).mean() for m in (artifact.data, nearest))
    assert rounded < 0.8 * plain


def test_damaged_weights_of_reduced_range_are_made_again(tmp_path: Path) -> None:
    one = np.ones(3, np.float32)
    held = RoundedWeight(codes=one.astype(np.int8), widening=one, mean_error=one)
    made, store = Rounding(plain={"a": held}), BaseStore(tmp_path)
    store.get_or_make("d", lambda: _base("d"))
    assert store.reduced_rounding("d", lambda: made).to_bytes() == made.to_bytes()
    (path,) = tmp_path.glob("bases/d/reduced.npz")
    path.write_bytes(path.read_bytes()[:-40])
    assert store.reduced_rounding("d", lambda: made).to_bytes() == made.to_bytes()
    assert store.reduced_rounding("d", Rounding).to_bytes() == made.to_bytes(), "it is read"


def test_what_runs_in_a_devices_own_provider_is_unknown(warm: Compressor) -> None:
    there = RuntimeOptions(provider="CUDAExecutionProvider")
    groups = warm.build(Candidate(precisions={"head": INT8}, runtime=there)).groups
    assert {g.effective for g in groups} == {None}
    assert all("CUDAExecutionProvider, which is not here" in (g.reason or "") for g in groups)


def test_the_runtime_options_do_not_change_the_file(warm: Compressor) -> None:
    one = Candidate(precisions={"head": INT8})
    two = dataclasses.replace(one, runtime=RuntimeOptions(threads=2))
    assert warm.build(one).sha256 == warm.build(two).sha256
    assert warm.build(one).candidate_digest != warm.build(two).candidate_digest
    assert warm.emit(one) == warm.build(two).data


def test_a_pruned_base_is_smaller_recovered_and_has_the_same_groups(warm: Compressor) -> None:
    facts = warm.prepare_base(RATIOS)
    plain = warm.prepare_base({})
    assert facts.macs < plain.macs
    assert facts.parameters < plain.parameters
    assert facts.recovery_epochs == round(min(plain.macs / facts.macs, MOST_PASSES))
    assert facts.recovery_s > 0
    artifact = warm.build(Candidate(precisions={"head": INT8}, prune_ratios=RATIOS))
    assert [g.group for g in artifact.groups] == [g.name for g in warm.inventory.groups]
    assert artifact.size_bytes < warm.build(Candidate(precisions={"head": INT8})).size_bytes


def test_another_compressor_takes_the_base_from_the_folder(
    warm: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate(precisions={"head": INT8}, prune_ratios=RATIOS)
    first = warm.build(candidate)
    other = compressor(warm._store._folder.parent)
    monkeypatch.setattr(Compressor, "_make", lambda *_: pytest.fail("trained again"))
    assert other.build(candidate).data == first.data
    assert other.prepare_base(RATIOS) == first.base


def test_without_training_data_batch_norm_alone_is_re_estimated(tmp_path: Path) -> None:
    facts = compressor(tmp_path, training=False).prepare_base(RATIOS)
    assert facts.recovery_epochs == 0
    assert facts.note is not None
    assert "without recovery training" in facts.note


def test_what_a_base_depends_on_is_in_its_digest(tmp_path: Path) -> None:
    base = compressor(tmp_path)
    other_seed = compressor(tmp_path, seed=1)
    no_training = compressor(tmp_path, training=False)
    digests = [c._base_digest(RATIOS) for c in (base, other_seed, no_training)]
    assert len({*digests, base._base_digest({})}) == 4
    assert base._base_digest({}) == other_seed._base_digest({})


def test_ranking_rounding_and_early_stopping_make_another_base(tmp_path: Path) -> None:
    variants = [
        compressor(tmp_path),
        compressor(tmp_path, importance="l1"),
        compressor(tmp_path, channel_multiple=16),
        compressor(tmp_path, recovery=RecoverySpec(epochs=1, batch_size=16, patience=1)),
    ]
    assert len({variant._base_digest(RATIOS) for variant in variants}) == len(variants)
    assert len({variant._base_digest({}) for variant in variants}) == 1


def test_a_base_says_how_it_was_pruned_and_rounds_as_the_device_likes(tmp_path: Path) -> None:
    coarse = compressor(tmp_path, importance="batch_norm", channel_multiple=16)
    ratios = {"stem.0": 0.25, "mix.0": 0.25, "hidden": 0.4}
    pruning = coarse.prepare_base(ratios).pruning
    assert pruning == {
        "importance": "batch_norm",
        "channel_multiple": 16,
        "channels": {"hidden": [64, 32]},
        "ranked_by_l2": ["hidden"],
    }


def test_ratios_that_rounding_undoes_need_no_base_of_their_own(tmp_path: Path) -> None:
    coarse = compressor(tmp_path, channel_multiple=16)
    facts = coarse.prepare_base({"stem.0": 0.25, "mix.0": 0.25})
    assert facts == coarse.prepare_base({})
    assert facts.pruning is None


def test_all_precisions_share_one_pruned_base(
    warm: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.prepare_base(RATIOS)
    monkeypatch.setattr(Compressor, "_make", lambda *_: pytest.fail("pruned again"))
    choices: list[dict[str, Precision]] = [{}, {"head": INT8}, {"head": INT8, "hidden": W4}]
    built = [warm.build(Candidate(precisions=c, prune_ratios=RATIOS)) for c in choices]
    assert len({artifact.base.digest for artifact in built}) == 1
    assert len({artifact.sha256 for artifact in built}) == len(choices)


def test_an_onnx_source_is_pruned_without_training_and_says_so(tmp_path: Path) -> None:
    source = dataclasses.replace(tiny_source(), module=None)
    facts = compressor(tmp_path, source=source).prepare_base(RATIOS)
    assert facts.macs < compressor(tmp_path, source=source).prepare_base({}).macs
    assert (facts.recovery_epochs, facts.recovery) == (0, None)
    assert facts.note is not None
    assert "recovery training needs the torch module" in facts.note


def test_unknown_groups_are_named(warm: Compressor) -> None:
    with pytest.raises(CompressionError, match="no layer group 'nobody'"):
        warm.build(Candidate(precisions={"nobody": INT8}))
    with pytest.raises(CompressionError, match="nobody"):
        warm.build(Candidate(prune_ratios={"nobody": 0.5}))


def test_a_damaged_base_is_made_again(tmp_path: Path) -> None:
    store, calls = BaseStore(tmp_path), []
    first = store.get_or_make("d", lambda: calls.append(1) or _base("d"))
    model = tmp_path / "bases" / "d" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    again = store.get_or_make("d", lambda: calls.append(2) or _base("d"))
    assert calls == [1, 2]
    assert again.facts == first.facts
    assert store.get_or_make("d", lambda: pytest.fail("made again")).facts == first.facts


def test_two_processes_make_a_base_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(2)
    children = [context.Process(target=_make_slowly, args=(tmp_path, started)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert len((tmp_path / "made").read_text().split()) == 1


def test_a_full_disk_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFull, match="free some space and resume"):
        BaseStore(tmp_path).get_or_make("d", lambda: _base("d"))
    assert [p.name for p in (tmp_path / "bases").iterdir()] == ["d.lock"]


def _base(digest: str) -> Base:
    return Base(
        facts=BaseFacts(digest=digest, macs=1, parameters=2),
        file=model_bytes(tiny_source().graph),
        calibration=Calibration(ranges={"x": Range(low=0.0, high=0.1)}, n_samples=1),
    )


def _make_slowly(folder: Path, started: object) -> None:
    def make() -> Base:
        with (folder / "made").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # long enough for the other process to meet the lock
        return _base("d")

    started.wait()  # type: ignore[attr-defined]
    BaseStore(folder).get_or_make("d", make)
