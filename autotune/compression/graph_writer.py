"""One candidate's graph, written node by node in the order of the FP32 graph.

Owns which name a tensor has for which reader: float, 8-bit codes, 16-bit codes or float16,
each made where it is first needed. What runs on which is decided by `placement.py` and
`wide.py`; `quantization.py` lists the rules with their reasons.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import onnx

from autotune.compression.artifact_names import (
    dequantized_name,
    raw_name,
    scale_name,
    weight_prefix,
)
from autotune.compression.calibration import Range
from autotune.compression.graph import attribute
from autotune.compression.hard_swish import HARD_SWISH_SHIFT, gate_arrays
from autotune.compression.histograms import LEVELS
from autotune.compression.int8_constants import coded_constant, norm_arrays, operand_codes
from autotune.compression.layer_codes import layer_codes, needs_bias
from autotune.compression.operators import (
    ELEMENTWISE,
    WeightedNode,
    averaged_range,
    constant_operand,
    norm_as_convolution,
)
from autotune.compression.parts import Parts
from autotune.compression.plan import Plan
from autotune.compression.weight_only import (
    is_blocked,
    output_axis,
    write_blocked,
    write_unpacked,
)
from autotune.compression.weights import INT8_MAX
from autotune.errors import CompressionError
from search_spaces import Precision

_SIGN_SHIFT = 128
# Unsigned codes less 128 are the signed codes of the same values.
_LEVELS_16 = 65535
_HALF, _FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


@dataclasses.dataclass(frozen=True, slots=True)
class _Codes:
    """value = (code - zero_point) * scale, for unsigned 8-bit codes."""

    scale: float
    zero_point: int


class GraphWriter:
    """Appends a plan's nodes to `parts`; used once."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self._plan = plan
        self._parts = parts
        self._view = plan.view
        self._placement = plan.placement
        self._made: set[str] = set()
        self._half_made: set[str] = set()
        self._meanings: dict[str, _Codes] = {}
        self._unrounded: dict[str, str] = {}  # sums as float, by the tensor that has their codes
        self._symmetric = plan.symmetric_roots()

    def write(self) -> None:
        """Write every node."""
        for node in self._view.nodes:
            layer = self._plan.layers.get(node.name)
            precision = self._plan.chosen.get(node.name)
            if node.name in self._placement.absorbed:
                continue
            if node.name in self._plan.wide.half:
                self._half_node(node)
            elif layer is not None and precision is not None and not precision.is_float:
                self._layer(layer, precision)
            elif node.op_type == "HardSwish" and node.name in self._placement.int8:
                self._int8_hard_swish(node)
            elif node.op_type == "BatchNormalization" and node.name in self._placement.int8:
                self._int8_norm(node)
            elif node.name in self._placement.sums:
                self._float_sum(node)
            elif node.name in self._placement.gated:
                self._gated_product(node)
            elif node.name in self._placement.int8:
                self._int8_operator(node)
            else:
                self._float_node(node, [self._as_float(name) for name in node.input])

    def _layer(self, layer: WeightedNode, precision: Precision) -> None:
        if precision.is_int8:
            self._int8_layer(layer, precision)
        elif precision.activation_bits == 16:
            self._coded16_layer(layer, precision)
        elif is_blocked(layer, precision):
            data, bias = self._as_float(layer.input), layer.bias
            if bias:
                self._as_float(bias)
            write_blocked(self._parts, self._view, layer, precision, data=data, bias=bias)
        else:
            data = self._as_float(layer.input)
            weight = write_unpacked(self._parts, self._view, layer, precision)
            rest = [self._as_float(name) for name in layer.node.input[2:]]
            self._float_node(layer.node, [data, weight, *rest])

    # -- float ---------------------------------------------------------------------------

    def _float_node(self, node: onnx.NodeProto, inputs: list[str]) -> None:
        out = str(node.output[0])
        target = f"{out}/raw16" if out in self._plan.wide.rounded else out
        if node.name in self._placement.guarded or node.name in self._plan.wide.guarded:
            raw = f"{out}/guarded"
            self._parts.copy(node, inputs, [raw])
            self._parts.node("LeakyRelu", [raw], [target], f"{node.name}/guard", alpha=1.0)
        else:
            self._parts.copy(node, inputs, [target, *node.output[1:]])
        if target != out:
            self._round16(target, out, out)

    def _half_node(self, node: onnx.NodeProto) -> None:
        inputs = [self._as_half(name) for name in node.input]
        out = str(node.output[0])
        self._parts.copy(node, inputs, [f"{out}/half"])
        self._half_made.add(out)
        if out == self._view.output_name:
            self._as_float(out)

    # -- 16-bit codes --------------------------------------------------------------------

    def _coded16_layer(self, layer: WeightedNode, precision: Precision) -> None:
        data = self._as_coded16(layer.input)
        if layer.input in self._placement.stored:
            input_scale = self._meaning(layer.input).scale
        else:
            input_scale = self._meaning16(layer.input)[0]
        rest = self._coded_weights(layer, precision, input_scale, shift=0.0, largest=INT8_MAX)
        self._float_node(layer.node, [data, *rest])

    def _as_coded16(self, tensor: str) -> str:
        """The name under which a layer with 16-bit activations reads the tensor."""
        if tensor in self._placement.stored:
            return self._as_codes(tensor)
        if tensor in self._plan.wide.rounded:
            return self._as_float(tensor)
        if f"{tensor}/dq16" not in self._made:
            self._made.add(f"{tensor}/dq16")
            self._round16(self._as_float(tensor), tensor, f"{tensor}/dq16")
        return f"{tensor}/dq16"

    def _round16(self, raw: str, tensor: str, out: str) -> None:
        """Q and DQ with 16-bit codes; ONNX has them since opset 21, onnxruntime always."""
        scale, zero_point = self._meaning16(tensor)
        names = [
            self._parts.constant(scale_name(scale), scale, np.float32),
            self._parts.constant(f"zero_point16/{zero_point}", zero_point, np.uint16),
        ]
        codes = f"{tensor}/q16"
        self._parts.node("QuantizeLinear", [raw, *names], [codes], codes, contrib=True)
        self._parts.node("DequantizeLinear", [codes, *names], [out], f"{codes}/dq", contrib=True)

    def _meaning16(self, tensor: str) -> tuple[float, int]:
        """Scale and zero point of the tensor's 16-bit codes."""
        low, high = self._range(tensor)
        if tensor in self._symmetric:
            scale = float(np.float32(max(-low, high) / (_LEVELS_16 // 2))) or 1.0
            return scale, (_LEVELS_16 + 1) // 2
        scale = float(np.float32((high - low) / _LEVELS_16)) or 1.0
        return scale, int(np.clip(round(-low / scale), 0, _LEVELS_16))

    # -- 8-bit codes ---------------------------------------------------------------------

    def _int8_operator(self, node: onnx.NodeProto) -> None:
        operand = constant_operand(self._view, node)
        # Behind the data of a Reshape come shapes and axes, constant or computed.
        n_data = len(node.input) if node.op_type in ELEMENTWISE | {"Concat"} else 1
        inputs = [
            self._operand(name) if name == operand else self._as_codes(name)
            for name in node.input[:n_data]
        ]
        inputs += [self._as_float(name) for name in node.input[n_data:]]
        out = self._placement.writes.get(node.output[0], node.output[0])
        self._parts.copy(node, inputs, [raw_name(out)])
        self._quantize(raw_name(out), out)

    def _gated_product(self, node: onnx.NodeProto) -> None:
        """A swish's input times the product of its gate and the excite's: see `gated_products`."""
        product = self._placement.gated[node.name]
        gate = self._as_codes(product.gate) if product.gate else f"{product.swish}/gate/dq"
        out = self._placement.writes.get(node.output[0], node.output[0])
        gates = f"{out}/gates"
        inputs = [gate, self._as_codes(product.excite)]
        self._parts.node("Mul", inputs, [raw_name(gates)], f"{node.name}/gates")
        # A swish's gate ends at 1, so the product ends where the other one does.
        scale = float(np.float32(min(self._held(product.excite).high, 1.0) / LEVELS)) or 1 / LEVELS
        self._quantize_as(raw_name(gates), gates, scale, 0)
        self._dequantize(gates, gates, scale, 0)
        x = self._as_codes(product.x)
        self._parts.node("Mul", [x, f"{gates}/dq"], [raw_name(out)], f"{node.name}/mul")
        self._quantize(raw_name(out), out)

    def _float_sum(self, node: onnx.NodeProto) -> None:
        """A residual Add on float; its Q and DQ stand in front of the first that takes codes."""
        out = self._placement.writes.get(node.output[0], node.output[0])
        inputs = [self._as_float(name) for name in node.input]
        # onnxruntime would make 8 bits of an Add between a DQ and a Q; it has none for a Sum.
        self._parts.node("Sum", inputs, [raw_name(out)], node.name)
        if out == node.output[0] != self._view.output_name:
            self._unrounded[out] = raw_name(out)
        else:  # the codes are the model's answer, or their range stands for an activation
            self._quantize(raw_name(out), out)

    def _operand(self, name: str) -> str:
        """An Add's or Mul's constant, with a range of its own."""
        codes, held = operand_codes(self._view.array(name))
        signed = self._plan.kernels.signed_activations
        written = (codes - _SIGN_SHIFT).astype(np.int8) if signed else codes.astype(np.uint8)
        self._parts.arrays((f"{name}/q", signed), lambda: {f"{name}/q": written})
        if f"{name}/dq" not in self._made:
            self._made.add(f"{name}/dq")
            self._dequantize(name, name, held.scale, held.zero_point)
        return f"{name}/dq"

    def _int8_norm(self, node: onnx.NodeProto) -> None:
        """A BatchNorm that no convolution precedes, as the depthwise one that it equals."""
        folded = norm_as_convolution(self._view, node)
        if folded is None:
            raise CompressionError(f"norm {node.name!r} is not one of constants over images")
        out = self._placement.writes.get(node.output[0], node.output[0])
        self._depthwise(node, folded, raw_name(out), node.name)
        self._quantize(raw_name(out), out)

    def _depthwise(
        self, node: onnx.NodeProto, arrays: tuple[np.ndarray, np.ndarray], made: str, name: str
    ) -> None:
        """What a node makes of each channel, as a convolution with those weights and biases."""
        data, scale = self._as_codes(node.input[0]), self._meaning(node.input[0]).scale
        names = f"{node.name}.weight", f"{node.name}.bias"
        largest = self._plan.kernels.largest_weight_code
        self._parts.arrays(
            (names[0], scale, largest),
            lambda: norm_arrays(names, *arrays, input_scale=scale, largest_code=largest),
        )
        constants = [self._dequantize_constant(n, 0, is_scalar=False) for n in names]
        self._parts.node("Conv", [data, *constants], [made], name, group=len(arrays[1]))

    def _int8_hard_swish(self, node: onnx.NodeProto) -> None:
        x = self._as_codes(node.input[0])
        out = self._placement.writes.get(node.output[0], node.output[0])
        three, total, gate = (f"{out}/{part}" for part in ("three", "sum", "gate"))
        stretched = self._plan.stretched.get(node.input[0])
        if stretched is not None:
            self._depthwise(node, gate_arrays(stretched.factors), total, f"{node.name}/add")
        else:
            self._code(f"{three}/q", LEVELS)
            self._dequantize(three, three, HARD_SWISH_SHIFT / LEVELS, 0)
            self._parts.node("Add", [x, f"{three}/dq"], [total], f"{node.name}/add")
        # Codes of [0, 6] are read as [0, 1]: the division by 6 costs nothing.
        self._quantize_as(total, gate, 2 * HARD_SWISH_SHIFT / LEVELS, 0)
        self._dequantize(gate, gate, 1 / LEVELS, 0)
        self._parts.node("Mul", [x, f"{gate}/dq"], [raw_name(out)], f"{node.name}/mul")
        self._quantize(raw_name(out), out)

    def _int8_layer(self, layer: WeightedNode, precision: Precision) -> None:
        out = self._placement.writes.get(layer.output, layer.output)
        inputs = [self._as_codes(layer.input)]
        inputs += self._coded_weights(
            layer,
            precision,
            self._meaning(layer.input).scale,
            shift=self._gate_shift(out),
            largest=self._plan.kernels.largest_weight_code,
        )
        if out in self._placement.stored:
            self._parts.copy(layer.node, inputs, [raw_name(out)])
            self._quantize(raw_name(out), out)
        else:
            self._parts.copy(layer.node, inputs, [out])

    def _coded_weights(
        self,
        layer: WeightedNode,
        precision: Precision,
        input_scale: float,
        *,
        shift: float,
        largest: int,
    ) -> list[str]:
        """8-bit weights and a 32-bit bias, each behind its DQ; `shift` is added to the bias."""
        bias = self._view.array(layer.bias) if layer.bias else None
        axis, before = output_axis(layer), self._plan.stretched.get(layer.input)
        after = self._plan.stretched.get(layer.output)
        names = [weight_prefix(layer.name, precision)]
        if needs_bias(layer, before, after) or shift:
            names.append(names[0].replace(f"{layer.name}.weight", f"{layer.name}.bias"))

        def make() -> Mapping[str, np.ndarray]:
            found = layer_codes(
                layer,
                self._view.array(layer.weight),
                bias,
                axis=axis,
                input_scale=input_scale,
                shift=shift,
                granularity=precision.granularity,
                largest_code=largest,
                before=before,
                after=after,
                rounding=self._plan.rounding,
            )
            arrays = coded_constant(names[0], found.weight.codes, found.weight.scale)
            if found.bias is not None:
                arrays |= coded_constant(names[1], *found.bias)
            return arrays

        stretches = before is not None, after is not None
        self._parts.arrays((names[0], input_scale, shift, largest, *stretches), make)
        is_scalar = precision.granularity is not None
        return [
            self._dequantize_constant(name, channel_axis, is_scalar=is_scalar)
            for name, channel_axis in zip(names, (axis, 0), strict=False)
        ]

    def _dequantize_constant(self, name: str, axis: int, *, is_scalar: bool) -> str:
        triple = [f"{name}/q", f"{name}/scale", f"{name}/zero_point"]
        # The axis says nothing where there is one scale.
        at = 0 if is_scalar else axis
        self._parts.node("DequantizeLinear", triple, [f"{name}/dq"], f"{name}/dq", axis=at)
        return f"{name}/dq"

    # -- tensors -------------------------------------------------------------------------

    def _as_float(self, tensor: str) -> str:
        """The name under which a float node reads the tensor."""
        if tensor in self._unrounded:
            return self._unrounded[tensor]
        if tensor in self._placement.stored:
            return dequantized_name(self._view, tensor)
        if tensor in self._half_made and tensor not in self._made:
            self._made.add(tensor)
            self._parts.node("Cast", [f"{tensor}/half"], [tensor], f"{tensor}/float", to=_FLOAT)
        self._parts.source_constant(tensor)
        return tensor

    def _as_half(self, tensor: str) -> str:
        """The name under which a float16 node reads it; integer constants stay as they are."""
        if not tensor:
            return tensor
        half = f"{tensor}/half"
        if self._view.is_constant(tensor):
            array = self._view.array(tensor)
            if array.dtype != np.float32:
                return self._as_float(tensor)
            # Bounds of a Clip may be infinite; weights that are not must stay finite.
            self._parts.arrays((half,), lambda: {half: array.astype(np.float16)})
        elif tensor not in self._half_made and half not in self._made:
            self._made.add(half)
            self._parts.node("Cast", [self._as_float(tensor)], [half], half, to=_HALF)
        return half

    def _as_codes(self, tensor: str) -> str:
        """The name under which an 8-bit node reads it; a float tensor gets its Q/DQ once."""
        if self._view.is_constant(tensor):
            self._parts.source_constant(tensor)
            return tensor
        if tensor in self._placement.stored and tensor not in self._unrounded:
            return dequantized_name(self._view, tensor)
        if f"{tensor}/dq" not in self._made:
            self._made.add(f"{tensor}/dq")
            meaning = self._meaning(tensor)
            self._quantize_as(self._as_float(tensor), tensor, meaning.scale, meaning.zero_point)
            self._dequantize(tensor, tensor, meaning.scale, meaning.zero_point)
        return f"{tensor}/dq"

    def _quantize(self, raw: str, tensor: str) -> None:
        """Q and DQ behind the 8-bit node that made `tensor`."""
        meaning = self._meaning(tensor)
        written = self._gate(tensor) or meaning
        self._quantize_as(raw, tensor, written.scale, written.zero_point)
        self._dequantize(tensor, tensor, meaning.scale, meaning.zero_point)

    def _meaning(self, tensor: str) -> _Codes:
        """What a code of the tensor stands for where it is read."""
        root = self._placement.stored.get(tensor, tensor)
        if root not in self._meanings:
            self._meanings[root] = self._meaning_of(root)
        return self._meanings[root]

    def _meaning_of(self, root: str) -> _Codes:
        producer = self._view.producer.get(root)
        if producer is not None and producer.op_type in ("Sigmoid", "HardSigmoid"):
            return _Codes(scale=1 / LEVELS, zero_point=0)
        if root in self._symmetric:
            low, high = self._range(root)
            scale = float(np.float32(max(-low, high) / INT8_MAX)) or 1.0
            return _Codes(scale=scale, zero_point=_SIGN_SHIFT)
        low, high = self._range(root)
        held = dataclasses.replace(self._plan.calibration.ranges[root], low=low, high=high)
        return _Codes(scale=held.scale, zero_point=held.zero_point)

    def _range(self, tensor: str) -> tuple[float, float]:
        """The least and the largest value of the tensor that matter."""
        held = self._held(tensor)
        joined = [self._held(x) for x in self._placement.shared.get(tensor, ())] or [held]
        low, high = min(x.low for x in joined), max(x.high for x in joined)
        pool = self._view.producer.get(tensor)
        if pool is not None and pool.op_type == "GlobalAveragePool":
            return self._averaged(pool, (low, high), (held.low, held.high))
        if tensor in self._placement.shared:
            return low, high
        taker = self._view.only_consumer(tensor)
        is_whole = tensor not in self._plan.stretched
        if is_whole and taker is not None and taker.op_type == "HardSwish":
            # HardSwish is 0 below -3: codes spent there are wasted.
            return max(held.low, -HARD_SWISH_SHIFT), held.high
        return held.low, held.high

    def _averaged(
        self, pool: onnx.NodeProto, joint: tuple[float, float], own: tuple[float, float]
    ) -> tuple[float, float]:
        if pool.name not in self._placement.int8:
            return joint
        scale = self._meaning(pool.input[0]).scale
        n_values = math.prod(self._view.shape(pool.input[0])[1:]) or 1
        return averaged_range(joint, own, input_scale=scale, n_values=n_values)

    def _held(self, tensor: str) -> Range:
        """The tensor's own range, its channels stretched where they are in this candidate."""
        if tensor in self._plan.stretched:
            return self._plan.stretched[tensor].held
        held = self._plan.calibration.ranges.get(tensor)
        if held is None:
            raise CompressionError(f"tensor {tensor!r} was not calibrated")
        return held

    def _gate(self, tensor: str) -> _Codes | None:
        """How a layer's output is quantized so that its codes are HardSigmoid's output.

        HardSigmoid(x) = clip(alpha x + beta, 0, 1) = code / 255 with
        code = clip(x / (1 / (255 alpha)) + 255 beta, 0, 255).
        """
        producer = self._view.producer.get(tensor)
        if producer is None or self._placement.absorbed.get(producer.name) != "gate":
            return None
        scale = 1 / (LEVELS * attribute(producer, "alpha", 0.2))
        return _Codes(scale=scale, zero_point=int(LEVELS * attribute(producer, "beta", 0.5)))

    def _gate_shift(self, tensor: str) -> float:
        """What the bias must add because a zero point is a whole number."""
        gate = self._gate(tensor)
        if gate is None:
            return 0.0
        beta = attribute(self._view.producer[tensor], "beta", 0.5)
        return float((LEVELS * beta - gate.zero_point) * gate.scale)

    # -- parts ---------------------------------------------------------------------------

    def _quantize_as(self, raw: str, tensor: str, scale: float, zero_point: int) -> None:
        inputs = [raw, *self._parameters(scale, zero_point)]
        self._parts.node("QuantizeLinear", inputs, [f"{tensor}/q"], f"{tensor}/q")

    def _dequantize(self, tensor: str, name: str, scale: float, zero_point: int) -> None:
        inputs = [f"{tensor}/q", *self._parameters(scale, zero_point)]
        out = dequantized_name(self._view, name)
        self._parts.node("DequantizeLinear", inputs, [out], f"{name}/dq")

    def _parameters(self, scale: float, zero_point: int) -> tuple[str, str]:
        """One constant per value: equal scales are the same tensor everywhere."""
        name = self._parts.constant(scale_name(scale), scale, np.float32)
        return name, self._code(f"zero_point/{zero_point}", zero_point)

    def _code(self, name: str, unsigned: int) -> str:
        """One code of an activation, in the kernels' sign."""
        if self._plan.kernels.signed_activations:
            return self._parts.constant(name, unsigned - _SIGN_SHIFT, np.int8)
        return self._parts.constant(name, unsigned, np.uint8)
