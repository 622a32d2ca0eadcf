"""The runtimes of a job: which are asked for, which can be judged, which compete on.

Owns the choice of runtime options. That a device has a runtime is checked in `targets.py`;
accuracy in a runtime is `autotune.compression.shipped_runtime`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from autotune.errors import InvalidJob
from autotune.spec import SearchSpec
from device_agents.device import probe_runtimes
from device_agents.protocol import RuntimeBuild
from search_spaces import RuntimeOptions, SearchSpace
from storage.records import TrialRecord

ONNXRUNTIME = "onnxruntime"
SIMULATED = "simulated"

CONTENDING = 1.5
"""How much slower than the fastest baseline an option's own fastest may be for the search to go
on with it. A choice: mixtures and pruning gain alike on every runtime, and a mixture gains less
over the better one of FP32 and INT8 than this (mobilenet_v3_small: 0.86 of FP32)."""


def asked_for(search: SearchSpec) -> list[RuntimeOptions]:
    """Every runtime of the job with every number of threads."""
    return [
        RuntimeOptions(runtime=runtime, threads=threads)
        for runtime in search.runtimes
        for threads in search.threads or (1,)
    ]


def require_judges(
    space: SearchSpace,
    *,
    probe: Callable[[Sequence[str]], Sequence[RuntimeBuild]] = probe_runtimes,
) -> None:
    """Return where this host has every runtime of the space, to judge accuracy in it.

    Raises:
        InvalidJob: one is missing; arithmetic differs, so another cannot stand in for it.
    """
    others = sorted({options.runtime for options in space.runtimes} - {ONNXRUNTIME})
    if not others:
        return
    missing = sorted(set(others) - {build.name for build in probe(others)})
    if missing:
        raise InvalidJob(
            f"search.runtimes names {', '.join(missing)}, and this service's host has no such "
            "runtime to judge accuracy in; install it there (`pip install "
            f"'edge-autotune[{missing[0]}]'` for one of ours), or leave it out"
        )


def contending(space: SearchSpace, trials: Sequence[TrialRecord]) -> SearchSpace:
    """The space without the runtime options whose baselines are far behind on every device.

    All options stay where the baselines of one were not measured.
    """
    kept: set[RuntimeOptions] = set()
    for figures in _fastest_baselines(trials):
        if set(space.runtimes) - set(figures):
            return space
        limit = CONTENDING * min(figures.values())
        kept |= {options for options, p50_ns in figures.items() if p50_ns <= limit}
    if not kept:
        return space
    return replace(space, runtimes=tuple(o for o in space.runtimes if o in kept))


def _fastest_baselines(
    trials: Sequence[TrialRecord],
) -> Iterator[dict[RuntimeOptions, float]]:
    """For each device the fastest baseline's p50 in ns by runtime option."""
    baselines = [trial for trial in trials if trial.proposed_by == "baseline"]
    n_devices = 1 + max((len(trial.further) for trial in baselines), default=0)
    for index in range(n_devices):
        found: dict[RuntimeOptions, float] = {}
        for trial in baselines:
            reports = [trial.latency, *(figures.latency for figures in trial.further)]
            report = reports[index] if index < len(reports) else None
            if report is not None and report.is_steady:
                options = trial.candidate.runtime
                found[options] = min(found.get(options, report.p50_ns), report.p50_ns)
        yield found


def unused(search: SearchSpec, offered: Sequence[Collection[str]]) -> list[str]:
    """A sentence on the runtimes that every device has and the job does not name, if any.

    `offered` has the names of each device's runtimes.
    """
    on_all = set.intersection(*(set(names) for names in offered)) if offered else set()
    known = sorted(on_all - {*search.runtimes, SIMULATED})
    if not known:
        return []
    return [
        f"the device also has {', '.join(known)}: search.runtimes lets it compete, for two more "
        "baselines and its share of the trials"
    ]
