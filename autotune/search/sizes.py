"""How many bytes a layer group takes in a file, in each precision.

Owns the count, which follows from the inventory alone: codes, scales, zero points and biases as
`compression/graph_writer.py` and `compression/weight_only.py` store them. The names and nodes
around them (some hundred bytes per layer) are left out, and pruning with them: it takes the same
share of every precision.
"""

from __future__ import annotations

import math

from search_spaces import Layer, LayerGroup, LayerKind, PerBlock, PerTensor, Precision

_FLOAT, _INT32, _INT64 = 4, 4, 8


def group_bytes(group: LayerGroup, precision: Precision) -> int:
    """Bytes of all constants of the group's layers in that precision."""
    return sum(layer_bytes(layer, precision) for layer in group.layers)


def layer_bytes(layer: Layer, precision: Precision) -> int:
    """Bytes of the layer's weights and bias with all that says what their codes mean."""
    weights = math.prod(layer.weight_shape)
    biases = max(layer.parameters - weights, 0)
    if precision.is_float:
        return _FLOAT * (weights + biases)
    if precision.is_half:
        return 2 * (weights + biases)
    if not precision.is_weight_only:
        scales = 1 if isinstance(precision.granularity, PerTensor) else _outputs(layer)
        bias_scales = min(scales, biases)
        return weights + (_FLOAT + 1) * scales + _INT32 * biases + (_FLOAT + _INT32) * bias_scales
    return _weight_only(layer, precision, weights) + _FLOAT * biases


def _weight_only(layer: Layer, precision: Precision, weights: int) -> int:
    bits, outputs = precision.weight_bits, _outputs(layer)
    is_product = layer.kind in (LayerKind.GEMM, LayerKind.MATMUL)
    has_blocks = precision.granularity is None or isinstance(precision.granularity, PerBlock)
    if is_product and bits > 1 and has_blocks:
        block = precision.granularity or PerBlock()
        size = block.size if isinstance(block, PerBlock) else PerBlock().size
        blocks = -(-weights // outputs // size)
        zeros = 0 if precision.is_symmetric else outputs * -(-blocks * bits // 8)
        return outputs * blocks * (size * bits // 8 + _FLOAT) + zeros
    scales = 1 if isinstance(precision.granularity, PerTensor) else outputs
    zeros = 1 if precision.is_symmetric else scales
    shape = 0 if bits == 8 else _INT64 * len(layer.weight_shape)
    return -(-weights * bits // 8) + _FLOAT * (scales + zeros) + shape


def _outputs(layer: Layer) -> int:
    """Output channels; a matrix product has them last."""
    is_product = layer.kind in (LayerKind.GEMM, LayerKind.MATMUL)
    return layer.output_shape[-1] if is_product else layer.weight_shape[0]
