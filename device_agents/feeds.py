"""Made-up inputs: seeded, of the shapes and types that a model asks for, at batch 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from device_agents.runtimes import TensorSpec, UnsupportedModel


def make_feeds(inputs: Sequence[TensorSpec], *, seed: int) -> dict[str, Any]:
    """Seeded inputs at batch 1: standard normal floats, zeros and ones for whole numbers.

    Raises:
        UnsupportedModel: a dimension other than the first is free.
    """
    generator = np.random.default_rng(seed)
    feeds = {}
    for tensor in inputs:
        shape = [size or 1 for size in tensor.shape]
        if None in tensor.shape[1:]:
            raise UnsupportedModel(
                f"input {tensor.name!r} has the free shape {tensor.shape}; only the first axis "
                "(the batch) may be free: export the model with fixed sizes"
            )
        if np.issubdtype(np.dtype(tensor.dtype), np.floating):
            values = generator.standard_normal(shape).astype(tensor.dtype)
        else:
            values = generator.integers(0, 2, shape).astype(tensor.dtype)
        feeds[tensor.name] = values
    return feeds
