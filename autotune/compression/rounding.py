"""Which way each 8-bit weight is rounded, so that the layer's outputs change least.

Owns second-order rounding: weights are rounded one input at a time, and the inputs still to
come take up the error (Frantar et al. 2022, arXiv:2210.17323, algorithm 1, the Hessian being
the second moment of the layer's inputs on the calibration samples); and empirical bias
correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2, with means over calibration
samples in place of BatchNorm's). Which scale a weight has is
`weights.py`'s business.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autotune.compression.calibration import tensor_batches
from autotune.compression.equalization import Stretched, scaled_weight
from autotune.compression.graph import GraphView, attribute
from autotune.compression.operators import WeightedNode, find_layers
from autotune.compression.weights import INT8_MAX
from search_spaces import LayerKind

_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_LARGEST_BLOCK = 512
# Inputs of a layer that take up each other's error; a Hessian over 4,608 inputs (a 3x3
# convolution of 512 channels) costs a hundred times as much and 85 MB.
_POSITIONS = 4096
# Rows of input per layer for the Hessian: eight times as many as it has columns.
_DAMPING = 0.01  # of the Hessian's mean diagonal (Frantar et al. 2022, section 3.3, step 3)
_WIDENINGS = np.linspace(1.0, 1.14, 15, dtype=np.float32)
"""Steps that an output's weights may have, as multiples of the narrowest that holds them.

With few inputs it is luck how well they meet a step's multiples: over fifteen steps the
squared logit error of uniform INT8 falls by 3 % on mobilenet_v2 and by 0.5 % on
mobilenet_v3_small (digits, 2,000 held-out images, means of 6 builds whose ranges differ).
"""
_MOST_INPUTS_WIDENED = 64
"""Layers with more inputs take the narrowest: widening up to 200 gains another 0.5 % of the squared
error of mobilenet_v2's answers, and all rounding takes half as long again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedWeight:
    """A layer's signed 8-bit codes in the weight's shape.

    `widening` is each output's step as a multiple of the largest weight over the largest code, at
    least 1, and `mean_error` what the outputs are too large by on average; both `(outputs,)`
    float32.
    """

    codes: np.ndarray
    widening: np.ndarray
    mean_error: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounding:
    """The rounded weights of a base by layer name.

    `plain` are the model's own weights, `stretched` those behind a stretched input tensor;
    the latter holds layers alone whose input can be stretched. Their codes go up to 127;
    `reduced` has the same for kernels whose codes end at 64, and is written to a file of its own.
    """

    plain: Mapping[str, RoundedWeight] = field(default_factory=dict)
    stretched: Mapping[str, RoundedWeight] = field(default_factory=dict)
    reduced: Rounding | None = None

    def of(
        self, layer: str, *, stretched: bool, largest_code: int = INT8_MAX
    ) -> RoundedWeight | None:
        """The layer's rounded weight, behind a stretched tensor or not; None without one."""
        held = self if largest_code == INT8_MAX else self.reduced
        if held is None:
            return None
        return (held.stretched if stretched else held.plain).get(layer)

    def with_layer(self, layer: str, rounded: RoundedWeight, *, stretched: bool) -> Rounding:
        """This rounding with one layer's weights rounded otherwise."""
        if stretched:
            return replace(self, stretched={**self.stretched, layer: rounded})
        return replace(self, plain={**self.plain, layer: rounded})

    def to_bytes(self) -> bytes:
        """An npz file, without `reduced`; the same rounding gives the same bytes."""
        arrays = {}
        for kind, layers in (("plain", self.plain), ("stretched", self.stretched)):
            for name, rounded in sorted(layers.items()):
                arrays[f"{kind}|{name}|codes"] = rounded.codes
                arrays[f"{kind}|{name}|widening"] = rounded.widening
                arrays[f"{kind}|{name}|mean_error"] = rounded.mean_error
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Rounding:
        """The rounding that `to_bytes` wrote."""
        found: dict[str, dict[str, RoundedWeight]] = {"plain": {}, "stretched": {}}
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for key in arrays.files:
                kind, name, part = key.split("|")
                if part == "codes":
                    found[kind][name] = RoundedWeight(
                        codes=arrays[key],
                        widening=arrays[f"{kind}|{name}|widening"],
                        mean_error=arrays[f"{kind}|{name}|mean_error"],
                    )
        return cls(plain=found["plain"], stretched=found["stretched"])


@dataclass(slots=True, kw_only=True)
class _Moments:
    """Sums over positions: outer products per block `(groups, k, k)`, and the inputs' sum."""

    products: list[np.ndarray]
    total: np.ndarray
    n: int = 0


def round_weights(
    view: GraphView,
    samples: np.ndarray,
    stretched: Mapping[str, Stretched],
    *,
    threads: int = 1,
    largest_code: int = INT8_MAX,
) -> Rounding:
    """Every layer's 8-bit weights, in codes up to the largest, after one run over the samples.

    `stretched` are the tensors that uniform INT8 stretches. A layer is left out, and keeps its
    nearest codes, where its inputs are too large or too alike to say which code is better.
    """
    layers = [layer for layer in find_layers(view) if takes_rounding(layer)]
    moments = {layer.name: _empty(view, layer) for layer in layers}
    inner = dict.fromkeys(layer.input for layer in layers if layer.input != view.input_name)
    rng = np.random.default_rng(0)
    for values in tensor_batches(view, list(inner), samples, threads=threads):
        for layer in layers:
            rows = input_rows(view, layer, values[layer.input], rng, n_samples=len(samples))
            _add(moments[layer.name], rows)
    behind = {layer.name: stretched[layer.input] for layer in layers if layer.input in stretched}
    return Rounding(
        plain=_all_rounded(view, layers, moments, {}, largest_code),
        stretched=_all_rounded(
            view, [x for x in layers if x.name in behind], moments, behind, largest_code
        ),
    )


def weight_rows(view: GraphView, layer: WeightedNode, read: Stretched | None) -> np.ndarray:
    """The weight as `(groups, outputs per group, inputs per output)`, float64.

    `read` is the layer's input where its channels are stretched.
    """
    inputs = None if read is None else 1 / read.factors
    return as_rows(scaled_weight(view.array(layer.weight), layer, inputs=inputs), layer)


def as_rows(weight: np.ndarray, layer: WeightedNode) -> np.ndarray:
    """An array of the weight's shape as `(groups, outputs per group, inputs per output)`."""
    weight = weight.T if is_transposed(layer) else weight
    groups = attribute(layer.node, "group", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def weight_like(view: GraphView, layer: WeightedNode, rows: np.ndarray) -> np.ndarray:
    """`weight_rows` undone: the rows in the shape of the layer's weight."""
    shape = view.array(layer.weight).shape
    return np.ascontiguousarray(
        rows.reshape(shape[::-1]).T if is_transposed(layer) else rows.reshape(shape)
    )


def input_rows(
    view: GraphView,
    layer: WeightedNode,
    value: np.ndarray,
    rng: np.random.Generator,
    *,
    n_samples: int,
    positions: int = _POSITIONS,
) -> np.ndarray:
    """What the layer multiplies at some of its positions: `(positions, groups, inputs)`, float32.

    Of each sample as many positions as make up some `positions` over all `n_samples`.
    """
    each = max(1, positions // n_samples)
    if layer.is_matrix_product:
        flat = value.reshape(-1, value.shape[-1])
        if len(flat) > each * len(value):
            flat = flat[np.sort(rng.choice(len(flat), each * len(value), replace=False))]
        return flat[:, None, :]
    window = view.array(layer.weight).shape[2:]
    strides = attribute(layer.node, "strides", [1] * len(window))
    dilations = attribute(layer.node, "dilations", [1] * len(window))
    pads = attribute(layer.node, "pads", [0] * 2 * len(window))
    axes = list(zip(pads[: len(window)], pads[len(window) :], strict=True))
    padded = np.pad(value, [(0, 0), (0, 0), *axes])
    extents = [
        (padded.shape[2 + i] - (window[i] - 1) * dilations[i] - 1) // strides[i] + 1
        for i in range(len(window))
    ]
    count = math.prod(extents)
    chosen = np.sort(rng.choice(count, min(each, count), replace=False))
    starts = np.stack(np.unravel_index(chosen, extents)) * np.array(strides)[:, None]
    patches = []
    for offset in np.ndindex(*window):
        at = starts + (np.array(offset) * np.array(dilations))[:, None]
        patches.append(padded[(slice(None), slice(None), *at)])
    # (samples, channels, positions, window) to (samples x positions, groups, channels x window)
    stacked = np.stack(patches, axis=-1).transpose(0, 2, 1, 3)
    groups = attribute(layer.node, "group", 1)
    return stacked.reshape(stacked.shape[0] * stacked.shape[1], groups, -1)


def int8_scales(rows: np.ndarray, largest_code: int = INT8_MAX) -> np.ndarray:
    """The step of each output channel's codes, float32 `(groups, outputs)`: max / largest code."""
    scale = (np.abs(rows).max(axis=2) / largest_code).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1.0))


def _all_rounded(
    view: GraphView,
    layers: Sequence[WeightedNode],
    moments: Mapping[str, _Moments],
    read: Mapping[str, Stretched],
    largest_code: int,
) -> dict[str, RoundedWeight]:
    """The layers' rounded weights, without those whose moments say nothing."""
    found = {}
    for layer in layers:
        held = moments[layer.name]
        if not all(np.isfinite(products).all() for products in held.products):
            continue
        # Where a channel hardly differs from its offset, what is left of its moment is rounding.
        with contextlib.suppress(np.linalg.LinAlgError):
            found[layer.name] = _rounded(view, layer, held, read.get(layer.name), largest_code)
    return found


def _rounded(
    view: GraphView,
    layer: WeightedNode,
    moments: _Moments,
    read: Stretched | None,
    largest_code: int,
) -> RoundedWeight:
    rows = weight_rows(view, layer, read)
    factors, offsets = per_input(read, rows.shape)
    narrowest = int8_scales(rows, largest_code)
    mean = moments.total / max(moments.n, 1)
    widening = np.ones(narrowest.shape, np.float32)
    parts, start = [], 0
    for products in moments.products:
        at = slice(start, start + products.shape[-1])
        # E[(x - o)(x - o)'] from E[x x'] and E[x]
        spread = products / max(moments.n, 1) - _outer(mean[:, at], mean[:, at])
        spread *= _outer(factors[:, at], factors[:, at])
        middle = (mean[:, at] - offsets[:, at]) * factors[:, at]
        second = spread + _outer(middle, middle)
        if rows.shape[2] <= _MOST_INPUTS_WIDENED:
            found, widening = _best_steps(rows, narrowest, second, spread, largest_code)
        else:
            steps = rows[:, :, at] / narrowest[..., None]
            found = second_order_codes(steps, second, largest_code)
        parts.append(found)
        start = at.stop
    codes = np.concatenate(parts, axis=2)
    scale = (narrowest * widening)[..., None].astype(np.float64)
    # Section 4.2: the weights' error times the mean input is the outputs' mean error. One beyond
    # float32 fits into no bias: the layer will keep its nearest codes.
    mean_error = np.einsum("goi,gi->go", codes * scale - rows, (mean - offsets) * factors)
    mean_error = np.clip(mean_error, -_LARGEST_FLOAT, _LARGEST_FLOAT)
    return RoundedWeight(
        codes=weight_like(view, layer, codes).astype(np.int8),
        widening=widening.reshape(-1),
        mean_error=mean_error.reshape(-1).astype(np.float32),
    )


def _best_steps(
    rows: np.ndarray,
    narrowest: np.ndarray,
    second: np.ndarray,
    spread: np.ndarray,
    largest_code: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and widening per output: of all steps, rounded alike, the one of least error.

    The error is that of the layer's outputs less its mean, which the bias takes: the weights'
    error, weighted by the covariance `spread` of the inputs.
    """
    groups, outputs, inputs = rows.shape
    steps = narrowest[..., None] * _WIDENINGS
    shape = (groups, outputs * len(_WIDENINGS), inputs)
    divided = (rows[:, :, None] / steps[..., None].astype(np.float64)).reshape(shape)
    found = second_order_codes(divided, second, largest_code)
    codes = found.reshape(groups, outputs, -1, inputs)
    error = codes * steps[..., None] - rows[:, :, None]
    seen = (error.reshape(shape) @ spread).reshape(error.shape)
    cost = (seen * error).sum(axis=3)
    best = cost.argmin(axis=2)
    chosen = np.take_along_axis(codes, best[..., None, None], axis=2)[:, :, 0]
    return chosen, _WIDENINGS[best]


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left[:, :, None] * right[:, None, :]


def per_input(read: Stretched | None, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of each column of rows with that shape, `(groups, inputs)` each."""
    groups, _, inputs = shape
    if read is None:
        return np.ones((groups, inputs)), np.zeros((groups, inputs))
    by_group = read.factors.reshape(groups, -1), read.offsets.reshape(groups, -1)
    factors, offsets = (x.repeat(inputs // x.shape[1], axis=1) for x in by_group)
    return factors, offsets


def second_order_codes(
    steps: np.ndarray, products: np.ndarray, largest_code: int = INT8_MAX
) -> np.ndarray:
    """Whole numbers near `steps` `(groups, outputs, k)` whose products with inputs stay nearest.

    `products` `(groups, k, k)` is the inputs' second moment. Column by column in order of
    importance; each rounding error is taken up by the columns that follow, in proportion to
    the inverse moment's Cholesky factor (Frantar et al. 2022, equations 2 and 3).
    """
    k = products.shape[-1]
    diagonal = np.einsum("gii->gi", products)
    order = np.argsort(-diagonal.mean(axis=0), kind="stable")
    damped = products[:, order][:, :, order].astype(np.float64)
    damped[:, np.arange(k), np.arange(k)] += _DAMPING * diagonal.mean(axis=1)[:, None] + 1e-12
    inverse = np.linalg.inv(damped)
    inverse = (inverse + inverse.transpose(0, 2, 1)) / 2
    upper = np.linalg.cholesky(inverse).transpose(0, 2, 1)
    rest = steps[:, :, order].copy()
    codes = np.empty_like(rest)
    for start in range(0, k, 32):
        end = min(start + 32, k)
        errors = np.empty((*rest.shape[:2], end - start))
        for i in range(start, end):
            codes[:, :, i] = np.clip(np.rint(rest[:, :, i]), -largest_code, largest_code)
            error = (rest[:, :, i] - codes[:, :, i]) / upper[:, i, i, None]
            errors[:, :, i - start] = error
            rest[:, :, i + 1 : end] -= error[..., None] * upper[:, None, i, i + 1 : end]
        rest[:, :, end:] -= errors @ upper[:, start:end, end:]
    restored = np.empty_like(codes)
    restored[:, :, order] = codes
    return restored


def _empty(view: GraphView, layer: WeightedNode) -> _Moments:
    groups, _, inputs = weight_rows(view, layer, None).shape
    window = math.prod(view.array(layer.weight).shape[2:]) if not layer.is_matrix_product else 1
    # A block holds whole channels.
    width = max(_LARGEST_BLOCK // window, 1) * window
    widths = [min(width, inputs - start) for start in range(0, inputs, width)]
    return _Moments(
        products=[np.zeros((groups, w, w), np.float32) for w in widths],
        total=np.zeros((groups, inputs)),
    )


def _add(moments: _Moments, rows: np.ndarray) -> None:
    by_group = rows.transpose(1, 0, 2)
    start = 0
    for products in moments.products:
        part = by_group[:, :, start : start + products.shape[-1]]
        # Squares of values from 1e19 on are infinite in float32; the layer is left as it is then.
        with np.errstate(over="ignore", invalid="ignore"):
            products += part.transpose(0, 2, 1) @ part
        start += products.shape[-1]
    moments.total += by_group.sum(axis=1, dtype=np.float64)
    moments.n += len(rows)


def is_transposed(layer: WeightedNode) -> bool:
    """The weight is `(inputs, outputs)`."""
    return layer.kind is LayerKind.MATMUL or (
        layer.kind is LayerKind.GEMM and not attribute(layer.node, "transB", 0)
    )


def takes_rounding(layer: WeightedNode) -> bool:
    """Convolutions with explicit padding, and matrix products; none that stays in FP32."""
    if layer.kind is LayerKind.CONV_TRANSPOSE:
        return False
    return layer.is_matrix_product or attribute(layer.node, "auto_pad", b"NOTSET") == b"NOTSET"
