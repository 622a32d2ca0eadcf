"""Ranges of the tensors that may be quantized, from one run of the FP32 graph.

Owns what an activation's 8 bits stand for. The graph runs once per base and leaves, per tensor,
a histogram, its least and largest value, and those of each channel; every candidate of that
base derives its scales from them. What a Relu behind a residual Add swallows does not count.
How a range follows from a histogram is `histograms.py`'s knowledge, how channels share a range
`equalization.py`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper

from autotune.compression.graph import GraphView
from autotune.compression.histograms import LEVELS, Histogram, choose_range, upper_end
from autotune.compression.operators import (
    INT8_OPERATORS,
    clip_bounds,
    find_layers,
    is_residual_add,
)
from autotune.compression.session import Session
from autotune.errors import CompressionError

_LEAST_WIDTH = 2.0**-50
_MEMORY_BYTES = 256 * 1024 * 1024
HARD_SWISH_START = -3.0
"""HardSwish is 0 below: codes spent there are wasted."""
_COUNTED = 1 << 20
"""Values per tensor and batch that go into its histogram, evenly spaced; extremes see all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The values that a tensor takes, in real numbers; zero is always inside.

    A range narrower than 1e-15 counts as zero alone: a bias would need a scale, (input scale x
    weight scale), that float32 rounds to 0.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if self.high - self.low < _LEAST_WIDTH:
            object.__setattr__(self, "low", 0.0)
            object.__setattr__(self, "high", 0.0)

    @property
    def scale(self) -> float:
        """The step of an unsigned 8-bit code; 1 for a tensor that is always zero."""
        width = self.high - self.low
        return float(np.float32(width / LEVELS)) or 1.0

    @property
    def zero_point(self) -> int:
        """The code of 0.0."""
        return min(max(round(-self.low / self.scale), 0), LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRange:
    """The least and the largest value of each channel (the first axis after the batch)."""

    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the tensors hold, on how many samples.

    Of a term of a sum that a Relu cuts, only what is felt behind it (`felt_values`).

    `ranges` has a range per tensor, `methods` how it was chosen; `channels` the extremes of
    each channel and `histograms` the distribution, from which other ranges can be derived.
    """

    ranges: Mapping[str, Range]
    n_samples: int
    methods: Mapping[str, str] = field(default_factory=dict)
    channels: Mapping[str, ChannelRange] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict, compare=False)

    def to_text(self) -> str:
        """JSON; floats are written exactly."""
        document = {
            "n_samples": self.n_samples,
            "ranges": {name: (r.low, r.high) for name, r in self.ranges.items()},
            "methods": dict(self.methods),
            "channels": {name: (c.low, c.high) for name, c in self.channels.items()},
            "histograms": {name: h.to_json() for name, h in self.histograms.items()},
        }
        return json.dumps(document, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Calibration:
        """The calibration that `to_text` wrote."""
        document = json.loads(text)
        return cls(
            n_samples=document["n_samples"],
            ranges={n: Range(low=a, high=b) for n, (a, b) in document["ranges"].items()},
            methods=document["methods"],
            channels={
                n: ChannelRange(low=tuple(a), high=tuple(b))
                for n, (a, b) in document["channels"].items()
            },
            histograms={n: Histogram.from_json(h) for n, h in document["histograms"].items()},
        )

    def min_max(self) -> Calibration:
        """The same statistics, every range from the least to the largest value."""
        ranges = {
            name: Range(low=min(0.0, *c.low), high=max(0.0, *c.high))
            for name, c in self.channels.items()
        }
        return replace(
            self, ranges={**self.ranges, **ranges}, methods=dict.fromkeys(ranges, "min-max")
        )


def calibrate(model: onnx.ModelProto, samples: np.ndarray, *, threads: int = 1) -> Calibration:
    """The range of every tensor that a candidate may quantize, by the method of least error.

    `samples` has shape `(n, ...)`. Batches are as large as 256 MiB of activations allow.

    Raises:
        CompressionError: there are no samples, or a tensor becomes NaN or infinite on them.
    """
    if len(samples) == 0:
        raise CompressionError("there are no calibration samples; give at least one")
    view = GraphView(model)
    names = quantizable_tensors(view)
    inner = [name for name in names if name != view.input_name]
    seen = {name: _Seen() for name in names}
    partners = cut_terms(view)
    for values in tensor_batches(view, inner, samples, threads=threads):
        for name in names:
            value = values[name]
            if name in partners:
                value = felt_values(value, values[partners[name]])
            seen[name].add(name, value)
    peaked = peaked_tensors(view)
    chosen = {name: seen[name].chosen_range(felt_from=peaked.get(name)) for name in names}
    return Calibration(
        n_samples=len(samples),
        ranges={name: held for name, (_, held) in chosen.items()},
        methods={name: method for name, (method, _) in chosen.items()},
        channels={name: seen[name].channels() for name in names},
        histograms={name: seen[name].histogram for name in names},
    )


def tensor_batches(
    view: GraphView, names: Sequence[str], samples: np.ndarray, *, threads: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Those inner tensors of the FP32 graph and its input, a few samples at a time."""
    session = Session(_with_outputs(view.model, names), threads=threads)
    per_sample = sum(4 * math.prod(view.shape(name)) for name in (*names, view.input_name))
    batch = max(1, min(len(samples), _MEMORY_BYTES // max(per_sample, 1)))
    for start in range(0, len(samples), batch):
        part = np.ascontiguousarray(samples[start : start + batch], dtype=np.float32)
        found = session.run({view.input_name: part}, list(names)) if names else []
        yield {**dict(zip(names, found, strict=True)), view.input_name: part}


class _Seen:
    """What one tensor has held so far."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self._low: np.ndarray | None = None
        self._high: np.ndarray | None = None

    def add(self, name: str, value: np.ndarray) -> None:
        if not value.size:
            return  # a Slice may leave nothing over
        others = (0, *range(2, value.ndim))
        low, high = value.min(axis=others), value.max(axis=others)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CompressionError(
                f"tensor {name!r} becomes NaN or infinite on the calibration samples; check the "
                "model's weights and the data"
            )
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)
        self.histogram.add(value.ravel()[:: -(-value.size // _COUNTED)])

    def chosen_range(self, *, felt_from: float | None) -> tuple[str, Range]:
        """The method and its range; that of a peaked tensor is drawn in at its upper end."""
        held = self.channels()
        low, high = min(0.0, *held.low, 0.0), max(0.0, *held.high, 0.0)
        if high - low < _LEAST_WIDTH:
            return "min-max", Range(low=low, high=high)
        method, (low, high) = choose_range(self.histogram, low, high)
        if felt_from is not None:
            high = upper_end(self.histogram, max(low, felt_from), high)
        return method, Range(low=low, high=high)

    def channels(self) -> ChannelRange:
        if self._low is None or self._high is None:
            return ChannelRange(low=(0.0,), high=(0.0,))
        low, high = (np.atleast_1d(x) for x in (self._low, self._high))
        return ChannelRange(low=tuple(float(x) for x in low), high=tuple(float(x) for x in high))


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


def peaked_tensors(view: GraphView) -> dict[str, float]:
    """What a HardSwish takes and makes and the products of that, with the least value felt.

    The peaks of a few images in one channel would set the step of all of their channels.
    """
    found: dict[str, float] = {}
    for node in view.nodes:
        if node.op_type == "HardSwish":
            found[node.input[0]] = HARD_SWISH_START
            for name in (node.output[0], *_products(view, node.output[0])):
                found[name] = -math.inf
    return found


def _products(view: GraphView, tensor: str) -> list[str]:
    takers = view.consumers.get(tensor, [])
    return [str(taker.output[0]) for taker in takers if taker.op_type == "Mul"]


def cut_terms(view: GraphView) -> dict[str, str]:
    """Each term of a residual Add that a Relu (or ReLU6) alone takes, with the other term.

    A term that something else takes as well, as the shortcut, is felt there too and is left out.
    """
    partners: dict[str, str] = {}
    for node in view.nodes:
        taker = view.only_consumer(node.output[0]) if is_residual_add(view, node) else None
        bounds = clip_bounds(view, taker) if taker is not None else None
        if bounds is None or bounds[0] != 0.0:
            continue
        for term, other in (node.input, reversed(node.input)):
            if view.only_consumer(term) is not None and term != other:
                partners[str(term)] = str(other)
    return partners


def felt_values(term: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A term of `max(term + other, 0)` without what the bound swallows.

    Below `-other` the sum is cut off at 0 whatever the term is, so values between there and 0
    are as good: a range that holds these gives the same sums, with smaller steps. It is as good
    for both terms at once: two that are cut at their ranges' lower ends are both negative.
    """
    felt: np.ndarray = np.maximum(term, np.minimum(-other, 0))
    return felt


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """The FP32 graph with those tensors as its outputs."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    del graph.graph.output[:]
    graph.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return graph.SerializeToString()
