"""Which precisions are really faster on this device, per kind of operator.

Owns the micro-benchmark: small models (`kernel_models/`, four layers of a kind in a row) timed
against their FP32 twins in each runtime, in a process of its own. A table of processors says
what could be fast; this says what is. What follows for a search is the service's to decide.

Run as `python -m device_agents.kernel_benchmark RUNTIME...`: one line of JSON per figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from device_agents.errors import DeviceDiskFull
from device_agents.files import durable_file
from device_agents.isolation import die_with_parent
from device_agents.protocol import KernelSpeed, RuntimeBuild

MODELS = Path(__file__).parent / "kernel_models"
SPEEDS_VERSION = 2
# Version 1 (2026-11-21): {"version", "speeds": [KernelSpeed, ...]}; the file's name holds a digest
# of the hardware, the runtime and its version.
# Version 2 (2026-11-22): ratios are of undisturbed blocks; since 2026-11-23 of undisturbed samples,
# which moves them by less than their intervals are wide.

LIMIT_S = 60.0
"""What the whole benchmark may take; figures that are missing then are told as missing."""
PAIR_S = 0.25
"""Timing of one model against its twin. Four sessions of each and some ten pairs of blocks: an
idle core gives ±5 %, which tells a factor of 3 from 1; a busy one an interval that says so."""
TARGET_HALF_WIDTH = 0.05
PROVIDER = "CPUExecutionProvider"
CONSTANT_CODES = ("w8", "w4")
"""What OpenVINO reads from constants alone, as artifacts hold them; these models make theirs."""
MEASURED = ("onnxruntime", "openvino")
"""Runtimes that read these models and have kernels; a vendor's may know neither."""


def remembered(
    folder: Path,
    hardware: str,
    builds: Sequence[RuntimeBuild],
    *,
    say: Callable[[str], None] = lambda _: None,
    limit_s: float = LIMIT_S,
) -> tuple[KernelSpeed, ...]:
    """The figures of every runtime of `MEASURED` that was found here; some ten seconds for each.

    Measured once for each build on this hardware (a fingerprint) and kept in `folder`; `say`
    tells people. What cannot be read is measured again, what cannot be kept the next time. All
    that is measured now takes `limit_s` at most; figures that this cut off are not kept.
    """
    deadline_s = time.monotonic() + limit_s
    found: list[KernelSpeed] = []
    for build in builds:
        if build.name not in MEASURED or PROVIDER not in build.providers:
            continue
        path = folder / f"kernel-speeds-{hardware[:16]}-{build.name}-{build.version}.json"
        speeds = _read(path)
        if speeds is None:
            say(f"measuring which precisions are faster in {build.name}; once, a minute at most")
            left_s = deadline_s - time.monotonic()
            speeds, is_whole = kernel_speeds(build.name, limit_s=left_s)
            if is_whole:
                _keep(path, speeds)
        found += speeds
    return tuple(found)


def _read(path: Path) -> list[KernelSpeed] | None:
    try:
        document = json.loads(path.read_bytes())
        if document["version"] == SPEEDS_VERSION:
            return [KernelSpeed.model_validate(speed) for speed in document["speeds"]]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        pass
    return None


def _keep(path: Path, speeds: Sequence[KernelSpeed]) -> None:
    dumped = [speed.model_dump(mode="json") for speed in speeds]
    text = json.dumps({"version": SPEEDS_VERSION, "speeds": dumped})
    with contextlib.suppress(OSError, DeviceDiskFull):
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable_file(path) as file:
            file.write(text.encode())


def cache_folder() -> Path:
    """Where figures are kept: the user's cache (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "edge-autotune"


def kernel_speeds(runtime: str, *, limit_s: float) -> tuple[list[KernelSpeed], bool]:
    """The figures of a runtime, measured now, and whether nobody ended that early.

    A runtime that dies on a model costs the figures behind it, no more.
    """
    command = [sys.executable, "-m", "device_agents.kernel_benchmark", runtime]
    child = subprocess.Popen(  # noqa: S603 - our own module
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        output, _ = child.communicate(timeout=max(0.0, limit_s))
        is_whole = child.returncode not in (-signal.SIGINT, -signal.SIGTERM)
        end = f"the benchmark ended with code {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        is_whole, end = False, "the time for all figures was over"
    found = [KernelSpeed.model_validate_json(line) for line in _whole_lines(output)]
    told = {(speed.operator, speed.precision) for speed in found}
    missing = [
        KernelSpeed(runtime=runtime, operator=operator, precision=precision, missing=end)
        for operator, precision, _ in _variants(runtime)
        if (operator, precision) not in told
    ]
    return found + missing, is_whole


def _whole_lines(output: bytes) -> list[bytes]:
    """Without the line that a killed process was writing."""
    return [line for line in output.splitlines(keepends=True) if line.endswith(b"\n")]


def _variants(runtime: str) -> Iterator[tuple[str, str, Path]]:
    """Operator, precision and file of every model that says something about the runtime."""
    # The most telling first, for a device so slow that the time ends before the models do.
    for path in sorted(MODELS.glob("*.onnx"), key=lambda path: ("fp16" in path.name, path.name)):
        operator, precision, _ = path.name.split(".")
        is_asked = runtime != "openvino" or precision not in CONSTANT_CODES
        if precision != "fp32" and is_asked:
            yield operator, precision.replace("-", "/"), path


def main(runtimes: Sequence[str]) -> int:
    """Write the figures of these runtimes, for as long as somebody waits for them."""
    die_with_parent()
    for runtime in runtimes:
        for operator, precision, path in _variants(runtime):
            figures = _compare(runtime, path, MODELS / f"{operator}.fp32.onnx")
            speed = KernelSpeed(runtime=runtime, operator=operator, precision=precision, **figures)
            sys.stdout.write(speed.model_dump_json() + "\n")
            sys.stdout.flush()
    return 0


def _compare(runtime_name: str, path: Path, twin: Path) -> dict[str, Any]:
    """Ratio and interval of the model's latency to its twin's; why not, where there are none."""
    from device_agents.errors import RuntimeUnavailable
    from device_agents.feeds import make_feeds
    from device_agents.latency import ratio_interval
    from device_agents.runtimes import (
        InvalidArtifact,
        RuntimeOptions,
        UnsupportedModel,
        load_runtime,
    )
    from device_agents.sampling import Call, SamplingPlan, Subject, sample
    from device_agents.watch import DeviceWatch

    options = RuntimeOptions(provider=PROVIDER, threads=1)
    files: dict[Subject, Path] = {"candidate": path, "reference": twin}
    plan = SamplingPlan(
        target_half_width=TARGET_HALF_WIDTH, time_cap_s=PAIR_S, min_blocks=8, seed=0
    )
    try:
        runtime = load_runtime(runtime_name)

        def load() -> dict[Subject, Call]:
            sessions = {subject: runtime.load(file, options) for subject, file in files.items()}
            return {s: x.bind(make_feeds(x.inputs, seed=0)) for s, x in sessions.items()}

        watch = runtime.watch or DeviceWatch()
        sampled = sample(load, plan, runtime.clock, watch=watch)
        interval = ratio_interval(sampled.blocks, seed=0)
    except (RuntimeUnavailable, InvalidArtifact, UnsupportedModel) as error:
        return {"missing": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever else a runtime raises on this model
        return {"missing": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"ratio": interval.center, "ratio_low": interval.low, "ratio_high": interval.high}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
