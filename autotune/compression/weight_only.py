"""Weights stored in few bits for a layer that computes in float.

Owns the two ways there are. A matrix product with block-wise scales is a MatMulNBits, which
reads packed weights as it multiplies. Everything else (convolutions, scales per channel or per
tensor, binary weights) holds its codes packed in the file and unpacks them with standard
operators, which onnxruntime folds into a float weight when it loads the file.

Why not DequantizeLinear of ONNX's own INT4 and INT2: onnxruntime 1.31 loads them (opset 21 and
25), but repeats the DequantizeLinear at every run, which costs a 3x3 convolution (128 channels,
28x28) 1.5 ms instead of 1.0; and the source's opset would have to be raised. These operators
exist since opset 13 and there is no ONNX type of one bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autotune.compression.graph import GraphView, attribute
from autotune.compression.operators import WeightedNode
from autotune.compression.parts import Parts
from autotune.compression.weights import block_matrix, code_weight, pack
from search_spaces import LayerKind, PerBlock, PerChannel, Precision

# MatMulNBits computes with activations rounded to 8 bits block by block. On one x86 core with
# VNNI a 1000 x 2048 product takes 0.035 ms with 4 bits (0.115 without rounding, as in FP32),
# 0.036 with 8 bits (3.7) and 0.056 with 2 bits (5.5); its result changes by 0.5 %.
_INT8_ACCUMULATION = 4
_FLOAT = 1  # TensorProto.FLOAT


def output_axis(layer: WeightedNode) -> int:
    """The axis of the weights along which the layer's outputs lie (of one group of them)."""
    if layer.kind in (LayerKind.MATMUL, LayerKind.CONV_TRANSPOSE):
        return 1
    if layer.kind is LayerKind.GEMM:
        return 0 if attribute(layer.node, "transB", 0) else 1
    return 0


def is_blocked(layer: WeightedNode, precision: Precision) -> bool:
    """The layer becomes a MatMulNBits."""
    wants_blocks = precision.granularity is None or isinstance(precision.granularity, PerBlock)
    return layer.is_matrix_product and precision.weight_bits > 1 and wants_blocks


def packed_weight(layer: str, precision: Precision) -> str:
    """The prefix of everything that holds or unpacks the layer's weights."""
    return f"{layer}.weight/{precision.name}"


def write_blocked(
    parts: Parts,
    view: GraphView,
    layer: WeightedNode,
    precision: Precision,
    *,
    data: str,
    bias: str | None,
) -> None:
    """Append the layer as a MatMulNBits that reads the float tensor `data`."""
    bits, granularity = precision.weight_bits, precision.granularity
    block = granularity.size if isinstance(granularity, PerBlock) else PerBlock().size
    weight = view.array(layer.weight)
    matrix = weight if output_axis(layer) == 0 else weight.T
    name = packed_weight(layer.name, precision)

    def make() -> Mapping[str, np.ndarray]:
        blocked = block_matrix(matrix, bits=bits, block=block, symmetric=precision.is_symmetric)
        arrays = {f"{name}/q": blocked.codes, f"{name}/scale": blocked.scale}
        if blocked.zero is not None:
            arrays[f"{name}/zero_point"] = blocked.zero
        return arrays

    parts.arrays((layer.name, precision.name), make)
    inputs = [data, f"{name}/q", f"{name}/scale"]
    if bias or not precision.is_symmetric:
        inputs.append("" if precision.is_symmetric else f"{name}/zero_point")
    if bias:
        inputs += ["", bias]
    n, k = matrix.shape
    parts.node(
        "MatMulNBits",
        inputs,
        [layer.output],
        layer.name,
        contrib=True,
        N=int(n),
        K=int(k),
        bits=bits,
        block_size=block,
        accuracy_level=_INT8_ACCUMULATION,
    )


def write_unpacked(parts: Parts, view: GraphView, layer: WeightedNode, precision: Precision) -> str:
    """Append the packed codes and the nodes that unpack them; returns the float weight's name."""
    bits = precision.weight_bits
    weight = view.array(layer.weight)
    name = packed_weight(layer.name, precision)

    def make() -> Mapping[str, np.ndarray]:
        coded = code_weight(
            weight,
            axis=output_axis(layer),
            bits=bits,
            granularity=precision.granularity or PerChannel(),
            symmetric=precision.is_symmetric,
        )
        arrays = {f"{name}/scale": coded.scale, f"{name}/zero_point": _compact(coded.zero)}
        if bits == 8:
            return {f"{name}/q": coded.codes, **arrays}
        return {
            f"{name}/q": pack(coded.codes, bits=bits).reshape(-1, 1),
            f"{name}/shape": np.array(weight.shape, np.int64),
            **arrays,
        }

    parts.arrays((layer.name, precision.name), make)
    codes = f"{name}/q" if bits == 8 else _split_bytes(parts, name, bits, weight.size)
    value, zeroed, scaled = (f"{name}/{part}" for part in ("cast", "sub", "mul"))
    parts.node("Cast", [codes], [value], value, to=_FLOAT)
    parts.node("Sub", [value, f"{name}/zero_point"], [zeroed], zeroed)
    parts.node("Mul", [zeroed, f"{name}/scale"], [scaled], scaled)
    return scaled


def _split_bytes(parts: Parts, name: str, bits: int, size: int) -> str:
    """Nodes that make one uint8 code per weight, in the weight's shape, of the packed bytes."""
    per_byte = 8 // bits
    shifts, modulus = f"unpack/shifts{bits}", f"unpack/modulus{bits}"
    parts.arrays((shifts,), lambda: {shifts: (np.arange(per_byte) * bits).astype(np.uint8)})
    parts.constant(modulus, 2**bits, np.uint8)
    parts.node("BitShift", [f"{name}/q", shifts], [f"{name}/shifted"], f"{name}/shifted",
               direction="RIGHT")  # fmt: skip
    parts.node("Mod", [f"{name}/shifted", modulus], [f"{name}/codes"], f"{name}/codes")
    flat = f"{name}/codes"
    if size % per_byte:
        ends = f"{name}/size"
        parts.arrays(("unpack/flat",), lambda: {"unpack/flat": np.array([-1], np.int64)})
        parts.arrays(("unpack/start",), lambda: {"unpack/start": np.array([0], np.int64)})
        parts.arrays((ends,), lambda: {ends: np.array([size], np.int64)})
        parts.node("Reshape", [flat, "unpack/flat"], [f"{name}/flat"], f"{name}/flat")
        parts.node("Slice", [f"{name}/flat", "unpack/start", ends], [f"{name}/all"], f"{name}/all")
        flat = f"{name}/all"
    parts.node("Reshape", [flat, f"{name}/shape"], [f"{name}/shaped"], f"{name}/shaped")
    return f"{name}/shaped"


def _compact(zero: np.ndarray) -> np.ndarray:
    """One number where all zeros are equal."""
    return zero.reshape(-1)[0].reshape(()) if (zero == zero.reshape(-1)[0]).all() else zero
