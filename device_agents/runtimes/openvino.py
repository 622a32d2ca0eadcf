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
    ExecutedLayer,
    InvalidArtifact,
    KernelRun,
    RuntimeOptions,
    TensorSpec,
    UnsupportedModel,
)
from device_agents.watch import Watch

PROVIDER_SUFFIX = "ExecutionProvider"
_NO_MODEL = ("Unable to read the model", "Could not open the file", "is not a valid", "parse")
_WEIGHTED = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
_FUSED_BIAS = "/WithoutBiases"
_OUT_OF_MEMORY = ("bad_alloc", "out of memory", "Failed to allocate")


class OpenVino:
    """The installed OpenVINO build."""

    name = "openvino"
    clock = Clock()
    watch: Watch | None = None

    def __init__(self) -> None:
        self._core = openvino.Core()
        self.version: str = str(openvino.__version__).partition("-")[0]

    def providers(self) -> tuple[str, ...]:
        """OpenVINO's devices here under names like onnxruntime's: `CPUExecutionProvider`."""
        return tuple(f"{device}{PROVIDER_SUFFIX}" for device in self._core.available_devices)

    def load(self, path: Path, options: RuntimeOptions) -> OpenVinoSession:
        """The model at batch 1, compiled for latency on the asked number of threads."""
        return OpenVinoSession(self._compile(path, options, {}))

    def load_profiled(self, path: Path, options: RuntimeOptions) -> ProfiledOpenVinoSession:
        """The same with OpenVINO's performance counters on."""
        return ProfiledOpenVinoSession(self._compile(path, options, {"PERF_COUNT": True}))

    def executed_layers(self, path: Path, options: RuntimeOptions) -> tuple[ExecutedLayer, ...]:
        """The kernels with weights that the compiled model has, and what they compute in.

        A subgraph that OpenVINO compiled into one kernel counts where all that it reads is float;
        what it computes codes in, it does not tell.
        """
        nodes = self._compile(path, options, {}).get_runtime_model().get_ops()
        fused = [n for n in nodes if _told(n, "layerType") == "Subgraph" and _reads_float(n)]
        weighted = [n for n in nodes if _told(n, "layerType") in _WEIGHTED]
        return tuple(_executed(node) for node in (*fused, *weighted))

    def _compile(self, path: Path, options: RuntimeOptions, further: dict[str, Any]) -> Any:
        options.require(self)
        device = options.provider.removesuffix(PROVIDER_SUFFIX)
        try:
            model = self._core.read_model(path)
            model.reshape({port: _at_batch_1(port.partial_shape) for port in model.inputs})
            settings = _options(device, options.threads) | further
            return self._core.compile_model(model, device, settings)
        except RuntimeError as error:
            raise _translated(error) from error


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


class ProfiledOpenVinoSession(OpenVinoSession):
    """A compiled model whose counters are read after every call."""

    def __init__(self, compiled: Any) -> None:
        super().__init__(compiled)
        self._runs: list[list[KernelRun]] = []

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """An inference, and the reading of its counters."""
        infer = super().bind(feeds)

        def run() -> object:
            outputs = infer()
            self._runs.append([_kernel_run(x) for x in self._executed()])
            return outputs

        return run

    def finish(self) -> list[list[KernelRun]]:
        """The kernels of each call; what was fused into another has no time of its own."""
        return self._runs

    def _executed(self) -> list[Any]:
        executed = openvino.ProfilingInfo.Status.EXECUTED
        return [x for x in self._request.get_profiling_info() if x.status == executed]


def _executed(node: Any) -> ExecutedLayer:
    names = _told(node, "originalLayersNames").split(",")
    weights = [_told(source.get_node(), "runtimePrecision") for source in _constants(node)]
    return ExecutedLayer(
        names=tuple(name.removesuffix(_FUSED_BIAS) for name in names),
        operator=_told(node, "layerType"),
        precision=_told(node, "runtimePrecision"),
        weight_precision=weights[0] if weights else None,
    )


def _reads_float(node: Any) -> bool:
    sources = (port.get_source_output().get_node() for port in node.inputs())
    return {_told(source, "runtimePrecision") for source in sources} == {"f32"}


def _constants(node: Any) -> list[Any]:
    sources = [port.get_source_output() for port in node.inputs()]
    return [x for x in sources if _told(x.get_node(), "layerType") == "Const"]


def _told(node: Any, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _kernel_run(info: Any) -> KernelRun:
    return KernelRun(
        name=info.node_name,
        operator=info.node_type,
        duration_ns=info.real_time.total_seconds() * 1e9,
    )


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
