"""Layer groups of an ONNX file in a style that torch does not write."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression.calibration import calibrate
from autotune.compression.effective import effective_precisions
from autotune.compression.inventory import build_inventory
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.source import SourceModel
from search_spaces import INT8
from tests.unit.compression_models import operators, run
from tests.unit.keras_style_model import SHAPE, keras_style, keras_style_source
from tests.unit.sketches import near


@pytest.fixture(scope="module")
def source() -> SourceModel:
    return keras_style_source()


@pytest.fixture(scope="module")
def graph(source: SourceModel) -> QuantizableGraph:
    return QuantizableGraph(source.graph, calibrate(source.graph, images()))


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((8, *SHAPE)).astype(np.float32)


def test_groups_are_named_after_the_nodes_and_found_by_pattern(source: SourceModel) -> None:
    groups = build_inventory(source).groups
    assert [(g.name, g.pattern.value, len(g.layers)) for g in groups] == [
        ("net/stem/Conv2D", "residual", 2),
        ("net/excite/down/Conv2D", "squeeze_excite", 2),
        ("net/left/Conv2D", "concat", 2),
        ("net/grow/Conv2DTranspose", "conv_transpose", 1),
        ("net/mix/depthwise", "conv_bn_act", 1),
        ("net/hidden/MatMul", "linear_act", 1),
        ("net/scores/Gemm", "classifier", 1),
    ]


def test_names_are_stable_between_runs(source: SourceModel) -> None:
    again = keras_style_source()
    assert again.digest == source.digest
    assert build_inventory(again).groups == build_inventory(source).groups


def test_every_node_with_weights_is_in_exactly_one_group(source: SourceModel) -> None:
    held = {tensor.name for tensor in source.graph.graph.initializer}
    kinds = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    weighted = [n.name for n in source.graph.graph.node if n.op_type in kinds]
    assert all(n.input[1] in held for n in source.graph.graph.node if n.op_type in kinds)
    layers = [layer.name for group in build_inventory(source).groups for layer in group.layers]
    assert sorted(layers) == sorted(weighted)


def test_uniform_int8_runs_as_planned_but_the_transposed_convolution(
    graph: QuantizableGraph,
) -> None:
    plan = {name: INT8 for name in graph.units if name != "net/grow/Conv2DTranspose"}
    artifact = graph.emit(plan)
    report = effective_precisions(artifact, graph.units.values(), plan)
    assert {g.group: g.effective for g in report if g.effective != "w8a8"} == {
        "net/grow/Conv2DTranspose": "fp32"
    }
    assert all(g.reason is None for g in report)
    executed = operators(artifact)
    assert (executed["QLinearConv"], executed["QLinearConcat"], executed["Pad"]) == (7, 1, 0)
    assert executed["Conv"] + executed["FusedConv"] + executed["BatchNormalization"] == 0


def test_uniform_int8_stays_near_fp32(source: SourceModel, graph: QuantizableGraph) -> None:
    plan = {name: INT8 for name in graph.units if name != "net/grow/Conv2DTranspose"}
    exact, int8 = run(source.fp32_bytes, images()), run(graph.emit(plan), images())
    assert near(exact, int8) > 25
    assert near(exact - exact.mean(axis=0), int8 - int8.mean(axis=0)) > 15


def test_the_normal_form_answers_as_the_file(source: SourceModel) -> None:
    single = np.concatenate([run(keras_style().SerializeToString(), x[None]) for x in images()])
    assert np.abs(run(source.fp32_bytes, images()) - single).max() < 1e-5
