"""The 8-bit weights and the 32-bit bias of one layer in one candidate.

Owns what they follow from: the base's rounded weights where they were made for the same codes,
stretched channels before and behind the layer, and what an absorbed activation adds to the
bias. The arithmetic is `weights.py`'s; `graph_writer.py` writes the arrays into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autotune.compression.equalization import Stretched, scaled_weight
from autotune.compression.operators import WeightedNode
from autotune.compression.rounding import Rounding
from autotune.compression.weights import (
    BIAS_MAX,
    INT8_MAX,
    QuantizedWeight,
    quantize_bias,
    quantize_weight,
)
from search_spaces.choices import Granularity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCodes:
    """Weight codes with their scales and, where there is a bias, its codes with theirs."""

    weight: QuantizedWeight
    bias: tuple[np.ndarray, np.ndarray] | None


def layer_codes(
    layer: WeightedNode,
    weight: np.ndarray,
    bias: np.ndarray | None,
    *,
    axis: int,
    input_scale: float,
    shift: float = 0.0,
    granularity: Granularity | None = None,
    largest_code: int = INT8_MAX,
    before: Stretched | None = None,
    after: Stretched | None = None,
    rounding: Rounding | None = None,
) -> LayerCodes:
    """The codes of a layer whose input and output are stretched as said.

    `shift` is added to every bias. Rounded weights are taken where there are any for these
    steps (per channel, all 8 bits) and the bias, corrected for them, fits into int32; else
    every weight goes to its nearest code.
    """
    gain = np.ones(weight.shape[axis]) if after is None else after.factors
    folded = weight  # most layers are not stretched, and a float64 copy of them costs time
    if before is not None or after is not None:
        inputs = None if before is None else 1 / before.factors
        folded = scaled_weight(weight, layer, inputs=inputs, outputs=gain)
    plain = None
    if needs_bias(layer, before, after) or shift:
        own = 0.0 if bias is None else bias.astype(np.float64)
        plain = gain * (own + _offset_terms(layer, weight, axis, before, after)) + shift
    quantized = quantize_weight(
        folded,
        axis=axis,
        input_scale=input_scale,
        bias=plain,
        granularity=granularity,
        largest_code=largest_code,
    )
    variants = rounding and (rounding.plain if before is None else rounding.stretched)
    rounded = variants and variants.get(layer.name)
    if rounded and granularity is None and largest_code == INT8_MAX:
        corrected = None if plain is None else plain - rounded.mean_error * gain
        if _has_same_steps(folded, quantized, corrected, input_scale):
            quantized = QuantizedWeight(codes=rounded.codes, scale=quantized.scale, axis=axis)
            plain = corrected
    return LayerCodes(
        weight=quantized,
        bias=None
        if plain is None
        else quantize_bias(plain, input_scale=input_scale, weight_scale=quantized.scale),
    )


def needs_bias(layer: WeightedNode, before: Stretched | None, after: Stretched | None) -> bool:
    """The layer has a bias, or offsets around it give it one."""
    moved = any(side is not None and side.offsets.any() for side in (before, after))
    return layer.bias is not None or moved


def _offset_terms(
    layer: WeightedNode,
    weight: np.ndarray,
    axis: int,
    before: Stretched | None,
    after: Stretched | None,
) -> np.ndarray:
    """What offsets add to each output's bias: W times the input's, less the output's."""
    added = np.zeros(weight.shape[axis])
    if before is not None and before.offsets.any():
        others = tuple(a for a in range(weight.ndim) if a != axis)
        added += scaled_weight(weight, layer, inputs=before.offsets).sum(axis=others)
    return added if after is None else added - after.offsets


def _has_same_steps(
    folded: np.ndarray, quantized: QuantizedWeight, bias: np.ndarray | None, input_scale: float
) -> bool:
    """No scale was widened for its bias' sake: the codes were chosen for max / 127."""
    others = tuple(a for a in range(folded.ndim) if a != quantized.axis)
    largest = np.abs(folded).max(axis=others)
    same = (largest == 0) | (quantized.scale <= largest / INT8_MAX * (1 + 1e-6))
    if bias is not None:
        same &= np.abs(bias) <= input_scale * quantized.scale.astype(np.float64) * BIAS_MAX
    return bool(same.all())
