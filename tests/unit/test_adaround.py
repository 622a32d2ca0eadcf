"""Learned rounding: nearer to FP32 in each layer's outputs, the same every time, never worse."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autotune.compression.adaround import (
    LayerTask,
    LearnedRounding,
    Rows,
    adaround,
    learned_codes,
)
from autotune.compression.calibration import calibrate
from autotune.compression.compressor import Compressor
from autotune.compression.kernels import X86
from autotune.compression.post_training import post_training
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.recovery import torch_settings
from autotune.errors import CompressionError
from autotune.spec import RecoverySpec
from search_spaces import INT8, W4, W8A16, Candidate
from tests.unit.compression_models import run, samples, tiny_source, tiny_splits

JUDGES = samples(64, seed=5)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_settings(seed=0, threads=1):
        yield


def task_and_rows(*, low: float = -np.inf) -> tuple[LayerTask, Rows]:
    """Six outputs of 48 correlated inputs, whose codes are a little off."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(800, 4)) @ rng.normal(size=(4, 48)) + 0.1 * rng.normal(size=(800, 48))
    exact = x.astype(np.float32)[:, None, :]
    task = LayerTask(
        steps=rng.uniform(-3, 3, (1, 6, 48)),
        scale=np.full((1, 6), 0.1),
        offset=np.zeros((1, 6)),
        low=low,
    )
    return task, Rows(exact=exact, coded=np.round(exact, 2))


@pytest.mark.parametrize("low", [-np.inf, 0.0])
def test_learned_codes_beat_the_nearest_ones_on_correlated_inputs(low: float) -> None:
    task, rows = task_and_rows(low=low)
    nearest = np.rint(task.steps)
    codes = learned_codes(task, nearest, rows, iterations=300)
    before, after = (task.error(c, task.mean_error(c, rows), rows) for c in (nearest, codes))
    assert after < 0.8 * before
    assert (np.abs(codes - task.steps) < 1).all()
    assert (codes == np.rint(codes)).all()


def test_a_trusted_start_is_stayed_near() -> None:
    task, rows = task_and_rows()
    start = np.floor(task.steps)
    free, near = (learned_codes(task, start, rows, iterations=20, trust=t) for t in (0.0, 0.9))
    assert (near != start).mean() < 0.1 < (free != start).mean()


def test_learned_codes_stay_in_eight_bits() -> None:
    task, rows = task_and_rows()
    wide = replace(task, steps=np.full((1, 6, 48), 127.0))
    assert np.abs(learned_codes(wide, wide.steps, rows, iterations=20)).max() <= 127


@functools.cache
def base() -> QuantizableGraph:
    """TinyNet as the compressor has it, with second-order codes."""
    found = post_training(tiny_source().graph, samples(16))
    return QuantizableGraph(tiny_source().graph, found.calibration, rounding=found.rounding)


@functools.cache
def nearest() -> QuantizableGraph:
    """The same with nearest codes: how much is to be gained does not hang on a few codes."""
    found = post_training(tiny_source().graph, samples(16))
    return QuantizableGraph(tiny_source().graph, found.calibration)


@pytest.fixture(scope="module")
def learned() -> LearnedRounding:
    graph = nearest()
    precisions = dict.fromkeys(graph.units, INT8)
    return adaround(graph, precisions, samples(24), judged_by=JUDGES, iterations=20)


def test_a_candidate_diverges_less_from_fp32_with_what_was_learned_for_it(
    learned: LearnedRounding,
) -> None:
    graph = nearest()
    precisions = dict.fromkeys(graph.units, INT8)
    fp32 = run(graph.fp32, JUDGES)
    before, after = (
        float(np.square(run(graph.emit(precisions, rounding=rounding), JUDGES) - fp32).mean())
        for rounding in (None, learned.rounding)
    )
    assert after < before
    assert learned.is_better and learned.improved


def test_the_graph_keeps_its_own_rounding(learned: LearnedRounding) -> None:
    graph = nearest()
    precisions = dict.fromkeys(graph.units, INT8)
    before = graph.emit(precisions)
    assert graph.emit(precisions, rounding=learned.rounding) != before
    assert graph.emit(precisions) == before


def test_learning_twice_gives_the_same_codes() -> None:
    graph = base()
    precisions = dict.fromkeys(("stem.0", "head"), INT8)
    first, second = (
        adaround(graph, precisions, samples(16), judged_by=JUDGES[:16], iterations=20)
        for _ in range(2)
    )
    assert first.improved
    assert first.rounding.to_bytes() == second.rounding.to_bytes()


def test_float_and_weight_only_layers_are_left_alone() -> None:
    mixed = {"hidden": W4, "head": INT8}
    found = adaround(base(), mixed, samples(8), judged_by=JUDGES[:8], iterations=5)
    assert found.n_layers == 1
    with pytest.raises(CompressionError, match=r"can round no layer: it takes.*offer w8a8"):
        adaround(base(), {"hidden": W4}, samples(8), judged_by=JUDGES[:8], iterations=5)


def test_a_device_of_fewer_weight_codes_is_told_why_nothing_is_rounded() -> None:
    tiny = tiny_source().graph
    graph = QuantizableGraph(tiny, calibrate(tiny, samples(8)), kernels=X86)
    with pytest.raises(CompressionError, match=r"of a 'x86' processor take weight codes up to 64"):
        adaround(graph, {"head": INT8}, samples(8), judged_by=JUDGES[:8], iterations=5)
    found = adaround(graph, {"head": W8A16}, samples(8), judged_by=JUDGES[:8], iterations=5)
    assert found.n_layers == 1, "it computes in float"


def compressor(folder: Path) -> Compressor:
    return Compressor(
        tiny_source(),
        tiny_splits(),
        recovery=RecoverySpec(),
        cache_dir=folder,
        adaround_iterations=20,
    )


def test_an_artifact_says_what_was_learned_and_only_if_it_was(tmp_path: Path) -> None:
    built = compressor(tmp_path)
    plain = Candidate(precisions={"stem.0": INT8, "head": INT8})
    artifact = built.build(replace(plain, rounding="adaround"))
    assert artifact.data != built.build(plain).data
    assert artifact.size_bytes == built.build(plain).size_bytes
    # The stem shares its group with the convolution behind the residual Add.
    assert artifact.compression["rounding"]["layers"] == 3
    assert "rounding" not in built.build(plain).compression


def test_a_rounding_that_is_not_better_is_refused_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotune.compression.adaround._learn_layer", lambda *arguments: None)
    candidate = Candidate(precisions={"hidden": INT8}, rounding="adaround")
    with pytest.raises(CompressionError, match=r"no better rounding.*0 of 1 layers"):
        compressor(tmp_path).build(candidate)
