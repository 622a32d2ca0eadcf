"""OpenVINO: reads the same ONNX file, Q/DQ included, and compiles it for the CPU.

Owns the door to the openvino package and the translation of its errors. Asks for latency, for
the thread count and for FP32 arithmetic: on CPUs with bf16 OpenVINO would use it on its own,
and the accuracy that was judged would not be the accuracy that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import openvino

from device_agents.runtimes import (
    Clock,
    InvalidArtifact,
    RuntimeOptions,
    TensorSpec,
    UnsupportedModel,
)

PROVIDER_SUFFIX = "ExecutionProvider"
_NO_MODEL = ("Unable to read the model", "Could not open the file", "is not a valid", "parse")
_OUT_OF_MEMORY = ("bad_alloc", "out of memory", "Failed to allocate")


class OpenVino:
    """The installed OpenVINO build."""

    name = "openvino"
    clock = Clock()

    def __init__(self) -> None:
        self._core = openvino.Core()
        self.version: str = str(openvino.__version__).partition("-")[0]

    def providers(self) -> tuple[str, ...]:
        """OpenVINO's devices here under names like onnxruntime's: `CPUExecutionProvider`."""
        return tuple(f"{device}{PROVIDER_SUFFIX}" for device in self._core.available_devices)

    def load(self, path: Path, options: RuntimeOptions) -> OpenVinoSession:
        """The model at batch 1, compiled for latency on the asked number of threads."""
        if options.provider not in self.providers():
            has = ", ".join(self.providers())
            raise UnsupportedModel(f"OpenVINO has no {options.provider} here; it has {has}")
        device = options.provider.removesuffix(PROVIDER_SUFFIX)
        try:
            model = self._core.read_model(path)
            model.reshape({port: _at_batch_1(port.partial_shape) for port in model.inputs})
            compiled = self._core.compile_model(model, device, _options(device, options.threads))
        except RuntimeError as error:
            raise _translated(error) from error
        return OpenVinoSession(compiled)


class OpenVinoSession:
    """A compiled model with one inference request."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self.inputs = tuple(
            TensorSpec(
                name=port.any_name,
                shape=tuple(int(size) for size in port.shape),
                dtype=str(port.element_type.to_dtype()),
            )
            for port in compiled.inputs
        )

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """A synchronous inference on these arrays, which OpenVINO reads in place."""
        return partial(self._request.infer, dict(feeds), share_inputs=True, share_outputs=True)


def _at_batch_1(shape: Any) -> Any:
    """The first axis set to 1 where it is free; other free axes stay and are refused later."""
    fixed = openvino.PartialShape(shape)
    if fixed.rank.is_static and len(fixed) and fixed[0].is_dynamic:
        fixed[0] = 1
    return fixed


def _options(device: str, threads: int) -> dict[str, Any]:
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return options | ({"INFERENCE_NUM_THREADS": threads} if device == "CPU" else {})


def _translated(error: RuntimeError) -> Exception:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line says what happened; those before name OpenVINO's own source files.
    text = lines[-1] if lines else type(error).__name__
    if any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return MemoryError(text)
    if any(sign in str(error) for sign in _NO_MODEL):
        return InvalidArtifact(f"OpenVINO cannot read the file: {text}")
    return UnsupportedModel(text)
