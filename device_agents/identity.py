"""The agent's state folder: its identity, its lock, and where cache and outbox live.

Owns `agent.json` (mode 600: it holds the agent's key), `described.json` (what the service knows
of the device) and the lock that keeps two agents from sharing one identity. The key is all that
a second start needs.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from device_agents.errors import DeviceAgentError
from device_agents.files import durable_file

IDENTITY_VERSION = 1
# Version 1 (2026-11-21): agent_id, device_id, device_name, agent_key, heartbeat_s.


class Identity(BaseModel):
    """What the service gave to this agent when it enrolled."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = IDENTITY_VERSION
    agent_id: str
    device_id: str
    device_name: str
    agent_key: str
    heartbeat_s: float


DESCRIBED_VERSION = 1
# Version 1 (2026-11-21): environment, versions.


class Described(BaseModel):
    """What the service was told: the `device.environment` of then, and the runtimes' versions."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = DESCRIBED_VERSION
    environment: str
    versions: dict[str, str]


class StateFolder:
    """The folder of one agent, locked while the agent lives.

    Raises:
        DeviceAgentError: the folder cannot be used, or another agent uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DeviceAgentError(f"the state folder {folder} cannot be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DeviceAgentError(
                f"another agent is using {folder}: stop it, or give this one its own --state-dir"
            ) from error

    def close(self) -> None:
        """Release the lock; the system does it as well when the process dies."""
        os.close(self._lock)

    def identity(self) -> Identity | None:
        """The identity from an earlier start; None if there is none that can be read."""
        try:
            return Identity.model_validate_json((self.path / "agent.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def save(self, identity: Identity) -> None:
        """Keep the identity for the next start, readable by this user alone."""
        with durable_file(self.path / "agent.json", mode=0o600) as file:
            file.write(identity.model_dump_json(indent=2).encode())

    def described(self) -> Described | None:
        """What the service knows of the device; None if that is not known here."""
        try:
            return Described.model_validate_json((self.path / "described.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def note_described(self, described: Described) -> None:
        """Keep what the service was told."""
        with durable_file(self.path / "described.json") as file:
            file.write(described.model_dump_json(indent=2).encode())

    def forget(self) -> None:
        """Drop an identity that the service no longer knows."""
        (self.path / "agent.json").unlink(missing_ok=True)
