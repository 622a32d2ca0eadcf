"""onnxruntime: sessions with the options that a user's deployment would have.

Owns the door to the onnxruntime package, what its execution providers want to be told, and the
translation of its errors. Sets what was asked for and nothing else, so that with the usual
options the figure is the one a plain session gives.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from device_agents.runtimes import (
    Clock,
    InvalidArtifact,
    KernelRun,
    RuntimeOptions,
    TensorSpec,
    UnsupportedModel,
)
from device_agents.watch import Watch

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
KERNEL_SUFFIX = "_kernel_time"
CALL_EVENT = "model_run"
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory")

REMOTE = frozenset({"AzureExecutionProvider"})
"""Providers that compute nothing here: with this one a session runs on the processor."""

BEHIND = {
    "TensorrtExecutionProvider": ("CUDAExecutionProvider",),
    "NvTensorRTRTXExecutionProvider": ("CUDAExecutionProvider",),
}
"""Who gets what a provider leaves, before the processor does (onnxruntime's documentation of the
TensorRT provider: register CUDA behind it)."""

OWN_THREADS = {
    "XnnpackExecutionProvider": "intra_op_num_threads",
    "OpenVINOExecutionProvider": "num_of_threads",
}
"""Options of providers that bring threads of their own (their pages in that documentation). The
session's are one then, as the page of XNNPACK advises: the two pools would fight for cores."""

LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "layout": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

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
    options = ("graph_level", "memory_arena", "spinning")
    clock = Clock()
    watch: Watch | None = None

    def __init__(self) -> None:
        self.version: str = onnxruntime.__version__
        # Warnings about single nodes would fill a measurement's log; errors are raised anyway.
        onnxruntime.set_default_logger_severity(3)

    def providers(self) -> tuple[str, ...]:
        """The execution providers of this build that compute here, its own order kept."""
        found = onnxruntime.get_available_providers()
        return tuple(provider for provider in found if provider not in REMOTE)

    def load(self, path: Path, options: RuntimeOptions) -> OnnxSession:
        """A sequential session with these options and defaults otherwise."""
        return OnnxSession(self._open(path, options, session_options(options)))

    def load_profiled(self, path: Path, options: RuntimeOptions) -> ProfiledOnnxSession:
        """The same session with onnxruntime's profiler on; it writes into a temporary folder."""
        folder = tempfile.TemporaryDirectory(prefix="autotune-profile-")
        settings = session_options(options)
        settings.enable_profiling = True
        settings.profile_file_prefix = f"{folder.name}/trace"
        return ProfiledOnnxSession(self._open(path, options, settings), folder)

    def _open(self, path: Path, options: RuntimeOptions, settings: Any) -> Any:
        options.require(self)
        chain = provider_chain(options, offered=self.providers())
        try:
            session = onnxruntime.InferenceSession(str(path), settings, providers=chain)
        except LOAD_ERRORS as error:
            raise _translated(error) from error
        # A provider whose libraries or device are missing is replaced without an error.
        started = session.get_providers()
        if options.provider not in started:
            raise UnsupportedModel(
                f"{options.provider} is in this build of onnxruntime and does not start here "
                f"(its libraries, driver or device are missing); it would run on {started[0]}"
            )
        return session


class OnnxSession:
    """A loaded ONNX model."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(_tensor_spec(tensor) for tensor in session.get_inputs())

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """`InferenceSession.run` on these arrays; its errors pass through unchanged."""
        return partial(self._session.run, None, dict(feeds))


class ProfiledOnnxSession(OnnxSession):
    """A loaded ONNX model whose session writes a trace into `folder`."""

    def __init__(self, session: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(session)
        self._folder = folder

    def finish(self) -> list[list[KernelRun]]:
        """The kernels of each call; whole microseconds, rounded down, is all that a trace has."""
        trace = Path(self._session.end_profiling()).read_bytes()
        self._folder.cleanup()
        return kernel_runs(json.loads(trace))


def kernel_runs(events: Sequence[Mapping[str, Any]]) -> list[list[KernelRun]]:
    """The kernels of each call in a trace's events (Chrome's format), in order.

    The event of a whole call comes behind those of its kernels.
    """
    runs: list[list[KernelRun]] = []
    current: list[KernelRun] = []
    for event in events:
        name = event["name"]
        if event.get("cat") == "Node" and name.endswith(KERNEL_SUFFIX):
            operator = str(event.get("args", {}).get("op_name", ""))
            current.append(
                KernelRun(
                    name=name.removesuffix(KERNEL_SUFFIX),
                    operator=operator,
                    duration_ns=event["dur"] * 1e3,
                )
            )
        elif name == CALL_EVENT:
            runs.append(current)
            current = []
    return runs


def session_options(asked: RuntimeOptions) -> Any:
    """Session options with these threads for one operator, operators one by one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1 if asked.provider in OWN_THREADS else asked.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = LEVELS[asked.graph_level]
    options.enable_cpu_mem_arena = asked.memory_arena
    if not asked.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def provider_chain(
    asked: RuntimeOptions, *, offered: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """The provider with its own options, and behind it who takes what it cannot run.

    onnxruntime itself adds the processor at the end.
    """
    behind = [name for name in BEHIND.get(asked.provider, ()) if name in offered]
    own = OWN_THREADS.get(asked.provider)
    settings = {} if own is None else {own: str(asked.threads)}
    return [(asked.provider, settings), *((name, {}) for name in behind)]


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
