"""Quantized weights: the arithmetic from float arrays to codes and scales.

Owns rounding and packing alone; which precision a layer takes, and where the codes go in a
graph, is the business of `weight_only.py` and `graph_writer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from search_spaces.choices import DEFAULT_BLOCK, Granularity, PerChannel, PerTensor

INT8_MAX = 127
# A bias is stored as int32 in steps of (input scale x weight scale); half the range is kept
# free for the accumulator that it is added to.
BIAS_MAX = 2**30
# Least and largest step of a weight's codes: times an input scale, both stay float32 numbers.
# Weights under 1e-15 count as zero.
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-58, 2.0**64
_VALUES_AT_ONCE = 2**17
BLOCK = DEFAULT_BLOCK
# With four codes the largest weight is a bad guide: of these fractions of it, each group of
# weights takes the one with the least square error (a grid search as in Banner et al. 2019,
# "Post training 4-bit quantization", section 2, with the error measured, not modelled).
_SHRINKS_OF_2_BITS = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Signed 8-bit codes, and float32 scales.

    `scale` has one entry per output channel (`axis` of the weight), or the shape () where all
    weights share it.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedWeight:
    """Unsigned codes of few bits: weight = (code - zero) * scale.

    `codes` is uint8 in the weight's own shape, one code per entry; `zero` and `scale` are
    float32 and broadcast against it.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedMatrix:
    """A matrix as MatMulNBits wants it.

    `codes` are uint8 of shape `(n, k_blocks, bytes)`, `scale` float32 `(n * k_blocks,)`, `zero`
    the packed codes of zero, or None where that is `2 ** (bits - 1)` everywhere.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None


def quantize_weight(
    weight: np.ndarray,
    *,
    axis: int,
    input_scale: float,
    bias: np.ndarray | None,
    granularity: Granularity | None = None,
    largest_code: int = INT8_MAX,
    factors: Sequence[np.ndarray] = (),
) -> QuantizedWeight:
    """Symmetric codes in [-largest_code, largest_code]; a channel of zeros gets scale 1.

    `factors` broadcast against the weight; what is quantized is the product of all.
    """
    scale = weight_scale(
        largest_weights(weight, axis=axis, factors=factors),
        input_scale=input_scale,
        bias=bias,
        granularity=granularity,
        largest_code=largest_code,
    )
    codes = weight_codes(weight, scale, axis=axis, factors=factors, largest_code=largest_code)
    return QuantizedWeight(codes=codes, scale=scale, axis=axis)


def largest_weights(
    weight: np.ndarray, *, axis: int, factors: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """The largest magnitude in each output channel (`axis`), float32."""
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.zeros(weight.shape[axis], np.float32)
    for part, values in _parts(weight, factors, np.float32):
        channels = part if axis == 0 else slice(None)
        here = np.maximum(values.max(axis=others), -values.min(axis=others))
        np.maximum(largest[channels], here, out=largest[channels])
    return largest


def weight_scale(
    largest: np.ndarray,
    *,
    input_scale: float,
    bias: np.ndarray | None,
    granularity: Granularity | None = None,
    largest_code: int = INT8_MAX,
) -> np.ndarray:
    """The scales, float32, of channels whose largest magnitudes are given.

    A channel whose bias would not fit into int32 gets a larger scale than its weights need.
    """
    scale: np.ndarray = largest.astype(np.float64) / largest_code
    if bias is not None:
        scale = np.maximum(scale, np.abs(bias.astype(np.float64)) / (input_scale * BIAS_MAX))
    if isinstance(granularity, PerTensor):
        scale = scale.max()
    scale = np.where(scale > 0, np.clip(scale, _LEAST_SCALE, _LARGEST_SCALE), 1.0)
    return scale.astype(np.float32)


def weight_codes(
    weight: np.ndarray,
    scale: np.ndarray,
    *,
    axis: int,
    factors: Sequence[np.ndarray] = (),
    largest_code: int = INT8_MAX,
) -> np.ndarray:
    """The nearest codes, int8, in float32 arithmetic as in ONNX's QuantizeLinear."""
    codes = np.empty(weight.shape, np.int8)
    along = _along(scale, axis, weight.ndim)
    for part, steps in _parts(weight, factors, np.float32):
        steps /= along[part] if axis == 0 and scale.ndim else along
        np.rint(steps, out=steps)
        codes[part] = np.clip(steps, -largest_code, largest_code, out=steps)
    return codes


def weight_sums(weight: np.ndarray, *, axis: int, factors: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of the weights, times the factors, of each output channel (`axis`), float64."""
    others = tuple(a for a in range(weight.ndim) if a != axis)
    sums = np.zeros(weight.shape[axis])
    for part, values in _parts(weight, factors, np.float64):
        sums[part if axis == 0 else slice(None)] += values.sum(axis=others)
    return sums


def _parts(
    weight: np.ndarray, factors: Sequence[np.ndarray], dtype: type[np.floating]
) -> Iterator[tuple[slice, np.ndarray]]:
    """A few rows of the product at a time, in a buffer that the next ones overwrite.

    Large fresh arrays cost more than the arithmetic, and a worker's memory as well.
    """
    rows = max(1, _VALUES_AT_ONCE * len(weight) // max(weight.size, 1))
    buffer = np.empty((min(rows, len(weight)), *weight.shape[1:]), dtype)
    factors = [_filled(factor, weight.shape).astype(dtype) for factor in factors]
    for start in range(0, len(weight), rows):
        part = slice(start, min(start + rows, len(weight)))
        values = buffer[: part.stop - start]
        np.copyto(values, weight[part])
        for factor in factors:
            values *= factor[part] if len(factor) > 1 else factor
        yield part, values


def _filled(factor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A factor that all rows share, with a row's shape: numpy multiplies whole rows at once."""
    return np.broadcast_to(factor, (1, *shape[1:])) if len(factor) == 1 else factor


def quantize_bias(
    bias: np.ndarray, *, input_scale: float, weight_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Int32 codes and their float32 scales, input scale x weight scale."""
    largest = float(np.finfo(np.float32).max)
    product = np.float64(input_scale) * weight_scale.astype(np.float64)
    scale = np.asarray(np.minimum(product, largest), dtype=np.float32)
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(codes, -BIAS_MAX, BIAS_MAX).astype(np.int32), scale


def code_weight(
    weight: np.ndarray, *, axis: int, bits: int, granularity: Granularity, symmetric: bool
) -> CodedWeight:
    """Codes of 1, 2, 4 or 8 bits with a scale per tensor or per output channel (`axis`).

    One bit is the binary weight network of Rastegari et al. 2016 (XNOR-Net, eq. 6): the sign
    times the channel's mean absolute weight.
    """
    by_channel = np.moveaxis(weight, axis, 0)
    if isinstance(granularity, PerChannel):
        groups = by_channel.reshape(len(by_channel), -1)
    else:
        groups = by_channel.reshape(1, -1)
    coded, scale, zero = _code(groups.astype(np.float32), bits=bits, symmetric=symmetric)
    codes = np.ascontiguousarray(np.moveaxis(coded.reshape(by_channel.shape), 0, axis))
    shape = [1] * weight.ndim
    shape[axis] = -1
    return CodedWeight(codes=codes, scale=scale.reshape(shape), zero=zero.reshape(shape))


def block_matrix(
    matrix: np.ndarray, *, bits: int, block: int = BLOCK, symmetric: bool = True
) -> BlockedMatrix:
    """A `(n, k)` matrix in blocks of `block` weights along k that share a scale."""
    n, k = matrix.shape
    k_blocks = -(-k // block)
    padded = np.zeros((n, k_blocks * block), dtype=np.float32)
    padded[:, :k] = matrix
    coded, scale, zero = _code(
        padded.reshape(-1, block), bits=bits, symmetric=symmetric, has_zero=True
    )
    packed = pack(coded, bits=bits).reshape(n, k_blocks, block * bits // 8)
    zeros = None
    if not symmetric:
        rows = zero.astype(np.uint8).reshape(n, k_blocks)
        spare = -k_blocks % (8 // bits)
        zeros = pack(np.pad(rows, ((0, 0), (0, spare))), bits=bits).reshape(-1)
    return BlockedMatrix(codes=packed, scale=scale.reshape(-1), zero=zeros)


def pack(codes: np.ndarray, *, bits: int) -> np.ndarray:
    """Codes of `bits` bits in bytes, the first one in the least significant bits; flat.

    >>> pack(np.array([1, 2, 3], np.uint8), bits=4).tolist()
    [33, 3]
    """
    per_byte = 8 // bits
    flat = codes.reshape(-1)
    by_byte = np.pad(flat, (0, -flat.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(by_byte), np.uint8)
    for position in range(per_byte):
        packed |= by_byte[:, position] << np.uint8(position * bits)
    return packed


def _code(
    groups: np.ndarray, *, bits: int, symmetric: bool, has_zero: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros of each row; weight = (code - zero) * scale.

    `has_zero`: the zeros must be codes themselves.
    """
    if bits == 1:
        return _binary(groups)
    if bits == 2 and symmetric:
        coder = _ternary if has_zero else _four_levels
        return _least_error(groups, lambda shrink: coder(groups, shrink))
    if bits == 2:
        return _least_error(groups, lambda shrink: _asymmetric(groups, bits, shrink))
    return _symmetric(groups, bits) if symmetric else _asymmetric(groups, bits)


def _least_error(
    groups: np.ndarray, code: Callable[[float], tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row the codes, scale and zero of the shrink with the least square error."""
    best = code(_SHRINKS_OF_2_BITS[0])
    least = _square_error(groups, *best)
    for shrink in _SHRINKS_OF_2_BITS[1:]:
        tried = code(shrink)
        error = _square_error(groups, *tried)
        is_better = (error < least)[:, None]
        least = np.minimum(error, least)
        codes, scale, zero = (
            np.where(is_better, new, old) for new, old in zip(tried, best, strict=True)
        )
        best = codes, scale, zero
    return best


def _four_levels(groups: np.ndarray, shrink: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-1.5, -0.5, 0.5 and 1.5 steps.

    Four codes with zero among them have one more on one side; cutting off the other side moves
    a channel's sum, which the layers behind it amplify.
    """
    largest = np.abs(groups).max(axis=1, keepdims=True)
    scale = (largest * (shrink / 1.5)).astype(np.float32)  # 0 keeps a row of zeros at zero
    steps = groups / np.where(scale > 0, scale, 1)
    codes = np.clip(np.rint(steps + 1.5), 0, 3).astype(np.uint8)
    return codes, scale, np.full(scale.shape, 1.5, np.float32)


def _ternary(groups: np.ndarray, shrink: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-1, 0 and 1 steps (Li et al. 2016, "Ternary weight networks"); code 0 is not used."""
    largest = np.abs(groups).max(axis=1, keepdims=True)
    scale = _divisor(largest * shrink)
    codes = np.clip(np.rint(groups / scale), -1, 1) + 2
    return codes.astype(np.uint8), scale, np.full(scale.shape, 2, np.float32)


def _binary(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sign(w) * mean |w|: code 0 is -1, code 1 is +1, so zero is 0.5 and a step twice the mean."""
    mean = np.abs(groups.astype(np.float64)).mean(axis=1, keepdims=True)
    zero = np.full(mean.shape, 0.5, np.float32)
    return (groups >= 0).astype(np.uint8), (2 * mean).astype(np.float32), zero


def _symmetric(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The code of zero is `2 ** (bits - 1)`.

    The scale maps a row's largest weight onto the most negative code, which uses all codes
    (as llama.cpp's Q4_0 does).
    """
    offset = 2 ** (bits - 1)
    where = np.abs(groups).argmax(axis=1)[:, None]
    extreme = np.take_along_axis(groups, where, axis=1)
    scale = _divisor(extreme / -offset)
    codes = np.clip(np.rint(groups / scale) + offset, 0, 2 * offset - 1).astype(np.uint8)
    return codes, scale, np.full(scale.shape, offset, np.float32)


def _asymmetric(
    groups: np.ndarray, bits: int, shrink: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row's range, widened to hold zero, over all codes."""
    top = 2**bits - 1
    low = np.minimum(groups.min(axis=1, keepdims=True), 0).astype(np.float64)
    high = np.maximum(groups.max(axis=1, keepdims=True), 0).astype(np.float64)
    width = np.where(high > low, high - low, top)
    scale = _divisor(shrink * width / top)
    zero = np.clip(np.rint(-shrink * low / scale), 0, top).astype(np.float32)
    codes = np.clip(np.rint(groups / scale) + zero, 0, top).astype(np.uint8)
    return codes, scale, zero


def _divisor(scale: np.ndarray) -> np.ndarray:
    """float32, with 1 for a row so small that its scale becomes 0: its codes are those of zero."""
    narrow = scale.astype(np.float32)
    found: np.ndarray = np.where(narrow == 0, np.float32(1), narrow)
    return found


def _square_error(
    groups: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    error: np.ndarray = np.square((codes - zero) * scale - groups).sum(axis=1)
    return error


def _along(scale: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Scales of a weight's output channels, or the one of all, ready to divide the weight."""
    if scale.ndim == 0:
        return scale
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape)
