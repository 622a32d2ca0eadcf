"""What taints a pair of blocks, seen on file systems laid out by hand."""

import pytest

from device_agents.watch import DeviceWatch, Glimpse, taint

FREQUENCY = "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq"
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"
COUNT = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_a_board_is_seen_with_flags_counters_and_clock(tmp_path):
    seen = DeviceWatch(write(tmp_path, {FREQUENCY: 1_500_000, FIRMWARE: "5", COUNT: 7})).look()
    assert seen.held_back == ("under-voltage", "throttled")
    assert (seen.throttle_events, seen.frequency_mhz) == (7, 1500.0)


def test_a_device_without_sources_tells_none_of_it(tmp_path):
    seen = DeviceWatch(tmp_path).look()
    assert (seen.held_back, seen.throttle_events, seen.frequency_mhz) == (None, None, None)


def test_a_source_that_takes_long_is_not_asked_between_blocks(tmp_path):
    write(tmp_path, {FREQUENCY: 1_500_000})
    ticks = iter(0.002 * n for n in range(100))
    assert DeviceWatch(tmp_path, clock=lambda: next(ticks)).look().frequency_mhz is None


def test_two_looks_at_a_quiet_board_taint_nothing(tmp_path):
    watch = DeviceWatch(write(tmp_path, {FREQUENCY: 1_500_000, FIRMWARE: "0", COUNT: 7}))
    before = watch.look()
    assert taint(before, Glimpse(held_back=(), throttle_events=7, frequency_mhz=1500.0)) is None


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({}, {"held_back": ("under-voltage",)}, "under-voltage"),
        ({"held_back": ("throttled",)}, {"held_back": ()}, "throttled"),
        ({"throttle_events": 3}, {"throttle_events": 4}, "throttled"),
        ({"frequency_mhz": 1500.0}, {"frequency_mhz": 600.0}, "the clock's frequency changed"),
        ({"frequency_mhz": 1500.0}, {"frequency_mhz": 1440.0}, None),
        ({}, {"wall_s": 0.02, "cpu_s": 0.01, "preemptions": 2}, "preempted"),
        ({}, {"wall_s": 0.02, "cpu_s": 0.019, "preemptions": 2}, None),
        ({}, {"wall_s": 0.02, "cpu_s": 0.001, "preemptions": 0}, None),
    ],
)
def test_what_happened_between_two_glimpses_is_named(before, after, reason):
    assert taint(Glimpse(**before), Glimpse(**after)) == reason
