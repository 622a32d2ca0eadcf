"""Residual streams: sums that follow one another stay float, whatever else is 8 bits."""

from __future__ import annotations

import numpy as np
import onnx

from autotune.compression.effective import effective_precisions
from autotune.compression.quantization import QuantizableGraph
from search_spaces import FP32, INT8
from tests.unit.compression_models import operators, run
from tests.unit.sketches import Sketch, near

BLOCKS = 6


def stream(between: str | None = None, *, end: str = "Conv") -> tuple[Sketch, str]:
    """Six residual blocks of two convolutions, and what reads the last sum."""
    sketch = Sketch(8, 8, 8)
    x = sketch.conv("x", "stem", 8, 8, 1, 1)
    for i in range(BLOCKS):
        wide = sketch.node("Relu", sketch.conv(x, f"wide{i}", 16, 8, 1, 1))
        x = sketch.node("Add", x, sketch.conv(wide, f"narrow{i}", 8, 16, 1, 1, gain=0.5))
        if between is not None:
            x = sketch.node(between, x)
    if end == "Clip":
        high = sketch.constant("high", np.float32(1.0))
        x = sketch.node("Clip", x, sketch.constant("low", np.float32(0.0)), high)
    return sketch, sketch.conv(x, "end", 8, 8, 1, 1)


def uniform(graph: QuantizableGraph) -> bytes:
    return graph.emit(dict.fromkeys(graph.units, INT8))


def test_a_stream_is_rounded_for_its_readers_alone() -> None:
    sketch, out = stream()
    artifact = uniform(sketch.quantizable(out))
    nodes = onnx.load_from_string(artifact).graph.node
    sums = {node.output[0]: node for node in nodes if node.op_type == "Sum"}
    assert len(sums) == BLOCKS
    chained = [node for node in sums.values() if sums.keys() & set(node.input)]
    assert len(chained) == BLOCKS - 1, "each takes the sum before it as it is"
    assert operators(artifact)["QLinearConv"] == 2 * BLOCKS + 2, "all layers stay in 8 bits"


def test_a_stream_that_a_relu_cuts_adds_codes() -> None:
    sketch, out = stream("Relu")
    kinds = operators(uniform(sketch.quantizable(out)))
    assert (kinds["QLinearAdd"], kinds["Sum"]) == (BLOCKS, 0)


def test_unrounded_sums_come_nearer_to_fp32() -> None:
    sketch, out = stream()
    graph = sketch.quantizable(out)
    x = sketch.samples(64)
    plan = graph.plan(dict.fromkeys(graph.units, INT8))
    assert len(plan.placement.sums) == BLOCKS
    ours = run(uniform(graph), x)
    rounded = run(_rounded_sums(uniform(graph)), x)
    exact = run(graph.fp32, x)
    assert near(exact, ours) > near(exact, rounded) + 0.5


def _rounded_sums(artifact: bytes) -> bytes:
    """The same file, in which each sum takes the codes of the sum before it."""
    model = onnx.load_from_string(artifact)
    coded = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    read = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Sum":
            node.input[:] = [read[coded[x]] if x in coded else x for x in node.input]
    return bytes(model.SerializeToString())


def test_an_fp32_layer_reads_the_sum_as_it_is() -> None:
    sketch, out = stream()
    graph = sketch.quantizable(out)
    reader = next(u.name for u in graph.units.values() if any(x.name == "end" for x in u.layers))
    chosen = dict.fromkeys(graph.units, INT8) | {reader: FP32}
    nodes = onnx.load_from_string(graph.emit(chosen)).graph.node
    sums = {node.output[0] for node in nodes if node.op_type == "Sum"}
    end = next(node for node in nodes if node.name == "end")
    assert end.input[0] in sums
    report = effective_precisions(graph.emit(chosen), graph.units.values(), chosen)
    assert all((g.effective, g.reason) == (chosen[g.group].name, None) for g in report)


def test_a_range_that_stands_for_an_activation_cuts_the_last_sum() -> None:
    sketch, out = stream(end="Clip")
    graph = sketch.quantizable(out)
    x = sketch.samples(64)
    assert near(run(graph.fp32, x), run(uniform(graph), x)) > 20
    kinds = operators(uniform(graph))
    assert kinds["Clip"] == 0 and kinds["Sum"] == BLOCKS
