"""Sensitivity measured on small real models: cut, reused, and equal to the whole file."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from autotune.compression.accuracy import AccuracyEvaluator
from autotune.compression.compressor import Compressor
from autotune.compression.prefix import PrefixActivations
from autotune.compression.prune_alone import pruned_outputs
from autotune.compression.sensitivity import SQNR_LIMIT_DB, SensitivityMeter, sqnr_db
from autotune.compression.slices import FileGraph, counterparts, difference
from autotune.compression.source import load_source_model
from autotune.errors import CompressionError
from autotune.spec import ModelSpec, RecoverySpec
from search_spaces import FP16, FP32, INT8, Candidate, Precision
from tests.unit.compression_models import (
    SHAPE,
    labelled,
    run,
    samples,
    save,
    tiny_source,
    tiny_splits,
)

DATA = labelled(40, seed=3)
CALIBRATION = samples(16)


@pytest.fixture(scope="module")
def compressor(tmp_path_factory: pytest.TempPathFactory) -> Compressor:
    folder = tmp_path_factory.mktemp("cache")
    return Compressor(tiny_source(), tiny_splits(), recovery=RecoverySpec(), cache_dir=folder)


def meter(compressor: Compressor, **changes: Any) -> SensitivityMeter:
    return SensitivityMeter(compressor, DATA, **{"calibration": CALIBRATION, **changes})


def choices(compressor: Compressor) -> list[tuple[str, Precision]]:
    """Every group with the first and the last of the lossy precisions it can take."""
    return [
        (group.name, Precision.parse(name))
        for group in compressor.inventory.groups
        for name in dict.fromkeys((group.precisions[1], group.precisions[-1]))
        if name != FP32.name
    ]


def test_the_divergence_behind_a_reused_prefix_is_that_of_the_whole_file(
    compressor: Compressor,
) -> None:
    whole = AccuracyEvaluator(tiny_source().fp32_bytes, DATA, split="search")
    reused = meter(compressor)
    for group, precision in choices(compressor):
        report = whole.evaluate(compressor.emit(Candidate(precisions={group: precision})))
        entry = reused.divergence(group, precision)
        # Where the layers are fused differs, and with it the rounding of float32.
        assert entry.mean_kl == pytest.approx(report.mean_kl, rel=1e-2, abs=1e-11), group
        assert (entry.drop, entry.n_samples) == (pytest.approx(report.drop), 40)


def test_the_prefix_of_all_groups_costs_one_pass(compressor: Compressor) -> None:
    reused = meter(compressor)
    for group in compressor.inventory.groups:
        reused.divergence(group.name, INT8)
    batches = 3  # of 40 samples
    assert 0 < reused.prefix.nodes_run <= batches * len(reused.prefix.fp32.nodes)


def test_going_back_gives_the_same_figures(compressor: Compressor) -> None:
    reused = meter(compressor)
    wanted = choices(compressor)[::4]
    forward = [reused.divergence(*choice).mean_kl for choice in wanted]
    backward = [reused.divergence(*choice).mean_kl for choice in reversed(wanted)]
    assert backward[::-1] == pytest.approx(forward, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("memory_bytes", [0, 300_000])
def test_memory_is_bounded_and_changes_no_figure(compressor: Compressor, memory_bytes: int) -> None:
    free, bounded = meter(compressor), meter(compressor, memory_bytes=memory_bytes)
    for group, precision in choices(compressor)[::2]:
        entry = bounded.divergence(group, precision)
        assert bounded.prefix.kept_bytes <= memory_bytes
        free_kl = free.divergence(group, precision).mean_kl
        assert entry.mean_kl == pytest.approx(free_kl, rel=1e-2, abs=1e-11)


def test_the_noise_is_that_at_the_groups_own_output(compressor: Compressor) -> None:
    group = compressor.inventory.group("block1.expand.0")  # a convolution and its Clip
    file = compressor.emit(Candidate(precisions={group.name: INT8}))
    fp32_file = compressor.emit(Candidate())
    fp32 = FileGraph.read(fp32_file)
    (last,) = [n.outputs[0] for n in fp32.nodes if n.name == group.nodes[-1]]
    ((exact, noisy),) = counterparts(fp32, FileGraph.read(file), [last]).items()
    x = DATA.x[:16]
    expected = sqnr_db([tensor(fp32_file, exact, x)], [tensor(file, noisy, x)])
    (entry,) = meter(compressor).noise(group.name, [INT8])
    assert (exact, noisy) == (last, noisy) and noisy != last
    assert entry.sqnr_db == pytest.approx(expected, abs=0.05)
    assert 20 < expected < 60


def test_fewer_bits_are_more_noise(compressor: Compressor) -> None:
    names = [p for p in ("w8", "w4", "w2") if p in compressor.inventory.group("head").precisions]
    entries = meter(compressor).noise("head", [Precision.parse(name) for name in names])
    noise = [entry.sqnr_db or 0.0 for entry in entries]
    assert len(noise) >= 2
    assert noise == sorted(noise, reverse=True)
    assert all(entry.mean_kl is None for entry in entries)


def test_a_precision_that_a_group_cannot_take_has_its_reason_beside_the_others(
    tmp_path: Path,
) -> None:
    model = onnx.ModelProto.FromString(tiny_source().fp32_bytes)
    head = next(t for t in model.graph.initializer if t.name == "head.weight")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * np.float32(1e6), head.name))
    spec = ModelSpec(source=save(model, tmp_path / "huge.onnx"))
    source = load_source_model(spec, input_shape=SHAPE)
    made = Compressor(source, tiny_splits(), recovery=RecoverySpec(), cache_dir=tmp_path)
    refused, measured = meter(made).noise("head", [FP16, INT8])
    assert re.search(r"group 'head' at fp16 could not be measured.*65504", str(refused))
    assert (measured.precision, measured.sqnr_db) == ("w8a8", pytest.approx(40, abs=15))


def test_an_unchanged_file_differs_in_nothing(compressor: Compressor) -> None:
    fp32 = FileGraph.read(compressor.emit(Candidate()))
    found = difference(fp32, fp32)
    assert (found.cut, found.nodes, found.changed) == (len(fp32.nodes), (), frozenset())
    kept = PrefixActivations(fp32, DATA.x)
    (outputs,) = kept.outputs(fp32, found, [fp32.output])
    assert outputs == pytest.approx(
        tensor(compressor.emit(Candidate()), fp32.output, DATA.x), abs=1e-4
    )


def test_no_noise_and_no_signal_have_limits() -> None:
    zeros, ones = [np.zeros(4)], [np.ones(4)]
    assert sqnr_db(ones, ones) == SQNR_LIMIT_DB
    assert sqnr_db(zeros, ones) == -SQNR_LIMIT_DB
    assert sqnr_db(ones, [np.array([1, 1, 1, np.nan])]) == -SQNR_LIMIT_DB


def test_a_group_pruned_alone_is_judged_as_its_exported_base_would_be(tmp_path: Path) -> None:
    untrained = tiny_splits(training=False)
    made = Compressor(tiny_source(), untrained, recovery=RecoverySpec(), cache_dir=tmp_path)
    whole = AccuracyEvaluator(tiny_source().fp32_bytes, DATA, split="search")
    report = whole.evaluate(made.emit(Candidate(prune_ratios={"mix.0": 0.5})))
    entry = meter(made, calibration=untrained.calibration).pruning("mix.0", 0.5)
    assert entry.mean_kl == pytest.approx(report.mean_kl, rel=1e-3)
    assert (entry.drop, entry.n_samples) == (pytest.approx(report.drop), 40)
    assert (entry.precision, entry.prune_ratio) == (None, 0.5)


def test_a_graph_without_a_module_is_pruned_as_a_graph(tmp_path: Path) -> None:
    source = dataclasses.replace(tiny_source(), module=None)
    made = Compressor(source, tiny_splits(), recovery=RecoverySpec(), cache_dir=tmp_path)
    calibration, x = CALIBRATION, DATA.x
    whole = pruned_outputs(made, {}, calibration=calibration, x=x)
    assert whole == pytest.approx(run(source.fp32_bytes, x), abs=1e-4)
    outputs = pruned_outputs(made, {"mix.0": 0.5}, calibration=calibration, x=x)
    assert outputs.shape == whole.shape
    assert 1e-3 < np.abs(outputs - whole).max() < 100


def test_a_ratio_that_removes_no_channel_does_no_damage(compressor: Compressor) -> None:
    entry = meter(compressor).pruning("stem.0", 0.25)  # 12 of 16 channels round to 16
    assert (entry.removed_share, entry.mean_kl, entry.drop) == (0.0, 0.0, 0.0)


def test_more_pruning_removes_more_of_the_weights(compressor: Compressor) -> None:
    mild, hard = (meter(compressor).removal("mix.0", r).removed_share or 0 for r in (0.25, 0.5))
    assert 0 < mild < 0.25 and mild < hard < 0.5


def test_unknown_groups_are_named(compressor: Compressor) -> None:
    measured = meter(compressor)
    for call in (
        lambda: measured.noise("nobody", [INT8]),
        lambda: measured.divergence("nobody", INT8),
        lambda: measured.removal("nobody", 0.5),
    ):
        with pytest.raises(CompressionError, match="nobody"):
            call()


@pytest.mark.parametrize("file", [b"", b"\xff" * 20, Path(__file__).read_bytes()])
def test_something_else_is_no_model_file(file: bytes) -> None:
    with pytest.raises(CompressionError):
        FileGraph.read(file)


def tensor(file: bytes, name: str, x: np.ndarray) -> np.ndarray:
    """One inner tensor of a whole file, by asking for it as an output."""
    model = onnx.load_from_string(file)
    if name != model.graph.output[0].name:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([name], {session.get_inputs()[0].name: x})[0]
