"""A simulated runtime: seeded latencies on a clock of its own, and every way to fail.

Owns the format of a simulated artifact and what its verbs do. Used by tests, quick starts and
search benchmarks: nothing is computed, the clock jumps, and a measurement of seconds takes
milliseconds. The failures are real ones: they happen to the process that measures.

An artifact is JSON: `{"format": "edge-autotune-simulated/1", "verb": "ok", "latency_ns": 4e5}`.
A file that is no such JSON is taken as a real model and costed by its size, so that a whole job
can be tried without timing anything. `AUTOTUNE_SIMULATED_SLOWNESS=1.1` in the agent's
environment makes one simulated device a tenth slower than others.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from device_agents.runtimes import (
    Clock,
    InvalidArtifact,
    KernelRun,
    RuntimeOptions,
    TensorSpec,
    UnsupportedModel,
)
from device_agents.watch import Glimpse, Watch

FORMAT = "edge-autotune-simulated/1"
# Version 1 (2026-11-21): verb, latency, noise, drift, throttling, after_calls, input_shape.
# 2026-11-21: drift_until_s and throttle_until_s, without end before.

MODEL_BASE_NS = 50_000.0
MODEL_NS_PER_BYTE = 0.05
"""Cost of a real model's file: what small convolution networks take per byte of weights on one
x86 core, to one digit (mobilenet_v2: 9.1 MB, 0.4 ms). A figure for trying things, no claim."""

UNUSUAL = {"layout": 1.0, "extended": 1.4, "basic": 4.0, "disabled": 4.5}
NO_ARENA, NO_SPINNING = 1.02, 1.1
"""How many times as long a simulated device takes with other options than the usual ones: what
small convolution networks do in onnxruntime on one x86 core, roughly. As above, no claim."""

SLOWNESS = "AUTOTUNE_SIMULATED_SLOWNESS"
"""Environment variable: how many times as long everything takes on this simulated device."""

OUT_OF_MEMORY_STEP = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedModel:
    """A simulated artifact.

    Attributes:
        verb: what happens, see `VERBS`.
        latency_ns: of one inference on the undisturbed device.
        noise: standard deviation of the latency's logarithm, about the relative spread.
        drift_per_s: the device becomes slower by this fraction in each second of its clock,
            until `drift_until_s`.
        throttle_after_s: from then to `throttle_until_s` each call takes `throttle_factor` times
            as long, and the device says that it is throttled.
        after_calls: the call at which a failing verb strikes; 0 strikes at loading.
        sleep_s: how long the verb `sleep` really sleeps in each call.
        input_shape: of the one input, with its batch axis.
        port: where on this host the verb `call_home` connects to.
    """

    verb: str = "ok"
    latency_ns: float = 400_000.0
    noise: float = 0.0
    drift_per_s: float = 0.0
    drift_until_s: float = math.inf
    throttle_after_s: float = math.inf
    throttle_until_s: float = math.inf
    throttle_factor: float = 1.0
    after_calls: int = 2
    sleep_s: float = 0.01
    input_shape: tuple[int, ...] = (1, 3, 8, 8)
    seed: int = 0
    port: int = 0

    def to_bytes(self) -> bytes:
        """The artifact's canonical bytes."""
        document = {"format": FORMAT} | {x.name: getattr(self, x.name) for x in fields(self)}
        return json.dumps(document, sort_keys=True).encode()


class SimulatedRuntime:
    """One simulated device; its clock starts at zero and only calls move it."""

    name = "simulated"
    version = "1"
    options = ("graph_level", "memory_arena", "spinning")

    def __init__(self) -> None:
        self._now_ns = 0.0
        self._n_sessions = 0
        self.slowness = float(os.environ.get(SLOWNESS, "1"))
        self._throttling: list[SimulatedModel] = []
        self.clock = Clock(now_ns=self.now_ns, sleep=lambda pause_s: self.spend(pause_s * 1e9))
        self.watch: Watch | None = self

    def providers(self) -> tuple[str, ...]:
        """The one provider, named like the real one so that plans fit both."""
        return ("CPUExecutionProvider",)

    def now_ns(self) -> int:
        """The simulated time, in ns."""
        return int(self._now_ns)

    def register(self, model: SimulatedModel) -> int:
        """The ordinal of a new session, from 0; what its model does to the device shows."""
        self._n_sessions += 1
        self._throttling.append(model)
        return self._n_sessions - 1

    def look(self) -> Glimpse:
        """The device now: nobody takes the processor away, and it tells when it is throttled."""
        elapsed_s = self._now_ns / 1e9
        is_throttled = any(
            model.throttle_after_s <= elapsed_s < model.throttle_until_s
            for model in self._throttling
        )
        return Glimpse(
            held_back=("throttled",) if is_throttled else (), wall_s=elapsed_s, cpu_s=elapsed_s
        )

    def spend(self, duration_ns: float) -> None:
        """Let simulated time pass."""
        self._now_ns += duration_ns

    def load(self, path: Path, options: RuntimeOptions) -> SimulatedSession:
        """The artifact as a session."""
        options.require(self)
        model = read_model(path.read_bytes())
        session = SimulatedSession(self, model, options)
        if model.after_calls == 0:
            VERBS[model.verb](session)
        return session

    def load_profiled(self, path: Path, options: RuntimeOptions) -> SimulatedSession:
        """Every simulated session notes what it spends."""
        return self.load(path, options)


class SimulatedSession:
    """A loaded artifact."""

    def __init__(
        self, device: SimulatedRuntime, model: SimulatedModel, options: RuntimeOptions
    ) -> None:
        self.device = device
        self.model = model
        self.inputs: tuple[TensorSpec, ...] = (
            TensorSpec(name="input", shape=model.input_shape, dtype="float32"),
        )
        # Amdahl's law with nine tenths of the work in parallel.
        self._slower = 0.1 + 0.9 / options.threads
        self._slower *= UNUSUAL.get(options.graph_level, 1.0)
        self._slower *= 1.0 if options.memory_arena else NO_ARENA
        self._slower *= 1.0 if options.spinning or options.threads == 1 else NO_SPINNING
        self._calls = 0
        self._durations: list[float] = []
        # Two sessions of one artifact must not have the same noise: their ratio would be exact.
        name = f"{model.seed}:{device.register(model)}"
        self._random = random.Random(name)  # noqa: S311 - noise, not a secret

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], object]:  # noqa: ARG002 - see there
        """The inputs are not looked at."""
        return self._run

    def _run(self) -> None:
        self._calls += 1
        if self.model.after_calls and self._calls >= self.model.after_calls:
            VERBS[self.model.verb](self)
        self._durations.append(self._duration_ns())
        self.device.spend(self._durations[-1])

    def finish(self) -> list[list[KernelRun]]:
        """Each call as the one kernel that a simulated model has."""
        return [
            [KernelRun(name="model", operator="Simulated", duration_ns=duration)]
            for duration in self._durations
        ]

    def _duration_ns(self) -> float:
        model = self.model
        elapsed_s = self.device.now_ns() / 1e9
        slower = 1 + model.drift_per_s * min(elapsed_s, model.drift_until_s)
        if model.throttle_after_s <= elapsed_s < model.throttle_until_s:
            slower *= model.throttle_factor
        slower *= self.device.slowness * self._slower
        return model.latency_ns * slower * self._random.lognormvariate(0, model.noise)


def read_model(data: bytes) -> SimulatedModel:
    """The artifact in these bytes; anything but simulated JSON is costed by its size.

    Raises:
        InvalidArtifact: the file is empty, or simulated JSON with a wrong field.
    """
    if not data:
        raise InvalidArtifact("the file is empty")
    if not data.lstrip().startswith(b"{"):
        digest = hashlib.sha256(data).digest()
        latency_ns = MODEL_BASE_NS + MODEL_NS_PER_BYTE * len(data)
        return SimulatedModel(latency_ns=latency_ns, noise=0.01, seed=digest[0])
    try:
        document = json.loads(data)
        if document.pop("format", None) != FORMAT:
            raise InvalidArtifact(f"the JSON is not of the format {FORMAT!r}")
        document["input_shape"] = tuple(document.get("input_shape", (1, 3, 8, 8)))
        model = SimulatedModel(**document)
    except (ValueError, TypeError) as error:
        raise InvalidArtifact(f"not a simulated artifact: {error}") from error
    if model.verb not in VERBS:
        raise InvalidArtifact(f"no verb {model.verb!r}; there are {', '.join(sorted(VERBS))}")
    return model


def _segfault(_: SimulatedSession) -> None:
    ctypes.string_at(0)


def _sleep(session: SimulatedSession) -> None:
    time.sleep(session.model.sleep_s)


def _hang(_: SimulatedSession) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(60)


def _out_of_memory(_: SimulatedSession) -> None:
    hoard = []
    while True:
        hoard.append(bytearray(b"\1") * OUT_OF_MEMORY_STEP)


def _fail(_: SimulatedSession) -> None:
    raise RuntimeError("the simulated kernel failed")


def _unsupported(_: SimulatedSession) -> None:
    raise UnsupportedModel("the simulated device has no kernel for this operator")


def _call_home(session: SimulatedSession) -> None:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", session.model.port), timeout=1).close()


def _garbage(_: SimulatedSession) -> None:
    sys.stdout.buffer.write(bytes(range(256)) * 16)
    sys.stdout.flush()
    os._exit(0)


def _not_a_number(session: SimulatedSession) -> None:
    session.device.spend(-2 * session.model.latency_ns)


VERBS: Mapping[str, Callable[[SimulatedSession], None]] = {
    "ok": lambda _: None,
    "sleep": _sleep,
    "segfault": _segfault,
    "abort": lambda _: os.abort(),
    "oom": _out_of_memory,
    "hang": _hang,
    "kill_agent": lambda _: os.kill(os.getppid(), signal.SIGKILL),
    "raise": _fail,
    "unsupported": _unsupported,
    "garbage": _garbage,
    "call_home": _call_home,
    "backwards_clock": _not_a_number,
}
"""What an artifact can do to the process that measures it."""
