"""The agent as a systemd service: its unit file, and the messages that keep it alive.

Owns sd_notify(3) on the standard library and the text of the unit. When to say that the agent
lives is `heartbeat.py`'s: from the heartbeat loop, so that a hanging agent is started anew while a
long measurement, which is another process, is left alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from collections.abc import Sequence

WATCHDOG_S = 90
"""Several heartbeats, also where each of them waits on a dead network (`connection.Timeouts`)."""

_UNIT = """\
[Unit]
Description=edge-autotune agent: measures models on this device
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={command}
Restart=always
# A model may kill the agent; the next measurement is to begin within 5 s.
RestartSec=2
# Refused, or of a release that the service does not speak with: a person has to act.
RestartPreventExitStatus=8 17
WatchdogSec={watchdog_s}
# The agent alone hears SIGTERM and ends its measurement itself: a child that died of the signal
# would be a crash of the model. What is left when the agent is gone is killed.
KillMode=mixed
# The measuring child is the first that the kernel may end; the agent is among the last.
OOMScoreAdjust=-500
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full
{user}
[Install]
WantedBy={target}
"""


def notify(message: str) -> bool:
    """Tell systemd; whether there is one that listens. Never raises: it may go at any time."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract names
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(message.encode(), address)
        return True
    return False


def unit(command: Sequence[str], *, user: str | None) -> str:
    """The unit file that runs `command`; for a user's own systemd where `user` is None."""
    return _UNIT.format(
        command=shlex.join(command).replace("%", "%%"),
        watchdog_s=WATCHDOG_S,
        user=f"User={user}\n" if user else "",
        target="multi-user.target" if user else "default.target",
    )
