"""The timed loop: blocks of candidate and reference in random alternation, until enough.

Owns warm-up, grouping of calls, alternation, the looks at the interval, and what is repeated.
Gets calls, a clock and a watch and knows neither runtime nor process; the statistics are
`latency.py`'s, what disturbs a device `watch.py`'s, loading the models `measurement_child.py`'s.

A measurement has several sittings: in each, both models are loaded anew, because where a
session happens to lie in memory makes it faster or slower for as long as it lasts.

One thing is kept out of the samples because it belongs to the measuring and not to the model:
the calls after a switch of models, whose caches and branch history the other has just replaced.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from device_agents.energy import EnergyMeter, NoEnergySensor
from device_agents.latency import (
    EARLY_SITTINGS,
    LARGEST_TREND,
    MIN_SITTINGS,
    StoppingRule,
    TimedBlock,
    ratio_interval,
    reference_trend,
)
from device_agents.quantiles import is_bounded
from device_agents.rest import is_restless
from device_agents.runtimes import Clock
from device_agents.undisturbed import Pairs
from device_agents.watch import Watch, taint

Subject = Literal["candidate", "reference"]
Call = Callable[[], object]
Load = Callable[[], Mapping[Subject, Call]]
"""Loads both models anew and returns their calls; what it returned before is not used any more."""

SAMPLE_NS = 100_000.0
"""A sample lasts at least this long: reading the clock twice takes 0.1 µs, a thousandth."""
BLOCK_NS = 2e7
"""A block lasts about this long, and at least one sample."""
SETTLING_NS = 2e7
"""A model runs for this long after a switch before it is timed, `MAX_SETTLING_CALLS` at most. On
a shared x86 core the k-th call of mobilenet_v2 after a switch took about 0.4 ms * 0.7 ** k longer
than later ones, in FP32 and INT8, at 64 and 224 pixels: of 0.24 ms nearly three times as long at
first and 5 % after ten calls, of 2 ms a fifth longer at first. With one call left out, INT8 at 224
pixels came out at 0.475 of FP32 where each model alone gives 0.433 (medians of 40)."""
MAX_SETTLING_CALLS = 10
LONG_CALL_NS = 1e8
"""A call of this length is a sample and a block: what a switch costs it does not notice, and every
further call costs more than it tells."""
MIN_PAIRS = 4
"""Sampled also where the time cap is too short for them: fewer have no interval."""
LOADED_NS = 5e6
"""A session loaded anew runs for this long before its first block, which settles besides. With its
first call alone both models of 0.25 ms were 0.3 % slower in the first block than in the third (110
sittings); with a whole block's length for each a third of the sitting went to it."""
MIN_SITTING_PAIRS = 1
"""Of one sitting, which is sampled for half as long as it took to load: what is best for the
interval is the ratio of what pairs differ by to what sessions do, times the root of the ratio of
the times that loading and a pair take (Cochran 1977, section 10.6). Of mobilenet_v2 on an x86 core
that is 42 and 88 ms; INT8 against FP32 at 224 pixels its sessions differed by 0.044 and its pairs
by 0.038 while the host was busy, by 0.012 and 0.027 while it was not: 0.6 and 1.6 pairs."""
LOADING_SHARE = 0.5
MAX_SITTING_SHARE = 0.5 / MIN_SITTINGS
"""Of the time cap, after which a sitting ends however long it took to load: else there would be
time for one or two."""
MAX_RESTARTS = 3
PAUSE_SHARE = 0.1
"""Of the time cap: how long a device may cool before a measurement begins anew. A board's heat
sink takes minutes; what a second shows is whether it cools at all."""
MAX_OBSERVATIONS = 64
"""Of the device between sittings, kept of a measurement: evenly spaced where there were more."""
LEAST_LEFT_SHARE = 0.2
"""Of the time cap, that must be left for beginning anew: with less the interval would be worse
than the trend, which the ratio has taken out already."""
WARM_UP_NS = 30e6
MIN_WARM_UP_CALLS = 3


Observe = Callable[[], Mapping[str, Any]]
"""Reads the device's conditions; may take milliseconds, as it is asked between sittings."""


class InvalidDuration(Exception):
    """The clock stood still or ran backwards over a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How long to sample; the fields mean what `protocol.MeasurementPlan` says.

    `rest_ns` is what the reference takes on this device at rest, None where that is not known, and
    `rest_cap_s` takes the place of the time cap while it takes longer here (`rest.py`); None does
    not wait for that. What `is_calibration` takes all of the time cap, however soon it is narrow.
    """

    target_half_width: float
    time_cap_s: float
    min_blocks: int
    seed: int
    quantile: str = "p50"
    rest_ns: float | None = None
    rest_cap_s: float | None = None
    is_calibration: bool = False


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

    Equal numbers, because what the faster ones of few samples take depends on how many they are.
    """
    fastest_ns = {subject: warm_up(call, clock) for subject, call in calls.items()}
    groups = {s: max(1, math.ceil(SAMPLE_NS / ns)) for s, ns in fastest_ns.items()}
    typical_ns = math.sqrt(math.prod(groups[s] * ns for s, ns in fastest_ns.items()))
    is_long = min(fastest_ns.values()) >= LONG_CALL_NS
    n_samples = 1 if is_long else max(1, round(BLOCK_NS / typical_ns))
    return {
        subject: Timer(
            call=call,
            group=groups[subject],
            n_samples=n_samples,
            n_settling=0 if is_long else settling_calls(fastest_ns[subject]),
            now_ns=clock.now_ns,
        )
        for subject, call in calls.items()
    }


def settling_calls(latency_ns: float) -> int:
    """Calls of that length after a switch that are not timed.

    >>> [settling_calls(ms * 1e6) for ms in (0.1, 2, 7, 29)]
    [10, 10, 3, 1]
    """
    return min(MAX_SETTLING_CALLS, math.ceil(SETTLING_NS / latency_ns))


def settled(timers: Mapping[Subject, Timer], calls: Mapping[Subject, Call]) -> dict[Subject, Timer]:
    """The same timers for sessions loaded anew, which have run for `LOADED_NS`, once at least."""
    for subject, call in calls.items():
        now_ns = timers[subject].now_ns
        start = now_ns()
        call()
        while now_ns() - start < LOADED_NS:
            call()
    return {subject: replace(timer, call=calls[subject]) for subject, timer in timers.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What sampling brought: `blocks` in pairs, in order of time.

    `tainted_pairs` counts the pairs that were measured while the device was disturbed, by
    reason; `are_tainted_used` says that they are among the blocks, because they are the rule
    here. `n_restarts` is how often the device was given a pause and everything began anew;
    `drift` says why the result must not rank, `energy_missing` why blocks have no energy though
    there is a meter. `between` is what was observed of the device from sitting to sitting.
    """

    blocks: list[TimedBlock]
    tainted_pairs: Mapping[str, int]
    are_tainted_used: bool = False
    n_restarts: int = 0
    drift: str | None = None
    energy_missing: str | None = None
    between: Sequence[Mapping[str, Any]] = ()


def sample(
    load: Load,
    plan: SamplingPlan,
    clock: Clock,
    *,
    watch: Watch,
    meter: EnergyMeter | None = None,
    observe: Observe | None = None,
) -> Sampled:
    """Pairs of blocks until the interval is narrow enough or the time cap is reached.

    The time begins when both models are loaded for the first time; past the cap it goes on while
    the device has not been at rest once, to the plan's `rest_cap_s`. A pair during which the device
    was disturbed (`watch.taint`) is measured again; where most pairs are, that is the device as it
    is, and they count. A reference with a trend means a device that heats up or is still busy:
    after a pause everything begins anew, `MAX_RESTARTS` times at most and only while there is time
    for it. Noise is no trend: it slows both blocks of a pair, and what does not cancel belongs into
    the interval.

    Raises:
        InvalidDuration: the clock cannot be trusted.
    """
    seats = _Seats(load=load, clock=clock)
    seats.change()
    begun_ns = clock.now_ns()
    cap_ns = begun_ns + plan.time_cap_s * 1e9
    rest_cap_ns = begun_ns + (plan.rest_cap_s or plan.time_cap_s) * 1e9
    pause_s = PAUSE_SHARE * plan.time_cap_s
    order = alternation(random.Random(plan.seed))  # noqa: S311 - an order, not a secret
    trends: list[float] = []
    while True:
        attempt = _Attempt(
            seats=seats, plan=plan, clock=clock, watch=watch, meter=meter, observe=observe
        )
        trend = attempt.run(order, cap_ns, rest_cap_ns)
        if trend is None:
            n_restarts, drift = len(trends), None
            break
        trends.append(trend)
        left_s = (cap_ns - clock.now_ns()) / 1e9 - pause_s
        if len(trends) > MAX_RESTARTS or left_s < LEAST_LEFT_SHARE * plan.time_cap_s:
            n_restarts, drift = len(trends) - 1, drift_reason(trends)
            break
        clock.sleep(pause_s)
        seats.change()
    return Sampled(
        blocks=attempt.blocks,
        tainted_pairs=dict(attempt.taints),
        are_tainted_used=attempt.are_tainted_used,
        n_restarts=n_restarts,
        drift=drift,
        energy_missing=attempt.energy_missing,
        between=evenly(attempt.between, MAX_OBSERVATIONS),
    )


def evenly(values: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """The values, or `most` of them at even distances with both ends; `most` is 2 or more."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def drift_reason(trends: Sequence[float]) -> str | None:
    """Why a measurement must not rank whose attempts had these trends of the reference.

    A trend that came once was not given the time to be a drift, and trends up and down are the
    slow noise of a shared machine.
    """
    if len(trends) < 2 or min(trends) < 0 < max(trends):
        return None
    word = "slower" if trends[-1] > 0 else "faster"
    listed = ", ".join(f"{abs(trend):.0%}" for trend in trends)
    return (
        f"the device became {word} over each of {len(trends)} attempts with pauses between "
        f"them (the reference by {listed}, more than {LARGEST_TREND:.0%}): it heats up or "
        "something else is starting on it; let it come to rest, cool it, or fix its clock"
    )


@dataclass(slots=True, kw_only=True)
class _Seats:
    """The two sessions of the moment; `loading_ns` is what loading and warming them took."""

    load: Load
    clock: Clock
    timers: Mapping[Subject, Timer] = field(default_factory=dict)
    loading_ns: int = 0
    number: int = -1

    def change(self) -> None:
        """Let go of both sessions and take new ones; how they are timed stays the same."""
        start = self.clock.now_ns()
        before = {subject: replace(x, call=_gone) for subject, x in self.timers.items()}
        self.timers = {}
        calls = self.load()
        self.timers = settled(before, calls) if before else make_timers(calls, self.clock)
        self.loading_ns = self.clock.now_ns() - start
        self.number += 1


def _gone() -> None:
    raise RuntimeError("this session has ended")


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """Pairs from one beginning on, with what disturbed each of them."""

    seats: _Seats
    plan: SamplingPlan
    clock: Clock
    watch: Watch
    meter: EnergyMeter | None
    observe: Observe | None
    between: list[Mapping[str, Any]] = field(default_factory=list)
    taints: Counter[str] = field(default_factory=Counter)
    energy_missing: str | None = None
    _waits: bool = False
    _all: list[TimedBlock] = field(default_factory=list)
    _clean: list[TimedBlock] = field(default_factory=list)

    def run(
        self, order: Iterator[tuple[Subject, Subject]], cap_ns: float, rest_cap_ns: float
    ) -> float | None:
        """Sample to the end, or to the first look that shows a trend, which is returned."""
        plan = self.plan
        rule = StoppingRule(target_half_width=plan.target_half_width)
        look = EARLY_SITTINGS
        while True:
            self._sit(order, rest_cap_ns if self.clock.now_ns() >= cap_ns else cap_ns)
            n_sittings = len({block.sitting for block in self.blocks})
            if n_sittings >= look and len(self.blocks) >= 2 * plan.min_blocks:
                trend = self._trend()
                if trend is not None:
                    return trend
                interval = ratio_interval(self.blocks, seed=plan.seed)
                is_narrow = rule.is_satisfied(interval, n_sittings)
                is_early = n_sittings < MIN_SITTINGS and plan.quantile != "p50"
                is_enough = is_narrow and not is_early and is_bounded(self.blocks, plan.quantile)
                if is_enough and not (plan.is_calibration or self._is_restless):
                    return None
                look = rule.next_look(n_sittings)
            # One that would be over before its first pair is not begun.
            next_ns = self.clock.now_ns() + self.seats.loading_ns
            if next_ns >= cap_ns and self._n_pairs >= MIN_PAIRS:
                if next_ns >= rest_cap_ns or not self._is_restless:
                    return self._trend()
                self._waits = True
            if self.observe is not None:
                self.between.append(self.observe())
            self.seats.change()

    def _trend(self) -> float | None:
        """The reference's; one that becomes faster is no drift where its level at rest is known.

        How far it is from that is in the bounds, and its trend cancels.
        """
        trend = reference_trend(self.blocks)
        is_known = self.plan.rest_ns is not None
        return None if trend is not None and trend < 0 and is_known else trend

    @property
    def _is_restless(self) -> bool:
        """The reference has not been as fast here as it is at rest.

        Or for too short a time: once that has been waited for, as many pairs are wanted of it as
        there are before the first full look. What the candidate takes at rest nobody knows: one
        whose calls are longer than the gaps that a neighbour leaves may be slower than that where
        the reference is not.
        """
        rest_ns = self.plan.rest_ns
        if rest_ns is None or self.plan.rest_cap_s is None:
            return False
        pairs = Pairs.of(self.blocks)
        is_short = self._waits and pairs.log_ratios.effective_size < MIN_SITTINGS
        return is_short or is_restless(pairs.undisturbed_ns("reference"), rest_ns)

    def _sit(self, order: Iterator[tuple[Subject, Subject]], cap_ns: float) -> None:
        """Pairs of one sitting."""
        start_ns, n_before = self.clock.now_ns(), self._n_pairs
        longest_ns = MAX_SITTING_SHARE * self.plan.time_cap_s * 1e9
        enough_ns = min(LOADING_SHARE * self.seats.loading_ns, longest_ns)
        before = self.watch.look()
        for pair in order:
            blocks = [self._block(subject) for subject in pair]
            after = self.watch.look()
            self._add(blocks, taint(before, after))
            before, now_ns = after, self.clock.now_ns()
            is_enough = now_ns - start_ns >= enough_ns
            if is_enough and self._n_pairs - n_before >= MIN_SITTING_PAIRS:
                return
            if now_ns >= cap_ns and self._n_pairs >= MIN_PAIRS:
                return

    def _block(self, subject: Subject) -> TimedBlock:
        before = self._joules()
        block = replace(self.seats.timers[subject].block(subject), sitting=self.seats.number)
        after = self._joules()
        if before is None or after is None:
            return block
        return replace(block, energy_joules=after - before)

    def _joules(self) -> float | None:
        """The meter's reading; a sensor that fails costs this block's energy, not its time."""
        if self.meter is None:
            return None
        try:
            return self.meter.joules()
        except (OSError, ValueError, NoEnergySensor) as error:
            self.energy_missing = f"the sensor of the {self.meter.covers} cannot be read: {error}"
            return None

    @property
    def _n_pairs(self) -> int:
        return len(self._all) // 2

    @property
    def are_tainted_used(self) -> bool:
        """Most pairs are tainted: what disturbs the device is how it is."""
        n_pairs, n_clean = len(self._all) // 2, len(self._clean) // 2
        return n_clean < n_pairs and n_clean < max(MIN_PAIRS, n_pairs / 2)

    @property
    def blocks(self) -> list[TimedBlock]:
        """What counts: the pairs that nothing disturbed, or all of them."""
        return self._all if self.are_tainted_used else self._clean

    def _add(self, blocks: Sequence[TimedBlock], reason: str | None) -> None:
        self._all += blocks
        if reason is None:
            self._clean += blocks
        else:
            self.taints[reason] += 1


def alternation(generator: random.Random) -> Iterator[tuple[Subject, Subject]]:
    """Pairs of one block each in random order, without end.

    Random, because in a fixed order a drift would always favour the same model, and so would a
    periodic disturbance.
    """
    while True:
        pair: list[Subject] = ["candidate", "reference"]
        generator.shuffle(pair)
        yield pair[0], pair[1]
