"""From a job's trials to what they teach about its device.

Owns the translation of trials into the numbers that `device_latency.py` learns from. Where it is
kept is `storage/knowledge.py`'s business, when it is learnt and used `tuning.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autotune.search.device_latency import Mixtures, learn, operator_of
from autotune.search.front import latency_of, ranks
from autotune.search.landscape import (
    INT8_SAVING,
    Encoding,
    Knowledge,
    boundary_values,
    moved_values,
)
from device_agents.protocol import LatencyReport
from storage.latency_model import LatencyModel
from storage.records import TrialRecord

_FP32_BYTES = 4
_LEAST_MIXTURES = 3
"""FP32, uniform INT8 and a mixture: below that there is nothing to tell groups apart by."""


def lesson(
    encoding: Encoding,
    knowledge: Knowledge,
    trials: Sequence[TrialRecord],
    prior: LatencyModel | None,
) -> LatencyModel | None:
    """What the trials on one device teach about it, on top of what earlier jobs taught.

    Of trials on the space's first runtime, which FP32's ratio of 1 belongs to; `trials` are seen
    as that device has them. None before FP32 and two others rank.
    """
    seen = [(encoding.point(t.candidate), latency_of(t)) for t in trials if ranks(t)]
    rows = [(p, latency) for p, latency in seen if p is not None and latency and p[-1] == 0]
    origin = next((latency for p, latency in rows if not p.any()), None)
    if origin is None or len(rows) < _LEAST_MIXTURES:
        return None
    mixtures = _mixtures(encoding, knowledge.told_by(encoding.space, trials), rows, origin)
    thought = {
        (operator, precision): 1.0 - INT8_SAVING
        for operator, own in zip(mixtures.operators, mixtures.options, strict=True)
        for precision in own
        if precision.startswith("w8a8")
    }
    return learn(
        mixtures,
        prior,
        runtime=encoding.space.runtimes[0],
        runtime_version=origin.runtime_version,
        thought=thought,
    )


def _mixtures(
    encoding: Encoding,
    knowledge: Knowledge,
    rows: Sequence[tuple[np.ndarray, LatencyReport]],
    origin: LatencyReport,
) -> Mixtures:
    groups = [knowledge.inventory.group(name) for name in encoding.groups]
    shares = knowledge.time_shares()
    uniform = encoding.space.uniform_int8()
    profiled = {
        (index, uniform.precision(group.name).name): after / before
        for index, group in enumerate(groups)
        if (before := knowledge.fp32_ns.get(group.name, 0.0)) > 0
        and (after := knowledge.int8_ns.get(group.name)) is not None
        and uniform.precision(group.name).is_int8
    }
    n = len(groups)
    return Mixtures(
        operators=[operator_of(group) for group in groups],
        options=[[p.name for p in encoding.space.precisions[g.name]] for g in groups],
        shares=np.array([shares[group.name] for group in groups]),
        boundary_bytes=_FP32_BYTES * boundary_values(encoding, knowledge.inventory),
        fp32_ns=origin.p50_ns,
        points=np.array([point[:n] for point, _ in rows]),
        ratios=np.array([latency.ratio for _, latency in rows]),
        noise=np.array([_deviation(latency) for _, latency in rows]),
        bases=np.array([point[n] for point, _ in rows]),
        saved=[knowledge.saved(base) for base in encoding.bases],
        profiled=profiled,
        work=np.array([(g.macs, _FP32_BYTES * moved_values(g)) for g in groups], dtype=float),
        fp32_group_ns=np.array([knowledge.fp32_ns.get(g.name, 0.0) for g in groups])
        if knowledge.fp32_ns
        else np.zeros(0),
    )


def _deviation(latency: LatencyReport) -> float:
    half = (latency.ratio_high - latency.ratio_low) / 2
    return max(half / 1.96, 1e-3 * latency.ratio) if math.isfinite(half) else latency.ratio
