"""The sensitivity phase of a job: what is missing is measured, entry by entry.

    noise of every group ─▶ divergence where it matters ─▶ prune ratios ─▶ estimates

Owns the order, the time that the phase may take and what is kept. Each entry is stored as it
comes, so that a service that was killed goes on with the missing ones. Which entries matter
is `screening.py`'s knowledge, how one is measured `autotune.compression.sensitivity`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Protocol

from autotune.errors import CompressionError
from autotune.search import screening
from autotune.search.workers import Call, CallFailed
from autotune.spec import SearchSpec
from search_spaces import LayerInventory, Precision, SearchSpace
from storage.records import TrialRecord
from storage.sensitivity import Sensitivity

PHASE_SHARE = 0.15
"""Of the time that the job will probably take; `limit_s` says how that is known."""

LEAST_PHASE_S = 5.0
"""A job of seconds still gets its most telling entries."""

_PRECISIONS_SHARE = 0.6
"""Of the phase's time; what the precisions leave goes to the prune ratios."""

_REST_FACTOR = 2.0
"""Whole job over its trials: pruned bases and confirmations take as long again (the demo: 95 s,
of which the trials 37 s)."""

_BATCH = 8
"""Calls between two looks at the clock."""


class Workers(Protocol):
    """The part of a worker pool that the phase needs."""

    def run(self, calls: Sequence[Call], *, should_stop: Callable[[], bool] = ...) -> Any:
        """(index, result) of each call as it finishes."""


def limit_s(search: SearchSpec, trials: Sequence[TrialRecord]) -> float:
    """How long the phase of a job may take: `PHASE_SHARE` of the job, which is guessed.

    The guess is the usual time of the trials so far (the baselines) times the trials asked
    for, times `_REST_FACTOR`, and never more than the job's own time budget.
    """
    taken = [
        (t.finished_at - t.created_at).total_seconds() for t in trials if t.finished_at is not None
    ]
    guess = search.trials * median(taken) * _REST_FACTOR if taken else 0.0
    if search.time_s is not None:
        guess = min(guess, search.time_s) if taken else search.time_s
    return max(LEAST_PHASE_S, PHASE_SHARE * guess)


class SensitivityPhase:
    """Fills in the entries of one job; `run` returns them all.

    Args:
        known: the entries stored so far.
        store: keeps the entries, called after each that is new.
        notice: tells the user of what could not be measured.
        limit_s: when it is spent, what is left is estimated.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        inventory: LayerInventory,
        known: Sequence[Sensitivity],
        store: Callable[[tuple[Sensitivity, ...]], None],
        notice: Callable[[str], None],
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._space = space
        self._inventory = inventory
        # An estimate is made anew from what is measured; version 1 knew no noise.
        self._entries = {
            e.key: replace(e, mean_kl=None, is_estimate=False) if e.is_estimate else e
            for e in known
            if e.sqnr_db is not None or e.removed_share is not None or e.is_measured
        }
        self._store = store
        self._notice = notice
        self._limit_s = limit_s
        self._clock = clock
        self._failed: set[tuple[str, str | float]] = set()

    def run(
        self, workers: Workers, *, should_stop: Callable[[], bool], with_pruning: bool
    ) -> tuple[Sensitivity, ...]:
        """Measure what is missing and matters, estimate the rest.

        Raises:
            Stopped: `should_stop` became true; what is measured is stored.
        """
        started = self._clock()
        self._measure_noise(workers, should_stop)
        end = started + self._limit_s * (_PRECISIONS_SHARE if with_pruning else 1.0)
        while self._clock() < end and (due := self._due()):
            self._run(workers, [_divergence(e) for e in due[:_BATCH]], should_stop)
        if with_pruning:
            self._measure_pruning(workers, should_stop, started + self._limit_s)
        self._estimate()
        return tuple(self._entries.values())

    def _measure_noise(self, workers: Workers, should_stop: Callable[[], bool]) -> None:
        calls = []
        for group, choices in self._space.precisions.items():
            missing = [
                p
                for p in choices
                if not p.is_float
                and ((e := self._entries.get((group, p.name))) is None or e.sqnr_db is None)
            ]
            if missing:
                calls.append(Call(method="noise", arguments=(group, missing)))
        self._run(workers, calls, should_stop)

    def _due(self) -> list[Sensitivity]:
        """The precisions to measure next, in graph order: the FP32 prefix only moves on."""
        order = {name: rank for rank, name in enumerate(self._space.precisions)}
        usable = [e for e in self._entries.values() if e.key not in self._failed]
        found = screening.next_precisions(e for e in usable if e.group in order)
        return sorted(found, key=lambda e: order[e.group])

    def _measure_pruning(
        self, workers: Workers, should_stop: Callable[[], bool], end: float
    ) -> None:
        missing = [
            (group, ratio)
            for group, ratios in self._space.prune_ratios.items()
            for ratio in ratios
            if ratio > 0 and (group, ratio) not in self._entries
        ]
        if missing:
            self._run(workers, [Call(method="removal", arguments=(missing,))], should_stop)
        order = screening.prune_order(self._entries.values(), self._inventory)
        while order and self._clock() < end:
            calls = [Call(method="pruning", arguments=pair) for pair in order[:_BATCH]]
            self._run(workers, calls, should_stop)
            order = order[_BATCH:]

    def _run(
        self, workers: Workers, calls: Sequence[Call], should_stop: Callable[[], bool]
    ) -> None:
        for index, result in workers.run(calls, should_stop=should_stop):
            if isinstance(result, CallFailed):
                self._give_up(calls[index], result)
                continue
            for entry in result:
                if isinstance(entry, CompressionError):
                    self._notice(str(entry))
                else:
                    self._keep(entry)
            self._store(tuple(self._entries.values()))

    def _keep(self, entry: Sensitivity) -> None:
        earlier = self._entries.get(entry.key)
        if earlier is not None:
            entry = replace(
                entry,
                sqnr_db=entry.sqnr_db if entry.sqnr_db is not None else earlier.sqnr_db,
                mean_kl=entry.mean_kl if entry.mean_kl is not None else earlier.mean_kl,
                drop=entry.drop if entry.drop is not None else earlier.drop,
                n_samples=entry.n_samples or earlier.n_samples,
                wall_s=entry.wall_s + earlier.wall_s,
            )
        self._entries[entry.key] = entry

    def _give_up(self, call: Call, failure: CallFailed) -> None:
        group, choice, *_ = (*call.arguments, None)
        if call.method in ("divergence", "pruning"):
            name = choice.name if isinstance(choice, Precision) else choice
            self._failed.add((str(group), name if name is not None else ""))
        self._notice(f"a sensitivity could not be measured: {failure.error}")

    def _estimate(self) -> None:
        entries = list(self._entries.values())
        estimates = screening.estimated_precisions(entries) + screening.estimated_pruning(entries)
        if estimates:
            self._entries |= {e.key: e for e in estimates}
            self._store(tuple(self._entries.values()))


def damage(entries: Sequence[Sensitivity]) -> Mapping[tuple[str, str], float]:
    """Mean KL by (group, precision's name), measured or estimated; what is unknown is absent."""
    return {
        (e.group, e.precision): e.mean_kl
        for e in entries
        if e.precision is not None and e.mean_kl is not None
    }


def prune_damage(entries: Sequence[Sensitivity]) -> Mapping[tuple[str, float], float]:
    """Mean KL by (prunable group, ratio), measured or estimated; what is unknown is absent."""
    return {
        (e.group, e.prune_ratio): e.mean_kl
        for e in entries
        if e.prune_ratio is not None and e.mean_kl is not None
    }


def _divergence(entry: Sensitivity) -> Call:
    precision = Precision.parse(entry.precision or "")
    return Call(method="divergence", arguments=(entry.group, precision))
