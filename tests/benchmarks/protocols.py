"""Two ways to a ratio of latencies: the agent's own, and the usual fixed number of runs.

Both load both models in a fresh process, with the same runtime, options and inputs, and both
state their seconds alike: from loading the runtime until the figures are there. The agent's
is `device_agents.measurement`, as `autotune-agent measure MODEL --against REFERENCE` runs it.
The fixed one loads a model, warms up, times its runs, lets go, and does the same with the other.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_agents.latency import CONFIDENCE_LEVEL
from device_agents.measurement import Measurement
from device_agents.protocol import LatencyReport, MeasurementPlan, RuntimeRequest
from device_agents.rest import RestMemory
from tests.benchmarks.harness import ROOT, Figure

WARM_UP_RUNS = 10
_BUSY = """
import numpy as np
x = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
print("ready", flush=True)
while True:
    x @ x
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A ratio, candidate over reference, with its stated 95 % interval and what it cost."""

    ratio: float
    low: float
    high: float
    device_s: float
    n_samples: int
    reference_ns: float

    def claims(self, value: float) -> bool:
        """The stated interval contains the value."""
        return self.low <= value <= self.high

    @property
    def half_width(self) -> float:
        """As a fraction of the ratio."""
        return (self.high - self.low) / 2 / self.ratio


def by_agent(
    candidate: Path,
    reference: Path,
    *,
    target: float,
    time_cap_s: float,
    seed: int,
    runtime: RuntimeRequest | None = None,
    reference_latency_ns: float | None = None,
    is_calibration: bool = False,
    memory: RestMemory | None = None,
) -> Measured:
    """The agent's measurement, in the child process that an agent starts.

    `runtime` is the candidate's, by default one thread of onnxruntime as the reference's is;
    `reference_latency_ns` is the reference's calibrated latency, as a job has it, and
    `is_calibration` finds it out. `memory` is the agent's, from one measurement to the next; by
    default that of an agent that has just been started.

    Raises:
        SystemExit: there is no report.
    """
    plan = MeasurementPlan(
        target_half_width=target,
        time_cap_s=time_cap_s,
        timeout_s=10 * time_cap_s + 60,
        reference_latency_ns=reference_latency_ns,
        is_calibration=is_calibration,
        seed=seed,
    )
    ended = Measurement(
        candidate=candidate,
        reference=reference,
        runtime=runtime or RuntimeRequest(),
        reference_runtime=RuntimeRequest(),
        plan=plan,
        memory=memory,
    ).run()
    if ended.report is None:
        raise SystemExit(f"a measurement ended as {ended.outcome}: {ended.reason}")
    return from_report(ended.report)


def from_report(report: LatencyReport) -> Measured:
    """What a report states."""
    return Measured(
        ratio=report.ratio,
        low=report.ratio_low,
        high=report.ratio_high,
        device_s=report.wall_s,
        n_samples=report.n_samples,
        reference_ns=report.reference_p50_ns,
    )


def by_fixed_runs(candidate: Path, reference: Path, *, runs: int, seed: int) -> Measured:
    """10 warm-up runs and `runs` timed ones of each model; the ratio of the means.

    An odd seed takes the reference first.
    """
    pair = [candidate, reference]
    order = [1, 0] if seed % 2 else [0, 1]
    request = {"models": [str(pair[i]) for i in order], "runs": runs, "seed": seed}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.protocols", json.dumps(request)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    samples = dict(zip(order, answer["samples_ns"], strict=True))
    return ratio_of_means(samples[0], samples[1], device_s=answer["device_s"])


def ratio_of_means(
    candidate_ns: Sequence[float], reference_ns: Sequence[float], *, device_s: float
) -> Measured:
    """The ratio of two means with the interval that independent runs would have.

    The delta method for log(a / b), with Student's quantile for the smaller sample (Fieller
    1954 in its usual approximation).
    """
    from scipy.stats import t as student

    a, b = (np.asarray(x, dtype=np.float64) for x in (candidate_ns, reference_ns))
    variance = sum(x.var(ddof=1) / x.size / x.mean() ** 2 for x in (a, b))
    quantile = student.ppf((1 + CONFIDENCE_LEVEL) / 2, min(a.size, b.size) - 1)
    ratio, width = float(a.mean() / b.mean()), float(quantile * np.sqrt(variance))
    return Measured(
        ratio=ratio,
        low=ratio * float(np.exp(-width)),
        high=ratio * float(np.exp(width)),
        device_s=device_s,
        n_samples=int(a.size),
        reference_ns=float(b.mean()),
    )


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """One core computes matrix products, as a neighbour's job does, until the block ends."""
    command = [sys.executable, "-c", _BUSY]
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def interquartile_range(values: Sequence[float]) -> float:
    """Of the values' logarithms, which is a fraction; exchanging the models keeps it."""
    low, high = np.quantile(np.log(values), [0.25, 0.75])
    return float(high - low)


def share(hits: Sequence[bool]) -> Figure:
    """A share with its 95 % interval (Clopper and Pearson 1934, exact)."""
    from scipy.stats import binomtest

    result = binomtest(sum(hits), len(hits))
    low, high = result.proportion_ci(method="exact")
    return Figure(value=float(result.statistic), low=float(low), high=float(high), n=len(hits))


def said(measured: Measured) -> str:
    """For a line of progress."""
    return f"{measured.ratio:.4f} ±{measured.half_width:.1%} in {measured.device_s:.1f} s"


def documents(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """For the raw values."""
    return [asdict(x) for x in measured]


def _run_fixed(request: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process of `by_fixed_runs` does."""
    from device_agents.measurement_child import make_feeds
    from device_agents.runtimes import RuntimeOptions, load_runtime

    started = time.perf_counter()
    default = RuntimeRequest()
    runtime = load_runtime(default.runtime)
    options = RuntimeOptions(provider=default.provider, threads=default.threads)
    samples_ns: list[list[int]] = []
    for path in request["models"]:
        session = runtime.load(Path(path), options)
        call = session.bind(make_feeds(session.inputs, seed=request["seed"]))
        for _ in range(WARM_UP_RUNS):
            call()
        taken: list[int] = []
        for _ in range(request["runs"]):
            before = time.perf_counter_ns()
            call()
            taken.append(time.perf_counter_ns() - before)
        samples_ns.append(taken)
        del call, session
    return {"samples_ns": samples_ns, "device_s": time.perf_counter() - started}


if __name__ == "__main__":
    print(json.dumps(_run_fixed(json.loads(sys.argv[1]))))
