"""What tensors and nodes of a candidate's file are called, after those of the FP32 graph.

Owns the names, so that who reads a file (`effective.py`, `layer_times.py`) and who keeps the
FP32 graph free of them (`cleanup.py`) say what `graph_writer.py` wrote.
"""

from __future__ import annotations

import numpy as np

from autotune.compression.graph import GraphView
from autotune.compression.weight_only import packed_weight
from search_spaces import INT8, Precision

TAKEN_SUFFIXES = (
    "/q",
    "/dq",
    "/raw",
    "/scale",
    "/zero_point",
    "/guarded",
    "/three",
    "/sum",
    "/gate",
    "/gates",
    "/half",
    "/float",
    "/q16",
    "/dq16",
    "/raw16",
)
"""Ends of the names that are made; none of the FP32 graph's own tensors ends so."""


def weight_codes(layer: str, precision: Precision) -> str:
    """The initializer that holds a layer's quantized weights in an artifact."""
    return f"{weight_prefix(layer, precision)}/q"


def weight_prefix(layer: str, precision: Precision) -> str:
    """The prefix of the layer's weight codes, scales and zero points."""
    plain = f"{layer}.weight"
    is_usual = precision.plain == INT8 and precision.granularity is None
    return plain if is_usual else packed_weight(layer, precision)


def scale_name(scale: float) -> str:
    """The constant with that scale: equal scales are the same tensor everywhere."""
    return f"scale/{np.float32(scale).tobytes().hex()}"


def raw_name(tensor: str) -> str:
    """What an 8-bit node makes, before its Q."""
    return f"{tensor}/raw"


def dequantized_name(view: GraphView, tensor: str) -> str:
    """A DQ's output; the graph's own output keeps its name."""
    return tensor if tensor == view.output_name else f"{tensor}/dq"
