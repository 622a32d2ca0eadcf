"""Weights quantized a few rows at a time: the same as all at once."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression import weights
from autotune.compression.weights import (
    code_weight,
    largest_weights,
    quantize_weight,
    weight_sums,
)
from search_spaces import PerChannel

# Axis of the outputs, the weight's shape and factors that broadcast against it.
CASES = {
    "convolution": (0, (9, 4, 3, 3), [(1, 4, 1, 1), (9, 1, 1, 1)]),
    "depthwise": (0, (9, 1, 3, 3), [(9, 1, 1, 1)]),
    "grouped": (0, (8, 2, 3, 3), [(8, 2, 1, 1), (8, 1, 1, 1)]),
    "matrix": (1, (40, 6), [(40, 1), (1, 6)]),
    "plain": (0, (9, 4), []),
}


@pytest.mark.parametrize("case", CASES)
def test_a_few_rows_at_a_time_give_the_codes_of_all_at_once(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis, shape, of_factors = CASES[case]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32)
    factors = [rng.uniform(0.5, 2, size) for size in of_factors]
    monkeypatch.setattr(weights, "_VALUES_AT_ONCE", weight[0].size * 2)
    found = quantize_weight(weight, axis=axis, input_scale=0.1, bias=None, factors=factors)
    product = np.prod([weight.astype(np.float64), *np.broadcast_arrays(weight, *factors)[1:]], 0)
    along = found.scale.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
    # A product that lies between two codes may go either way in float32.
    assert np.abs(found.codes - product / along).max() <= 0.5 + 1e-4
    others = tuple(a for a in range(weight.ndim) if a != axis)
    largest = largest_weights(weight, axis=axis, factors=factors)
    np.testing.assert_allclose(largest, np.abs(product).max(axis=others), rtol=1e-6)
    sums = weight_sums(weight, axis=axis, factors=factors)
    np.testing.assert_allclose(sums, product.sum(axis=others), rtol=1e-9)


def test_a_weight_that_begins_at_an_odd_byte_gives_the_same_codes() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    odd = np.frombuffer(b"\0" + weight.tobytes(), np.float32, offset=1).reshape(weight.shape)
    assert not odd.flags.aligned
    found, expected = (
        quantize_weight(w, axis=0, input_scale=0.1, bias=None) for w in (odd, weight)
    )
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_channel_smaller_than_any_scale_gets_the_codes_of_zero(
    bits: int, symmetric: bool
) -> None:
    weight = np.array([[1e-45, 0.0], [-0.5, 0.25]], np.float32)
    found = code_weight(weight, axis=0, bits=bits, granularity=PerChannel(), symmetric=symmetric)
    decoded = (found.codes - found.zero) * found.scale
    assert np.isfinite(found.scale).all()
    assert np.abs(decoded[0]).max() <= 1e-44
