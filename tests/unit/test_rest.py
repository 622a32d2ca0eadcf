"""What an agent knows of a device at rest, and how long measurements wait for it."""

import pytest

from device_agents.protocol import MeasurementPlan
from device_agents.rest import MAX_REFERENCES, MEMORY, REST_CAPS, Rest, RestMemory, is_restless
from tests.unit.records import latency

PLAN = MeasurementPlan(time_cap_s=8, timeout_s=120, reference_latency_ns=1e6)
UNKNOWN = PLAN.model_copy(update={"reference_latency_ns": None})
CALIBRATION = UNKNOWN.model_copy(update={"is_calibration": True})


def learn(memory, level_ns, plan=PLAN, *, reference="fp32", is_reference=False):
    report = None if level_ns is None else latency(1.0, reference_p50_ns=level_ns)
    memory.learn(reference, plan, report, is_reference=is_reference)


def memory_of(*levels_ns):
    memory = RestMemory()
    for level_ns in levels_ns:
        learn(memory, level_ns)
    return memory


def ask(memory, plan=PLAN, *, reference="fp32", is_reference=False):
    return memory.ask(reference, plan, is_reference=is_reference)


@pytest.mark.parametrize(
    ("time_cap_s", "rest_cap_s"), [(8, REST_CAPS * 8), (15, 60), (30, 60), (90, 90)]
)
def test_a_measurement_waits_some_time_caps_and_spares_half_of_its_timeout(time_cap_s, rest_cap_s):
    plan = PLAN.model_copy(update={"time_cap_s": time_cap_s})
    assert ask(RestMemory(), plan).cap_s == rest_cap_s


def test_nothing_is_waited_for_where_nothing_is_known():
    assert ask(RestMemory(), UNKNOWN) == ask(RestMemory(), CALIBRATION, is_reference=True) == Rest()


def test_the_reference_against_itself_waits_only_to_be_calibrated():
    memory = memory_of(1e6)
    assert ask(memory, is_reference=True) == Rest(reference_ns=1e6, cap_s=None)
    assert ask(memory, CALIBRATION, is_reference=True).cap_s == REST_CAPS * 8


def test_a_calibration_in_a_bad_minute_is_not_taken_for_rest():
    """FP32 was calibrated at 1 ms; one later measurement found it a tenth faster."""
    assert ask(memory_of(1.02e6)).reference_ns == 1e6
    assert ask(memory_of(1.02e6, 0.9e6, 1.01e6)).reference_ns == 0.9e6


def test_one_measurement_under_a_faster_clock_is_not_what_a_device_does_at_rest():
    faster = MEMORY // 4 - 1
    memory = memory_of(*[1e6] * MEMORY, *[0.9e6] * faster)
    assert ask(memory).reference_ns == 1e6
    learn(memory, 0.9e6)
    assert ask(memory).reference_ns == 0.9e6


def test_a_device_that_is_slower_from_now_on_is_not_waited_for_for_ever():
    memory, n_in_vain = memory_of(*[1e6] * MEMORY), 0
    while is_restless(1.1e6, ask(memory).reference_ns):
        learn(memory, 1.1e6)
        n_in_vain += 1
    assert n_in_vain == MEMORY - 1


def test_each_reference_has_its_own_rest():
    memory = memory_of(1e6)
    assert ask(memory, UNKNOWN, reference="another") == Rest()
    learn(memory, 5e6, UNKNOWN, reference="another")
    assert ask(memory, UNKNOWN, reference="another").reference_ns == 5e6
    assert ask(memory, UNKNOWN).reference_ns == 1e6


def test_a_measurement_without_a_report_teaches_nothing():
    memory = RestMemory()
    learn(memory, None)
    assert ask(memory, UNKNOWN) == Rest()


def test_devices_that_are_compared_by_it_do_not_tell_what_a_reference_takes_at_rest():
    memory = memory_of(1e6)
    for _ in range(MEMORY):
        learn(memory, 0.9e6, is_reference=True)
    assert ask(memory).reference_ns == 1e6
    learn(memory, 0.9e6, CALIBRATION, is_reference=True)
    assert ask(memory).reference_ns == 0.9e6


def test_the_first_comparison_tells_a_member_of_a_pool_what_it_takes_itself():
    memory = RestMemory()
    learn(memory, 1.04e6, UNKNOWN, is_reference=True)
    assert ask(memory).reference_ns == 1.04e6, "and not what its pool does"


def test_references_of_long_ago_are_forgotten():
    memory = memory_of(1e6)
    for number in range(MAX_REFERENCES):
        learn(memory, 5e6, UNKNOWN, reference=number)
    assert ask(memory, UNKNOWN) == Rest()
    assert ask(memory, UNKNOWN, reference=0).reference_ns == 5e6
