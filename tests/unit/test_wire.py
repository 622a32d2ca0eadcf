"""Files joined from bytes: every part as protobuf itself would have written it."""

from __future__ import annotations

import mmap

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from autotune.compression import wire
from autotune.compression.parts import KeptParts
from autotune.compression.wire import (
    array_field,
    assemble,
    initializer_field,
    node_field,
    shell,
)
from tests.unit.compression_models import tiny_source


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "float16", "float32", "bool"])
def test_an_array_is_written_as_its_tensor_is(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype)
    assert array_field(array, "x/q") == initializer_field(numpy_helper.from_array(array, "x/q"))


def test_an_array_that_is_not_contiguous_is_written_in_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert array_field(array, "x") == initializer_field(numpy_helper.from_array(array, "x"))


def test_a_large_file_is_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [b"head", memoryview(bytes(range(256)) * 100), b"tail"]
    small = assemble(b"outer", b"graph", parts)
    monkeypatch.setattr(wire, "_FRESH_PAGES_BYTES", 0)
    assert assemble(b"outer", b"graph", parts) == small


def test_a_large_constant_lies_on_pages_of_its_own() -> None:
    array = np.arange(100_000, dtype=np.int32)
    part = array_field(array, "w")
    assert isinstance(part, memoryview) and isinstance(part.obj, mmap.mmap)
    assert part == initializer_field(numpy_helper.from_array(array, "w"))


def test_the_parts_of_a_model_join_to_the_model() -> None:
    model = tiny_source().graph
    parts = [node_field(node) for node in model.graph.node]
    parts += [initializer_field(tensor) for tensor in model.graph.initializer]
    joined = onnx.load_from_string(assemble(*shell(model), parts))
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    expected.graph.ClearField("value_info")
    assert joined == expected


def test_kept_constants_go_in_the_order_of_their_last_use() -> None:
    kept, made = KeptParts(limit_bytes=2500), []

    def constants(name: str) -> None:
        kept.arrays((name,), lambda: made.append(name) or {name: np.zeros(1000, np.int8)})

    for name in ("a", "b", "a", "c", "a", "b"):
        constants(name)
    assert made == ["a", "b", "c", "b"], "c took b's place, and b c's"
