"""Quantized weights: the arithmetic from float arrays to codes and scales.

Owns rounding and packing alone; where they go in a graph is `quantization.py`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

INT8_MAX = 127
# A bias is stored as int32 in steps of (input scale x weight scale); half the range is kept
# free for the accumulator that it is added to.
_BIAS_MAX = 2**30
BLOCK = 32
# Weights per scale of a block-wise matrix: the smallest that onnxruntime's MatMulNBits has in
# all its kernels; smaller blocks are more accurate.


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Signed 8-bit codes, and a float32 scale per output channel (`axis` of the weight)."""

    codes: np.ndarray
    scale: np.ndarray
    axis: int


def quantize_weight(
    weight: np.ndarray, *, axis: int, input_scale: float, bias: np.ndarray | None
) -> QuantizedWeight:
    """Symmetric per-channel codes in [-127, 127]; a channel of zeros gets scale 1.

    A channel whose bias would not fit into int32 gets a larger scale than its weights need.
    """
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight.astype(np.float64)).max(axis=others)
    scale = largest / INT8_MAX
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (input_scale * _BIAS_MAX))
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = weight / scale.reshape(shape).astype(np.float64)
    codes = np.clip(np.rint(steps), -INT8_MAX, INT8_MAX).astype(np.int8)
    return QuantizedWeight(codes=codes, scale=scale, axis=axis)


def quantize_bias(
    bias: np.ndarray, *, input_scale: float, weight_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Int32 codes and their float32 scales, input scale x weight scale."""
    scale = (np.float32(input_scale) * weight_scale).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(codes, -_BIAS_MAX, _BIAS_MAX).astype(np.int32), scale


def pack_blocks(matrix: np.ndarray, *, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A `(n, k)` matrix as MatMulNBits wants it: codes `(n, k_blocks, bytes)`, scales.

    Every `BLOCK` weights along k share a scale; the code of zero is `2 ** (bits - 1)`. The
    scale maps a block's largest weight onto the most negative code, which uses all codes
    (as llama.cpp's Q4_0 does). Scales are float32, `(n * k_blocks,)`.
    """
    n, k = matrix.shape
    k_blocks = -(-k // BLOCK)
    padded = np.zeros((n, k_blocks * BLOCK), dtype=np.float32)
    padded[:, :k] = matrix
    blocks = padded.reshape(n, k_blocks, BLOCK)
    offset = 2 ** (bits - 1)
    where = np.abs(blocks).argmax(axis=2)[..., None]
    extreme = np.take_along_axis(blocks, where, axis=2)
    scale = np.where(extreme == 0, 1.0, extreme / -offset).astype(np.float32)
    codes = np.clip(np.rint(blocks / scale) + offset, 0, 2 * offset - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return np.ascontiguousarray(codes), scale.reshape(-1)
