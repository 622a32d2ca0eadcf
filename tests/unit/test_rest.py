"""How long measurements wait for a device at rest, and when they do not any more."""

import pytest

from device_agents.protocol import MeasurementPlan
from device_agents.rest import MAX_IN_VAIN, REST_CAPS, Patience
from tests.unit.records import latency

PLAN = MeasurementPlan(time_cap_s=8, timeout_s=120, reference_latency_ns=1e6)
RESTLESS, AT_REST = (latency(1.0, reference_p50_ns=ns) for ns in (1.05e6, 1.01e6))


def after(*reports, rest_cap_s=32.0):
    patience = Patience()
    for report in reports:
        patience.learn(PLAN, report, rest_cap_s=rest_cap_s)
    return patience.rest_cap_s(PLAN, is_reference=False)


@pytest.mark.parametrize(
    ("time_cap_s", "rest_cap_s"), [(8, REST_CAPS * 8), (15, 60), (30, 60), (90, 90)]
)
def test_a_measurement_waits_some_time_caps_and_spares_half_of_its_timeout(time_cap_s, rest_cap_s):
    plan = PLAN.model_copy(update={"time_cap_s": time_cap_s})
    assert Patience().rest_cap_s(plan, is_reference=False) == rest_cap_s


def test_nothing_is_waited_for_where_nothing_is_calibrated():
    plan = PLAN.model_copy(update={"reference_latency_ns": None})
    patience = Patience()
    for _ in range(MAX_IN_VAIN):
        patience.learn(plan, RESTLESS, rest_cap_s=32.0)
    assert patience.rest_cap_s(plan, is_reference=False) is None
    assert patience.rest_cap_s(PLAN, is_reference=False) is not None, "nothing was in vain"


def test_the_reference_against_itself_does_not_wait():
    assert Patience().rest_cap_s(PLAN, is_reference=True) is None


def test_waiting_in_vain_ends_until_the_device_is_found_at_rest():
    assert after(*[RESTLESS] * (MAX_IN_VAIN - 1)) is not None
    assert after(*[RESTLESS] * MAX_IN_VAIN) is None
    assert after(*[RESTLESS] * MAX_IN_VAIN, None) is None, "no report, nothing learned"
    assert after(*[RESTLESS] * MAX_IN_VAIN, AT_REST) is not None
    assert after(RESTLESS, AT_REST, RESTLESS) is not None


def test_who_did_not_wait_did_not_wait_in_vain():
    assert after(*[RESTLESS] * MAX_IN_VAIN, rest_cap_s=None) is not None
