"""A profile: how long each kernel of a model takes on this device.

Owns the number of runs and the medians over them; each runtime's file knows how to ask its
profiler. Which layer group a kernel computes is the service's knowledge. A model's latency is
never taken from here: a profiled session is slower.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from device_agents.feeds import make_feeds
from device_agents.runtimes import (
    InvalidArtifact,
    KernelRun,
    Runtime,
    RuntimeOptions,
    UnsupportedModel,
)

N_WARM_UP = 3
MIN_RUNS = 5
MAX_RUNS = 50
"""The median of 50 kernels' times moves by a few percent from one profile to the next."""
LONGEST_NS = 1e9
"""Runs end here, if there are `MIN_RUNS`."""


def profile(runtime: Runtime, path: Path, options: RuntimeOptions, *, seed: int) -> dict[str, Any]:
    """The profile of a model, with the keys of `protocol.Profile`.

    Whatever keeps the runtime from giving one is told in `missing`: a measurement is worth as
    much without.
    """
    try:
        session = runtime.load_profiled(path, options)
        run = session.bind(make_feeds(session.inputs, seed=seed))
        calls_ns: list[int] = []
        started_ns = runtime.clock.now_ns()
        while len(calls_ns) < N_WARM_UP + MAX_RUNS:
            before_ns = runtime.clock.now_ns()
            run()
            now_ns = runtime.clock.now_ns()
            calls_ns.append(now_ns - before_ns)
            if len(calls_ns) >= N_WARM_UP + MIN_RUNS and now_ns - started_ns > LONGEST_NS:
                break
        runs = session.finish()[N_WARM_UP:]
    except (InvalidArtifact, UnsupportedModel) as error:
        return {"missing": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever a runtime's profiler raises
        return {"missing": f"the profiler failed: {type(error).__name__}: {error}"}
    kernels = kernel_medians(runs)
    if not kernels:
        return {"missing": "the runtime's profiler noted no kernel"}
    return {
        "kernels": kernels,
        "inference_ns": float(median(calls_ns[N_WARM_UP:])),
        "n_runs": len(runs),
    }


def kernel_medians(runs: list[list[KernelRun]]) -> list[dict[str, Any]]:
    """The median of each kernel over the runs, in order of execution.

    A kernel that one run executes several times counts with their sum.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    for index, run in enumerate(runs):
        for kernel in run:
            durations = totals.setdefault((kernel.name, kernel.operator), [0.0] * len(runs))
            durations[index] += kernel.duration_ns
    return [
        {"name": name, "operator": operator, "time_ns": float(median(durations))}
        for (name, operator), durations in totals.items()
    ]
