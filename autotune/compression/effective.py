"""Planned against effective precision: what the runtime really executes.

Owns the comparison. A plain onnxruntime CPU session writes the graph that it runs; a layer
counts as quantized only where an integer kernel takes its quantized weights, and as FP32 only
where no integer kernel carries its name. Kernels of other runtimes are the device's business.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from autotune.compression.quantization import weight_codes
from autotune.compression.units import Unit
from autotune.errors import CompressionError
from search_spaces import FP32, INT8, Precision

INTEGER_KERNELS = frozenset(
    {
        "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger",
        "ConvInteger",
    }
)  # fmt: skip
_BLOCK_KERNELS = frozenset({"MatMulNBits"})
# onnxruntime numbers the copies of a fused node: `conv1` becomes `conv1_token_4`.
_COPY_NUMBER = re.compile(r"(_token_\d+|_nchwc|_nhwc)+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPrecision:
    """A layer group's precision as planned and as executed; `reason` says why they differ."""

    group: str
    planned: str
    effective: str
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {
            "group": self.group,
            "planned": self.planned,
            "effective": self.effective,
            "reason": self.reason,
        }


def effective_precisions(
    artifact: bytes, units: Iterable[Unit], planned: Mapping[str, Precision]
) -> tuple[GroupPrecision, ...]:
    """One entry per layer group, in graph order; groups not planned are FP32.

    Raises:
        CompressionError: onnxruntime does not load the artifact.
    """
    executed = optimized_graph(artifact)
    takers: dict[str, str] = {}
    integer_nodes = set()
    for node in executed.graph.node:
        for name in node.input:
            takers.setdefault(name, node.op_type)
        if node.op_type in INTEGER_KERNELS:
            integer_nodes.add(_COPY_NUMBER.sub("", node.name))
    return tuple(
        _compare(unit, planned.get(unit.name, FP32), takers, integer_nodes) for unit in units
    )


def optimized_graph(artifact: bytes) -> onnx.ModelProto:
    """The graph that a plain onnxruntime CPU session with default options executes.

    Raises:
        CompressionError: onnxruntime does not load the artifact.
    """
    with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path)
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it warns that the file fits this machine alone
        # Packing weights for the kernels comes after the graph is final; it is a third of the time.
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime's exceptions share no public base class
            raise CompressionError(f"onnxruntime does not load the artifact: {error}") from error
        return onnx.load(str(path))


def _compare(
    unit: Unit, planned: Precision, takers: Mapping[str, str], integer_nodes: set[str]
) -> GroupPrecision:
    reasons = [
        reason
        for layer in unit.layers
        if (reason := _difference(layer.name, planned, takers, integer_nodes)) is not None
    ]
    effective = planned
    if reasons:
        effective = INT8 if planned.is_float else FP32
    return GroupPrecision(
        group=unit.name,
        planned=planned.name,
        effective=effective.name,
        reason="; ".join(reasons) or None,
    )


def _difference(
    layer: str, planned: Precision, takers: Mapping[str, str], integer_nodes: set[str]
) -> str | None:
    if planned.is_float:
        if layer in integer_nodes:
            return f"the runtime quantizes {layer!r} on its own"
        return None
    kernels = _BLOCK_KERNELS if planned.is_weight_only else INTEGER_KERNELS
    taker = takers.get(weight_codes(layer, planned))
    if taker in kernels:
        return None
    if taker is None:
        return f"the runtime turned the weights of {layer!r} back into float"
    return f"the quantized weights of {layer!r} go to {taker}, which computes in float"
