"""A swish times an excite: both gates are multiplied first, whatever else is 8 bits."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression import placement
from autotune.compression.calibration import calibrate
from autotune.compression.effective import effective_precisions
from autotune.compression.kernels import ARM_DOT
from autotune.compression.quantization import QuantizableGraph
from search_spaces import FP32, INT8
from tests.unit.compression_models import operators, run
from tests.unit.sketches import Sketch, near

CHANNELS = 8


def excited(swish: str, gate: str = "HardSigmoid") -> QuantizableGraph:
    """A depthwise convolution, its swish, squeeze and excite, and a projection."""
    sketch = Sketch(CHANNELS, 8, 8)
    x = sketch.conv("x", "deep", CHANNELS, 1, 3, 3, gain=2.0, group=CHANNELS, pads=[1] * 4)
    y = sketch.node("HardSwish", x) if swish == "HardSwish" else sigmoid_swish(sketch, x)
    squeezed = sketch.conv(sketch.node("GlobalAveragePool", y), "fc1", 4, CHANNELS, 1, 1)
    gated = sketch.conv(sketch.node("Relu", squeezed), "fc2", CHANNELS, 4, 1, 1)
    product = sketch.node("Mul", sketch.node(gate, gated), y)
    model = sketch.model(sketch.conv(product, "project", 4, CHANNELS, 1, 1))
    return QuantizableGraph(model, calibrate(model, images()))


def sigmoid_swish(sketch: Sketch, x: str) -> str:
    return sketch.node("Mul", x, sketch.node("Sigmoid", x))


def images() -> np.ndarray:
    """Most values are small beside the largest, as they are in trained models."""
    drawn = Sketch(CHANNELS, 8, 8).samples(64)
    return drawn * np.abs(drawn)


def uniform(graph: QuantizableGraph) -> bytes:
    return graph.emit(dict.fromkeys(graph.units, INT8))


@pytest.mark.parametrize("gate", ["HardSigmoid", "Sigmoid"])
@pytest.mark.parametrize("swish", ["HardSwish", "SiLU"])
def test_the_product_of_gates_comes_nearer_to_fp32(swish, gate, monkeypatch) -> None:
    graph = excited(swish, gate)
    x = images()
    exact = run(graph.fp32, x)
    ours = uniform(graph)
    monkeypatch.setattr(placement, "gated_products", lambda _: {})
    usual = uniform(graph)
    assert near(exact, run(ours, x)) > near(exact, run(usual, x)) + 0.3
    assert operators(ours)["QLinearMul"] == operators(usual)["QLinearMul"] + 1
    assert operators(ours)["Mul"] == 0, "every product is one of codes"


@pytest.mark.parametrize("swish", ["HardSwish", "SiLU"])
def test_signed_codes_mean_the_same(swish) -> None:
    graph, x = excited(swish), images()
    signed = graph.emit(dict.fromkeys(graph.units, INT8), kernels=ARM_DOT)
    assert near(run(uniform(graph), x), run(signed, x)) > 30


def test_an_fp32_excite_gives_codes_of_its_gate() -> None:
    graph, x = excited("HardSwish"), images()
    chosen = {
        name: FP32 if any(layer.name in ("fc1", "fc2") for layer in unit.layers) else INT8
        for name, unit in graph.units.items()
    }
    assert FP32 in chosen.values()
    artifact = graph.emit(chosen)
    assert near(run(graph.fp32, x), run(artifact, x)) > 25
    report = effective_precisions(artifact, graph.units.values(), chosen)
    assert all((g.effective, g.reason) == (chosen[g.group].name, None) for g in report)


def test_a_swish_in_float_is_multiplied_as_it_is() -> None:
    graph, x = excited("HardSwish"), images()
    deep = next(u.name for u in graph.units.values() if any(y.name == "deep" for y in u.layers))
    chosen = dict.fromkeys(graph.units, INT8) | {deep: FP32}
    assert not graph.plan(chosen).placement.gated
    assert near(run(graph.fp32, x), run(graph.emit(chosen), x)) > 25
