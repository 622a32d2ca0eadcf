"""Ranges hold what the rest of the graph feels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from autotune.compression.calibration import calibrate, cut_terms, felt_values, peaked_tensors
from autotune.compression.graph import GraphView
from tests.unit.compression_models import samples, tiny_source

X = samples(8)


def residual(activation: str, *, shortcut_convolved: bool = True) -> onnx.ModelProto:
    """stem, conv a, (conv b or the stem itself), Add, activation, pool."""
    rng = np.random.default_rng(0)
    shapes = {"s": (8, 3, 3, 3), "a": (8, 8, 3, 3), "b": (8, 8, 3, 3)}
    arrays = {f"{n}.weight": rng.normal(0, 0.3, shape) for n, shape in shapes.items()}
    arrays |= {"lo": np.array(0.0), "hi": np.array(6.0)}
    inputs = {"Relu": ["sum"], "Clip": ["sum", "lo", "hi"], "HardSwish": ["sum"]}[activation]
    nodes = [
        helper.make_node("Conv", ["input", "s.weight"], ["s"], "s", pads=[1] * 4),
        helper.make_node("Conv", ["s", "a.weight"], ["a"], "a", pads=[1] * 4),
        helper.make_node("Conv", ["s", "b.weight"], ["b"], "b", pads=[1] * 4),
        helper.make_node("Add", ["a", "b" if shortcut_convolved else "s"], ["sum"], "sum"),
        helper.make_node(activation, inputs, ["act"], "act"),
        helper.make_node("GlobalAveragePool", ["act"], ["output"], "pool"),
    ]
    nodes = nodes if shortcut_convolved else [n for n in nodes if n.name != "b"]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 8, 1, 1])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in arrays.items() if n in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def test_terms_cut_at_their_felt_range_give_the_same_rectified_sum() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (2, 4, 3, 8, 8))
    low_a, low_b = felt_values(a, b).min(), felt_values(b, a).min()
    assert a.min() < low_a < 0
    cut = np.maximum(np.maximum(a, low_a) + np.maximum(b, low_b), 0)
    assert cut == pytest.approx(np.maximum(a + b, 0), abs=1e-12)
    assert felt_values(a, b).max() == a.max()


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_what_a_relu_behind_a_sum_swallows_widens_no_range(activation: str) -> None:
    felt = calibrate(residual(activation), X)
    whole = calibrate(residual("HardSwish"), X)
    for name in ("a", "b"):
        assert whole.ranges[name].low < felt.ranges[name].low < 0
        assert felt.ranges[name].high == whole.ranges[name].high
        assert min(felt.channels[name].low) == felt.ranges[name].low


def test_a_shortcut_that_others_take_too_keeps_its_range() -> None:
    assert cut_terms(GraphView(residual("Relu", shortcut_convolved=False))) == {"a": "s"}
    assert cut_terms(GraphView(residual("Relu"))) == {"a": "b", "b": "a"}
    assert not cut_terms(GraphView(residual("HardSwish")))


def test_what_a_hard_swish_takes_and_makes_ends_below_its_peak_and_keeps_its_least_value() -> None:
    model = residual("HardSwish")
    peak = np.concatenate([X, 1.5 * X[:1]])
    found = calibrate(model, peak)
    assert peaked_tensors(GraphView(model)) == {"sum": -3.0, "act": -np.inf}
    for name in ("sum", "act"):
        assert 0 < found.ranges[name].high < max(found.channels[name].high), name
    assert found.ranges["act"].low == min(found.channels["act"].low)
    assert found.ranges["act"].low == pytest.approx(-0.375, abs=1e-3)


def test_a_gated_hard_swish_counts_as_one_and_a_silu_does_not() -> None:
    view = GraphView(tiny_source().graph)
    gated = {node.output[0] for node in view.nodes if node.op_type == "Mul"}
    assert gated & peaked_tensors(view).keys() == {"mul", "mul_1"}
    assert gated - peaked_tensors(view).keys() == {"silu"}
