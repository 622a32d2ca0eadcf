"""The timed loop on simulated devices: a clock that only calls move."""

import math
import random
from dataclasses import dataclass, replace

import pytest

from device_agents import sampling
from device_agents.latency import EARLY_SITTINGS, MIN_SITTINGS, ratio_interval, reference_medians
from device_agents.runtimes import Clock, RuntimeOptions
from device_agents.runtimes.simulated import SimulatedModel, SimulatedRuntime, SimulatedSession
from device_agents.sampling import InvalidDuration, SamplingPlan
from device_agents.undisturbed import Pairs
from device_agents.watch import Glimpse

PLAN = SamplingPlan(target_half_width=0.02, time_cap_s=10.0, min_blocks=8, seed=1)


@dataclass
class Bench:
    """Two simulated models on one device; a session is faster or slower by some `session_spread`.

    `session_spread` is the standard deviation of a session's logarithm.
    """

    device: SimulatedRuntime
    models: dict
    session_spread: float = 0.0
    seed: int = 0
    n_loaded: int = 0

    def sample(self, plan=PLAN, watch=None, observe=None):
        watch = watch or self.device
        return sampling.sample(self.load, plan, self.device.clock, watch=watch, observe=observe)

    def load(self):
        self.n_loaded += 1
        return {name: self.session(name, model).bind({}) for name, model in self.models.items()}

    def session(self, name, model):
        luck = random.Random(f"{self.seed}:{self.n_loaded}:{name}").gauss(0, self.session_spread)
        model = replace(model, latency_ns=model.latency_ns * math.exp(luck))
        return SimulatedSession(self.device, model, RuntimeOptions(threads=1))

    def timers(self):
        return sampling.make_timers(self.load(), self.device.clock)


def bench(candidate, reference, **changes):
    return Bench(SimulatedRuntime(), {"candidate": candidate, "reference": reference}, **changes)


class Silent:
    """A device that tells nothing of itself."""

    def look(self):
        return Glimpse()


def noisy(latency_ns, **changes):
    return SimulatedModel(latency_ns=latency_ns, noise=0.02, **changes)


def test_a_quiet_device_needs_no_more_than_the_first_look():
    device = bench(noisy(2e5), noisy(4e5))
    measured = device.sample()
    sittings = [block.sitting for block in measured.blocks]
    assert device.n_loaded == 1 + max(sittings) == EARLY_SITTINGS
    assert all(sittings.count(n) >= 2 * sampling.MIN_SITTING_PAIRS for n in range(EARLY_SITTINGS))
    assert (measured.n_restarts, measured.tainted_pairs) == (0, {})


def test_the_device_is_observed_from_sitting_to_sitting():
    device = bench(noisy(2e5), noisy(4e5))
    measured = device.sample(observe=lambda: {"sessions so far": device.n_loaded})
    assert [x["sessions so far"] for x in measured.between] == list(range(1, EARLY_SITTINGS))


def test_of_many_observations_some_are_kept_at_even_distances():
    seen = [{"n": n} for n in range(1000)]
    kept = [x["n"] for x in sampling.evenly(seen, 5)]
    assert kept == [0, 250, 500, 749, 999]
    assert sampling.evenly(seen[:5], 5) == seen[:5]


def test_a_tail_is_not_looked_at_early():
    device = bench(noisy(2e5), noisy(4e5))
    device.sample(replace(PLAN, quantile="p90"))
    assert device.n_loaded >= MIN_SITTINGS


def test_a_narrower_target_takes_more_sittings():
    plan = SamplingPlan(target_half_width=0.002, time_cap_s=10.0, min_blocks=8, seed=1)
    device = bench(noisy(2e5), noisy(4e5))
    device.sample(plan)
    assert device.n_loaded > MIN_SITTINGS


def test_intervals_cover_the_ratio_where_sessions_differ():
    plan = SamplingPlan(target_half_width=0.01, time_cap_s=10.0, min_blocks=8, seed=1)
    devices = [bench(noisy(2e5), noisy(4e5), session_spread=0.008, seed=n) for n in range(30)]
    intervals = [ratio_interval(device.sample(plan).blocks, seed=1) for device in devices]
    assert sum(x.low <= 0.5 <= x.high for x in intervals) >= 26
    assert all(x.half_width < 0.011 for x in intervals)


def test_a_sitting_lasts_half_as_long_as_its_loading():
    device = bench(noisy(2e5), noisy(4e5))
    load = device.load
    device.load = lambda: device.device.spend(3e8) or load()
    blocks = [block for block in device.sample().blocks if block.sitting == 1]
    assert 1.5e8 <= sum(block.n_calls * block.median_ns for block in blocks) <= 2.5e8


def test_a_session_that_has_ended_is_not_called_again():
    device = bench(noisy(2e5), noisy(4e5))

    def load():
        return {name: guarded(call) for name, call in Bench.load(device).items()}

    def guarded(call):
        mine = device.n_loaded
        return lambda: call() if mine == device.n_loaded else pytest.fail("an ended session ran")

    device.load = load
    device.sample()
    assert device.n_loaded == EARLY_SITTINGS


def test_the_time_cap_ends_a_hopeless_measurement():
    device = bench(SimulatedModel(noise=0.5), SimulatedModel(noise=0.5))
    plan = SamplingPlan(target_half_width=0.001, time_cap_s=1.0, min_blocks=8, seed=1)
    device.timers()  # what is loaded and warmed up for the first time is not counted
    start_ns = device.device.now_ns()
    device.sample(plan)
    assert 0.9 <= (device.device.now_ns() - start_ns) / 1e9 < 1.2


def test_a_cap_that_is_too_short_still_gives_an_interval():
    plan = SamplingPlan(target_half_width=0.02, time_cap_s=0.1, min_blocks=8, seed=1)
    measured = bench(noisy(2e8), noisy(2e8)).sample(plan)
    assert len(measured.blocks) == 2 * sampling.MIN_PAIRS


def test_short_calls_are_grouped_until_the_clock_resolves_them():
    timers = bench(SimulatedModel(latency_ns=7_000.0), noisy(4e5)).timers()
    assert timers["candidate"].group == 15
    assert timers["reference"].group == 1
    assert timers["candidate"].block("candidate").median_ns == pytest.approx(7_000)


def test_both_models_have_blocks_of_as_many_samples():
    timers = bench(noisy(2e5), noisy(8e5)).timers()
    counts = {name: len(timer.block(name).samples_ns) for name, timer in timers.items()}
    assert counts["candidate"] == counts["reference"] == pytest.approx(50, abs=6)


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


def replacing_each_other(device):
    """Each call after a switch of models takes longer, by less from call to call."""
    last, load = {"name": "", "since": 0}, device.load

    def slowed(name, call):
        def run():
            last["since"] = last["since"] + 1 if last["name"] == name else 0
            last["name"] = name
            device.device.spend(4e5 * 0.7 ** last["since"])
            return call()

        return run

    device.load = lambda: {name: slowed(name, call) for name, call in load().items()}
    return device


@pytest.mark.parametrize("latency_ns", [2.4e5, 2e6, 9e6])
def test_what_a_switch_of_models_costs_is_not_in_the_ratio(latency_ns):
    device = replacing_each_other(bench(noisy(latency_ns), noisy(2 * latency_ns)))
    plan = replace(PLAN, target_half_width=0.004)
    interval = ratio_interval(device.sample(plan).blocks, seed=1)
    assert interval.center == pytest.approx(0.5, rel=0.008)


def test_a_long_call_is_a_block_of_its_own():
    timers = bench(noisy(3e8), noisy(2e8)).timers()
    assert timers["candidate"].n_samples == 1
    assert timers["candidate"].n_settling == 0


def test_pairs_come_in_both_orders():
    pairs = sampling.alternation(random.Random(0))
    first = [next(pairs)[0] for _ in range(40)]
    assert {"candidate", "reference"} == set(first)
    assert 10 <= first.count("candidate") <= 30


def drifting(per_s, **changes):
    models = (noisy(ns, drift_per_s=per_s, **changes) for ns in (2e5, 4e5))
    plan = SamplingPlan(target_half_width=0.002, time_cap_s=15.0, min_blocks=8, seed=1)
    return bench(*models).sample(plan)


@pytest.mark.parametrize(("per_s", "word"), [(0.3, "slower"), (-0.05, "faster")])
def test_a_drift_that_persists_is_unstable_after_three_restarts(per_s, word):
    measured = drifting(per_s)
    assert measured.n_restarts == sampling.MAX_RESTARTS == 3
    assert word in measured.drift
    assert "4 attempts" in measured.drift


def test_a_device_that_settles_is_measured_after_a_restart():
    measured = drifting(0.3, drift_until_s=1.0)
    assert 1 <= measured.n_restarts < 3
    assert measured.drift is None
    assert ratio_interval(measured.blocks, seed=1).center == pytest.approx(0.5, rel=0.01)
    assert min(reference_medians(measured.blocks)) > 1.25 * 4e5


def test_a_drift_of_two_percent_is_left_to_the_ratio():
    measured = drifting(0.002)
    assert (measured.n_restarts, measured.drift) == (0, None)


def test_a_measurement_too_short_for_another_attempt_is_no_drift():
    models = (noisy(ns, drift_per_s=0.3) for ns in (2e5, 4e5))
    plan = SamplingPlan(target_half_width=1e-5, time_cap_s=0.1, min_blocks=8, seed=1)
    assert bench(*models).sample(plan).drift is None


def test_slow_noise_in_both_directions_is_no_drift():
    assert sampling.drift_reason([0.06, -0.05, 0.04]) is None
    assert "6%, 5%" in sampling.drift_reason([0.06, 0.05])


def test_noise_without_a_trend_starts_nothing_anew():
    models = (SimulatedModel(latency_ns=ns, noise=0.2) for ns in (2e5, 4e5))
    plan = SamplingPlan(target_half_width=0.001, time_cap_s=3.0, min_blocks=8, seed=1)
    measured = bench(*models).sample(plan)
    assert (measured.n_restarts, measured.drift) == (0, None)
    assert len(measured.blocks) > 50


def test_pairs_of_a_throttled_spell_are_measured_again():
    spell = {"throttle_after_s": 0.3, "throttle_until_s": 0.5, "throttle_factor": 3.0}
    plan = SamplingPlan(target_half_width=1e-4, time_cap_s=2.0, min_blocks=8, seed=1)
    measured = bench(noisy(2e5, **spell), noisy(4e5)).sample(plan)
    assert set(measured.tainted_pairs) == {"throttled"}
    assert not measured.are_tainted_used
    candidate_ns = [b.median_ns for b in measured.blocks if b.subject == "candidate"]
    assert max(candidate_ns) < 1.2 * 2e5


def test_a_device_that_is_always_throttled_is_measured_as_it_is():
    measured = bench(noisy(2e5, throttle_after_s=0.0), noisy(4e5)).sample()
    assert measured.are_tainted_used
    assert len(measured.blocks) == 2 * measured.tainted_pairs["throttled"] >= 2 * 8


def test_a_clock_that_falls_half_way_does_not_end_the_measurement():
    throttled = {"throttle_after_s": 1.0, "throttle_factor": 1.5}
    plan = SamplingPlan(target_half_width=0.0015, time_cap_s=10.0, min_blocks=8, seed=1)
    measured = bench(noisy(2e5, **throttled), noisy(4e5, **throttled)).sample(plan, watch=Silent())
    interval = ratio_interval(measured.blocks, seed=1)
    assert measured.drift is None
    assert interval.center == pytest.approx(0.5, rel=0.01)
    assert interval.half_width < 0.01


@pytest.mark.parametrize("step_ns", [0, -5])
def test_a_clock_that_does_not_advance_is_refused(step_ns):
    ticks = iter(range(10**9, 0, step_ns)) if step_ns else iter([7] * 100)
    clock = Clock(now_ns=lambda: next(ticks))
    with pytest.raises(InvalidDuration):
        sampling.warm_up(lambda: None, clock)


def with_a_neighbour(*, until_s, slower, is_fading=False):
    """INT8 of 2 ms against FP32 of 4 ms, which something slows until then by such factors."""
    device = bench(noisy(2e6), noisy(4e6))
    load = device.load

    def disturbed(name, call):
        latency_ns = device.models[name].latency_ns

        def run():
            call()
            left = 1 - device.device.now_ns() / (until_s * 1e9) if until_s else 0
            if left > 0:
                share = left if is_fading else 1
                device.device.spend(share * (slower[name] - 1) * latency_ns)

        return run

    device.load = lambda: {name: disturbed(name, call) for name, call in load().items()}
    return device


BURSTS = {"candidate": 1.45, "reference": 1.28}
RESTING = replace(PLAN, time_cap_s=8.0, rest_cap_s=32.0, rest_ns=4e6)


@pytest.mark.parametrize(
    ("until_s", "at_least_s", "at_most_s"), [(0, 0, 8), (8.5, 9, 12), (20, 20, 24), (26, 26, 30)]
)
def test_sampling_waits_until_the_reference_is_as_fast_as_at_rest(until_s, at_least_s, at_most_s):
    device = with_a_neighbour(until_s=until_s, slower=BURSTS)
    measured = device.sample(RESTING)
    assert at_least_s <= device.device.now_ns() / 1e9 <= at_most_s
    interval = ratio_interval(measured.blocks, seed=1)
    assert interval.center == pytest.approx(0.5, rel=0.01)
    assert interval.half_width < 0.06, "what waiting brought is known, and ranks"


def test_a_device_that_does_not_come_to_rest_is_not_waited_for_without_end():
    device = with_a_neighbour(until_s=1000, slower=BURSTS)
    measured = device.sample(RESTING)
    assert 31 <= device.device.now_ns() / 1e9 <= 33
    assert ratio_interval(measured.blocks, seed=1).center == pytest.approx(0.566, rel=0.02)


def test_a_device_that_comes_to_rest_does_not_drift():
    device = with_a_neighbour(until_s=12, slower=BURSTS, is_fading=True)
    measured = device.sample(RESTING)
    assert (measured.drift, measured.n_restarts) == (None, 0)
    assert ratio_interval(measured.blocks, seed=1).center == pytest.approx(0.5, rel=0.03)


def test_nobody_waits_for_a_rest_that_is_not_known():
    device = with_a_neighbour(until_s=1000, slower=BURSTS)
    device.sample(replace(RESTING, rest_ns=None))
    assert device.device.now_ns() / 1e9 <= 8.5


def test_a_calibration_waits_for_rest_where_that_is_known():
    plan = replace(RESTING, is_calibration=True)
    device = with_a_neighbour(until_s=20, slower=BURSTS)
    measured = device.sample(plan)
    assert 20 <= device.device.now_ns() / 1e9 <= 24
    reference_ns = Pairs.of(measured.blocks).undisturbed_ns("reference")
    assert reference_ns == pytest.approx(4e6, rel=0.03)


def test_a_calibration_takes_all_of_its_time():
    device = bench(noisy(2e5), noisy(2e5))
    device.sample(replace(PLAN, is_calibration=True))
    assert device.device.now_ns() / 1e9 >= 9.8
