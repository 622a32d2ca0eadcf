"""Shapes that ONNX's own inference leaves open, found by running the graph.

Owns that one repair: behind an operator of another domain nothing is inferred, and a tensor
of unknown shape can be neither calibrated nor counted. `cleanup.py` infers what can be.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from autotune.compression.graph import BATCH_AXIS, model_bytes, shape_of
from autotune.compression.session import Session
from autotune.errors import CompressionError, InvalidModel

_BATCHES = (2, 3)
"""Two batch sizes: an axis that follows them is the batch axis."""


def complete_shapes(model: onnx.ModelProto) -> None:
    """Add, in place, type and shape of every tensor that has none; sequences are left alone.

    A model that onnxruntime does not run stays as it is: the loader finds out and says so.
    """
    graph = model.graph
    known = {value.name for value in (*graph.value_info, *graph.input, *graph.output)}
    unknown = [n for node in graph.node for n in node.output if n and n not in known]
    if not unknown:
        return
    runs = _values(model, unknown)
    for name in unknown:
        arrays = [run.get(name) for run in runs]
        first, second = arrays if len(arrays) == len(_BATCHES) else (None, None)
        if not isinstance(first, np.ndarray) or not isinstance(second, np.ndarray):
            continue
        if first.ndim == second.ndim and first.dtype.kind in "fiub":
            kind = helper.np_dtype_to_tensor_dtype(first.dtype)
            shape = [_extent(*pair) for pair in zip(first.shape, second.shape, strict=True)]
            graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))


def _extent(first: int, second: int) -> int | str | None:
    if first == second:
        return first
    return BATCH_AXIS if (first, second) == _BATCHES else None


def _values(model: onnx.ModelProto, names: list[str]) -> list[dict[str, object]]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    source = model.graph.input[0]
    rng = np.random.default_rng(0)
    runs = []
    try:
        session = Session(model_bytes(probe))
        for batch in _BATCHES:
            x = rng.standard_normal((batch, *shape_of(source)[1:])).astype(np.float32)
            runs.append(dict(zip(names, session.run({source.name: x}), strict=True)))
    except (CompressionError, InvalidModel):
        return []
    return runs
