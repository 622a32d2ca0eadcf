"""The timed loop: blocks of candidate and reference in random alternation, until enough.

Owns warm-up, grouping of calls, alternation, the looks at the interval, and the restarts after
a drift. Gets two calls and a clock and knows neither runtime nor process; the statistics are
`latency.py`'s, loading the models is `measurement_child.py`'s.

One thing is kept out of the samples because it belongs to the measuring and not to the model:
the call after a switch of models, whose caches the other model has just emptied.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from device_agents.latency import (
    DRIFT_LIMIT,
    StoppingRule,
    TimedBlock,
    ratio_interval,
    reference_drift,
    reference_medians,
)
from device_agents.runtimes import Clock

Subject = Literal["candidate", "reference"]
Call = Callable[[], object]

SAMPLE_NS = 100_000.0
"""A sample lasts at least this long: reading the clock twice takes 0.1 µs, a thousandth."""
BLOCK_NS = 1e7
"""A block lasts about this long, but at least `MIN_SAMPLES` samples."""
MIN_SAMPLES = 2
LONG_CALL_NS = 1e8
"""A call of this length is a sample and a block: refilling the caches takes some ms, which it
does not notice, and every further call costs more than it tells."""
MIN_PAIRS = 4
"""Sampled also where the time cap is too short for them: fewer have no interval."""
WARM_UP_NS = 30e6
MIN_WARM_UP_CALLS = 3
MAX_RESTARTS = 3
COOL_DOWN_S = 1.0


class InvalidDuration(Exception):
    """The clock stood still or ran backwards over a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How long to sample; the fields mean what `protocol.MeasurementPlan` says."""

    target_half_width: float
    time_cap_s: float
    min_blocks: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timer:
    """One model's call with its grouping: `group` calls a sample, `n_samples` a block.

    `n_settling` calls at the start of a block are not timed.
    """

    call: Call
    group: int
    n_samples: int
    n_settling: int
    now_ns: Callable[[], int]

    def block(self, subject: Subject) -> TimedBlock:
        """One block, now."""
        call, group, now_ns = self.call, self.group, self.now_ns
        for _ in range(self.n_settling):
            call()
        durations = []
        for _ in range(self.n_samples):
            start = now_ns()
            for _ in range(group):
                call()
            durations.append(now_ns() - start)
        if min(durations) <= 0:
            raise InvalidDuration(f"{group} calls took {min(durations)} ns by the clock")
        samples = tuple(round(duration / group) for duration in durations)
        return TimedBlock(subject=subject, samples_ns=samples, median_ns=median(durations) / group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The blocks of the last attempt, and what became of the attempts.

    `drift` is the reference's at the end, as a fraction; within `DRIFT_LIMIT` it is harmless.
    """

    blocks: tuple[TimedBlock, ...]
    drift: float
    n_restarts: int

    @property
    def is_drifting(self) -> bool:
        """The reference still moved by more than `DRIFT_LIMIT`."""
        return abs(self.drift) > DRIFT_LIMIT


def warm_up(call: Call, clock: Clock) -> float:
    """Run until caches, page faults and the allocator have settled; the fastest call, in ns.

    The fastest, because it is the same in every session of a model, also on a busy machine.
    The very first call, which allocates, is not even looked at.
    """
    call()
    durations: list[int] = []
    while len(durations) < MIN_WARM_UP_CALLS or sum(durations) < WARM_UP_NS:
        start = clock.now_ns()
        call()
        durations.append(clock.now_ns() - start)
        if durations[-1] <= 0:
            raise InvalidDuration(f"a call took {durations[-1]} ns by the clock")
    return float(min(durations))


def make_timers(calls: Mapping[Subject, Call], clock: Clock) -> dict[Subject, Timer]:
    """Timers for warmed-up calls, with as many samples in a block of either.

    Equal numbers, because the median of few skewed samples depends on how many they are.
    """
    fastest_ns = {subject: warm_up(call, clock) for subject, call in calls.items()}
    groups = {s: max(1, math.ceil(SAMPLE_NS / ns)) for s, ns in fastest_ns.items()}
    typical_ns = math.sqrt(math.prod(groups[s] * ns for s, ns in fastest_ns.items()))
    is_long = min(fastest_ns.values()) >= LONG_CALL_NS
    n_samples = 1 if is_long else max(MIN_SAMPLES, round(BLOCK_NS / typical_ns))
    return {
        subject: Timer(
            call=call,
            group=groups[subject],
            n_samples=n_samples,
            n_settling=0 if is_long else 1,
            now_ns=clock.now_ns,
        )
        for subject, call in calls.items()
    }


def sample(timers: Mapping[Subject, Timer], plan: SamplingPlan, clock: Clock) -> Sampling:
    """Sample until the interval is narrow enough or the time cap is reached.

    A reference that drifts discards what was sampled: after a pause sampling starts again, up
    to `MAX_RESTARTS` times. Each attempt but the last has its share of the time cap to show
    that what looked like a drift was a passing disturbance.

    Raises:
        InvalidDuration: the clock cannot be trusted.
    """
    start_ns = clock.now_ns()
    for n_restarts in range(MAX_RESTARTS + 1):
        share = (n_restarts + 1) / (MAX_RESTARTS + 1)
        attempt = _Attempt(
            timers=timers,
            plan=plan,
            clock=clock,
            seed=plan.seed + n_restarts,
            patience_ends_ns=start_ns + share * plan.time_cap_s * 1e9,
            cap_ns=start_ns + plan.time_cap_s * 1e9,
        )
        blocks, drift = attempt.run()
        if abs(drift) <= DRIFT_LIMIT or clock.now_ns() >= attempt.cap_ns:
            break
        clock.pause_s(min(COOL_DOWN_S, plan.time_cap_s / 10))
    return Sampling(blocks=tuple(blocks), drift=drift, n_restarts=n_restarts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """One uninterrupted series of blocks, and when it has to end."""

    timers: Mapping[Subject, Timer]
    plan: SamplingPlan
    clock: Clock
    seed: int
    patience_ends_ns: float
    cap_ns: float

    def run(self) -> tuple[list[TimedBlock], float]:
        """The blocks in order of time, and the reference's drift over them."""
        rule = StoppingRule(
            target_half_width=self.plan.target_half_width, min_blocks=self.plan.min_blocks
        )
        look = rule.first_look()
        blocks: list[TimedBlock] = []
        order = random.Random(self.seed)  # noqa: S311 - an order, not a secret
        for pair in alternation(order):
            blocks += [self.timers[subject].block(subject) for subject in pair]
            n_pairs = len(blocks) // 2
            is_late = self.clock.now_ns() >= self.cap_ns
            if n_pairs < look and not (is_late and n_pairs >= MIN_PAIRS):
                continue
            look = rule.next_look(n_pairs)
            drift = reference_drift(reference_medians(blocks))
            is_narrow = rule.is_satisfied(ratio_interval(blocks, seed=self.seed))
            if is_late or self._is_enough(is_narrow=is_narrow, drift=drift):
                return blocks, drift
        raise AssertionError("the alternation never ends")

    def _is_enough(self, *, is_narrow: bool, drift: float) -> bool:
        if abs(drift) > DRIFT_LIMIT:
            return self.clock.now_ns() >= self.patience_ends_ns
        return is_narrow


def alternation(generator: random.Random) -> Iterator[tuple[Subject, Subject]]:
    """Pairs of one block each in random order, without end.

    Random, because in a fixed order a drift would always favour the same model, and so would a
    periodic disturbance.
    """
    while True:
        pair: list[Subject] = ["candidate", "reference"]
        generator.shuffle(pair)
        yield pair[0], pair[1]
