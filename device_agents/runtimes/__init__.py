"""What a runtime must do to be measured, and how installed ones are found.

Owns the interface and the look-up by entry point (group `edge_autotune.runtimes`), so that a
vendor's runtime is a package of its own. Each runtime is one file beside this one. What is
timed, and when, is `measurement_child.py`'s business. Imports no runtime until one is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from device_agents.errors import RuntimeUnavailable
from device_agents.watch import Watch

ENTRY_POINT_GROUP = "edge_autotune.runtimes"

BUILT_IN: Mapping[str, str] = {
    "onnxruntime": "device_agents.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "device_agents.runtimes.openvino:OpenVino",
    "simulated": "device_agents.runtimes.simulated:SimulatedRuntime",
}
"""Found even where the distribution's metadata is missing (a copied source tree); no package
can take these names."""


class InvalidArtifact(Exception):
    """The runtime cannot read the file at all: it is not a model of a format it knows."""


class UnsupportedModel(Exception):
    """The runtime read the model and cannot run it: operator, type, shape or provider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input of a model. A free dimension is None; `dtype` is numpy's name for it."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


GRAPH_LEVELS = ("all", "layout", "extended", "basic", "disabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """How a session is made; the fields mean what those of `protocol.RuntimeRequest` do."""

    provider: str = "CPUExecutionProvider"
    threads: int = 1
    graph_level: str = "all"
    memory_arena: bool = True
    spinning: bool = True

    def require(self, runtime: Runtime) -> None:
        """Return where the runtime can be started so.

        Raises:
            UnsupportedModel: it has no such provider here, or does not heed an option.
        """
        offered = runtime.providers()
        if self.provider not in offered:
            raise UnsupportedModel(
                f"{runtime.name} has no {self.provider} here; it has {', '.join(offered)}"
            )
        heeded = getattr(runtime, "options", ())
        for option in ("graph_level", "memory_arena", "spinning"):
            value = getattr(self, option)
            if value != getattr(RuntimeOptions(), option) and option not in heeded:
                raise UnsupportedModel(f"{runtime.name} has no option {option} to set to {value}")
        if self.graph_level not in GRAPH_LEVELS:
            listed = ", ".join(GRAPH_LEVELS)
            raise UnsupportedModel(f"graph level {self.graph_level!r} is not known; {listed} are")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """What calls are timed with, and what a pause waits by; a simulation brings its own.

    `now_ns` is monotonic, in ns.
    """

    now_ns: Callable[[], int] = time.perf_counter_ns
    sleep: Callable[[float], None] = time.sleep


class Session(Protocol):
    """A model loaded for inference."""

    inputs: tuple[TensorSpec, ...]

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:
        """A call without arguments that runs one whole inference on these arrays.

        It returns the outputs, a sequence or a mapping of arrays, and reads the inputs anew in
        each call.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRun:
    """One execution of one kernel, by the runtime's own names for it."""

    name: str
    operator: str
    duration_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedLayer:
    """A kernel of the compiled model and the graph's nodes that it computes.

    `precision` is what it computes in, by the runtime's short name (`f32`, `u8`);
    `weight_precision` that of its constant weights, None where they are not its input.
    """

    names: tuple[str, ...]
    operator: str
    precision: str
    weight_precision: str | None = None


class ProfiledSession(Session, Protocol):
    """A session that notes how long each kernel takes."""

    def finish(self) -> list[list[KernelRun]]:
        """What each call since loading executed, in order; ends the session."""
        ...


class Runtime(Protocol):
    """One runtime build on this device. Made anew in every measurement's process.

    `options` names the `RuntimeOptions` beside provider and threads that it heeds; a runtime
    without the attribute heeds none, and is never asked for one.
    """

    name: str
    version: str
    clock: Clock
    watch: Watch | None
    """Who looks at the device; None: its kernel shows it, as that of any real device does."""

    def providers(self) -> tuple[str, ...]:
        """The execution providers this build can use here, preferred first."""
        ...

    def load(self, path: Path, options: RuntimeOptions) -> Session:
        """A session with these options, and else those a user's own deployment would have.

        Raises:
            InvalidArtifact: the file is not a model.
            UnsupportedModel: the model cannot run here, or not with these options.
        """
        ...

    def load_profiled(self, path: Path, options: RuntimeOptions) -> ProfiledSession:
        """The same session, with notes; its calls are slower by what the notes take.

        Raises:
            InvalidArtifact: the file is not a model.
            UnsupportedModel: the model cannot run here, or the runtime has no profiler.
        """
        ...


def runtime_names() -> tuple[str, ...]:
    """The names of all runtimes that could be loaded, sorted; nothing is imported."""
    return tuple(sorted({*BUILT_IN, *_installed()}))


def load_runtime(name: str) -> Runtime:
    """The runtime of that name, imported and ready.

    Raises:
        RuntimeUnavailable: no such runtime, or its package does not import here.
    """
    source = _built_in(name) or _installed().get(name)
    if source is None:
        known = ", ".join(runtime_names())
        raise RuntimeUnavailable(f"no runtime is called {name!r}; this device has {known}")
    try:
        made: Runtime = source()()
    except (ImportError, AttributeError, OSError) as error:
        raise RuntimeUnavailable(f"runtime {name!r} does not load here: {error}") from error
    return made


def _built_in(name: str) -> Callable[[], Any] | None:
    reference = BUILT_IN.get(name)
    if reference is None:
        return None
    module, _, attribute = reference.partition(":")
    return lambda: getattr(import_module(module), attribute)


def _installed() -> dict[str, Callable[[], Any]]:
    # Reads the metadata of every installed distribution: tens of milliseconds, which a
    # measurement with a built-in runtime does not spend; so does importing the reader.
    from importlib.metadata import entry_points

    return {point.name: point.load for point in entry_points(group=ENTRY_POINT_GROUP)}
