"""Our arithmetic against `quantize_static`'s, on the same ranges and the same placement."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from autotune.compression.quantization import QuantizableGraph
from autotune.compression.source import SourceModel
from tests.benchmarks.oracle_equivalence import (
    code_differences,
    compare,
    emit_uniform,
    is_valid,
    placement_differences,
    quantize_alike,
    taken_apart,
    uniform_graph,
)
from tests.unit.compression_models import samples, tiny_source, torchvision_source
from tests.unit.keras_style_model import keras_style_source

NAMES = ("tiny", "resnet18", "squeezenet1_1", "keras_style")


@pytest.fixture(scope="module")
def tiny() -> tuple[QuantizableGraph, onnx.ModelProto]:
    graph = uniform_graph(tiny_source().graph, samples(8))
    return graph, onnx.load_from_string(emit_uniform(graph))


def source_of(name: str) -> SourceModel:
    if name == "tiny":
        return tiny_source()
    return keras_style_source() if name == "keras_style" else torchvision_source(name)


@pytest.mark.parametrize("name", NAMES)
def test_files_equal_those_of_quantize_static_in_every_code(name: str) -> None:
    source = source_of(name)
    graph = uniform_graph(source.graph, samples(8, source.input_shape))
    found = compare(graph, emit_uniform(graph), samples(4, source.input_shape, seed=1))
    assert found["placement_differences"] == []
    assert found["code_differences"] == []
    assert found["max_error_steps"] <= 1.0
    assert found["output_spread_steps"] > 0.1, "a constant output would prove nothing"


@pytest.mark.parametrize("name", NAMES)
def test_files_pass_the_checker_with_standard_operators_and_the_sources_opset(name: str) -> None:
    source = source_of(name)
    assert is_valid(
        emit_uniform(uniform_graph(source.graph, samples(2, source.input_shape))), source.graph
    )


def test_a_file_of_another_opset_is_not_called_valid(tiny) -> None:
    graph, ours = tiny
    other = onnx.ModelProto()
    other.CopyFrom(graph.view.model)
    other.opset_import[0].version -= 1
    assert not is_valid(ours.SerializeToString(), other)


def test_one_wrong_code_of_a_weight_is_seen(tiny) -> None:
    graph, ours = _copied(tiny)
    held = next(i for i in ours.graph.initializer if i.name == "stem.0.weight/q")
    codes = numpy_helper.to_array(held).copy()
    codes.flat[0] += 1
    held.CopyFrom(numpy_helper.from_array(codes, held.name))
    placed = taken_apart(tiny[1], graph)
    (found,) = code_differences(ours, placed, quantize_alike(placed, graph.calibration))
    assert found.endswith(f"1 of {codes.size} codes differ")


def test_a_wrong_scale_of_an_activation_is_seen(tiny) -> None:
    graph, ours = _copied(tiny)
    placed = taken_apart(ours, graph)
    theirs = quantize_alike(placed, graph.calibration)
    name, pair = next(iter(placed.pairs.items()))
    placed.pairs[name] = type(pair)(pair.tensor, float(np.nextafter(pair.scale, 1)), 0)
    (found,) = placement_differences(placed, theirs)
    assert found.startswith(f"{name}: ours")


def test_a_missing_pair_is_seen(tiny) -> None:
    graph, ours = _copied(tiny)
    placed = taken_apart(ours, graph)
    theirs = quantize_alike(placed, graph.calibration)
    placed.pairs.pop("input")
    (found,) = placement_differences(placed, theirs)
    assert found.startswith("input: ours None")


def _copied(
    tiny: tuple[QuantizableGraph, onnx.ModelProto],
) -> tuple[QuantizableGraph, onnx.ModelProto]:
    copy = onnx.ModelProto()
    copy.CopyFrom(tiny[1])
    return tiny[0], copy
