"""Factors of channels in common: never dearer than the geometric means, and what nobody has."""

from __future__ import annotations

import numpy as np
import pytest

from autotune.compression.shared_factors import shared_factors, stream_factors


def cost(factors: np.ndarray, widths: np.ndarray) -> float:
    return float(((widths * factors).max(axis=1) ** 2).sum() * (factors**-2.0).sum())


def test_one_tensor_gives_all_its_channels_the_same_range() -> None:
    widths = np.array([[4.0, 1.0, 0.5]])
    assert shared_factors(widths) == pytest.approx([1, 4, 8])


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_costs_less_than_with_geometric_means(seed: int) -> None:
    widths = np.exp(np.random.default_rng(seed).normal(0, 0.5, (5, 24)))
    fitted = shared_factors(widths)
    assert fitted.min() == 1
    assert cost(fitted, widths) < 0.95 * cost(np.exp(-np.log(widths).mean(axis=0)), widths)


def test_silent_channels_and_tensors_of_zeros_do_not_set_a_factor() -> None:
    numbers = {"a": np.array([3, 5]), "b": np.array([5, 7]), "zero": np.array([9])}
    widths = {"a": np.array([1.0, 0.0]), "b": np.array([2.0, 1.0]), "zero": np.zeros(1)}
    known, factors = stream_factors(numbers, widths, largest_factor=64.0)
    assert known.tolist() == [3, 5, 7]
    assert np.isfinite(factors).all() and factors.max() <= 64
