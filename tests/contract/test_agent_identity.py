"""Real agents and a real service: keys that rotate, are revoked, and are copied."""

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.connection import ServiceConnection
from device_agents.errors import DeviceDiskFull, EnrolmentRefused, ServiceUnreachable
from device_agents.identity import Identity, StateFolder
from storage.records import DrainCause
from tests.running_service import RunningService, running_service
from tests.unit.agent_service import PATIENCE_S, RunningAgent


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One for all, with heartbeats that a test need not wait for."""
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder, heartbeat_s=0.05, lease_ttl_s=1) as running:
        yield running


@contextlib.contextmanager
def enrolled(service: RunningService, state: Path, name: str) -> Iterator[RunningAgent]:
    """An agent that is at work."""
    token = service.client.enrolment_token().token
    with RunningAgent(service.url, state, token=token, name=name) as running:
        until(lambda: (state / "agent.json").exists() and bool(running.lines))
        yield running


def until(condition: object) -> None:
    for _ in range(int(PATIENCE_S / 0.02)):
        if condition():  # type: ignore[operator]
            return
        threading.Event().wait(0.02)
    raise AssertionError("it did not happen in time")


def key_of(state: Path) -> str:
    return Identity.model_validate_json((state / "agent.json").read_bytes()).agent_key


def test_an_agent_gets_a_new_key_and_comes_back_with_it(
    service: RunningService, tmp_path: Path
) -> None:
    with enrolled(service, tmp_path, "rotated"):
        first = key_of(tmp_path)
        service.client.rotate_device_key("rotated")
        until(lambda: key_of(tmp_path) != first)
    with RunningAgent(service.url, tmp_path, token=None) as running:
        until(lambda: running.lines)
    assert running.lines[0].startswith("back as rotated")


def test_a_new_key_that_never_arrived_locks_nobody_out(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ServiceConnection.new_key
    lost: list[str] = []

    def lose_the_first(connection: ServiceConnection) -> object:
        key = asked(connection)
        if not lost:
            lost.append(key.agent_key)
            raise ServiceUnreachable("the answer was lost")
        return key

    monkeypatch.setattr(ServiceConnection, "new_key", lose_the_first)
    with enrolled(service, tmp_path, "lossy") as running:
        first = key_of(tmp_path)
        service.client.rotate_device_key("lossy")
        until(lambda: key_of(tmp_path) not in (first, *lost))
    assert running.error is None
    assert lost


def test_a_new_key_that_finds_no_room_is_asked_for_again(
    service: RunningService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = StateFolder.save
    refused: list[str] = []

    def full_at_first(folder: StateFolder, identity: Identity) -> None:
        if not refused:
            refused.append(identity.agent_key)
            raise DeviceDiskFull("no room left")
        save(folder, identity)

    with enrolled(service, tmp_path, "full") as running:
        first = key_of(tmp_path)
        monkeypatch.setattr(StateFolder, "save", full_at_first)
        service.client.rotate_device_key("full")
        until(lambda: key_of(tmp_path) not in (first, *refused))
    assert running.error is None
    assert refused


def test_a_revoked_agent_says_why_and_stops_asking(service: RunningService, tmp_path: Path) -> None:
    with enrolled(service, tmp_path, "gone") as running:
        service.client.revoke_device("gone")
        error = running.join()
    assert isinstance(error, EnrolmentRefused)
    assert "was revoked" in str(error)
    assert "autotune device enroll" in str(error)
    with RunningAgent(service.url, tmp_path, token=None) as again:
        assert "(gone) was revoked at" in str(again.join())


def test_two_processes_with_one_state_folder_are_both_told(
    service: RunningService, tmp_path: Path
) -> None:
    card, copy = tmp_path / "card", tmp_path / "copy"
    with enrolled(service, card, "card") as running:
        shutil.copytree(card, copy)
        command = [sys.executable, "-m", "device_agents", "run", "--service", service.url]
        with subprocess.Popen(
            [*command, "--state-dir", str(copy)], stderr=subprocess.PIPE, text=True
        ) as other:
            assert other.stderr is not None
            said = next(line for line in other.stderr if "no work for this device" in line)
            other.terminate()
            until(lambda: any("no work for this device" in line for line in running.lines))
    assert "two processes use the identity" in said
    assert service.repository.get_device("card").drained_by is DrainCause.IDENTITY
