"""The settings of a service: where it keeps things, where it listens, what it may do.

Owns their defaults and the rules between them. Each comes from the command line, else from
the environment (`AUTOTUNE_DATA_DIR` and its like), else from its default. What a job may
choose for itself is `spec.py`'s.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from autotune.errors import InvalidSettings

DEFAULT_PORT = 8577
GIBIBYTE = 1024**3


def default_data_dir() -> Path:
    """`edge-autotune` below XDG_DATA_HOME, or below ~/.local/share where that is not set.

    XDG Base Directory Specification 0.8: a relative XDG_DATA_HOME is to be ignored.
    """
    base = os.environ.get("XDG_DATA_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share"
    return root / "edge-autotune"


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """How a service is set up.

    `database_url` is `sqlite:///PATH` or `postgresql+psycopg://...`; None is a SQLite file in
    the data directory. `port` 0 takes a free one. An agent renews its lease every
    `heartbeat_s`; after `lease_ttl_s` without it the measurement goes to the next one that
    asks (at most `measurement_attempts` times). The defaults let four heartbeats get lost.

    Raises:
        InvalidSettings: a value is not allowed, or the address would be open without TLS.
    """

    model_config = SettingsConfigDict(env_prefix="AUTOTUNE_", frozen=True, extra="forbid")

    data_dir: Path = Field(default_factory=default_data_dir)
    database_url: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    workers: int = Field(default_factory=usable_cores, ge=1)
    trust_job_code: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    heartbeat_s: float = Field(default=3.0, gt=0, le=60)
    lease_ttl_s: float = Field(default=15.0, gt=0, le=600)
    measurement_attempts: int = Field(default=3, ge=1)
    max_upload_bytes: int = Field(default=16 * GIBIBYTE, ge=1)

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise InvalidSettings(_explain(error)) from error

    @field_validator("data_dir", "tls_cert", "tls_key")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together; give both")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ValueError(f"there is no file {path} for TLS")
        if self.lease_ttl_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_ttl_s is {self.lease_ttl_s:g}, less than two heartbeats of "
                f"{self.heartbeat_s:g} s: one late heartbeat would lose a measurement"
            )
        if not self.is_loopback and not self.uses_tls and not self.insecure:
            raise ValueError(
                f"listening on {self.host} without TLS would send every token in the clear; "
                "give --tls-cert and --tls-key, or pass --insecure if the network is trusted"
            )
        return self

    @property
    def uses_tls(self) -> bool:
        """The service speaks https."""
        return self.tls_cert is not None

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach the address. A name other than localhost is not trusted."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_dir / 'autotune.db'}"

    @property
    def artifacts_dir(self) -> Path:
        """Where artifacts and uploads lie, by content."""
        return self.data_dir / "artifacts"

    @property
    def token_file(self) -> Path:
        """The user token that was made here, for local clients; readable by its owner only."""
        return self.data_dir / "token"

    @property
    def service_file(self) -> Path:
        """Address and process id of the running service, for local clients."""
        return self.data_dir / "service.json"


def _explain(error: ValidationError) -> str:
    lines = []
    for entry in error.errors():
        name = ".".join(str(part) for part in entry["loc"])
        message = str(entry["msg"]).removeprefix("Value error, ")
        message = message.replace("Input should be", "must be").partition(", unable to parse")[0]
        variable = f"in the environment: AUTOTUNE_{name.upper()}"
        lines.append(f"{name} is {entry['input']!r}: {message} ({variable})" if name else message)
    return "; ".join(lines)
