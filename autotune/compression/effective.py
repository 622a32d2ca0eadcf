"""Planned against effective precision: what the runtime really executes.

Owns the comparison. A plain onnxruntime CPU session writes the graph that it runs; a layer
counts as quantized only where a kernel for packed or integer weights takes its codes, as
float16 only where a kernel takes its 16-bit weights, and as FP32 only where no integer kernel
carries its name. Other runtimes are `shipped_runtime.py`'s, what a device's own profile shows
`profiled_precisions.py`'s.
"""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from autotune.compression.artifact_names import weight_codes
from autotune.compression.kernel_names import BLOCK_KERNELS, FLOAT_KERNELS, INTEGER_KERNELS
from autotune.compression.kernels import X86_VNNI, KernelClass
from autotune.compression.operators import WeightedNode
from autotune.compression.units import Unit
from autotune.compression.weight_only import is_blocked, packed_weight
from autotune.errors import CompressionError
from device_agents.runtimes.onnxruntime import LEVELS
from search_spaces import FP32, INT8, Precision

# onnxruntime numbers the copies of a fused node: `conv1` becomes `conv1_token_4`.
_COPY_NUMBER = re.compile(r"(_token_\d+|_nchwc|_nhwc)+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPrecision:
    """A layer group's precision as planned and as executed; `reason` says why they differ.

    `effective` is None where nobody saw what is executed, and `reason` why; `seen_in` names where
    it was seen. `stored_bits` is what a weight takes in the file, whatever it is computed with.
    """

    group: str
    planned: str
    effective: str | None
    reason: str | None
    stored_bits: int = 32
    seen_in: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {
            "group": self.group,
            "planned": self.planned,
            "effective": self.effective,
            "reason": self.reason,
            "stored_bits": self.stored_bits,
            "seen_in": self.seen_in,
        }


def effective_precisions(
    artifact: bytes,
    units: Iterable[Unit],
    planned: Mapping[str, Precision],
    *,
    kernels: KernelClass = X86_VNNI,
    graph_level: str = "all",
    stands_in: KernelClass | None = None,
) -> tuple[GroupPrecision, ...]:
    """One entry per layer group, in graph order; groups not planned are FP32.

    The graph is what this machine's onnxruntime makes of the artifact at that graph level, on
    its processor; `kernels` is the device's class, for what that has and this machine has not.
    `stands_in` is the class that the artifact was written for where it is not the device's.

    Raises:
        CompressionError: onnxruntime does not load the artifact.
    """
    graph = optimized_graph(artifact, graph_level=graph_level)
    seen_in = f"onnxruntime {onnxruntime.__version__} on {platform.machine()}"
    if stands_in is not None:
        seen_in = f"a {stands_in.scheme} stand-in for the {kernels.scheme} file, {seen_in}"
    executed = _Executed(graph, has_half=kernels.has_half, seen_in=seen_in)
    return tuple(_compare(unit, planned.get(unit.name, FP32), executed) for unit in units)


def optimized_graph(artifact: bytes, *, graph_level: str = "all") -> onnx.ModelProto:
    """The graph that an onnxruntime CPU session executes; a plain one's level is `all`.

    Raises:
        CompressionError: onnxruntime does not load the artifact.
    """
    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.intra_op_num_threads = 1
        options.graph_optimization_level = LEVELS[graph_level]
        options.log_severity_level = 3  # it warns that the file fits this machine alone
        # Packing weights for the kernels comes after the graph is final; it is a third of the time.
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime's exceptions share no public base class
            raise CompressionError(f"onnxruntime does not load the artifact: {error}") from error
        return onnx.load(str(path))


class _Executed:
    """Look-ups over the graph that runs."""

    def __init__(self, model: onnx.ModelProto, *, has_half: bool, seen_in: str) -> None:
        self.device_has_half = has_half
        self.seen_in = seen_in
        self.producer: dict[str, onnx.NodeProto] = {}
        self.takers: dict[str, list[onnx.NodeProto]] = {}
        self.integer_nodes: set[str] = set()
        for node in model.graph.node:
            self.producer.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.takers.setdefault(name, []).append(node)
            if node.op_type in INTEGER_KERNELS:
                self.integer_nodes.add(_COPY_NUMBER.sub("", node.name))
        self.outputs = {value.name for value in model.graph.output}
        self.halves = {
            tensor.name
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT16
        }

    def taker(self, name: str) -> onnx.NodeProto | None:
        """The first node that takes the tensor."""
        return next(iter(self.takers.get(name, ())), None)


def _compare(unit: Unit, planned: Precision, executed: _Executed) -> GroupPrecision:
    reasons = [
        reason
        for layer in unit.layers
        if (reason := _difference(layer, planned, executed)) is not None
    ]
    effective: str | None = planned.name
    if reasons and planned.is_float:
        effective = INT8.name
    elif reasons:
        effective = None if planned.is_half and executed.device_has_half else FP32.name
    return GroupPrecision(
        group=unit.name,
        planned=planned.name,
        effective=effective,
        reason="; ".join(reasons) or None,
        stored_bits=planned.weight_bits,
        seen_in=executed.seen_in if effective else None,
    )


def _difference(layer: WeightedNode, planned: Precision, executed: _Executed) -> str | None:
    """Why the layer does not run as planned; None where it does."""
    if not planned.is_int8 and layer.name in executed.integer_nodes:
        return f"the runtime quantizes {layer.name!r} on its own"
    if planned.is_float:
        return None
    if planned.is_half:
        return _no_half(layer, executed)
    if planned.is_weight_only and not is_blocked(layer, planned):
        return _unpacked(layer, planned, executed)
    kernels = BLOCK_KERNELS if planned.is_weight_only else INTEGER_KERNELS
    taker = executed.taker(weight_codes(layer.name, planned))
    if taker is None:
        return f"the runtime turned the weights of {layer.name!r} back into float"
    if planned.activation_bits == 16:
        return (
            f"missing kernel: no {layer.node.op_type} of this runtime takes 16-bit activations; "
            f"{layer.name!r} computes in float on what {taker.op_type} gives it"
        )
    if taker.op_type in kernels:
        return None
    if taker.op_type == "DequantizeLinear":
        return _not_fused(layer, taker, executed)
    return f"the quantized weights of {layer.name!r} go to {taker.op_type}, which is float"


def _no_half(layer: WeightedNode, executed: _Executed) -> str | None:
    weight = f"{layer.weight}/half"
    taker = executed.taker(weight)
    if weight in executed.halves and taker is not None and taker.op_type in FLOAT_KERNELS:
        return None
    if executed.device_has_half:
        return (
            f"not seen: the device's processor has float16 arithmetic, the machine on which "
            f"{layer.name!r} was checked has not"
        )
    return (
        f"missing kernel: this runtime has no float16 {layer.node.op_type} here; {layer.name!r} "
        "computes in float32 between casts"
    )


def _unpacked(layer: WeightedNode, planned: Precision, executed: _Executed) -> str:
    """Codes of few bits that a float layer multiplies with: small in the file alone."""
    prefix = f"{packed_weight(layer.name, planned)}/"
    repeated = any(name.startswith(prefix) for name in executed.producer)
    when = "at every run" if repeated else "when the file is loaded"
    return (
        f"missing kernel: no {layer.node.op_type} takes packed {planned.weight_bits}-bit weights; "
        f"those of {layer.name!r} are unpacked {when} and computed with in float"
    )


def _not_fused(layer: WeightedNode, dequantize: onnx.NodeProto, executed: _Executed) -> str:
    """Which side of the layer kept its Q/DQ from becoming an integer kernel."""
    node = executed.taker(dequantize.output[0])
    if node is None:
        return f"the runtime turned the weights of {layer.name!r} back into float"
    fed_by = executed.producer.get(node.input[0])
    if fed_by is None or fed_by.op_type != "DequantizeLinear":
        source = "the model's input" if fed_by is None else fed_by.op_type
        return f"un-fused Q/DQ: {layer.name!r} gets its data as float from {source}"
    floats = [t.op_type for t in executed.takers.get(node.output[0], ())]
    floats = [op for op in floats if op != "QuantizeLinear"]
    if node.output[0] in executed.outputs:
        floats.append("the model's output")
    if floats:
        return f"float consumer: {layer.name!r} gives its result as float to {floats[0]}"
    return (
        f"missing kernel: the runtime leaves the {node.op_type} {layer.name!r} between Q and DQ "
        "and computes in float"
    )
