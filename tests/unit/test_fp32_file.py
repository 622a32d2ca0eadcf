"""A model's file taken apart: its fields are all of it, and its weights stay in its bytes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from autotune.compression.fp32_file import LARGE_BYTES, Fp32File
from autotune.compression.graph import GraphView
from autotune.compression.slices import FileGraph
from autotune.errors import CompressionError
from storage.protobuf import fields


def model() -> onnx.ModelProto:
    """A product with a large constant and a sum with a small one, both float32."""
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.standard_normal((64, 32)).astype(np.float32), "large"),
        numpy_helper.from_array(np.arange(32, dtype=np.float32), "small"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["m"], name="product"),
        helper.make_node("Add", ["m", "small"], ["y"], name="sum"),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size])
        for name, size in (("x", 64), ("y", 32))
    ]
    return helper.make_model(helper.make_graph(nodes, "two", ends[:1], ends[1:], constants))


def test_the_fields_of_a_message_are_the_whole_message() -> None:
    data = model().SerializeToString()
    found = list(fields(memoryview(data)))
    assert b"".join(field.whole for field in found) == data
    assert found[-1].whole.obj is data, "nothing is copied"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_are_fields_or_refused(data: bytes) -> None:
    try:
        found = list(fields(memoryview(data)))
    except ValueError:
        return
    assert b"".join(field.whole for field in found) == data


@pytest.mark.parametrize("cut", [1, 700, 8000])
def test_a_file_that_was_cut_off_is_refused(cut: int) -> None:
    data = model().SerializeToString()[:-cut]
    for read in (Fp32File.read, FileGraph.read):
        with pytest.raises(CompressionError, match="no ONNX file"):
            read(data)


def test_large_weights_are_views_of_the_file_and_small_ones_stay_in_the_model() -> None:
    source = model()
    held = Fp32File.read(source.SerializeToString())
    assert list(held.weights) == ["large"]
    assert np.shares_memory(held.weights["large"], np.frombuffer(held.file, np.uint8))
    assert len(held.light.SerializeToString()) < LARGE_BYTES
    view = GraphView(held.light, held.weights)
    for tensor in source.graph.initializer:
        np.testing.assert_array_equal(view.array(tensor.name), numpy_helper.to_array(tensor))


def test_the_model_without_its_weights_is_else_the_same() -> None:
    source = model()
    light = Fp32File.read(source.SerializeToString()).light
    source.graph.initializer[0].ClearField("raw_data")
    assert light == source


def test_each_constant_is_a_field_that_another_graph_can_take_over() -> None:
    source = model()
    held = Fp32File.read(source.SerializeToString())
    graph = onnx.GraphProto.FromString(b"".join(held.constants.values()))
    assert list(graph.initializer) == list(source.graph.initializer)


@pytest.mark.parametrize(
    ("element", "count"), [(onnx.TensorProto.BFLOAT16, 20_000), (onnx.TensorProto.INT4, 80_000)]
)
def test_a_large_constant_of_a_type_that_numpy_lacks_stays_in_the_model(
    element: int, count: int
) -> None:
    source = model()
    source.graph.initializer.append(
        helper.make_tensor("other", element, [count], bytes(40_000), raw=True)
    )
    held = Fp32File.read(source.SerializeToString())
    assert list(held.weights) == ["large"]
    assert held.light.graph.initializer[2] == source.graph.initializer[2]
