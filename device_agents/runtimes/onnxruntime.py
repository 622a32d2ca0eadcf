"""onnxruntime: sessions with the options that a user's deployment would have.

Owns the door to the onnxruntime package and the translation of its errors. Sets the thread
count that was asked for and nothing else, so that the figure is the one a plain session gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from device_agents.runtimes import (
    Clock,
    InvalidArtifact,
    RuntimeOptions,
    TensorSpec,
    UnsupportedModel,
)

LOAD_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed: ?)*")
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory")

# onnxruntime names an input's type like ONNX does; numpy's names differ.
NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntime:
    """The installed onnxruntime build."""

    name = "onnxruntime"
    clock = Clock()

    def __init__(self) -> None:
        self.version: str = onnxruntime.__version__
        # Warnings about single nodes would fill a measurement's log; errors are raised anyway.
        onnxruntime.set_default_logger_severity(3)

    def providers(self) -> tuple[str, ...]:
        """The execution providers of this build."""
        return tuple(onnxruntime.get_available_providers())

    def load(self, path: Path, options: RuntimeOptions) -> OnnxSession:
        """A sequential session with the asked thread count and defaults otherwise."""
        if options.provider not in self.providers():
            has = ", ".join(self.providers())
            raise UnsupportedModel(f"this build has no {options.provider}; it has {has}")
        try:
            session = onnxruntime.InferenceSession(
                str(path), session_options(options.threads), providers=[options.provider]
            )
        except LOAD_ERRORS as error:
            raise _translated(error) from error
        return OnnxSession(session)


class OnnxSession:
    """A loaded ONNX model."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(_tensor_spec(tensor) for tensor in session.get_inputs())

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """`InferenceSession.run` on these arrays; its errors pass through unchanged."""
        return partial(self._session.run, None, dict(feeds))


def session_options(threads: int) -> Any:
    """Session options with this many threads for one operator, operators one by one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    return options


def _tensor_spec(tensor: Any) -> TensorSpec:
    dtype = NUMPY_TYPES.get(tensor.type)
    if dtype is None:
        raise UnsupportedModel(f"input {tensor.name!r} is a {tensor.type}, which cannot be made up")
    shape = tuple(size if isinstance(size, int) else None for size in tensor.shape)
    return TensorSpec(name=tensor.name, shape=shape, dtype=dtype)


def _translated(error: Exception) -> Exception:
    text = _first_line(error)
    if any(sign in text for sign in OUT_OF_MEMORY):
        return MemoryError(text)
    if isinstance(error, ort_errors.InvalidProtobuf | ort_errors.NoModel | ort_errors.NoSuchFile):
        return InvalidArtifact(f"not an ONNX model: {text}")
    if "No graph was found" in text:  # an empty file, reported as an invalid argument
        return InvalidArtifact("not an ONNX model: it holds no graph")
    return UnsupportedModel(text)


def _first_line(error: BaseException) -> str:
    """Without the number of the error and the path on this device, which tell a user nothing."""
    text = PREFIX.sub("", str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__
