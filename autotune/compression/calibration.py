"""Ranges of the tensors that may be quantized, from one run of the FP32 graph.

Owns what an activation's 8 bits stand for. It is done once per base; every candidate of
that base derives its scales from the same ranges. They are least and largest value: narrower
ones were tried on models trained on digits and multiplied the KL divergence of uniform INT8
(mobilenet_v2: 0.00025 nats, 0.0025 with ranges of least square error, 0.0094 with 0.01 %
percentiles; mobilenet_v3_small: 0.00075, 0.0010, 0.0015).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from autotune.compression.graph import GraphView
from autotune.compression.units import INT8_OPERATORS, find_layers
from autotune.errors import CompressionError

LEVELS = 255
_LEAST_WIDTH = 2.0**-50
# A tensor whose values all lie within 1e-15 counts as zero: in steps of such a range a bias
# would need a scale, (input scale x weight scale), that float32 rounds to 0.
_MEMORY_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The values that a tensor takes, in real numbers; zero is always inside."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """The step of an unsigned 8-bit code; 1 for a tensor that is always zero."""
        width = self.high - self.low
        return float(np.float32(width / LEVELS)) or 1.0

    @property
    def zero_point(self) -> int:
        """The code of 0.0."""
        return int(np.clip(round(-self.low / self.scale), 0, LEVELS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A range per tensor name, and how many samples it was seen on."""

    ranges: Mapping[str, Range]
    n_samples: int

    def to_text(self) -> str:
        """JSON; floats are written exactly."""
        pairs = {name: (r.low, r.high) for name, r in sorted(self.ranges.items())}
        return json.dumps({"n_samples": self.n_samples, "ranges": pairs}, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Calibration:
        """The calibration that `to_text` wrote."""
        document = json.loads(text)
        return cls(
            n_samples=document["n_samples"],
            ranges={n: Range(low=a, high=b) for n, (a, b) in document["ranges"].items()},
        )


def calibrate(model: onnx.ModelProto, samples: np.ndarray, *, threads: int = 1) -> Calibration:
    """The range of every tensor that a candidate may quantize: its least and largest value.

    `samples` has shape `(n, ...)`. Batches are as large as 256 MiB of activations allow.

    Raises:
        CompressionError: there are no samples, or a tensor becomes NaN or infinite on them.
    """
    if len(samples) == 0:
        raise CompressionError("there are no calibration samples; give at least one")
    view = GraphView(model)
    names = quantizable_tensors(view)
    session = _session(model, [n for n in names if n != view.input_name], threads)
    per_sample = sum(4 * math.prod(view.shape(name)) for name in names)
    batch = max(1, min(len(samples), _MEMORY_BYTES // max(per_sample, 1)))
    low = dict.fromkeys(names, 0.0)
    high = dict.fromkeys(names, 0.0)
    outputs = [output.name for output in session.get_outputs()]
    for start in range(0, len(samples), batch):
        part = np.ascontiguousarray(samples[start : start + batch], dtype=np.float32)
        values = {view.input_name: part}
        if outputs:
            results = session.run(outputs, {view.input_name: part})
            values |= dict(zip(outputs, results, strict=True))
        for name in names:
            # numpy's minimum keeps a NaN, Python's loses it
            low[name] = float(np.minimum(low[name], values[name].min()))
            high[name] = float(np.maximum(high[name], values[name].max()))
    _require_finite(low, high)
    return Calibration(
        n_samples=len(samples),
        ranges={name: _range(low[name], high[name]) for name in names},
    )


def _range(low: float, high: float) -> Range:
    is_zero = high - low < _LEAST_WIDTH
    return Range(low=0.0, high=0.0) if is_zero else Range(low=low, high=high)


def quantizable_tensors(view: GraphView) -> list[str]:
    """Inputs and outputs of everything that may run on 8-bit data, in graph order."""
    names: dict[str, None] = {}
    for layer in find_layers(view):
        names.update(dict.fromkeys((layer.input, layer.output)))
    for node in view.nodes:
        if node.op_type in INT8_OPERATORS:
            names.update(dict.fromkeys((*view.data_inputs(node), node.output[0])))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED)
    return [n for n in names if view.rank(n) > 0 and view.element_type(n) in floats]


def _session(
    model: onnx.ModelProto, names: Sequence[str], threads: int
) -> onnxruntime.InferenceSession:
    """The FP32 graph with those tensors as its outputs."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    del graph.graph.output[:]
    graph.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _require_finite(low: Mapping[str, float], high: Mapping[str, float]) -> None:
    for name, value in low.items():
        if not (math.isfinite(value) and math.isfinite(high[name])):
            raise CompressionError(
                f"tensor {name!r} becomes NaN or infinite on the calibration samples; check the "
                "model's weights and the data"
            )
