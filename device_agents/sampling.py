"""The timed loop: blocks of candidate and reference in random alternation, until enough.

Owns warm-up, grouping of calls, alternation and the looks at the interval. Gets two calls and
a clock and knows neither runtime nor process; the statistics are `latency.py`'s, loading the
models is `measurement_child.py`'s.

One thing is kept out of the samples because it belongs to the measuring and not to the model:
the call after a switch of models, whose caches the other model has just emptied.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from device_agents.energy import EnergyMeter
from device_agents.latency import StoppingRule, TimedBlock, ratio_interval
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
        return TimedBlock(
            subject=subject,
            samples_ns=samples,
            median_ns=median(durations) / group,
            n_calls=self.n_settling + self.n_samples * group,
        )


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


def sample(
    timers: Mapping[Subject, Timer],
    plan: SamplingPlan,
    clock: Clock,
    *,
    meter: EnergyMeter | None = None,
) -> list[TimedBlock]:
    """Blocks in order of time, until the interval is narrow enough or the time cap is reached.

    Nothing is thrown away: what slows the device slows both blocks of a pair, and what does
    not cancel belongs into the interval.

    Raises:
        InvalidDuration: the clock cannot be trusted.
    """
    cap_ns = clock.now_ns() + plan.time_cap_s * 1e9
    rule = StoppingRule(target_half_width=plan.target_half_width, min_blocks=plan.min_blocks)
    look = rule.first_look()
    blocks: list[TimedBlock] = []
    for pair in alternation(random.Random(plan.seed)):  # noqa: S311 - an order, not a secret
        blocks += [_metered(timers[subject], subject, meter) for subject in pair]
        n_pairs = len(blocks) // 2
        if clock.now_ns() >= cap_ns and n_pairs >= MIN_PAIRS:
            break
        if n_pairs >= look:
            if rule.is_satisfied(ratio_interval(blocks, seed=plan.seed)):
                break
            look = rule.next_look(n_pairs)
    return blocks


def _metered(timer: Timer, subject: Subject, meter: EnergyMeter | None) -> TimedBlock:
    if meter is None:
        return timer.block(subject)
    before = meter.joules()
    block = timer.block(subject)
    return replace(block, energy_joules=meter.joules() - before)


def alternation(generator: random.Random) -> Iterator[tuple[Subject, Subject]]:
    """Pairs of one block each in random order, without end.

    Random, because in a fixed order a drift would always favour the same model, and so would a
    periodic disturbance.
    """
    while True:
        pair: list[Subject] = ["candidate", "reference"]
        generator.shuffle(pair)
        yield pair[0], pair[1]
