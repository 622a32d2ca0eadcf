"""A candidate's graph: QuantizeLinear/DequantizeLinear written into the one FP32 graph.

Owns the placement. Weights are signed 8-bit, symmetric, per output channel; activations
unsigned 8-bit, asymmetric, per tensor (u8s8: the fast integer kernels of x86). What is
placed where follows what onnxruntime fuses (checked on its optimized graphs by `effective.py`):

- a tensor has one Q and one DQ, however many take it; a float producer keeps its float tensor
  for float consumers;
- Relu and Clip behind an 8-bit layer are dropped: the output range starts at 0 (ends at 6);
- HardSwish has no 8-bit kernel, but x * clip(x + 3, 0, 6) / 6 does: a QLinearAdd whose output
  range is [0, 6] and a QLinearMul, 10 to 20 % faster than going through float;
- HardSigmoid behind an 8-bit layer is free: codes of the range [-3, 3] are read as [0, 1];
- pools, SE products and the like stay 8-bit while most of their input is;
- a float layer between a DQ and a Q gets a LeakyRelu of slope 1: onnxruntime's
  WeightBiasQuantization would quantize it, and this one is fused into its kernel for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autotune.compression.calibration import LEVELS, Calibration
from autotune.compression.graph import GraphView, attribute
from autotune.compression.placement import Placement, place
from autotune.compression.units import WeightedNode, find_units
from autotune.compression.weights import BLOCK, pack_blocks, quantize_bias, quantize_weight
from autotune.compression.wire import assemble, initializer_field, node_field, shell
from autotune.errors import CompressionError
from search_spaces import INT8, LayerKind, Precision

CONTRIB_DOMAIN = "com.microsoft"
_WEIGHT_ONLY_BITS = (4, 8)
# x * clip(x + 3, 0, 6) / 6 (Howard et al. 2019, "Searching for MobileNetV3", section 5.2).
_HARD_SWISH_SHIFT = 3.0


def weight_codes(layer: str, precision: Precision) -> str:
    """The initializer that holds a layer's quantized weights in an artifact."""
    suffix = f"w{precision.weight_bits}/q" if precision.is_weight_only else "q"
    return f"{layer}.weight/{suffix}"


class QuantizableGraph:
    """One FP32 graph with its calibration, from which candidates are written.

    Quantized weights and serialized nodes are kept, so the next candidate costs little more
    than joining bytes. Not thread-safe.
    """

    def __init__(self, model: onnx.ModelProto, calibration: Calibration) -> None:
        self.view = GraphView(model)
        self.calibration = calibration
        self.units = {unit.name: unit for unit in find_units(self.view)}
        self.layers = {x.name: x for unit in self.units.values() for x in unit.layers}
        self._shells = {False: shell(model), True: shell(_with_contrib(model))}
        self._kept: dict[tuple[object, ...], bytes] = {}
        self._kept_arrays: dict[tuple[object, ...], Mapping[str, bytes]] = {}

    def emit(self, precisions: Mapping[str, Precision]) -> bytes:
        """The file in which each group has the precision given; the others stay FP32.

        The same precisions give the same bytes in every process.

        Raises:
            CompressionError: an unknown group, or a precision that a group cannot take.
        """
        chosen: dict[str, Precision] = {}
        for group, precision in precisions.items():
            unit = self.units.get(group)
            if unit is None:
                known = ", ".join(self.units)
                raise CompressionError(f"the model has no layer group {group!r}; it has {known}")
            for layer in unit.layers:
                _require_possible(group, layer, precision)
                chosen[layer.name] = precision
        writer = _Writer(self, place(self.view, self.layers, chosen), chosen)
        writer.write()
        outer, graph = self._shells[writer.needs_contrib]
        return assemble(outer, graph, (*writer.nodes, *writer.constants.values()))

    def kept(self, key: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
        """The serialized part with that key, made once."""
        part = self._kept.get(key)
        if part is None:
            part = self._kept[key] = make()
        return part

    def kept_arrays(
        self, key: tuple[object, ...], make: Callable[[], Mapping[str, np.ndarray]]
    ) -> Mapping[str, bytes]:
        """The serialized constants with that key, made once."""
        parts = self._kept_arrays.get(key)
        if parts is None:
            parts = {
                name: initializer_field(numpy_helper.from_array(array, name))
                for name, array in make().items()
            }
            self._kept_arrays[key] = parts
        return parts


@dataclasses.dataclass(frozen=True, slots=True)
class _Codes:
    """value = (code - zero_point) * scale."""

    scale: float
    zero_point: int


class _Writer:
    """Writes one candidate, node by node in graph order."""

    def __init__(
        self, graph: QuantizableGraph, placement: Placement, chosen: Mapping[str, Precision]
    ) -> None:
        self.graph = graph
        self.view = graph.view
        self.placement = placement
        self.chosen = chosen
        self.nodes: list[bytes] = []
        self.constants: dict[str, bytes] = {}
        self.needs_contrib = False
        self._read_as_codes: set[str] = set()

    def write(self) -> None:
        """Fill `nodes` and `constants`."""
        for node in self.view.nodes:
            layer = self.graph.layers.get(node.name)
            precision = self.chosen.get(node.name)
            if node.name in self.placement.absorbed:
                continue
            if layer is not None and precision == INT8:
                self._int8_layer(layer)
            elif layer is not None and precision is not None and precision.is_weight_only:
                self._weight_only_layer(layer, precision.weight_bits)
            elif node.op_type == "HardSwish" and node.name in self.placement.int8:
                self._int8_hard_swish(node)
            elif node.name in self.placement.int8:
                self._int8_operator(node)
            else:
                self._float_node(node)

    def _float_node(self, node: onnx.NodeProto) -> None:
        inputs = [self._as_float(name) for name in node.input]
        if node.name not in self.placement.guarded:
            self._copy(node, inputs, list(node.output))
            return
        raw = f"{node.output[0]}/guarded"
        self._copy(node, inputs, [raw])
        self._node("LeakyRelu", [raw], [node.output[0]], f"{node.name}/guard", alpha=1.0)

    def _int8_operator(self, node: onnx.NodeProto) -> None:
        inputs = [self._as_codes(name) for name in node.input]
        out = self.placement.writes.get(node.output[0], node.output[0])
        self._copy(node, inputs, [_raw(out)])
        self._quantize(_raw(out), out)

    def _int8_hard_swish(self, node: onnx.NodeProto) -> None:
        x, out = self._as_codes(node.input[0]), node.output[0]
        three, total, gate = (f"{out}/{part}" for part in ("three", "sum", "gate"))
        self._constant(f"{three}/q", LEVELS, np.uint8)
        self._dequantize(three, three, _HARD_SWISH_SHIFT / LEVELS, 0)
        self._node("Add", [x, f"{three}/dq"], [total], f"{node.name}/add")
        # Codes of [0, 6] are read as [0, 1]: the division by 6 costs nothing.
        self._quantize_as(total, gate, 2 * _HARD_SWISH_SHIFT / LEVELS, 0)
        self._dequantize(gate, gate, 1 / LEVELS, 0)
        self._node("Mul", [x, f"{gate}/dq"], [_raw(out)], f"{node.name}/mul")
        self._quantize(_raw(out), out)

    def _int8_layer(self, layer: WeightedNode) -> None:
        out = self.placement.writes.get(layer.output, layer.output)
        inputs = [self._as_codes(layer.input)]
        inputs += self._int8_weights(layer, self._meaning(layer.input).scale, out)
        if out in self.placement.stored:
            self._copy(layer.node, inputs, [_raw(out)])
            self._quantize(_raw(out), out)
        else:
            self._copy(layer.node, inputs, [out])

    def _int8_weights(self, layer: WeightedNode, input_scale: float, out: str) -> list[str]:
        weight = self.view.array(layer.weight)
        bias = self.view.array(layer.bias) if layer.bias else None
        axis, shift = _output_axis(layer), self._gate_shift(out)
        if shift:
            bias = (np.zeros(weight.shape[axis], np.float32) if bias is None else bias) + shift

        def make() -> Mapping[str, np.ndarray]:
            quantized = quantize_weight(weight, axis=axis, input_scale=input_scale, bias=bias)
            arrays = _triple(f"{layer.name}.weight", quantized.codes, quantized.scale)
            if bias is not None:
                arrays |= _triple(
                    f"{layer.name}.bias",
                    *quantize_bias(bias, input_scale=input_scale, weight_scale=quantized.scale),
                )
            return arrays

        self.constants.update(self.graph.kept_arrays((layer.name, input_scale, shift), make))
        axes = {f"{layer.name}.weight": axis}
        if bias is not None:
            axes[f"{layer.name}.bias"] = 0
        for name, channel_axis in axes.items():
            triple = [f"{name}/q", f"{name}/scale", f"{name}/zero_point"]
            dequantized = f"{name}/dq"
            self._node("DequantizeLinear", triple, [dequantized], dequantized, axis=channel_axis)
        return [f"{name}/dq" for name in axes]

    def _weight_only_layer(self, layer: WeightedNode, bits: int) -> None:
        weight = self.view.array(layer.weight)
        matrix = weight if _output_axis(layer) == 0 else weight.T
        name = f"{layer.name}.weight/w{bits}"

        def make() -> Mapping[str, np.ndarray]:
            codes, scale = pack_blocks(matrix, bits=bits)
            return {f"{name}/q": codes, f"{name}/scale": scale}

        self.constants.update(self.graph.kept_arrays((layer.name, bits), make))
        inputs = [self._as_float(layer.input), f"{name}/q", f"{name}/scale"]
        if layer.bias:
            inputs += ["", "", self._as_float(layer.bias)]
        n, k = matrix.shape
        sizes = {"N": int(n), "K": int(k), "bits": bits, "block_size": BLOCK}
        self._node(
            "MatMulNBits", inputs, [layer.output], layer.name, domain=CONTRIB_DOMAIN, **sizes
        )
        self.needs_contrib = True

    # -- tensors -------------------------------------------------------------------------

    def _as_float(self, tensor: str) -> str:
        """The name under which a float node reads the tensor."""
        if tensor in self.placement.stored:
            return _dequantized(self.view, tensor)
        self._keep_constant(tensor)
        return tensor

    def _as_codes(self, tensor: str) -> str:
        """The name under which an 8-bit node reads it; a float tensor gets its Q/DQ once."""
        if self.view.is_constant(tensor):
            self._keep_constant(tensor)
            return tensor
        if tensor not in self.placement.stored and tensor not in self._read_as_codes:
            self._read_as_codes.add(tensor)
            meaning = self._meaning(tensor)
            self._quantize_as(tensor, tensor, meaning.scale, meaning.zero_point)
            self._dequantize(tensor, tensor, meaning.scale, meaning.zero_point)
        if tensor in self.placement.stored:
            return _dequantized(self.view, tensor)
        return f"{tensor}/dq"

    def _quantize(self, raw: str, tensor: str) -> None:
        """Q and DQ behind the 8-bit node that made `tensor`."""
        gate = self._gate(tensor)
        if gate is not None:
            self._quantize_as(raw, tensor, gate.scale, gate.zero_point)
        else:
            meaning = self._meaning(tensor)
            self._quantize_as(raw, tensor, meaning.scale, meaning.zero_point)
        self._dequantize(
            tensor, tensor, self._meaning(tensor).scale, self._meaning(tensor).zero_point
        )

    def _meaning(self, tensor: str) -> _Codes:
        """What a code of the tensor stands for where it is read."""
        root = self.placement.stored.get(tensor, tensor)
        producer = self.view.producer.get(root)
        if producer is not None and producer.op_type in ("Sigmoid", "HardSigmoid"):
            return _Codes(scale=1 / LEVELS, zero_point=0)
        held = self.graph.calibration.ranges.get(root)
        if held is None:
            raise CompressionError(f"tensor {root!r} was not calibrated")
        taker = self.view.only_consumer(root)
        if taker is not None and taker.op_type == "HardSwish":
            # HardSwish is 0 below -3: codes spent there are wasted.
            held = dataclasses.replace(held, low=max(held.low, -_HARD_SWISH_SHIFT))
        return _Codes(scale=held.scale, zero_point=held.zero_point)

    def _gate(self, tensor: str) -> _Codes | None:
        """How a layer's output is quantized so that its codes are HardSigmoid's output.

        HardSigmoid(x) = clip(alpha x + beta, 0, 1) = code / 255 with
        code = clip(x / (1 / (255 alpha)) + 255 beta, 0, 255).
        """
        producer = self.view.producer.get(tensor)
        if producer is None or self.placement.absorbed.get(producer.name) != "gate":
            return None
        scale = 1 / (LEVELS * attribute(producer, "alpha", 0.2))
        return _Codes(scale=scale, zero_point=int(LEVELS * attribute(producer, "beta", 0.5)))

    def _gate_shift(self, tensor: str) -> float:
        """What the bias must add because a zero point is a whole number."""
        gate = self._gate(tensor)
        if gate is None:
            return 0.0
        beta = attribute(self.view.producer[tensor], "beta", 0.5)
        return float((LEVELS * beta - gate.zero_point) * gate.scale)

    # -- parts ---------------------------------------------------------------------------

    def _quantize_as(self, raw: str, tensor: str, scale: float, zero_point: int) -> None:
        inputs = [raw, *self._parameters(scale, zero_point)]
        self._node("QuantizeLinear", inputs, [f"{tensor}/q"], f"{tensor}/q")

    def _dequantize(self, tensor: str, name: str, scale: float, zero_point: int) -> None:
        inputs = [f"{tensor}/q", *self._parameters(scale, zero_point)]
        self._node("DequantizeLinear", inputs, [_dequantized(self.view, name)], f"{name}/dq")

    def _parameters(self, scale: float, zero_point: int) -> tuple[str, str]:
        """One constant per value: equal scales are the same tensor everywhere."""
        names = f"scale/{np.float32(scale).tobytes().hex()}", f"zero_point/{zero_point}"
        self._constant(names[0], scale, np.float32)
        self._constant(names[1], zero_point, np.uint8)
        return names

    def _constant(self, name: str, value: float, dtype: type[np.generic]) -> None:
        if name not in self.constants:
            array = np.asarray(value, dtype=dtype)
            self.constants.update(self.graph.kept_arrays((name,), lambda: {name: array}))

    def _keep_constant(self, name: str) -> None:
        if name in self.view.initializers and name not in self.constants:
            tensor = self.view.initializers[name]
            self.constants[name] = self.graph.kept((name,), lambda: initializer_field(tensor))

    def _node(
        self,
        operator: str,
        inputs: list[str],
        outputs: list[str],
        name: str,
        *,
        domain: str | None = None,
        **attributes: int | float,
    ) -> None:
        key = (operator, name, *inputs, "->", *outputs)

        def make() -> bytes:
            return node_field(
                helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes)
            )

        self.nodes.append(self.graph.kept(key, make))

    def _copy(self, node: onnx.NodeProto, inputs: list[str], outputs: list[str]) -> None:
        def make() -> bytes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:], copy.output[:] = inputs, outputs
            return node_field(copy)

        key = (node.op_type, node.name, *inputs, "->", *outputs)
        self.nodes.append(self.graph.kept(key, make))


def _raw(tensor: str) -> str:
    """What an 8-bit node makes, before its Q."""
    return f"{tensor}/raw"


def _dequantized(view: GraphView, tensor: str) -> str:
    """A DQ's output; the graph's own output keeps its name."""
    return tensor if tensor == view.output_name else f"{tensor}/dq"


def _output_axis(layer: WeightedNode) -> int:
    """The axis of the weights along which there is one scale per output."""
    if layer.kind is LayerKind.MATMUL:
        return 1
    if layer.kind is LayerKind.GEMM:
        return 0 if attribute(layer.node, "transB", 0) else 1
    return 0


def _triple(name: str, codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """Codes, scales and zero points of a symmetric tensor."""
    zeros = np.zeros(len(scale), codes.dtype)
    return {f"{name}/q": codes, f"{name}/scale": scale, f"{name}/zero_point": zeros}


def _with_contrib(model: onnx.ModelProto) -> onnx.ModelProto:
    outer = onnx.ModelProto()
    outer.CopyFrom(model)
    outer.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return outer


def _require_possible(group: str, layer: WeightedNode, precision: Precision) -> None:
    is_block_wise = precision.is_weight_only and precision.weight_bits in _WEIGHT_ONLY_BITS
    if precision.is_float or precision == INT8 or (is_block_wise and layer.is_matrix_product):
        return
    takes = "fp32, w8, w4 or w8a8" if layer.is_matrix_product else "fp32 or w8a8"
    raise CompressionError(
        f"layer group {group!r} cannot take {precision.name}: its {layer.kind} {layer.name!r} "
        f"takes {takes}"
    )
