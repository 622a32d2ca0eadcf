"""The agent's own doctor, its systemd unit and its watchdog."""

import configparser
import json
import socket

import pytest
from click.testing import CliRunner

from device_agents import systemd
from device_agents.cli import main
from device_agents.connection import PATIENT
from device_agents.doctor import examine
from device_agents.heartbeat import FIRST_INTERVAL_S
from device_agents.protocol import RuntimeBuild
from tests.unit.test_device import RASPBERRY_PI, lay_out

BUILD = RuntimeBuild(name="onnxruntime", version="1.31.1", providers=("CPUExecutionProvider",))


def findings(root, *, files=RASPBERRY_PI, builds=(BUILD,), service=None, state_dir=None):
    found = examine(
        state_dir=state_dir or root / "state",
        service=service,
        root=lay_out(root, files),
        probe=lambda: builds,
    )
    return {finding.check: finding for finding in found}


def test_a_board_that_was_throttled_before_is_warned_of_not_failed(tmp_path):
    found = findings(tmp_path, files=RASPBERRY_PI | {THROTTLED: "50000\n"})["throttling"]
    assert found.status == "warn"
    assert "under-voltage" in found.text


THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_a_board_that_is_throttled_now_fails(tmp_path):
    assert findings(tmp_path)["throttling"].status == "fail"


def test_a_changing_clock_is_told_with_its_repair(tmp_path):
    clock = findings(tmp_path)["clock"]
    assert clock.status == "warn"
    assert "performance" in clock.text


def test_a_device_without_a_runtime_cannot_measure(tmp_path):
    simulated = BUILD.model_copy(update={"name": "simulated"})
    assert findings(tmp_path, builds=(simulated,))["runtimes"].status == "fail"


def test_little_memory_fails_before_a_model_ends_as_oom(tmp_path):
    low = {"proc/meminfo": "MemAvailable:    90000 kB\n"}
    assert findings(tmp_path, files=low)["memory"].status == "fail"


def test_a_state_folder_that_cannot_be_made_fails(tmp_path):
    in_a_file = tmp_path / "file"
    in_a_file.write_text("")
    assert findings(tmp_path, state_dir=in_a_file / "state")["state folder"].status == "fail"


def test_a_service_that_does_not_answer_fails(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert findings(tmp_path, service=f"http://127.0.0.1:{port}")["service"].status == "fail"


def test_the_command_ends_with_1_where_something_must_be_repaired(tmp_path):
    arguments = ["doctor", "--service", "http://127.0.0.1:9", "--state-dir", str(tmp_path)]
    done = CliRunner().invoke(main, [*arguments, "-o", "json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)[-1]["check"] == "service"


def test_an_address_that_is_none_is_wrong_usage(tmp_path):
    done = CliRunner().invoke(main, ["doctor", "--service", "here", "--state-dir", str(tmp_path)])
    assert done.exit_code == 2


def unit_of(*arguments):
    done = CliRunner().invoke(main, ["unit", "--service", "https://host:8577", *arguments])
    assert done.exit_code == 0
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string(done.stdout)
    return parser


def test_a_system_unit_runs_as_its_user_with_that_users_state():
    unit = unit_of("--user", "root", "--name", "kitchen pi")
    assert unit["Service"]["User"] == "root"
    assert "/root/.local/state/edge-autotune" in unit["Service"]["ExecStart"]
    assert unit["Service"]["ExecStart"].endswith("--name 'kitchen pi'")
    assert unit["Install"]["WantedBy"] == "multi-user.target"


def test_a_unit_for_what_is_no_address_is_not_written():
    refused = CliRunner().invoke(main, ["unit", "--service", "my-machine:8577"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "it looks like http://" in refused.stderr


def test_a_users_own_unit_names_no_user():
    unit = unit_of()
    assert "User" not in unit["Service"]
    assert unit["Install"]["WantedBy"] == "default.target"


def test_a_unit_is_watched_started_again_and_ended_by_the_agent_itself():
    service = unit_of()["Service"]
    kept = {name: service[name] for name in ("Type", "Restart", "WatchdogSec", "KillMode")}
    assert kept == {
        "Type": "notify",
        "Restart": "always",
        "WatchdogSec": str(systemd.WATCHDOG_S),
        "KillMode": "mixed",
    }
    longest_beat_s = PATIENT.connect_s + PATIENT.heartbeat_s + FIRST_INTERVAL_S
    assert 3 * longest_beat_s < systemd.WATCHDOG_S


def test_an_account_that_does_not_exist_is_refused():
    done = CliRunner().invoke(main, ["unit", "--service", "https://h", "--user", "nobody-here"])
    assert done.exit_code == 2


def test_systemd_hears_that_the_agent_lives(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert systemd.notify("WATCHDOG=1")
        assert listener.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all"])
def test_without_systemd_nothing_happens(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notify("WATCHDOG=1")
