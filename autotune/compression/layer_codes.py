"""The 8-bit weights and the 32-bit bias of one layer in one candidate.

Owns what they follow from: the base's rounded weights where they were made for the same codes,
stretched channels before and behind the layer, and what an absorbed activation adds to the
bias. The arithmetic is `weights.py`'s; `graph_writer.py` writes the arrays into a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autotune.compression.equalization import Stretched, channel_factors
from autotune.compression.operators import WeightedNode
from autotune.compression.rounding import Rounding
from autotune.compression.weights import (
    BIAS_MAX,
    INT8_MAX,
    QuantizedWeight,
    largest_weights,
    quantize_bias,
    weight_codes,
    weight_scale,
    weight_sums,
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
    steps (per channel, of that largest code) and the bias, corrected for them, fits into int32;
    else every weight goes to its nearest code.
    """
    gain = np.ones(weight.shape[axis]) if after is None else after.factors
    factors = channel_factors(
        weight.shape,
        layer,
        inputs=None if before is None else 1 / before.factors,
        outputs=None if after is None else gain,
    )
    plain = None
    if needs_bias(layer, before, after) or shift:
        own = 0.0 if bias is None else bias.astype(np.float64)
        plain = gain * (own + offset_terms(layer, weight, axis, before, after)) + shift
    largest = largest_weights(weight, axis=axis, factors=factors)
    scale = weight_scale(
        largest,
        input_scale=input_scale,
        bias=plain,
        granularity=granularity,
        largest_code=largest_code,
    )
    codes = None
    rounded = rounding and rounding.of(
        layer.name, stretched=before is not None, largest_code=largest_code
    )
    if rounded and granularity is None:
        corrected = None if plain is None else plain - rounded.mean_error * gain
        if _has_same_steps(largest / largest_code, scale, corrected, input_scale):
            codes, plain = rounded.codes, corrected
            scale = scale * rounded.widening
    if codes is None:
        codes = weight_codes(weight, scale, axis=axis, factors=factors, largest_code=largest_code)
    return LayerCodes(
        weight=QuantizedWeight(codes=codes, scale=scale, axis=axis),
        bias=None
        if plain is None
        else quantize_bias(plain, input_scale=input_scale, weight_scale=scale),
    )


def needs_bias(layer: WeightedNode, before: Stretched | None, after: Stretched | None) -> bool:
    """The layer has a bias, or offsets around it give it one."""
    moved = any(side is not None and side.offsets.any() for side in (before, after))
    return layer.bias is not None or moved


def offset_terms(
    layer: WeightedNode,
    weight: np.ndarray,
    axis: int,
    before: Stretched | None,
    after: Stretched | None,
) -> np.ndarray:
    """What offsets add to each output's bias: W times the input's, less the output's."""
    added = np.zeros(weight.shape[axis])
    if before is not None and before.offsets.any():
        factors = channel_factors(weight.shape, layer, inputs=before.offsets)
        added += weight_sums(weight, axis=axis, factors=factors)
    return added if after is None else added - after.offsets


def _has_same_steps(
    narrowest: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, input_scale: float
) -> bool:
    """No scale was widened for its bias' sake: the codes were chosen for the narrowest steps."""
    same = (narrowest == 0) | (scale <= narrowest * (1 + 1e-6))
    if bias is not None:
        same &= np.abs(bias) <= input_scale * scale.astype(np.float64) * BIAS_MAX
    return bool(same.all())
