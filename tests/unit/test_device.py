"""Description and conditions, read from file systems laid out by hand."""

import subprocess
import sys
from functools import partial

import pytest

from device_agents import device
from device_agents.conditions import CpuTicks, StolenTime, cpu_ticks, read_conditions
from device_agents.device import Processor, describe_device, host_id, probe_runtimes
from device_agents.errors import RuntimeUnavailable
from device_agents.protocol import Conditions, RuntimeBuild
from device_agents.runtimes import load_runtime, runtime_names

RASPBERRY_PI = {
    "proc/cpuinfo": (
        "processor\t: 0\nFeatures\t: fp asimd crc32 asimddp\nCPU part\t: 0xd0b\n\n"
        "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
    ),
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\x00",
    "proc/meminfo": "MemTotal:        8256000 kB\nMemAvailable:    7000000 kB\n",
    "proc/loadavg": "0.42 0.30 0.20 1/200 1234\n",
    "proc/stat": "cpu  100 0 100 700 0 0 0 100 0 0\n",
    "proc/sys/kernel/random/boot_id": "b007\n",
    "etc/machine-id": "cafe\n",
    "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "sys/class/thermal/thermal_zone0/temp": "48312\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50004\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "ondemand\n",
}
X86 = {
    "proc/cpuinfo": (
        "model name\t: AMD EPYC\ncpu MHz\t\t: 2596.122\nflags\t\t: fpu avx2 avx512_vnni sse\n"
    ),
}
BUILD = RuntimeBuild(name="simulated", version="1", providers=("CPUExecutionProvider",))


def lay_out(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def describe(root, *, builds=(BUILD,)):
    return describe_device(root, probe=lambda: builds)


def test_a_raspberry_pi_tells_all_its_conditions(tmp_path):
    root = lay_out(tmp_path, RASPBERRY_PI)
    conditions = Conditions.model_validate(read_conditions(root))
    assert conditions.model_copy(
        update={"missing": {}, "involuntary_switches": None}
    ) == Conditions(
        load_1m=0.42,
        cpu_frequency_mhz=2400.0,
        temperature_celsius=48.312,
        governor="ondemand",
        available_memory_bytes=7_000_000 * 1024,
        steal_fraction=0.1,
        throttled_now=("throttled",),
        throttled_since_boot=("under-voltage", "throttled"),
    )
    assert set(conditions.missing) == {"throttle_events"}


def test_what_a_device_does_not_have_is_none_with_a_reason(tmp_path):
    conditions = Conditions.model_validate(read_conditions(tmp_path))
    # The process's own counter needs no file.
    fields = set(Conditions.model_fields) - {"missing", "involuntary_switches"}
    assert {name for name in fields if getattr(conditions, name) is None} == fields
    assert set(conditions.missing) == fields
    assert all(conditions.missing.values())


def test_a_device_without_cpufreq_falls_back_to_cpuinfo(tmp_path):
    conditions = read_conditions(lay_out(tmp_path, X86))
    assert conditions["cpu_frequency_mhz"] == 2596.122
    assert "hypervisor" in conditions["missing"]["governor"]


def test_a_broken_sensor_is_no_temperature(tmp_path):
    zones = {
        "sys/class/thermal/thermal_zone0/temp": "-274000\n",
        "sys/class/thermal/thermal_zone1/temp": "hot\n",
    }
    assert "temperature_celsius" in read_conditions(lay_out(tmp_path, zones))["missing"]


def test_throttle_counters_of_x86_and_jetson_are_summed(tmp_path):
    counters = {
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "2\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "3\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "5\n",
    }
    assert read_conditions(lay_out(tmp_path, counters))["throttle_events"] == 10


def test_stolen_time_counts_from_the_last_reading(tmp_path):
    root = lay_out(tmp_path, RASPBERRY_PI)
    since = cpu_ticks(root)
    (root / "proc/stat").write_text("cpu  150 0 100 700 0 0 0 150 0 0\n")
    assert since == CpuTicks(total=1000, steal=100)
    assert StolenTime(root=root).fraction(since) == 0.5


def test_a_device_is_described_from_its_files(tmp_path):
    described = describe(lay_out(tmp_path, RASPBERRY_PI))
    assert described.cpu_model == "Raspberry Pi 5 Model B Rev 1.0"
    assert described.cpu_flags == ("asimd", "asimddp")
    assert described.memory_bytes == 8_256_000 * 1024
    assert described.operating_system == "Debian GNU/Linux 12 (bookworm)"
    assert described.runtimes == (BUILD,)


def test_an_x86_processor_lists_the_flags_that_choose_kernels(tmp_path):
    processor = Processor(root=lay_out(tmp_path, X86))
    assert processor.model() == "AMD EPYC"
    assert processor.kernel_flags() == ("avx2", "avx512_vnni")


def test_the_fingerprint_is_of_what_decides_about_latency(tmp_path):
    root = lay_out(tmp_path, RASPBERRY_PI)
    before = describe(root).fingerprint
    lay_out(root, {"proc/sys/kernel/random/boot_id": "next\n", "etc/os-release": "PRETTY_NAME=X\n"})
    assert describe(root).fingerprint == before
    newer = BUILD.model_copy(update={"version": "2"})
    assert describe(root, builds=(newer,)).fingerprint != before
    lay_out(root, {"proc/device-tree/model": "Raspberry Pi 4"})
    assert describe(root).fingerprint != before


def test_a_few_kilobytes_of_memory_make_no_other_device(tmp_path):
    before = describe(lay_out(tmp_path, RASPBERRY_PI)).fingerprint
    lay_out(tmp_path, {"proc/meminfo": "MemTotal: 8251000 kB\n"})
    assert describe(tmp_path).fingerprint == before


def test_the_host_id_outlives_a_restart_and_differs_between_machines(tmp_path):
    root = lay_out(tmp_path, RASPBERRY_PI)
    first = host_id(root)
    assert len(first) == 32
    lay_out(root, {"proc/sys/kernel/random/boot_id": "other\n"})
    assert host_id(root) == first
    lay_out(root, {"etc/machine-id": "0123456789abcdef0123456789abcdef\n"})
    assert host_id(root) != first


def test_without_a_machine_id_the_boot_tells_hosts_apart(tmp_path):
    root = lay_out(tmp_path, {**RASPBERRY_PI, "etc/machine-id": ""})
    first = host_id(root)
    lay_out(root, {"proc/sys/kernel/random/boot_id": "other\n"})
    assert host_id(root) != first


def test_processes_on_this_machine_agree_on_its_id():
    program = "from device_agents.device import host_id; print(host_id())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.strip() == host_id()


def test_the_probe_finds_both_runtimes_here():
    builds = {build.name: build for build in probe_runtimes()}
    assert {"onnxruntime", "simulated"} <= builds.keys()
    assert "CPUExecutionProvider" in builds["onnxruntime"].providers


def test_a_runtime_that_does_not_load_is_one_the_device_does_not_have():
    assert [build.name for build in probe_runtimes(["abacus", "simulated"])] == ["simulated"]


def test_a_runtime_that_never_answers_is_left_out(monkeypatch):
    monkeypatch.setattr(device, "PROBE_TIMEOUT_S", 0.0)
    assert probe_runtimes(["simulated"]) == ()


@pytest.mark.parametrize("after", ["", "print('context released')"])
def test_what_a_runtime_prints_beside_its_build_is_passed_over(monkeypatch, after):
    build = RuntimeBuild(name="npu", version="1", providers=("NpuProvider",))
    program = f"print('driver 2.3'); print({build.model_dump_json()!r}); {after}"
    start = partial(subprocess.Popen, [sys.executable, "-c", program], stdout=subprocess.PIPE)
    monkeypatch.setattr(device, "_start_probe", lambda name: start())
    assert probe_runtimes(["npu"]) == (build,)


def test_a_runtime_that_says_nothing_is_one_the_device_does_not_have(monkeypatch):
    start = partial(subprocess.Popen, [sys.executable, "-c", ""], stdout=subprocess.PIPE)
    monkeypatch.setattr(device, "_start_probe", lambda name: start())
    assert probe_runtimes(["npu"]) == ()


def test_an_unknown_runtime_names_the_known_ones():
    with pytest.raises(RuntimeUnavailable, match="onnxruntime, openvino, simulated"):
        load_runtime("abacus")


def test_the_built_in_runtimes_need_no_metadata(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    assert runtime_names() == ("onnxruntime", "openvino", "simulated")
    assert load_runtime("simulated").name == "simulated"


def test_a_runtime_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "device_agents.runtimes.onnxruntime", raising=False)
    with pytest.raises(RuntimeUnavailable, match="does not load here"):
        load_runtime("onnxruntime")
