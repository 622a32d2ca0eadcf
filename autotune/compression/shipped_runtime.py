"""An artifact in a runtime other than onnxruntime: its outputs, and what it really executes.

Owns the comparison of plan and execution there, and the outputs that accuracy is judged by,
taken at batch 1 through the same door that a device times. onnxruntime's own execution is
`effective.py`'s.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autotune.compression.effective import GroupPrecision
from autotune.compression.layer_times import makers_of
from autotune.compression.units import Unit
from autotune.errors import CompressionError
from device_agents.errors import RuntimeUnavailable
from device_agents.runtimes import (
    ExecutedLayer,
    InvalidArtifact,
    Runtime,
    RuntimeOptions,
    UnsupportedModel,
    load_runtime,
)
from search_spaces import FP32, INT8, Precision

BY_ONNXRUNTIME = frozenset({"onnxruntime", "simulated"})
"""Runtimes whose artifacts onnxruntime judges: a simulated device computes nothing itself."""

_CODES = ("u8", "i8")
_PACKED = (*_CODES, "u4", "i4", "u2", "i2")

Answers = Callable[[np.ndarray], np.ndarray]
"""Samples of shape (n, ...) to outputs of shape (n, classes)."""


def open_answers(artifact: bytes, runtime: str, *, threads: int) -> Answers:
    """What the artifact answers in the runtime of that name, on this machine's processor.

    Raises:
        CompressionError: the runtime is not here, or cannot run the artifact.
    """
    session = _in_file(artifact, runtime, lambda x, path: x.load(path, _options(threads)))
    (tensor,) = session.inputs
    sample = np.zeros([size or 1 for size in tensor.shape], dtype=tensor.dtype)
    call = session.bind({tensor.name: sample})

    def answers(x: np.ndarray) -> np.ndarray:
        rows = []
        for values in x:
            sample[0] = values
            try:
                found = call()
            except Exception as error:
                # what a runtime raises has no base class in common
                raise CompressionError(f"{runtime} cannot run the artifact: {error}") from error
            rows.append(np.array(_first(found)[0]))
        return np.stack(rows)

    return answers


def executed_precisions(
    artifact: bytes, units: Iterable[Unit], planned: Mapping[str, Precision], *, runtime: str
) -> tuple[GroupPrecision, ...]:
    """One entry per layer group, in graph order, as that runtime executes the artifact.

    What a group without a kernel of its name executes is unknown; so are all groups of a
    runtime without `executed_layers`.

    Raises:
        CompressionError: the runtime is not here, or cannot run the artifact.
    """

    def look(loaded: Runtime, path: Path) -> tuple[str, tuple[ExecutedLayer, ...] | None]:
        told = getattr(loaded, "executed_layers", None)
        seen_in = f"{runtime} {loaded.version} on {platform.machine()}"
        return seen_in, None if told is None else tuple(told(path, _options(1)))

    seen_in, executed = _in_file(artifact, runtime, look)
    if executed is None:
        why = f"{runtime} does not tell what it executes"
        return unseen_precisions(units, planned, why=why)
    makers = makers_of(artifact)  # a fused kernel may carry the name of what it makes
    by_name = {makers.get(name, name): x for x in executed for name in x.names}
    return tuple(
        _compare(unit, planned.get(unit.name, FP32), by_name, seen_in=seen_in) for unit in units
    )


def unseen_precisions(
    units: Iterable[Unit], planned: Mapping[str, Precision], *, why: str
) -> tuple[GroupPrecision, ...]:
    """One entry per layer group: what each is executed in is unknown, and why."""
    return tuple(_unseen(unit, planned.get(unit.name, FP32), why) for unit in units)


def _unseen(unit: Unit, planned: Precision, why: str) -> GroupPrecision:
    return GroupPrecision(
        group=unit.name,
        planned=planned.name,
        effective=None,
        reason=f"not seen: {why}",
        stored_bits=planned.weight_bits,
    )


def _compare(
    unit: Unit, planned: Precision, executed: Mapping[str, ExecutedLayer], *, seen_in: str
) -> GroupPrecision:
    """One layer that differs decides; else one that was not seen leaves its group unknown."""
    found = {layer.name: executed.get(layer.name) for layer in unit.layers}
    differing = [
        why
        for layer, kernel in found.items()
        if kernel is not None and (why := _difference(layer, planned, kernel))
    ]
    missing = [repr(layer) for layer, kernel in found.items() if kernel is None]
    if missing and not differing:
        return _unseen(unit, planned, f"no kernel that it lists is named for {', '.join(missing)}")
    effective = planned
    if differing:
        effective = INT8 if planned.is_float else FP32
    return GroupPrecision(
        group=unit.name,
        planned=planned.name,
        effective=effective.name,
        reason="; ".join(differing) or None,
        stored_bits=planned.weight_bits,
        seen_in=seen_in,
    )


def _difference(layer: str, planned: Precision, found: ExecutedLayer) -> str | None:
    has_codes = found.precision in _CODES
    if planned.is_int8 != has_codes and (planned.is_int8 or planned.is_float):
        return f"the runtime computes {layer!r} in {found.precision}"
    if planned.is_weight_only and found.weight_precision not in _PACKED:
        return f"the runtime unpacks the weights of {layer!r} and computes in {found.precision}"
    if not planned.is_float and not planned.is_int8 and not planned.is_weight_only:
        return f"the runtime computes {layer!r} in {found.precision}, as accuracy was judged"
    return None


def _options(threads: int) -> RuntimeOptions:
    return RuntimeOptions(provider="CPUExecutionProvider", threads=threads)


def _in_file(artifact: bytes, runtime: str, do: Callable[[Runtime, Path], Any]) -> Any:
    """`do` with the runtime and the artifact's path; runtimes read files."""
    try:
        loaded = load_runtime(runtime)
        with tempfile.TemporaryDirectory(prefix="autotune-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(artifact)
            return do(loaded, path)
    except (RuntimeUnavailable, InvalidArtifact, UnsupportedModel) as error:
        raise CompressionError(f"{runtime} cannot run the artifact: {error}") from error


def _first(outputs: Any) -> Any:
    """The first output: runtimes answer with a sequence or with a mapping of arrays."""
    return next(iter(outputs.values() if hasattr(outputs, "values") else outputs))
