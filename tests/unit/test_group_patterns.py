"""Each pattern on a graph of a few nodes: what it ties, what shares a scale, what stays float."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest

from autotune.compression import placement
from autotune.compression.calibration import Range
from autotune.compression.effective import effective_precisions, optimized_graph
from autotune.compression.graph import GraphView
from autotune.compression.inventory import count_cost
from autotune.compression.kernels import ARM_DOT
from autotune.compression.quantization import QuantizableGraph
from autotune.compression.units import find_units
from autotune.errors import CompressionError
from search_spaces import FP32, INT8, LayerInventory, LayerPattern
from tests.unit.compression_models import operators, run, tiny_source
from tests.unit.sketches import Sketch, near


def groups_of(model: onnx.ModelProto) -> dict[str, tuple[str, list[str]]]:
    """Per group, its pattern and its layers."""
    return {
        unit.name: (unit.pattern.value, [layer.name for layer in unit.layers])
        for unit in find_units(GraphView(model))
    }


def int8(graph: QuantizableGraph, *but: str) -> bytes:
    """The file with every group INT8 that can be, but those named."""
    return graph.emit({name: INT8 for name in graph.units if name not in but})


def concat_copies(artifact: bytes) -> list[list[bool]]:
    """Per 8-bit Concat, of each input whether its scale and zero point are the output's."""
    return [
        [list(n.input[at : at + 2]) == list(n.input[:2]) for at in range(3, len(n.input), 3)]
        for n in optimized_graph(artifact).graph.node
        if n.op_type == "QLinearConcat"
    ]


def branches(second: str = "Relu") -> tuple[Sketch, str]:
    """A fire module: two convolutions of one tensor, joined, and one behind them."""
    sketch = Sketch(4, 8, 8)
    a = sketch.node("Relu", sketch.conv("x", "a", 8, 4, 1, 1, gain=0.5))
    b = sketch.node(second, sketch.conv("x", "b", 8, 4, 3, 3, pads=[1] * 4))
    joined = sketch.node("Concat", a, b, axis=1)
    return sketch, sketch.conv(joined, "c", 4, 16, 1, 1)


def test_the_producers_of_a_concat_are_one_group() -> None:
    sketch, out = branches()
    assert groups_of(sketch.model(out)) == {
        "a": ("concat", ["a", "b"]),
        "c": ("classifier", ["c"]),
    }


def test_a_concat_of_tied_producers_is_a_copy() -> None:
    sketch, out = branches()
    artifact = int8(sketch.quantizable(out))
    assert concat_copies(artifact) == [[True, True]]
    assert near(run(sketch.model(out).SerializeToString(), sketch.samples()),
                run(artifact, sketch.samples())) > 30  # fmt: skip


def test_one_scale_is_no_less_exact_than_rounding_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch, out = branches()
    graph = sketch.quantizable(out)
    exact = run(graph.emit({}), sketch.samples())
    shared = near(exact, run(int8(graph), sketch.samples()))
    monkeypatch.setattr(placement, "share_concat_scales", lambda *_: {})
    apart = int8(sketch.quantizable(out))
    assert concat_copies(apart) != [[True, True]]
    assert shared > near(exact, run(apart, sketch.samples())) - 0.5


def test_a_range_that_stands_for_a_relu_is_not_shared_with_negative_values() -> None:
    sketch, out = branches(second="LeakyRelu")
    graph = sketch.quantizable(out)
    artifact = int8(graph)
    assert concat_copies(artifact) == [[False, True]]
    assert near(run(graph.emit({}), sketch.samples()), run(artifact, sketch.samples())) > 30


def test_a_skip_connection_keeps_its_own_scale_and_precision() -> None:
    sketch = Sketch(4, 8, 8)
    skip = sketch.conv("x", "skip", 8, 4, 1, 1)
    deep = sketch.conv(skip, "deep", 8, 8, 1, 1, gain=4.0)
    out = sketch.conv(sketch.node("Concat", skip, deep, axis=1), "last", 4, 16, 1, 1)
    assert [pattern for pattern, _ in groups_of(sketch.model(out)).values()] == [
        "conv_bn_act", "conv_bn_act", "classifier",
    ]  # fmt: skip
    assert concat_copies(int8(sketch.quantizable(out))) == [[False, True]]


def dense_block() -> tuple[Sketch, str]:
    """Three layers, each of which reads all before it through a norm (Huang et al. 2017)."""
    sketch = Sketch(4, 8, 8)
    features = [sketch.conv("x", "stem", 8, 4, 1, 1)]
    for index in range(3):
        taken = 8 * len(features)
        joined = sketch.node("Concat", *features, axis=1) if index else features[0]
        made = sketch.conv(activated(sketch, joined, f"n{index}", taken), f"c{index}", 8, taken,
                           3, 3, pads=[1] * 4)  # fmt: skip
        features.append(made)
    joined = sketch.node("Concat", *features, axis=1)
    return sketch, sketch.conv(activated(sketch, joined, "n3", 32), "last", 4, 32, 1, 1)


def activated(sketch: Sketch, x: str, name: str, channels: int) -> str:
    """BatchNormalization and Relu in front of a convolution."""
    statistics = [sketch.drawn(f"{name}.{part}", channels, spread=0.3) for part in "sbm"]
    variance = sketch.constant(f"{name}.v", np.linspace(0.5, 2, channels, dtype=np.float32))
    return sketch.node("Relu", sketch.node("BatchNormalization", x, *statistics, variance))


def test_a_dense_block_shares_one_scale_but_ties_no_precision() -> None:
    sketch, out = dense_block()
    graph = sketch.quantizable(out)
    assert all(len(unit.layers) == 1 for unit in graph.units.values())
    assert concat_copies(int8(graph)) == [[True] * n for n in (2, 3, 4)]
    plan = {"c0": FP32, "stem": INT8, "c1": INT8, "c2": INT8, "last": INT8}
    report = effective_precisions(graph.emit(plan), graph.units.values(), plan)
    assert [g.effective for g in report] == [plan[g.group].name for g in report]


def test_a_norm_in_front_of_an_8_bit_convolution_is_a_depthwise_one() -> None:
    sketch, out = dense_block()
    graph = sketch.quantizable(out)
    artifact = int8(graph)
    executed = operators(artifact)
    assert (executed["QLinearConv"], executed["BatchNormalization"]) == (5 + 4, 0)
    assert near(run(graph.emit({}), sketch.samples()), run(artifact, sketch.samples())) > 25


def test_norms_and_constants_have_signed_codes_where_the_kernels_want_them() -> None:
    sketch, out = dense_block()
    moved = sketch.node("Mul", out, sketch.drawn("gain", 1, 4, 1, 1))
    graph = sketch.quantizable(sketch.conv(moved, "end", 4, 4, 1, 1))
    signed = graph.emit(dict.fromkeys(graph.units, INT8), kernels=ARM_DOT)
    types = {i.data_type for i in onnx.load_from_string(signed).graph.initializer}
    assert onnx.TensorProto.UINT8 not in types
    assert near(run(graph.emit({}), sketch.samples()), run(signed, sketch.samples())) > 25


def test_a_norm_in_front_of_a_float_convolution_stays_float() -> None:
    sketch, out = dense_block()
    norms = Counter(
        node.op_type
        for node in onnx.load_from_string(int8(sketch.quantizable(out), "last")).graph.node
        if node.op_type == "BatchNormalization"
    )
    assert norms == {"BatchNormalization": 1}


def test_a_norm_belongs_to_the_convolution_behind_it() -> None:
    sketch, out = dense_block()
    unit = next(u for u in find_units(GraphView(sketch.model(out))) if u.name == "last")
    kinds = [name.split(":")[0] for name in unit.nodes]
    assert kinds == ["BatchNormalization", "Relu", "last"]


def attention(sketch: Sketch, x: str, *, packed: bool) -> str:
    """Single-head attention over 6 tokens of 8 features."""
    if packed:
        qkv = sketch.linear(x, "qkv", 8, 24)
        index = [sketch.constant(f"i{n}", np.arange(8 * n, 8 * n + 8)) for n in range(3)]
        q, k, v = (sketch.node("Gather", qkv, i, axis=2) for i in index)
    else:
        q, k, v = (sketch.linear(x, name, 8, 8) for name in ("q", "k", "v"))
    scale = sketch.constant("scale", np.float32(8**-0.5))
    scores = sketch.node("MatMul", q, sketch.node("Transpose", k, perm=[0, 2, 1]))
    weights = sketch.node("Softmax", sketch.node("Mul", scores, scale), axis=-1)
    return sketch.linear(sketch.node("MatMul", weights, v), "out", 8, 8)


@pytest.mark.parametrize("packed", [True, False])
def test_the_projections_of_an_attention_are_one_group(packed: bool) -> None:
    sketch = Sketch(6, 8)
    out = sketch.linear(
        sketch.node("Add", "x", attention(sketch, "x", packed=packed)), "head", 8, 4
    )
    layers = ["qkv", "out"] if packed else ["q", "k", "v", "out"]
    groups = groups_of(sketch.model(out))
    assert groups[layers[0]] == ("attention", layers)
    assert groups["head"] == ("classifier", ["head"])


def test_the_products_of_activations_and_softmax_stay_float() -> None:
    sketch = Sketch(6, 8)
    graph = sketch.quantizable(attention(sketch, "x", packed=False))
    artifact = int8(graph)
    executed = operators(artifact)
    assert executed["MatMulIntegerToFloat"] == 4
    assert executed["MatMul"] + executed["FusedMatMul"] == 2
    assert executed["Softmax"] == 1
    assert near(run(graph.emit({}), sketch.samples()), run(artifact, sketch.samples())) > 25


def test_a_bias_behind_a_matrix_product_belongs_to_it_and_is_not_rounded_to_8_bits() -> None:
    sketch = Sketch(6, 8)
    hidden = sketch.node("Gelu", sketch.linear("x", "up", 8, 32))
    graph = sketch.quantizable(sketch.linear(hidden, "down", 32, 8))
    up = graph.units["up"]
    assert [name.split(":")[0] for name in up.nodes] == ["up", "Add", "Gelu"]
    assert count_cost(graph.view)[1] == 8 * 32 + 32 + 32 * 8 + 8
    executed = operators(int8(graph))
    assert executed["MatMulIntegerToFloat"] == 2
    assert executed["QuantizeLinear"] == 2, "the inputs of the two products, not their sums"


def test_a_residual_add_into_a_layer_norm_ties_nothing_and_stays_float() -> None:
    sketch = Sketch(6, 8)
    stream = sketch.node("Add", "x", sketch.linear("x", "first", 8, 8))
    gain, shift = sketch.drawn("gain", 8), sketch.drawn("shift", 8)
    normal = sketch.node("LayerNormalization", stream, gain, shift)
    stream = sketch.node("Add", stream, sketch.linear(normal, "second", 8, 8))
    out = sketch.linear(sketch.node("LayerNormalization", stream, gain, shift), "head", 8, 4)
    groups = groups_of(sketch.model(out))
    assert [layers for _, layers in groups.values()] == [["first"], ["second"], ["head"]]
    assert "QLinearAdd" not in operators(int8(sketch.quantizable(out)))


def test_an_add_with_a_constant_between_convolutions_is_computed_on_codes() -> None:
    sketch = Sketch(4, 8, 8)
    shift = sketch.drawn("shift", 1, 8, 1, 1)
    moved = sketch.node("Add", sketch.conv("x", "a", 8, 4, 1, 1), shift)
    graph = sketch.quantizable(sketch.conv(moved, "b", 4, 8, 1, 1))
    artifact = int8(graph)
    assert operators(artifact)["QLinearAdd"] == 1
    assert near(run(graph.emit({}), sketch.samples()), run(artifact, sketch.samples())) > 25
    assert "QLinearAdd" not in operators(int8(graph, "b")), "nobody wants its codes"


def test_a_transposed_convolution_is_a_group_that_never_computes_on_codes() -> None:
    sketch = Sketch(4, 8, 8)
    first = sketch.node("Relu", sketch.conv("x", "a", 8, 4, 1, 1))
    weight = sketch.drawn("up.weight", 8, 4, 2, 2, spread=0.3)
    grown = sketch.node("ConvTranspose", first, weight, strides=[2, 2])
    graph = sketch.quantizable(sketch.conv(grown, "b", 4, 4, 1, 1))
    assert graph.units["up"].pattern is LayerPattern.CONV_TRANSPOSE
    assert count_cost(graph.view)[0] == 64 * (4 * 8 + 8 * 4 * 4) + 256 * 16
    with pytest.raises(CompressionError, match=r"'up' cannot take w8a8.*take fp32"):
        graph.emit({"up": INT8})
    plan = {"a": INT8, "b": INT8}
    report = effective_precisions(graph.emit(plan), graph.units.values(), plan)
    assert [g.effective for g in report] == ["w8a8", "fp32", "w8a8"]


def test_swish_belongs_to_its_convolution_and_is_no_gate_of_a_block() -> None:
    sketch = Sketch(4, 8, 8)
    made = sketch.conv("x", "a", 8, 4, 1, 1)
    out = sketch.conv(sketch.node("Mul", made, sketch.node("Sigmoid", made)), "b", 4, 8, 1, 1)
    unit = find_units(GraphView(sketch.model(out)))[0]
    assert unit.pattern is LayerPattern.CONV
    assert [name.split(":")[0] for name in unit.nodes] == ["a", "Sigmoid", "Mul"]


def test_costs_do_not_depend_on_where_the_batch_axis_is() -> None:
    sketch = Sketch(6, 8)
    swapped = sketch.node("Transpose", "x", perm=[1, 0, 2])
    made = sketch.linear(swapped, "a", 8, 16)
    view = GraphView(sketch.model(sketch.node("Transpose", made, perm=[1, 0, 2])))
    assert view.sample_shape(find_units(view)[0].layers[0].output) == (6, 16)
    assert count_cost(view) == (6 * 8 * 16, 8 * 16 + 16)


def test_an_inventory_of_an_earlier_version_is_read_without_patterns() -> None:
    group = {"name": "a", "layers": [], "nodes": ["a"], "precisions": ["fp32"]}
    document = {
        "version": 3, "model_digest": "0", "groups": [group], "prunable_groups": [],
        "float_operators": [], "pruning_unavailable": None,
    }  # fmt: skip
    assert LayerInventory.from_json(document).groups[0].pattern is LayerPattern.LAYER


def test_a_shape_that_the_graph_notes_is_the_one_that_inference_finds() -> None:
    noted = tiny_source().graph
    bare = onnx.ModelProto()
    bare.CopyFrom(noted)
    del bare.graph.value_info[:]
    views = GraphView(noted), GraphView(bare)
    tensors = [name for node in noted.graph.node for name in node.output]
    shapes = [{name: view.sample_shape(name) for name in tensors} for view in views]
    assert shapes[0] == shapes[1]
    assert all(shapes[0].values())


@pytest.mark.parametrize(
    ("values", "averages", "beside"),
    [(1.0, 0.5, 1e12), (1e-8, 0.0, 1.0), (1e3, 1e-6, 1e-6)],
    ids=["joined with a huge range", "always zero", "vanishing"],
)
def test_averages_whose_range_the_kernel_refuses_run_in_one_that_it_takes(
    values: float, averages: float, beside: float
) -> None:
    sketch = Sketch(3, 6, 6)
    made = sketch.conv("x", "a", 4, 3, 1, 1)
    pooled = sketch.node("GlobalAveragePool", made)
    wide = sketch.conv("x", "b", 4, 3, 6, 6)
    out = sketch.conv(sketch.node("Concat", pooled, wide, axis=1), "c", 4, 8, 1, 1)
    graph = sketch.quantizable(out)
    widths = {made: values, pooled: averages, wide: beside}
    ranges = {name: Range(low=-width, high=width) for name, width in widths.items()}
    held = dataclasses.replace(graph.calibration, ranges=graph.calibration.ranges | ranges)
    artifact = int8(QuantizableGraph(graph.fp32, held))
    assert operators(artifact)["QLinearGlobalAveragePool"] == 1
    assert np.isfinite(run(artifact, sketch.samples())).all()
