"""A candidate's graph: QuantizeLinear/DequantizeLinear written into the one FP32 graph.

Owns the door: groups and precisions in, a file out. Weights of 8-bit layers are signed,
symmetric, per output channel; activations 8-bit, asymmetric, per tensor, unsigned or signed
as the device's kernels want them (`kernels.py`). What is placed where follows what onnxruntime
fuses (checked on its optimized graphs by `effective.py`):

- a tensor has one Q and one DQ, however many take it; a float producer keeps its float tensor
  for float consumers;
- Relu and Clip behind an 8-bit layer are dropped: the output range starts at 0 (ends at 6);
- HardSwish has no 8-bit kernel, but x * clip(x + 3, 0, 6) / 6 does: a QLinearAdd whose output
  range is [0, 6] and a QLinearMul, 10 to 20 % faster than going through float; where channels are
  stretched, a depthwise QLinearConv takes the Add's place (`hard_swish.py`);
- HardSigmoid behind an 8-bit layer is free: codes of the range [-3, 3] are read as [0, 1];
- pools, SE products and the like stay 8-bit while most of their input is;
- a HardSwish times an excite takes the product of both gates first (`gated_products`);
- residual sums that follow one another stay float, and layers get codes of them (`stream_sums`);
- what an 8-bit Concat joins has one scale (`sharing.py`): the Concat copies;
- a norm in front of an 8-bit convolution (DenseNet) is the depthwise convolution that it equals;
- a matrix product leaves its sums as float where nobody takes codes of them (transformers: the
  bias, GELU, the residual stream and LayerNorm follow in float);
- a float layer between a DQ and a Q gets a LeakyRelu of slope 1: onnxruntime's
  WeightBiasQuantization would quantize it, and this one is fused into its kernel for nothing;
- float16 layers pass float16 on, through the operators between them; casts stand at the ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from autotune.compression.calibration import Calibration
from autotune.compression.equalization import Equalization
from autotune.compression.fp32_file import Fp32File
from autotune.compression.graph import GraphView, model_bytes
from autotune.compression.graph_writer import GraphWriter
from autotune.compression.kernels import X86_VNNI, KernelClass
from autotune.compression.parts import CONTRIB_DOMAIN, KeptParts, Parts
from autotune.compression.placement import place
from autotune.compression.plan import Plan
from autotune.compression.rounding import Rounding
from autotune.compression.units import Unit, WeightedNode, find_units
from autotune.compression.wide import place_wide
from autotune.compression.wire import assemble, settle_allocator, shell
from autotune.errors import CompressionError
from search_spaces import FP32, LayerKind, PerBlock, Precision

KERNELS_KEY = "edge_autotune.kernel_class"
"""The metadata entry of a file that names its kernel class: accuracy holds there alone."""

_KEPT_SHARE = 1.0
"""Bytes of quantized constants kept per weight: 8 bits for all layers."""

_LARGEST_HALF = float(np.finfo(np.float16).max)


class QuantizableGraph:
    """One FP32 graph with its calibration, from which candidates are written.

    `model` may be its file's bytes: then nothing holds the weights a second time. Quantized
    weights and serialized nodes are kept, so the next candidate costs little more than joining
    bytes. Not thread-safe. `equalize` lets 8-bit neighbours share out the ranges of their
    channels.
    """

    def __init__(
        self,
        model: onnx.ModelProto | bytes,
        calibration: Calibration,
        *,
        kernels: KernelClass = X86_VNNI,
        rounding: Rounding | None = None,
        equalize: bool = True,
    ) -> None:
        file = model if isinstance(model, bytes) else model_bytes(model)
        self._fp32 = Fp32File.read(file)
        self.view = GraphView(self._fp32.light, self._fp32.weights)
        self.calibration = calibration
        self.kernels = kernels
        self.rounding = rounding or Rounding()
        self.equalization = Equalization(self.view, calibration)
        self.units = {unit.name: unit for unit in find_units(self.view)}
        self.layers = {x.name: x for unit in self.units.values() for x in unit.layers}
        self._equalize = equalize
        self._fits_half: set[str] = set()
        self._shells: dict[tuple[bool, str | None], tuple[bytes, bytes]] = {}
        n_weights = sum(math.prod(i.dims) for i in self._fp32.light.graph.initializer)
        self._kept = KeptParts(int(_KEPT_SHARE * n_weights))
        settle_allocator(len(file))

    @property
    def fp32(self) -> bytes:
        """The FP32 model's file."""
        return self._fp32.file

    def emit(
        self,
        precisions: Mapping[str, Precision],
        *,
        kernels: KernelClass | None = None,
        rounding: Rounding | None = None,
    ) -> bytes:
        """The file in which each group has the precision given; the others stay FP32.

        The same precisions, kernels and rounding give the same bytes in every process;
        `kernels` and `rounding` stand in for the graph's own.

        Raises:
            CompressionError: an unknown group, or a precision that a group cannot take.
        """
        plan = self.plan(precisions, kernels=kernels, rounding=rounding)
        # What is kept holds the codes of the graph's own rounding.
        parts = Parts(self._fp32.constants, self._kept if rounding is None else KeptParts(0))
        GraphWriter(plan, parts).write()
        has_int8 = any(precision.is_int8 for precision in plan.chosen.values())
        outer, graph = self._shell(parts.needs_contrib, plan.kernels.name if has_int8 else None)
        return assemble(outer, graph, (*parts.nodes, *parts.constants.values()))

    def plan(
        self,
        precisions: Mapping[str, Precision],
        *,
        kernels: KernelClass | None = None,
        rounding: Rounding | None = None,
    ) -> Plan:
        """What the file that `emit` writes follows from.

        Raises:
            CompressionError: an unknown group, or a precision that a group cannot take.
        """
        chosen: dict[str, Precision] = {}
        for group, precision in precisions.items():
            unit = self.units.get(group)
            if unit is None:
                known = ", ".join(self.units)
                raise CompressionError(f"the model has no layer group {group!r}; it has {known}")
            self._require_possible(unit, precision)
            chosen |= {layer.name: precision for layer in unit.layers}
        placement = place(self.view, self.layers, chosen)
        return Plan(
            view=self.view,
            layers=self.layers,
            calibration=self.calibration,
            chosen=chosen,
            placement=placement,
            wide=place_wide(self.view, self.layers, chosen, placement),
            kernels=kernels or self.kernels,
            stretched=self.equalization.in_force(placement) if self._equalize else {},
            rounding=self.rounding if rounding is None else rounding,
        )

    def _shell(self, needs_contrib: bool, kernels: str | None) -> tuple[bytes, bytes]:
        """The file around the graph; one with 8-bit layers says which kernels it is for."""
        key = (needs_contrib, kernels)
        if key not in self._shells:
            outer = onnx.ModelProto()
            outer.CopyFrom(self._fp32.light)
            if needs_contrib:
                outer.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
            if kernels is not None:
                outer.metadata_props.add(key=KERNELS_KEY, value=kernels)
            self._shells[key] = shell(outer)
        return self._shells[key]

    def _require_possible(self, unit: Unit, precision: Precision) -> None:
        for layer in unit.layers:
            if layer.kind is LayerKind.CONV_TRANSPOSE and precision != FP32:
                raise CompressionError(
                    f"layer group {unit.name!r} cannot take {precision.name}: onnxruntime's CPU "
                    f"provider computes a {layer.node.op_type} in FP32 alone; take fp32"
                )
            if isinstance(precision.granularity, PerBlock) and not layer.is_matrix_product:
                raise CompressionError(
                    f"layer group {unit.name!r} cannot take {precision.name}: its {layer.kind} "
                    f"{layer.name!r} is no matrix product, and only those share scales by "
                    f"blocks; take {precision.plain.name}"
                )
            if precision.is_half and layer.name not in self._fits_half:
                self._require_half(unit.name, layer)
                self._fits_half.add(layer.name)

    def _require_half(self, group: str, layer: WeightedNode) -> None:
        """float16 ends at 65,504; what lies beyond becomes infinite."""
        largest = float(np.abs(self.view.array(layer.weight)).max(initial=0.0))
        for tensor in (layer.input, layer.output):
            held = self.calibration.ranges.get(tensor)
            largest = max(largest, *((-held.low, held.high) if held else ()))
        if largest > _LARGEST_HALF:
            raise CompressionError(
                f"layer group {group!r} cannot take fp16: {layer.name!r} has values up to "
                f"{largest:g}, and 16-bit floats end at {_LARGEST_HALF:g}"
            )
