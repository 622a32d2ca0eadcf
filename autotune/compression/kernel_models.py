"""The small models of the devices' kernel benchmark: one kind of operator in one precision each.

Owns their making. The files are shipped inside `device_agents`, because a device has no onnx
package; `device_agents/kernel_benchmark.py` times them. After a change here:
`python -m autotune.compression.kernel_models` writes them anew.

Four layers of a kind stand in a row, so that what a precision costs at both ends weighs as it
does within a model. Weights are one number, made by a ConstantOfShape when the file is loaded:
a file has a kilobyte, and no kernel looks at the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import device_agents

FOLDER = Path(device_agents.__file__).parent / "kernel_models"
LAYERS = 4
_BLOCK = 32
_INT8_ACCUMULATION = 4  # as `weight_only.py` writes it
_OPSET, _IR_VERSION = 21, 10
_CONTRIB = "com.microsoft"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A layer that keeps its input's shape: that of input and weights, and a convolution's pads."""

    operator: str
    sample: tuple[int, ...]
    weight: tuple[int, ...]
    group: int = 1

    @property
    def scale(self) -> float:
        """The weights' value, which keeps the activations' size."""
        return 1 / math.sqrt(math.prod(self.weight[1:]))


_KINDS = {
    "conv3x3": _Kind(operator="Conv", sample=(64, 28, 28), weight=(64, 64, 3, 3)),
    "conv1x1": _Kind(operator="Conv", sample=(128, 28, 28), weight=(128, 128, 1, 1)),
    "depthwise": _Kind(operator="Conv", sample=(128, 28, 28), weight=(128, 1, 3, 3), group=128),
    "matmul": _Kind(operator="MatMul", sample=(1024,), weight=(1024, 1024)),
}
_SIGNS = {"u8s8": TensorProto.UINT8, "s8s8": TensorProto.INT8}


class _Graph:
    """Nodes in the making, on one tensor that goes through all of them."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.tensor = "x"

    def add(self, operator: str, *inputs: str, name: str, **attributes: object) -> str:
        """A node with one output, which has the node's name."""
        self.nodes.append(helper.make_node(operator, [*inputs], [name], name=name, **attributes))
        return name

    def filled(self, name: str, shape: tuple[int, ...], value: float, data_type: int) -> str:
        """A tensor of one value."""
        extents = np.array(shape, dtype=np.int64)
        shape_name = self.add(
            "Constant", name=f"{name}/shape", value=numpy_helper.from_array(extents)
        )
        dtype = helper.tensor_dtype_to_np_dtype(data_type)
        held = numpy_helper.from_array(np.array([value], dtype=dtype))
        return self.add("ConstantOfShape", shape_name, name=name, value=held)

    def layer(self, weight: str, index: int) -> None:
        """One layer on the current tensor."""
        kind, attributes = self.kind, {}
        if kind.operator == "Conv":
            pad = kind.weight[-1] // 2
            attributes = {"group": kind.group, "pads": [pad] * 4}
        self.tensor = self.add(
            kind.operator, self.tensor, weight, name=f"layer{index}", **attributes
        )


def make_models() -> dict[str, bytes]:
    """The files by name: `conv3x3.w8a8-u8s8.onnx`; the same in every process."""
    return {f"{name}.onnx": model for name, model in _models()}


def _models() -> Iterator[tuple[str, bytes]]:
    for name, kind in _KINDS.items():
        yield f"{name}.fp32", _float(kind, TensorProto.FLOAT)
        yield f"{name}.fp16", _float(kind, TensorProto.FLOAT16)
        for signs, data_type in _SIGNS.items():
            yield f"{name}.w8a8-{signs}", _quantized(kind, data_type)
    for bits in (8, 4):
        yield f"matmul.w{bits}", _packed(_KINDS["matmul"], bits)


def _float(kind: _Kind, data_type: int) -> bytes:
    graph = _Graph(kind)
    is_half = data_type == TensorProto.FLOAT16
    if is_half:
        graph.tensor = graph.add("Cast", "x", name="narrow", to=data_type)
    for index in range(LAYERS):
        graph.layer(graph.filled(f"weight{index}", kind.weight, kind.scale, data_type), index)
    if is_half:
        graph.tensor = graph.add("Cast", graph.tensor, name="widen", to=TensorProto.FLOAT)
    return _serialized(graph)


def _quantized(kind: _Kind, data_type: int) -> bytes:
    """8-bit activations per tensor, weights per channel, as `quantization.py` writes them."""
    graph = _Graph(kind)
    zero = 128 if data_type == TensorProto.UINT8 else 0
    scale = graph.filled("scale", (), 0.05, TensorProto.FLOAT)
    point = graph.filled("point", (), zero, data_type)
    channels, axis = (kind.weight[1], 1) if kind.operator == "MatMul" else (kind.weight[0], 0)
    codes = graph.add("QuantizeLinear", "x", scale, point, name="x/q")
    graph.tensor = graph.add("DequantizeLinear", codes, scale, point, name="x/dq")
    for index in range(LAYERS):
        weight = graph.filled(f"weight{index}", kind.weight, 100, TensorProto.INT8)
        steps = graph.filled(f"steps{index}", (channels,), kind.scale / 100, TensorProto.FLOAT)
        zeros = graph.filled(f"zeros{index}", (channels,), 0, TensorProto.INT8)
        weight = graph.add(
            "DequantizeLinear", weight, steps, zeros, name=f"weight{index}/dq", axis=axis
        )
        graph.layer(weight, index)
        codes = graph.add("QuantizeLinear", graph.tensor, scale, point, name=f"layer{index}/q")
        graph.tensor = graph.add("DequantizeLinear", codes, scale, point, name=f"layer{index}/dq")
    return _serialized(graph)


def _packed(kind: _Kind, bits: int) -> bytes:
    """Weight-only codes in blocks, the form that onnxruntime's MatMulNBits reads."""
    graph = _Graph(kind)
    depth, width = kind.weight
    blocks = depth // _BLOCK
    for index in range(LAYERS):
        codes = graph.filled(
            f"weight{index}", (width, blocks, _BLOCK * bits // 8), 0x99, TensorProto.UINT8
        )
        scales = graph.filled(f"scales{index}", (width, blocks), kind.scale / 10, TensorProto.FLOAT)
        graph.tensor = graph.add(
            "MatMulNBits", graph.tensor, codes, scales, name=f"layer{index}", domain=_CONTRIB,
            K=depth, N=width, bits=bits, block_size=_BLOCK, accuracy_level=_INT8_ACCUMULATION,
        )  # fmt: skip
    return _serialized(graph)


def _serialized(graph: _Graph) -> bytes:
    shape = ["n", *graph.kind.sample]
    last = graph.nodes[-1]
    last.output[0] = "y"
    made = helper.make_graph(
        graph.nodes,
        "kernel_benchmark",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    domains = [helper.make_opsetid("", _OPSET)]
    if any(node.domain == _CONTRIB for node in graph.nodes):
        domains.append(helper.make_opsetid(_CONTRIB, 1))
    model = helper.make_model(made, opset_imports=domains, ir_version=_IR_VERSION)
    model.producer_name = "edge-autotune"
    return bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
    for name, model in make_models().items():
        (FOLDER / name).write_bytes(model)
