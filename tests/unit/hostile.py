"""A runtime that does its worst, as a vendor's package of its own: found by entry point.

An artifact is JSON: the `verb` that its second call obeys. Installed nowhere: `package` writes
what pip would install for it, and whoever has that folder on its path has the runtime.
"""

import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from device_agents.runtimes import Clock, InvalidArtifact, TensorSpec

SMALL_BYTES = 256 * 2**20


def package(folder):
    """The folder as pip would fill it; it belongs on PYTHONPATH."""
    metadata = folder / "hostile_runtime-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: hostile-runtime\nVersion: 1.0\n"
    )
    points = "[edge_autotune.runtimes]\nhostile = hostile_runtime:Hostile\n"
    (metadata / "entry_points.txt").write_text(points)
    (folder / "hostile_runtime.py").write_text(Path(__file__).read_text())
    return folder


def artifact(verb, number=0):
    """A file that obeys; the number makes it another one."""
    return json.dumps({"verb": verb, "number": number}).encode()


class Hostile:
    name = "hostile"
    version = "1.0"
    watch = None

    def __init__(self):
        self.clock = Clock(now_ns=self.now_ns, sleep=lambda _: None)
        self.lies = False
        self.is_throttled = False

    def now_ns(self):
        return float("nan") if self.lies else time.perf_counter_ns()

    def providers(self):
        return ("CPUExecutionProvider",)

    def load(self, path, options):
        try:
            return Session(self, json.loads(path.read_bytes())["verb"])
        except (ValueError, KeyError) as error:
            raise InvalidArtifact(str(error)) from error


class Session:
    inputs = (TensorSpec(name="input", shape=(1, 4), dtype="float32"),)

    def __init__(self, runtime, verb):
        self.runtime, self.verb, self.calls = runtime, verb, 0

    def bind(self, feeds):
        return self.run

    def run(self):
        self.calls += 1
        if self.calls == 2:
            VERBS[self.verb](self.runtime)
        until = time.perf_counter_ns() + (300_000 if self.runtime.is_throttled else 100_000)
        while time.perf_counter_ns() < until:
            pass
        return [[float("nan")] if self.verb == "nan" else [0.0]]


def hang(_):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(60)


def spin(_):
    """Two processes at full speed, for ever."""
    os.fork()
    while True:
        pass


def exhaust(_):
    resource.setrlimit(resource.RLIMIT_DATA, (SMALL_BYTES, SMALL_BYTES))
    hoard = []
    while True:
        hoard.append(bytearray(b"\1") * 2**22)


def throttle(runtime):
    runtime.is_throttled = True


def lie(runtime):
    runtime.lies = True


def scribble(_):
    noise = random.Random(7).randbytes(100_000)
    Path(sys.argv[2]).write_bytes(noise)  # where the report belongs
    sys.stdout.buffer.write(noise)
    sys.stdout.flush()
    os._exit(0)


def boast(_):
    """A report whose numbers are not numbers, in well-formed JSON."""
    ends = {"before": {}, "after": {}, "runtime_version": "1", "wall_s": 0.1, "is_steady": True}
    keys = ["p50", "p50_low", "p50_high", "p90", "p99", "reference_p50", "reference_latency"]
    numbers = {f"{key}_ns": float("nan") for key in keys} | {"n_samples": 9, "n_blocks": 9}
    ratios = dict.fromkeys(("ratio", "ratio_low", "ratio_high"), float("-inf"))
    report = {"outcome": "ok", "report": ends | numbers | ratios}
    Path(sys.argv[2]).write_text(json.dumps(report))
    os._exit(0)


VERBS = {
    "ok": lambda _: None,
    "sleep": lambda _: time.sleep(0.2),
    "segfault": lambda _: ctypes.string_at(0),
    "abort": lambda _: os.abort(),
    "oom": exhaust,
    "hang": hang,
    "kill_agent": lambda _: os.kill(os.getppid(), signal.SIGKILL),
    "throttle": throttle,
    "nan": lie,
    "nan_report": boast,
    "garbage": scribble,
    "spin": spin,
}
