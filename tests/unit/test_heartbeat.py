"""When an agent beats."""

import socket

import pytest

from device_agents.backoff import Backoff
from device_agents.errors import ServiceUnreachable
from device_agents.heartbeat import Pulse
from device_agents.protocol import HeartbeatReply


class Service:
    """Answers every heartbeat, or none."""

    is_there = True

    def heartbeat(self, _):
        if not self.is_there:
            raise ServiceUnreachable("away")
        return HeartbeatReply(heartbeat_s=3.0)


class Waits:
    """An event that notes for how long it is waited for, and ends it after a number of times."""

    def __init__(self, times):
        self.times, self.seen_s = times, []

    def is_set(self):
        return False

    def wait(self, seconds):
        self.seen_s.append(seconds)
        return len(self.seen_s) == self.times


def waits_of(service, times):
    pulse = Pulse(
        service,
        held=lambda: None,
        came_back=lambda: None,
        rotate=lambda: None,
        say=lambda _: None,
        backoff=lambda: Backoff(uniform=lambda _, high: high),
    )
    waits = Waits(times)
    pulse.run(waits)
    return waits.seen_s


def test_agents_that_were_answered_together_do_not_beat_together_ever_after():
    seen_s = waits_of(Service(), 200)
    assert all(3.0 * 0.8 <= wait_s <= 3.0 for wait_s in seen_s)
    assert max(seen_s) - min(seen_s) > 0.5


def test_a_lost_answer_is_followed_by_another_heartbeat_sooner_than_the_next_would_be():
    away = Service()
    away.is_there = False
    assert waits_of(away, 5) == pytest.approx([0.5, 1.0, 2.0, 3.0, 3.0])


@pytest.mark.parametrize("is_there", [True, False])
def test_systemd_hears_once_that_the_agent_is_ready_and_at_each_beat_that_it_lives(
    tmp_path, monkeypatch, is_there
):
    service = Service()
    service.is_there = is_there
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        waits_of(service, 2)
        systemd.setblocking(False)
        heard = [systemd.recv(100) for _ in range(3)]
        with pytest.raises(BlockingIOError):
            systemd.recv(100)
    assert heard == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
