"""The timed loop on simulated devices: a clock that only calls move."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from device_agents import sampling
from device_agents.latency import ratio_interval
from device_agents.runtimes import Clock
from device_agents.runtimes.simulated import SimulatedModel, SimulatedRuntime, SimulatedSession
from device_agents.sampling import InvalidDuration, SamplingPlan

PLAN = SamplingPlan(target_half_width=0.02, time_cap_s=10.0, min_blocks=8, seed=1)


@dataclass
class Bench:
    """Two simulated models on one device, and how often each was called."""

    device: SimulatedRuntime
    calls: dict

    def sample(self, plan=PLAN):
        return sampling.sample(self.timers(), plan, self.device.clock)

    def timers(self):
        return sampling.make_timers(self.calls, self.device.clock)


def bench(candidate, reference):
    device = SimulatedRuntime()
    models = {"candidate": candidate, "reference": reference}
    sessions = {name: SimulatedSession(device, x, threads=1) for name, x in models.items()}
    return Bench(device, {name: session.bind({}) for name, session in sessions.items()})


def noisy(latency_ns, **changes):
    return SimulatedModel(latency_ns=latency_ns, noise=0.02, **changes)


def test_a_quiet_device_needs_no_more_than_the_first_look():
    measured = bench(noisy(2e5), noisy(4e5)).sample()
    assert len(measured) == 2 * 9


def test_a_narrower_target_takes_more_pairs():
    plan = SamplingPlan(target_half_width=0.002, time_cap_s=10.0, min_blocks=8, seed=1)
    device = bench(noisy(2e5), noisy(4e5))
    assert len(device.sample(plan)) > 2 * 9


def test_the_time_cap_ends_a_hopeless_measurement():
    device = bench(SimulatedModel(noise=0.5), SimulatedModel(noise=0.5))
    plan = SamplingPlan(target_half_width=0.001, time_cap_s=1.0, min_blocks=8, seed=1)
    timers = device.timers()
    start_ns = device.device.now_ns()
    sampling.sample(timers, plan, device.device.clock)
    assert 1.0 <= (device.device.now_ns() - start_ns) / 1e9 < 1.1


def test_a_cap_that_is_too_short_still_gives_an_interval():
    plan = SamplingPlan(target_half_width=0.02, time_cap_s=0.1, min_blocks=8, seed=1)
    measured = bench(noisy(2e8), noisy(2e8)).sample(plan)
    assert len(measured) == 2 * sampling.MIN_PAIRS


def test_short_calls_are_grouped_until_the_clock_resolves_them():
    timers = bench(SimulatedModel(latency_ns=7_000.0), noisy(4e5)).timers()
    assert timers["candidate"].group == 15
    assert timers["reference"].group == 1
    assert timers["candidate"].block("candidate").median_ns == pytest.approx(7_000)


def test_both_models_have_blocks_of_as_many_samples():
    timers = bench(noisy(2e5), noisy(8e5)).timers()
    counts = {name: len(timer.block(name).samples_ns) for name, timer in timers.items()}
    assert counts["candidate"] == counts["reference"] == pytest.approx(25, abs=3)


def test_the_call_after_a_switch_of_models_is_not_timed():
    device = SimulatedRuntime()
    durations_ns = iter([9e6, 1e6, 1e6, 1e6])
    timer = sampling.Timer(
        call=lambda: device.spend(next(durations_ns)),
        group=1,
        n_samples=3,
        n_settling=1,
        now_ns=device.now_ns,
    )
    assert timer.block("candidate").samples_ns == (1_000_000, 1_000_000, 1_000_000)


def test_a_long_call_is_a_block_of_its_own():
    timers = bench(noisy(3e8), noisy(2e8)).timers()
    assert timers["candidate"].n_samples == 1
    assert timers["candidate"].n_settling == 0


def test_pairs_come_in_both_orders():
    pairs = sampling.alternation(random.Random(0))
    first = [next(pairs)[0] for _ in range(40)]
    assert {"candidate", "reference"} == set(first)
    assert 10 <= first.count("candidate") <= 30


def test_a_drifting_device_keeps_every_block_and_the_right_ratio():
    device = bench(noisy(2e5, drift_per_s=0.3), noisy(4e5, drift_per_s=0.3))
    taken = []

    def recorded(timer):
        return SimpleNamespace(block=lambda name: taken.append(timer.block(name)) or taken[-1])

    timers = {name: recorded(timer) for name, timer in device.timers().items()}
    plan = SamplingPlan(target_half_width=0.0005, time_cap_s=5.0, min_blocks=8, seed=1)
    blocks = sampling.sample(timers, plan, device.device.clock)
    assert blocks == taken
    assert len(blocks) > 100
    assert ratio_interval(blocks, seed=1).center == pytest.approx(0.5, rel=0.01)


def test_a_clock_that_falls_half_way_does_not_end_the_measurement():
    throttled = {"throttle_after_s": 1.2, "throttle_factor": 1.5}
    plan = SamplingPlan(target_half_width=0.0015, time_cap_s=10.0, min_blocks=8, seed=1)
    interval = ratio_interval(
        bench(noisy(2e5, **throttled), noisy(4e5, **throttled)).sample(plan), seed=1
    )
    assert interval.center == pytest.approx(0.5, rel=0.01)
    assert interval.half_width < 0.01


@pytest.mark.parametrize("step_ns", [0, -5])
def test_a_clock_that_does_not_advance_is_refused(step_ns):
    ticks = iter(range(10**9, 0, step_ns)) if step_ns else iter([7] * 100)
    clock = Clock(now_ns=lambda: next(ticks))
    with pytest.raises(InvalidDuration):
        sampling.warm_up(lambda: None, clock)
