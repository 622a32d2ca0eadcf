"""The runtimes of a job: which are asked for, which can be judged, which compete on.

Owns the choice of runtime options, and that the devices have what the job names. Accuracy in a
runtime is `autotune.compression.shipped_runtime`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product

from autotune.errors import DeviceUnavailable, InvalidJob
from autotune.spec import SearchSpec
from device_agents.device import probe_runtimes
from device_agents.protocol import RuntimeBuild
from search_spaces import USUAL_PROVIDER, RuntimeOptions, SearchSpace
from storage.records import DeviceRecord, TrialRecord

ONNXRUNTIME = "onnxruntime"
SIMULATED = "simulated"

CONTENDING = 1.5
"""How much slower than the fastest baseline an option's own fastest may be for the search to go
on with it. A choice: mixtures and pruning gain alike on every runtime, and a mixture gains less
over the better one of FP32 and INT8 than this (mobilenet_v3_small: 0.86 of FP32)."""


def asked_for(
    search: SearchSpec, devices: Sequence[Collection[RuntimeBuild]] = ()
) -> list[RuntimeOptions]:
    """Every combination of the job's runtimes with their options that each device can start.

    `devices` has the builds of each; a runtime that one lacks stays, for `require_offered` to
    tell. A single thread waits for none, so that it is not asked to spin or not to.
    """
    combinations = product(
        search.runtimes,
        search.providers,
        search.threads or (1,),
        search.graph_levels,
        search.memory_arena,
        search.spinning,
    )
    asked = (
        RuntimeOptions(
            runtime=runtime,
            provider=provider,
            threads=threads,
            graph_level=graph_level,
            memory_arena=memory_arena,
            spinning=spinning or threads == 1,
        )
        for runtime, provider, threads, graph_level, memory_arena, spinning in combinations
    )
    return [
        options
        for options in dict.fromkeys(asked)
        if all(_can_start(builds, options) for builds in devices)
    ]


def _can_start(builds: Collection[RuntimeBuild], options: RuntimeOptions) -> bool:
    return all(
        options.provider in build.providers and set(options.unusual) <= set(build.options)
        for build in builds
        if build.name == options.runtime
    )


def require_offered(search: SearchSpec, devices: Sequence[DeviceRecord]) -> list[RuntimeOptions]:
    """What `asked_for` says, where every device has every runtime and some use for every option.

    Raises:
        DeviceUnavailable: one lacks a runtime, or no runtime of the job takes what it asks for.
    """
    for device in devices:
        offered = {build.name for build in device.description.runtimes}
        missing = set(search.runtimes) - offered
        if missing:
            raise DeviceUnavailable(
                f"device {device.name} has no runtime {', '.join(sorted(missing))}; "
                f"it has {', '.join(sorted(offered)) or 'none'}"
            )
    found = asked_for(search, [device.description.runtimes for device in devices])
    for key, option in _KEYS.items():
        used = {getattr(options, option) for options in found}
        for value in getattr(search, key):
            if value not in used:
                raise DeviceUnavailable(
                    f"search.{key} names {_as_written(value)}, which no runtime of the job takes "
                    f"on {_offers(search, devices)}; an agent of an older release takes providers "
                    "and threads alone"
                )
    return found


_KEYS = {
    "providers": "provider",
    "graph_levels": "graph_level",
    "memory_arena": "memory_arena",
    "spinning": "spinning",
}
"""The keys of a job file that name options, and the options."""


def _as_written(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _offers(search: SearchSpec, devices: Sequence[DeviceRecord]) -> str:
    """The devices with what the job's runtimes take there."""
    return "; ".join(
        f"device {device.name} ({_described(build)})"
        for device in devices
        for build in device.description.runtimes
        if build.name in search.runtimes
    )


def _described(build: RuntimeBuild) -> str:
    options = f"; takes {', '.join(build.options)}" if build.options else ""
    return f"{build.name} {build.version}: {', '.join(build.providers) or 'no provider'}{options}"


def require_judges(
    asked: Sequence[RuntimeOptions],
    *,
    probe: Callable[[Sequence[str]], Sequence[RuntimeBuild]] = probe_runtimes,
) -> None:
    """Return where this host has every runtime that is asked for, to judge accuracy in it.

    Raises:
        InvalidJob: one is missing; arithmetic differs, so another cannot stand in for it.
    """
    others = sorted({options.runtime for options in asked} - {ONNXRUNTIME})
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


def remarks(search: SearchSpec, devices: Sequence[Collection[RuntimeBuild]]) -> list[str]:
    """A sentence each on what every device has and the job does not name, and on other judges.

    `devices` has the builds of each. A simulated job is about no real runtime.
    """
    if not set(search.runtimes) - {SIMULATED}:
        return []
    builds = [[b for b in builds if b.name in search.runtimes] for builds in devices]
    known = {
        "runtimes": _on_all([{build.name for build in own} for own in devices]) - {SIMULATED},
        "providers": _on_all([{name for b in own for name in b.providers} for own in builds]),
    }
    found = [
        f"the device also has {', '.join(sorted(left))}: search.{key} lets it compete, for two "
        "more baselines and its share of the trials"
        for key, names in known.items()
        if (left := names - set(getattr(search, key)))
    ]
    elsewhere = [provider for provider in search.providers if provider != USUAL_PROVIDER]
    if elsewhere:
        found.append(
            f"accuracy is judged on this host's processor; {', '.join(elsewhere)} may round "
            "otherwise, so check the winner on the device too"
        )
    return found


def _on_all(offered: Sequence[set[str]]) -> set[str]:
    return set.intersection(*offered) if offered else set()
