"""Energy meters, read from file systems laid out by hand, and what an inference is charged."""

import ctypes

import pytest

from device_agents import measurement_child
from device_agents.energy import NoEnergySensor, Nvml, PowerMonitor, Rapl, open_meter
from device_agents.latency import TimedBlock, energy_per_inference
from device_agents.runtimes import Clock
from device_agents.runtimes.simulated import SimulatedRuntime
from device_agents.sampling import SamplingPlan, sample
from tests.unit.test_measurement import child_job

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


def test_a_power_monitor_that_tells_microwatts_is_held_between_readings(tmp_path):
    board = {"sys/class/hwmon/hwmon0/name": "ina219"}
    board["sys/class/hwmon/hwmon0/power1_input"] = 2_500_000
    seconds = iter([10.0, 10.5, 11.5])
    meter = PowerMonitor(root=write(tmp_path, board), now_s=lambda: next(seconds))
    assert meter.joules() == pytest.approx(2.5 * 0.5)
    write(tmp_path, {"sys/class/hwmon/hwmon0/power1_input": 4_000_000})
    assert meter.joules() == pytest.approx(2.5 * 0.5 + 4.0 * 1.0)


@pytest.mark.parametrize("reading", ["", "N/A"])
def test_a_power_monitor_that_cannot_be_read_is_not_offered(tmp_path, reading):
    board = {"sys/class/hwmon/hwmon0/name": "ina219"}
    board["sys/class/hwmon/hwmon0/power1_input"] = reading
    with pytest.raises(NoEnergySensor, match="monitor cannot be read"):
        PowerMonitor(root=write(tmp_path, board))
    files = {f"{PACKAGE}/energy_uj": 1, f"{PACKAGE}/max_energy_range_uj": 9}
    assert open_meter(write(tmp_path, files)).covers == "processor package"


class FakeNvml:
    """NVML's functions, called as ctypes calls them: 0 is success, results come by reference."""

    def __init__(self, millijoules):
        self.readings = iter(millijoules)

    def nvmlInit_v2(self):  # noqa: N802 - NVML's name
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):  # noqa: N802 - NVML's name
        device._obj.value = 0xF00 + index
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, energy):  # noqa: N802 - NVML's name
        assert device.value == 0xF00
        energy._obj.value = reading = next(self.readings)
        return 3 if reading == 0 else 0  # NVML_ERROR_NOT_SUPPORTED


def test_an_nvidia_devices_millijoules_are_joules(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeNvml([5_000, 12_345, 14_845]))
    meter = Nvml()
    before = meter.joules()
    assert before == pytest.approx(12.345)
    assert meter.joules() - before == pytest.approx(2.5)


def test_an_nvidia_device_without_the_counter_has_no_meter(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: FakeNvml([0]))
    with pytest.raises(NoEnergySensor, match="counts no energy"):
        Nvml()


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


def sampled_on(device):
    clock = Clock(now_ns=lambda: int(device.now))
    costs = {"candidate": 1.0, "reference": 3.0}
    calls = {name: lambda joules=joules: device.call(joules) for name, joules in costs.items()}
    plan = SamplingPlan(target_half_width=0.1, time_cap_s=1, min_blocks=4, seed=3)
    return sample(lambda: calls, plan, clock, watch=SimulatedRuntime(), meter=device)


def test_each_model_is_charged_for_its_own_blocks():
    assert energy_per_inference(sampled_on(Device()).blocks) == pytest.approx(1.0)


class BadSensor(Device):
    """Each reading whose number is in `fails` raises `error`."""

    def __init__(self, error, fails):
        super().__init__()
        self.error, self.fails, self.n_read = error, fails, 0

    def joules(self):
        self.n_read += 1
        if self.n_read in self.fails:
            raise self.error
        return super().joules()


@pytest.mark.parametrize("error", [OSError(5, "I/O"), ValueError("''"), NoEnergySensor("lost")])
def test_a_sensor_that_fails_costs_the_energy_and_not_the_measurement(error):
    sampled = sampled_on(BadSensor(error, range(10**6)))
    assert energy_per_inference(sampled.blocks) is None
    assert sampled.energy_missing == f"the sensor of the test cannot be read: {error}"
    assert len(sampled.blocks) == len(sampled_on(Device()).blocks)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_reading_that_fails_costs_one_block(number):
    blocks = sampled_on(BadSensor(OSError(11, "again"), [number])).blocks
    assert sum(block.energy_joules is None for block in blocks) == 1
    assert energy_per_inference(blocks) == pytest.approx(1.0)


def test_a_report_without_energy_says_that_the_sensor_failed(tmp_path, monkeypatch):
    sensor = BadSensor(OSError(5, "I/O"), range(10**6))
    monkeypatch.setattr(measurement_child, "find_meter", lambda _: (sensor, "test"))
    document = measurement_child.measure(child_job(tmp_path))
    assert document["outcome"] == "ok"
    assert document["report"]["energy_joules"] is None
    assert "cannot be read: [Errno 5] I/O" in document["report"]["energy_source"]


def test_without_a_meter_there_is_no_energy():
    block = TimedBlock(subject="candidate", samples_ns=(1,), median_ns=1.0, n_calls=3)
    assert energy_per_inference([block]) is None
