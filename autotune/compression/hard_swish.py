"""HardSwish in 8 bits: `x * clip(x + 3, 0, 6) / 6`, with channels stretched where that pays.

Owns which HardSwishes let factors pass, how large those may get, and the gate that takes them
back. HardSwish is not homogeneous, but the product is in `x`: where `a x` is stored in place of
`x`, a depthwise convolution of weights `1 / a` and bias 3 makes the same gate that adding 3
makes otherwise. `equalization.py` joins these channels with those around them, `graph_writer.py`
writes the nodes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx

from autotune.compression.calibration import (
    HARD_SWISH_START,
    Calibration,
    ChannelRange,
    peaked_tensors,
)
from autotune.compression.graph import GraphView

HARD_SWISH_SHIFT = 3.0
"""x * clip(x + 3, 0, 6) / 6 (Howard et al. 2019, "Searching for MobileNetV3", section 5.2)."""

LEAST_CHANNELS = 32
"""HardSwishes of fewer channels keep them as they are.

The convolution is slow on few channels. Add and Mul against convolution and Mul in onnxruntime
1.31, one core with VNNI, in us: 16 x 112 x 112 51 and 95, 64 x 28 x 28 13 and 16, 240 x 14 x 14
13 and 16, 576 x 7 x 7 10 and 9. (An Add of a number per channel is slower still on few channels.)
"""

LEAST_GAIN = 1.1
"""Channels are stretched where rounding then costs less by this factor: the gate costs time.

On mobilenet_v3_small (64x64) 17 gates made by convolutions take 4 % of the
model's time more than 17 Adds; 15 of them gain as much.
"""
_ROOMS = np.geomspace(1.0, 6.0, 25)


def has_free_gate(view: GraphView, node: onnx.NodeProto) -> bool:
    """The HardSwish takes images of enough channels that a node made for it alone."""
    shape, tensor = view.shape(node.input[0]), str(node.input[0])
    return (
        len(shape) == 3
        and shape[0] >= LEAST_CHANNELS
        and tensor in view.producer
        and view.only_consumer(tensor) is not None
    )


def gate_arrays(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(C, 1, 1, 1)` and bias `(C,)` of the convolution that makes `x + 3` of `a x`."""
    weight = (1 / factors).astype(np.float32)[:, None, None, None]
    return weight, np.full(len(factors), HARD_SWISH_SHIFT, np.float32)


def felt_channels(
    view: GraphView, calibration: Calibration, *, headroom: float
) -> dict[str, ChannelRange]:
    """The extremes of each channel; around a HardSwish as far as they are felt.

    It is 0 below -3, which a channel gets to by the headroom; above it ends where the tensor's
    own range does, which does not follow the peaks of a few images.
    """
    felt = dict(calibration.channels)
    for name, start in peaked_tensors(view).items():
        if name not in felt:
            continue
        low, end = felt[name].low, calibration.ranges[name].high
        if math.isfinite(start):
            low = tuple(max(headroom * x, start) for x in low)
        felt[name] = replace(felt[name], low=low, high=tuple(min(x, end) for x in felt[name].high))
    return felt


def swish_factors(wanted: np.ndarray, taken: ChannelRange, made: ChannelRange) -> np.ndarray:
    """Of the factors wanted behind a HardSwish, as much as serves what it takes as well; `(C,)`.

    Most channels it takes reach down to -3, so each factor lowers the end of the range that they
    share. The largest factor is the one at which rounding what it takes and what it makes
    costs least: the sum of both squared steps as a channel has them, in the mean of the channels.
    """
    ends = [(np.minimum(held.low, 0.0), np.maximum(held.high, 0.0)) for held in (taken, made)]
    reach = np.maximum(-ends[0][0], 1e-9)

    def cost(factors: np.ndarray) -> float:
        widths = [(factors * high).max() - (factors * low).min() for low, high in ends]
        return float(np.square(widths).sum() * (1 / factors**2).mean())

    none = np.ones(len(wanted))
    limits = (np.maximum(1.0, -HARD_SWISH_START * room / reach) for room in _ROOMS)
    best = min((np.clip(wanted, 1.0, limit) for limit in limits), key=cost)
    return best if cost(none) >= LEAST_GAIN * cost(best) else none
