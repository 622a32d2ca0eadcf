"""From a job's trials to what they teach about its device.

Owns the translation of trials into the numbers that `device_latency.py` learns from. Where it is
kept is `storage/knowledge.py`'s business, when it is learnt and used `tuning.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autotune.search.device_latency import Mixtures, learn, operator_of
from autotune.search.front import latency_of, ranks
from autotune.search.landscape import (
    INT8_SAVING,
    Encoding,
    Knowledge,
    boundary_bytes,
    moved_bytes,
    ratio_deviation,
)
from device_agents.protocol import LatencyReport
from storage.latency_model import LatencyModel
from storage.records import TrialRecord

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
        (operator, precision.name): 1.0 - INT8_SAVING
        for operator, name in zip(mixtures.operators, encoding.groups, strict=True)
        for precision in encoding.space.precisions[name]
        if precision.is_int8
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
        (index, precision.name): factor
        for index, name in enumerate(encoding.groups)
        if (precision := uniform.precision(name)).is_int8
        and (factor := knowledge.int8_factor(name)) is not None
    }
    n = len(groups)
    return Mixtures(
        operators=[operator_of(group) for group in groups],
        options=[[p.name for p in encoding.space.precisions[g.name]] for g in groups],
        shares=np.array([shares[group.name] for group in groups]),
        boundary_bytes=boundary_bytes(encoding, knowledge.inventory),
        fp32_ns=origin.p50_ns,
        points=np.array([point[:n] for point, _ in rows]),
        ratios=np.array([latency.ratio for _, latency in rows]),
        noise=np.array([ratio_deviation(latency) for _, latency in rows]),
        bases=np.array([point[n] for point, _ in rows]),
        saved=[knowledge.saved(base) for base in encoding.bases],
        profiled=profiled,
        work=np.array([(g.macs, moved_bytes(g)) for g in groups], dtype=float),
        fp32_group_ns=np.array([knowledge.fp32_ns.get(g.name, 0.0) for g in groups])
        if knowledge.fp32_ns
        else np.zeros(0),
    )
