"""Device seconds to a ±2 % interval, against fixed runs: `python -m tests.benchmarks.device_time`.

Six FP32 models from 0.1 to 100 ms, each against a second session of itself, so that the ratio
is known: 1. Each is calibrated once beforehand, as a job's FP32 baseline does it for all of the
job's measurements, which `raw` keeps and no key counts. A model against itself does not wait for a
device at rest: what waiting costs a candidate is in the `device_seconds` of
`tests.benchmarks.latency_spread`. The agent's measurement (to ±2 %, 30 s at most) takes turns with
10 warm-up and 100 timed runs of each of the two, all in fresh processes. Fixed runs in one process
are as precise as they happen to be: sessions differ, and no number of calls in one of them shows
it. So the comparison at equal coverage asks how often they would have to be done again, in fresh
processes, for the mean to lie within ±2 % at the agent's level, 95 %. Keys:

- `device_seconds_ratio`: seconds of the agent's measurements over those of as many fixed runs as
  that takes, summed over the models, each model's median; from loading the runtime to the
  figures, for both; at most 0.5. The number is the square of 1.96 times their spread over 2 %, 1
  at least, from the standard deviation of their logarithms around 0: which a user of fixed runs
  does not know beforehand, so it is the least that they cost;
- `device_seconds_ratio_once`: the same where the fixed runs are done once, whatever they cover;
- `coverage`, `coverage_fixed`: the share of intervals that contain 1, over all models and
  repeats: the stated interval of each (for the fixed runs, once, that of the ratio of means, with
  Student's quantile);
- `coverage_fixed_2pct`: the same where the fixed runs are credited with ±2 % flat.

`raw` has each model's latency, seconds, half widths and coverages.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import NormalDist, median
from typing import Any

from autotune.spec import MeasurementSpec
from device_agents.latency import CONFIDENCE_LEVEL
from tests.benchmarks.harness import Benchmark, Figure, start
from tests.benchmarks.models import fp32_model
from tests.benchmarks.protocols import (
    Measured,
    by_agent,
    by_fixed_runs,
    documents,
    said,
    share,
)

MODELS = (
    ("squeezenet1_1", 32),
    ("mobilenet_v2", 64),
    ("efficientnet_b0", 64),
    ("efficientnet_b0", 224),
    ("densenet121", 224),
    ("convnext_tiny", 288),
)
"""About 0.1, 0.5, 1.6, 7, 29 and 100 ms on one x86 core."""
QUICK_MODELS = (("mobilenet_v2", 64), ("efficientnet_b0", 224))
REPEATS, QUICK_REPEATS = 6, 2
FIXED_RUNS = 100
TARGET, TIME_CAP_S = 0.02, 30.0

Turns = dict[str, list[Measured]]


def main() -> int:
    benchmark = start("device_time", "Device seconds to an interval of ±2 %.")
    found: dict[str, Turns] = {}
    for name, size in QUICK_MODELS if benchmark.quick else MODELS:
        found[f"{name}_{size}"] = take_turns(benchmark, name, size)
    for key, figure in figures(found).items():
        benchmark.add(key, figure)
    benchmark.raw["models"] = {name: model_document(turns) for name, turns in found.items()}
    benchmark.report()
    return 0


def take_turns(benchmark: Benchmark, name: str, size: int) -> Turns:
    """All repeats of one model."""
    path = fp32_model(name, size)
    measure = partial(by_agent, path, path, target=TARGET)
    calibration = measure(time_cap_s=MeasurementSpec().time_cap_s, seed=0, is_calibration=True)
    measure = partial(measure, time_cap_s=TIME_CAP_S, reference_latency_ns=calibration.reference_ns)
    found: Turns = {"calibration": [calibration], "agent": [], "fixed": []}
    for seed in range(QUICK_REPEATS if benchmark.quick else REPEATS):
        ours = measure(seed=seed)
        fixed = by_fixed_runs(path, path, runs=FIXED_RUNS, seed=seed)
        found["agent"].append(ours)
        found["fixed"].append(fixed)
        benchmark.say(f"{name} at {size}: agent {said(ours)}, fixed {said(fixed)}")
    return found


def figures(found: Mapping[str, Turns]) -> dict[str, Figure]:
    """The keys from the turns of each model."""
    ours, fixed = (seconds(found, way) for way in ("agent", "fixed"))
    enough = [k * s for k, s in zip(map(times_needed, found.values()), fixed, strict=True)]
    n = len(found)
    return {
        "device_seconds_ratio": Figure(value=sum(ours) / sum(enough), n=n),
        "device_seconds_ratio_once": Figure(value=sum(ours) / sum(fixed), n=n),
        "coverage": share([x.claims(1.0) for turns in found.values() for x in turns["agent"]]),
        "coverage_fixed": share(
            [x.claims(1.0) for turns in found.values() for x in turns["fixed"]]
        ),
        "coverage_fixed_2pct": share(
            [abs(x.ratio - 1) <= TARGET for turns in found.values() for x in turns["fixed"]]
        ),
    }


def seconds(found: Mapping[str, Turns], way: str) -> list[float]:
    """The median over repeats of what one measurement takes, per model."""
    return [median(x.device_s for x in turns[way]) for turns in found.values()]


def times_needed(turns: Turns) -> float:
    """How often fixed runs have to be done for their mean to lie within ±2 % of 1, in 95 %."""
    logs = [math.log(x.ratio) for x in turns["fixed"]]
    spread = math.sqrt(sum(x * x for x in logs) / len(logs))
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)
    return max(1.0, (quantile * spread / TARGET) ** 2)


def model_document(turns: Turns) -> dict[str, Any]:
    """One model's figures and raw values."""
    ours, fixed = turns["agent"], turns["fixed"]
    return {
        "latency_ms": median(x.reference_ns for x in ours) / 1e6,
        "device_seconds_ratio": figures({"": turns})["device_seconds_ratio"].value,
        "fixed_times_needed": times_needed(turns),
        "half_width": median(x.half_width for x in ours),
        "half_width_fixed": median(x.half_width for x in fixed),
        "coverage": _covered(ours),
        "coverage_fixed": _covered(fixed),
        "calibration": documents(turns["calibration"]),
        "agent": documents(ours),
        "fixed": documents(fixed),
    }


def _covered(measured: Sequence[Measured]) -> float:
    return sum(x.claims(1.0) for x in measured) / len(measured)


if __name__ == "__main__":
    sys.exit(main())
