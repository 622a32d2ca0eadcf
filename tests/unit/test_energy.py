"""Energy meters, read from file systems laid out by hand, and what an inference is charged."""

import pytest

from device_agents.energy import NoEnergySensor, Nvml, PowerMonitor, Rapl, open_meter
from device_agents.latency import TimedBlock, energy_per_inference
from device_agents.runtimes import Clock
from device_agents.runtimes.simulated import SimulatedRuntime
from device_agents.sampling import SamplingPlan, sample

PACKAGE = "sys/class/powercap/intel-rapl:0"


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_rapl_counts_packages_once_and_over_a_wrap(tmp_path):
    zone = {f"{PACKAGE}/energy_uj": 900, f"{PACKAGE}/max_energy_range_uj": 1000}
    sub_zone = {"sys/class/powercap/intel-rapl:0:0/energy_uj": 77}
    meter = Rapl(root=write(tmp_path, zone | sub_zone))
    assert meter.joules() == 0
    write(tmp_path, {f"{PACKAGE}/energy_uj": 400})
    assert meter.joules() == pytest.approx(500e-6)


def test_a_jetsons_board_rail_is_chosen_by_its_label(tmp_path):
    monitor = "sys/class/hwmon/hwmon2"
    rails = {
        f"{monitor}/name": "ina3221",
        f"{monitor}/in1_label": "VDD_CPU",
        f"{monitor}/in1_input": 5000,
        f"{monitor}/curr1_input": 9999,
        f"{monitor}/in2_label": "VDD_IN",
        f"{monitor}/in2_input": 5000,
        f"{monitor}/curr2_input": 2000,
    }
    seconds = iter([0.0, 0.5])
    meter = PowerMonitor(root=write(tmp_path, rails), now_s=lambda: next(seconds))
    assert meter.joules() == pytest.approx(10.0 * 0.5)


def test_a_device_without_a_sensor_says_what_was_looked_for(tmp_path):
    with pytest.raises(NoEnergySensor, match=r"INA.*RAPL"):
        open_meter(tmp_path)


def test_the_board_is_asked_before_the_package(tmp_path):
    files = {f"{PACKAGE}/energy_uj": 1, f"{PACKAGE}/max_energy_range_uj": 9}
    board = {"sys/class/hwmon/hwmon0/name": "ina219", "sys/class/hwmon/hwmon0/power1_input": 1}
    assert open_meter(write(tmp_path, files)).covers == "processor package"
    assert open_meter(write(tmp_path, board)).covers == "board"


def test_a_machine_without_an_nvidia_driver_has_no_such_meter():
    with pytest.raises(NoEnergySensor, match="no NVIDIA driver"):
        Nvml(library="libnvidia-ml-that-is-not-here.so")


class Device:
    """A clock and a meter that a call moves: the candidate takes 1 J and 1 ms, the other 3 J."""

    covers = "test"

    def __init__(self):
        self.spent = self.now = 0.0

    def call(self, joules):
        self.spent += joules
        self.now += 1e6

    def joules(self):
        return self.spent


def test_each_model_is_charged_for_its_own_blocks():
    device = Device()
    clock = Clock(now_ns=lambda: int(device.now))
    costs = {"candidate": 1.0, "reference": 3.0}
    calls = {name: lambda joules=joules: device.call(joules) for name, joules in costs.items()}
    plan = SamplingPlan(target_half_width=0.1, time_cap_s=1, min_blocks=4, seed=3)
    blocks = sample(lambda: calls, plan, clock, watch=SimulatedRuntime(), meter=device).blocks
    assert energy_per_inference(blocks) == pytest.approx(1.0)


def test_without_a_meter_there_is_no_energy():
    block = TimedBlock(subject="candidate", samples_ns=(1,), median_ns=1.0, n_calls=3)
    assert energy_per_inference([block]) is None
