"""Constants that 8-bit operators without weights of their own take.

Owns their arithmetic: the operand of an Add or Mul, and a BatchNorm as the depthwise
convolution that it equals. Layers' weights are `weights.py`'s; `graph_writer.py` writes both.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autotune.compression.calibration import Range
from autotune.compression.histograms import LEVELS
from autotune.compression.weights import quantize_bias, quantize_weight


def operand_codes(array: np.ndarray) -> tuple[np.ndarray, Range]:
    """Unsigned 8-bit codes of a constant operand, and the range that they cover."""
    held = Range(low=min(0.0, float(array.min())), high=max(0.0, float(array.max())))
    codes = np.rint(array.astype(np.float64) / held.scale) + held.zero_point
    return np.clip(codes, 0, LEVELS).astype(np.int32), held


def norm_arrays(
    names: tuple[str, str],
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    input_scale: float,
    largest_code: int,
) -> Mapping[str, np.ndarray]:
    """Codes, scales and zero points of a norm's weights `(C, 1, ...)` and bias `(C,)`.

    One weight per channel and one scale per weight: rounding costs nothing.
    """
    quantized = quantize_weight(
        weight, axis=0, input_scale=input_scale, bias=bias, largest_code=largest_code
    )
    codes, scale = quantize_bias(bias, input_scale=input_scale, weight_scale=quantized.scale)
    return coded_constant(names[0], quantized.codes, quantized.scale) | coded_constant(
        names[1], codes, scale
    )


def coded_constant(name: str, codes: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """Codes, scales and zero points of a symmetric tensor."""
    zeros = np.zeros(scale.shape, codes.dtype)
    return {f"{name}/q": codes, f"{name}/scale": scale, f"{name}/zero_point": zeros}
