"""How far repeats of one measurement lie apart: `python -m tests.benchmarks.latency_spread`.

mobilenet_v2 with all groups in 8 bits against its FP32 file, 40 times on an idle machine and 40
times while another process computes on one core. In each repeat the agent's measurement (as a job
screens by default: to ±2 %, but 8 s at most) takes turns with what is usually done, 10 warm-up and
20 timed runs of each model and the ratio of the means, all in fresh processes. FP32 against FP32
is measured by the agent half as often; once beforehand in each condition, which calibrates the
reference, as a job's FP32 baseline does. The agent waits for a device at rest, so a repeat begins
with the usual runs and at the next tick of a period: right after the agent's they would meet the
state that it has waited for. Keys:

- `iqr_ratio_idle`, `iqr_ratio_loaded`: interquartile range of the agent's ratios over that of the
  usual ones, of their logarithms; at most a third under load;
- `false_difference_rate`: FP32 against FP32, the share of stated intervals that leave out 1; at
  most 0.05, over both conditions;
- `coverage`: the share of the agent's intervals that contain the long-run value of their
  condition, which is the median over all its repeats; at least 0.9, over both conditions.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx

from autotune.spec import MeasurementSpec
from device_agents.rest import RestMemory
from search_spaces import INT8
from tests.benchmarks.harness import Benchmark, Figure, start
from tests.benchmarks.models import fp32_model, images
from tests.benchmarks.protocols import (
    Measured,
    busy_core,
    by_agent,
    by_fixed_runs,
    documents,
    interquartile_range,
    said,
    share,
)

MODEL, SIZE, QUICK_SIZE = "mobilenet_v2", 224, 64
REPEATS, QUICK_REPEATS = 40, 3
USUAL_RUNS = 20
QUICK_TIME_CAP_S = 1.2
PERIOD_S = 15.0
"""A repeat begins at a multiple of this."""
CALIBRATION_IMAGES = 8
RESAMPLES = 2000

Repeats = dict[str, list[Measured]]
"""Of each way in order of time; `calibration` holds the one that calibrated the reference."""


def main() -> int:
    benchmark = start("latency_spread", "The spread of repeated measurements.")
    fp32 = fp32_model(MODEL, QUICK_SIZE if benchmark.quick else SIZE)
    int8 = int8_file(fp32, QUICK_SIZE if benchmark.quick else SIZE)
    found: dict[str, Repeats] = {}
    memory = RestMemory()
    for condition, load in (("idle", contextlib.nullcontext), ("loaded", busy_core)):
        with load():
            found[condition] = repeats(benchmark, condition, int8, fp32, memory)
    for key, figure in figures(found).items():
        benchmark.add(key, figure)
    benchmark.raw["repeats"] = {
        condition: {way: documents(values) for way, values in ways.items()}
        for condition, ways in found.items()
    }
    benchmark.raw["device_seconds"] = {
        condition: {way: sum(x.device_s for x in values) for way, values in ways.items()}
        for condition, ways in found.items()
    }
    benchmark.report()
    return 0


def int8_file(fp32: Path, size: int) -> Path:
    """The model with all groups in 8 bits, beside its FP32 file; made where it is not yet."""
    from autotune.compression.calibration import calibrate
    from autotune.compression.quantization import QuantizableGraph

    model = onnx.load(fp32)
    graph = QuantizableGraph(model, calibrate(model, images(CALIBRATION_IMAGES, size)))
    path = fp32.with_name(f"{fp32.stem}_int8.onnx")
    path.write_bytes(graph.emit(dict.fromkeys(graph.units, INT8)))
    return path


def repeats(
    benchmark: Benchmark, condition: str, int8: Path, fp32: Path, memory: RestMemory
) -> Repeats:
    """All repeats under one condition; each takes a turn of every way."""
    screening = MeasurementSpec()
    target = screening.target_half_width
    cap = QUICK_TIME_CAP_S if benchmark.quick else screening.time_cap_s
    measure = partial(by_agent, reference=fp32, target=target, time_cap_s=cap, memory=memory)
    calibration = measure(fp32, seed=0, is_calibration=True)
    measure = partial(measure, reference_latency_ns=calibration.reference_ns)
    found: Repeats = {"agent": [], "usual": [], "agent_same": []}
    begun_s = time.monotonic()
    for seed in range(QUICK_REPEATS if benchmark.quick else REPEATS):
        if seed and not benchmark.quick:
            time.sleep(-(time.monotonic() - begun_s) % PERIOD_S)
        found["usual"].append(by_fixed_runs(int8, fp32, runs=USUAL_RUNS, seed=seed))
        found["agent"].append(measure(int8, seed=seed))
        if seed % 2 == 0:
            found["agent_same"].append(measure(fp32, seed=seed))
        benchmark.say(
            f"{condition} {seed + 1}: "
            + ", ".join(f"{way} {said(values[-1])}" for way, values in found.items())
        )
    return {"calibration": [calibration], **found}


def figures(found: Mapping[str, Repeats]) -> dict[str, Figure]:
    """The keys from the repeats of each condition."""
    iqr = {c: iqr_ratio(ways["agent"], ways["usual"]) for c, ways in found.items()}
    differs = [not x.claims(1.0) for ways in found.values() for x in ways["agent_same"]]
    covered = [hit for ways in found.values() for hit in covers(ways["agent"])]
    return {
        **{f"iqr_ratio_{condition}": figure for condition, figure in iqr.items()},
        "false_difference_rate": share(differs),
        "coverage": share(covered),
    }


def iqr_ratio(ours: Sequence[Measured], usual: Sequence[Measured]) -> Figure:
    """One interquartile range over the other, with a bootstrap interval over the repeats."""
    ratios = np.array([[x.ratio for x in ours], [x.ratio for x in usual]])
    rng = np.random.default_rng(0)
    picks = rng.integers(len(ours), size=(RESAMPLES, len(ours)))
    drawn = [_iqr_ratio(ratios[:, pick]) for pick in picks]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Figure(value=_iqr_ratio(ratios), low=float(low), high=float(high), n=len(ours))


def covers(measured: Sequence[Measured]) -> list[bool]:
    """Which of the stated intervals contain the median over all of the repeats."""
    long_run = median(x.ratio for x in measured)
    return [x.claims(long_run) for x in measured]


def _iqr_ratio(ratios: np.ndarray) -> float:
    usual = interquartile_range(ratios[1])
    return interquartile_range(ratios[0]) / usual if usual > 0 else float("nan")


if __name__ == "__main__":
    sys.exit(main())
