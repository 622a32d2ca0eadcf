"""A job's search space as factors and links, with what is known before anything is measured.

Owns the encoding: candidates to rows of integers and back, prior effects on latency (as a
fraction of FP32's) and on accuracy, and which choices bear on each other. The regression is
`surrogate.py`'s, the choice of the next point `improvement.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from autotune.search import device_latency
from autotune.search.drop_model import DropModel, Drops
from autotune.search.features import Factor, Features, Link
from autotune.search.front import REFERENCE_DROP, REFERENCE_RATIO, latency_of, ranks
from autotune.search.improvement import TEACHING_RUNS, Landscape, Promise, most_promising
from autotune.search.priors import (
    BASE_SCALE,
    EFFECT_SCALE,
    NOTHING,
    Earlier,
    boundary_links,
    damage_factors,
    damage_links,
    profiled,
    time_factors,
    time_scales,
)
from autotune.search.screening import pruned_macs
from autotune.search.surrogate import Surrogate
from device_agents.protocol import LatencyReport
from search_spaces import FP32, Candidate, LayerGroup, LayerInventory, Precision, SearchSpace
from storage.latency_model import LatencyModel
from storage.records import TrialRecord

INT8_SAVING = 0.4
"""Share of its time that a group is thought to save at 8 bits, before anything is measured:
the 3x3 convolution of design.md saves 0.7, a depthwise one costs 0.35 more; the scale below
says how little this is trusted."""

_TEACHING_SHARE = 4
"""One part of this many of a job's trials may be measured to teach: of 14 trials every second one
was too many, and the job ended without the answer that was there.

Baselines and the warm start count, so that a job of 20 trials teaches nothing more. Counted from
behind them, regret after 20 trials in replays is 0.039 +- 0.002 instead of 0.021 +- 0.001 on
resnet18, 0.016 +- 0.008 instead of 0.005 +- 0.004 on efficientnet_b0 (100 seeds each), 0.002 +-
0.001 instead of 0 on mobilenet_v2 and 0 as before on mobilenet_v3_small (60), though the model's
error on other mixtures is 4 to 14 % less; on the simulated fifty groups, after 60, it is 0.168
instead of 0.151 (5)."""

LONG_BUDGET = _TEACHING_SHARE * TEACHING_RUNS
"""Trials of a job in which teaching is not cut short."""

_SURE = 2.0
"""Standard deviations past which a candidate's figures are not expected: 2.3 % on one side."""

_RUNTIME_SCALE = 0.5
_UNKNOWN_DAMAGE = 0.002
"""Drop of a group whose sensitivity is not known; two thirds of a point in ten."""

_PRUNED_DAMAGE = 0.02
"""Drop of a pruned base after its recovery training. A choice; its first trial tells."""

DROP_CEILING = 4 * REFERENCE_DROP
"""Larger drops are thought of as this beforehand, and told apart no further."""

_BETWEEN_JOBS = 0.015
"""How far a ratio may lie from the one that an earlier job measured, beyond both intervals: two
fresh sessions of one file differ by 1.5 % (interquartile) on an idle core."""

_FP32_BYTES = 4

_DROP_PER_NAT = 0.5
"""Accuracy drop per nat of divergence until trials tell: for small divergences half of the
samples whose answer is in doubt go either way. A choice; the trials' own ratio replaces it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Candidates as rows: one column per group with a choice, then the base, then the runtime.

    `bases` are sets of prune ratios, the unpruned one first.
    """

    space: SearchSpace
    bases: tuple[Mapping[str, float], ...]
    _base_numbers: Mapping[frozenset[tuple[str, float]], int] = field(
        init=False, repr=False, compare=False
    )
    _option_numbers: Mapping[str, Mapping[Precision, int]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        offered = self.space.precisions
        options = {group: {p: n for n, p in enumerate(offered[group])} for group in self.groups}
        object.__setattr__(self, "_option_numbers", options)
        numbers: dict[frozenset[tuple[str, float]], int] = {}
        for number, base in enumerate(self.bases):
            # As a candidate has its ratios; of two equal bases the first.
            ratios = frozenset(Candidate(prune_ratios=base).prune_ratios.items())
            numbers.setdefault(ratios, number)
        object.__setattr__(self, "_base_numbers", numbers)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that have a choice, in graph order."""
        return tuple(name for name, choices in self.space.precisions.items() if len(choices) > 1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Options per column."""
        options = (len(self.space.precisions[name]) for name in self.groups)
        return (*options, len(self.bases), len(self.space.runtimes))

    def point(self, candidate: Candidate) -> np.ndarray | None:
        """Its row; None where it is not of this space and these bases."""
        base = self._base_numbers.get(frozenset(candidate.prune_ratios.items()))
        if base is None or candidate.runtime not in self.space.runtimes or candidate.rounding:
            return None
        chosen = [
            numbers.get(candidate.precision(group))
            for group, numbers in self._option_numbers.items()
        ]
        if None in chosen:
            return None
        return np.array([*chosen, base, self.space.runtimes.index(candidate.runtime)], dtype=int)

    def candidate(self, point: Sequence[int] | np.ndarray) -> Candidate:
        """The candidate of a row."""
        return Candidate(
            precisions={
                name: self.space.precisions[name][option]
                for name, option in zip(self.groups, point, strict=False)
            },
            prune_ratios=self.bases[point[-2]],
            runtime=self.space.runtimes[point[-1]],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What is known of a job before its trials.

    `damage` is the sensitivity of (group, precision name), mean KL in nats. `fp32_ns` and
    `int8_ns` are each group's kernel times in the two uniform artifacts, where the device has
    profiled them; without the former the work counted in the inventory stands in, without the
    latter `INT8_SAVING`. `taught` is what earlier jobs on the device taught about it; it fills
    in what no profile of this model tells. `fp32_latency_ns` is the model's own.
    """

    inventory: LayerInventory
    damage: Mapping[tuple[str, str], float]
    fp32_ns: Mapping[str, float] = field(default_factory=dict)
    int8_ns: Mapping[str, float] = field(default_factory=dict)
    taught: LatencyModel | None = None
    fp32_latency_ns: float | None = None

    def told_by(self, space: SearchSpace, trials: Sequence[TrialRecord]) -> Knowledge:
        """The same with the kernel times that the profiles of the baselines tell."""

        def group_ns(candidate: Candidate) -> dict[str, float]:
            """Scaled so that the groups together take as long as was measured."""
            for trial in trials:
                latency = trial.latency
                if trial.candidate == candidate and latency is not None and latency.profile:
                    told = latency.profile.group_ns()
                    scaled = profiled(np.array(list(told.values())), latency.p50_ns)
                    return dict(zip(told, scaled.tolist(), strict=True))
            return {}

        first = next((t for t in trials if t.candidate == space.fp32()), None)
        latency = None if first is None else latency_of(first)
        return replace(
            self,
            fp32_ns=group_ns(space.fp32()),
            int8_ns=group_ns(space.uniform_int8()),
            fp32_latency_ns=self.fp32_latency_ns if latency is None else latency.p50_ns,
        )

    def int8_factor(self, group: str) -> float | None:
        """The group's time at 8 bits as a share of FP32's; None where no profiles told it."""
        before, after = self.fp32_ns.get(group, 0.0), self.int8_ns.get(group)
        return None if after is None or before <= 0 else after / before

    def saving(self, group: str, precision: Precision) -> float:
        """The share of its time that a group saves in a precision; negative where it is slower."""
        if precision == FP32:
            return 0.0
        factor = self.int8_factor(group)
        if precision.is_int8 and factor is not None:
            return 1.0 - factor
        taught = device_latency.expected_saving(self.taught, self._operator(group), precision.name)
        if taught is not None:
            return taught
        return INT8_SAVING if precision.is_int8 else 0.0

    def spread(self, group: str, precisions: Sequence[Precision]) -> float:
        """How far those savings may be off, a standard deviation; the largest of them."""
        operator = self._operator(group)
        spreads = [
            device_latency.expected_spread(self.taught, operator, p.name)
            for p in precisions
            if p != FP32
        ]
        return max((EFFECT_SCALE if s is None else s for s in spreads), default=EFFECT_SCALE)

    def boundary_price(self, n_bytes: float) -> float:
        """What converting so many bytes of FP32 once is thought to add to the ratio."""
        taught = self.taught.boundary_ns_per_byte if self.taught else None
        if taught is None or not self.fp32_latency_ns:
            return 0.0
        return taught * n_bytes / self.fp32_latency_ns

    def _operator(self, group: str) -> str:
        return device_latency.operator_of(self.inventory.group(group))

    def time_shares(self) -> dict[str, float]:
        """Per group; they sum to 1 over the inventory's groups."""
        timed = sum(self.fp32_ns.values())
        if timed > 0:
            return {g.name: self.fp32_ns.get(g.name, 0.0) / timed for g in self.inventory.groups}
        work = {g.name: float(g.macs) for g in self.inventory.groups}
        moved = {g.name: float(moved_bytes(g)) for g in self.inventory.groups}
        taught = {
            n: device_latency.expected_ns(self.taught, self._operator(n), work[n], moved[n])
            for n in work
        }
        known = {name: ns for name, ns in taught.items() if ns is not None}
        if known and len(known) == len(work):
            return {name: ns / (sum(known.values()) or 1.0) for name, ns in known.items()}
        total, bytes_moved = sum(work.values()) or 1.0, sum(moved.values()) or 1.0
        # Half by arithmetic, half by memory: depthwise layers have little of the first.
        return {n: 0.5 * work[n] / total + 0.5 * moved[n] / bytes_moved for n in work}

    def saved(self, base: Mapping[str, float]) -> float:
        """The share of multiply-accumulates that a base is without."""
        macs = pruned_macs(self.inventory)
        total = sum(group.macs for group in self.inventory.groups) or 1
        return min(sum(macs.get(name, 0.0) * r for name, r in base.items()) / total, 0.95)


def moved_bytes(group: LayerGroup) -> int:
    """What a group's layers read and write in FP32, without their weights."""
    return _FP32_BYTES * sum(
        math.prod(layer.input_shape) + math.prod(layer.output_shape) for layer in group.layers
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Both models, fitted to the trials that rank; `points` `(n, n_factors)` are theirs."""

    encoding: Encoding
    knowledge: Knowledge
    landscape: Landscape
    trials: Sequence[TrialRecord]
    points: np.ndarray

    def is_hopeless(self, candidate: Candidate) -> bool:
        """A measured trial is faster and loses no more, whatever the models' error.

        Of the candidate what counts is the best end of its figures: `_SURE` standard deviations
        below what is expected.
        """
        point = self.encoding.point(candidate)
        if point is None:
            return False
        means, deviations = self.landscape.predict(point[None])
        ratio, drop = means[0] - _SURE * deviations[0]
        figures = self.landscape.told(len(self.points))
        is_faster, loses_no_more = figures[:, 0] < ratio, figures[:, 1] <= max(drop, 0.0)
        return bool((is_faster & loses_no_more).any())


def fit(
    encoding: Encoding,
    knowledge: Knowledge,
    trials: Sequence[TrialRecord],
    *,
    earlier: Earlier = NOTHING,
    largest_drop: float = REFERENCE_DROP,
) -> Fitted | None:
    """The models of latency (ratio to FP32) and accuracy drop; None before FP32 itself ranks.

    They are fitted to `earlier` results, too, which come behind the job's own. How far beyond
    `largest_drop` a trial is says little.
    """
    measured = _encoded(encoding, [t for t in trials if ranks(t)])
    origin = next((latency_of(t) for p, t in measured if not p.any()), None)
    if origin is None:
        return None
    knowledge = knowledge.told_by(encoding.space, trials)
    points = np.array([p for p, _ in measured])
    ranked = [t for _, t in measured]
    own = {trial.candidate.digest for trial in ranked}
    latencies, drops = (
        [t for t in others if t.candidate.digest not in own]
        for others in (earlier.latencies, earlier.drops)
    )
    landscape = Landscape(
        _latency_model(encoding, knowledge, measured, latencies, base=origin.ratio),
        _drop_model(encoding, knowledge, measured, drops, ceiling=largest_drop),
    )
    return Fitted(
        encoding=encoding, knowledge=knowledge, landscape=landscape, trials=ranked, points=points
    )


_Measured = Sequence[tuple[np.ndarray, TrialRecord]]


def _latency_model(
    encoding: Encoding,
    knowledge: Knowledge,
    measured: _Measured,
    earlier: Sequence[TrialRecord],
    *,
    base: float,
) -> Surrogate:
    """Of the job's trials, then of earlier ones."""
    known = [*measured, *_encoded(encoding, earlier)]
    reports = [latency_of(trial) for _, trial in known]
    ratios = np.array([r.ratio for r in reports if r is not None])
    noise = np.array([ratio_deviation(r) for r in reports if r is not None])
    noise[len(measured) :] = np.hypot(noise[len(measured) :], _BETWEEN_JOBS)
    points = np.array([point for point, _ in known])
    return Surrogate(latency_features(encoding, knowledge), points, ratios, noise, base=base)


def _drop_model(
    encoding: Encoding,
    knowledge: Knowledge,
    measured: _Measured,
    earlier: Sequence[TrialRecord],
    *,
    ceiling: float,
) -> DropModel:
    """Of the job's trials, then of earlier ones."""
    known = [*measured, *_encoded(encoding, earlier)]
    reports = [trial.accuracy for _, trial in known if trial.accuracy is not None]
    per_nat = drop_per_nat([trial for _, trial in known])
    drops = Drops(
        measured=np.array([max(report.drop, 0.0) for report in reports]),
        diverged=per_nat * np.array([report.mean_kl for report in reports]),
        errors=np.array([report.drop_error or 0.0 for report in reports]),
        n_samples=max(report.n_samples for report in reports),
        ceiling=ceiling,
    )
    points = np.array([point for point, _ in known])
    return DropModel(drop_features(encoding, knowledge, per_nat), points, drops)


def _encoded(encoding: Encoding, trials: Sequence[TrialRecord]) -> _Measured:
    """Those of the space, with their points."""
    seen = [(encoding.point(trial.candidate), trial) for trial in trials]
    return [(point, trial) for point, trial in seen if point is not None]


def propose(
    encoding: Encoding,
    knowledge: Knowledge,
    trials: Sequence[TrialRecord],
    *,
    n: int,
    seed: int,
    budget: int = LONG_BUDGET,
    largest_drop: float = REFERENCE_DROP,
    earlier: Earlier = NOTHING,
    on_fitted: Callable[[Fitted], None] = lambda _: None,
) -> list[tuple[Candidate, Promise]]:
    """The `n` most promising candidates that no trial has, most promising first.

    What they promise is hypervolume up to `largest_drop`, which is that of
    `front.reference_drop` where the job limits its drop.

    Empty where nothing ranks yet or nothing new is left. `earlier` results teach the models;
    what they measured may be proposed again. In a job of `budget` trials the first quarter may be
    spent on teaching the models: what they learn has to be of use yet. `on_fitted` gets them.
    """
    fitted = fit(encoding, knowledge, trials, earlier=earlier, largest_drop=largest_drop)
    if fitted is None:
        return []
    on_fitted(fitted)
    unranked = [encoding.point(t.candidate) for t in trials if not ranks(t)]
    promises = most_promising(
        fitted.landscape,
        fitted.points,
        reference=(REFERENCE_RATIO, largest_drop),
        n=n,
        rng=np.random.default_rng(seed + len(trials)),
        excluded=[p for p in unranked if p is not None],
        teaching_runs=min(TEACHING_RUNS, budget // _TEACHING_SHARE),
    )
    return [(encoding.candidate(promise.point), promise) for promise in promises]


def ratio_deviation(latency: LatencyReport) -> float:
    """The standard deviation of a measured ratio, a thousandth of the ratio at least.

    The ratio itself where the interval has no end.
    """
    half = (latency.ratio_high - latency.ratio_low) / 2
    return max(half / 1.96, 1e-3 * latency.ratio) if math.isfinite(half) else latency.ratio


def drop_per_nat(trials: Sequence[TrialRecord]) -> float:
    """How much accuracy a nat of divergence costs, as these trials have it."""
    return conversion(
        [(t.accuracy.mean_kl, t.accuracy.drop) for t in trials if t.accuracy is not None]
    )


def conversion(pairs: Sequence[tuple[float, float]]) -> float:
    """Drop per nat over pairs of (mean KL, drop)."""
    # Sums weigh the candidates that lose something most; the default counts as one of them.
    prior_kl = 0.01
    kl = prior_kl + sum(k for k, _ in pairs)
    drop = prior_kl * _DROP_PER_NAT + sum(max(d, 0.0) for _, d in pairs)
    return drop / kl


def latency_features(encoding: Encoding, knowledge: Knowledge) -> Features:
    """Factors and links for the ratio to FP32's latency."""
    groups, all_shares = encoding.groups, knowledge.time_shares()
    shares = np.array([all_shares[name] for name in groups])
    precisions = [encoding.space.precisions[name] for name in groups]
    savings = [
        np.array([knowledge.saving(name, p) for p in own])
        for name, own in zip(groups, precisions, strict=True)
    ]
    spreads = [knowledge.spread(name, own) for name, own in zip(groups, precisions, strict=True)]
    kinds = [tuple(p.name for p in own) for own in precisions]
    factors = time_factors(shares, savings, np.array(spreads), kinds=kinds)
    factors.append(
        Factor(
            n_options=len(encoding.bases),
            effects=np.array([-knowledge.saved(base) for base in encoding.bases]),
            scale=BASE_SCALE,
        )
    )
    n_runtimes = len(encoding.space.runtimes)
    factors.append(Factor(n_options=n_runtimes, effects=np.zeros(n_runtimes), scale=_RUNTIME_SCALE))
    sizes = boundary_bytes(encoding, knowledge.inventory)
    links = boundary_links(sizes, price=knowledge.boundary_price(float(sizes.sum())))
    for column, scale in enumerate(time_scales(shares)):
        links += [
            Link(first=column, second=len(groups) + which, scale=float(scale))
            for which in (0, 1)
            if factors[len(groups) + which].n_options > 1
        ]
    return Features(factors, links)


def boundary_bytes(encoding: Encoding, inventory: LayerInventory) -> np.ndarray:
    """The size in FP32 of the tensor behind each group with a choice but the last."""
    last = {group.name: group.layers[-1] for group in inventory.groups}
    sizes = [_FP32_BYTES * math.prod(last[n].output_shape) for n in encoding.groups[:-1]]
    return np.array(sizes, dtype=float)


def drop_features(encoding: Encoding, knowledge: Knowledge, per_nat: float) -> Features:
    """Factors and links for the accuracy drop."""
    damages = [
        np.array(
            [
                0.0
                if p == FP32
                else per_nat * max(knowledge.damage.get((name, p.name), -1.0), 0.0)
                if (name, p.name) in knowledge.damage
                else _UNKNOWN_DAMAGE
                for p in encoding.space.precisions[name]
            ]
        ).clip(max=DROP_CEILING)
        for name in encoding.groups
    ]
    own = damage_factors(damages)
    n_bases, n_runtimes = len(encoding.bases), len(encoding.space.runtimes)
    pruned = np.array([_PRUNED_DAMAGE if any(base.values()) else 0.0 for base in encoding.bases])
    factors = [
        *own,
        Factor(n_options=n_bases, effects=pruned, scale=_PRUNED_DAMAGE),
        Factor(n_options=n_runtimes, effects=np.zeros(n_runtimes), scale=1e-3),
    ]
    links = damage_links(own)
    if n_bases > 1:
        links += [
            Link(first=column, second=len(own), scale=factor.scale)
            for column, factor in enumerate(own)
        ]
    return Features(factors, links)
