"""Where the local service is: its address and token, left by it in the data directory.

Owns reading those files. Writing them is the service's work, at its start, readable by its
user alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from autotune.errors import AuthenticationError, ServiceError


def local_service(url: str | None, token: str | None) -> tuple[str, str]:
    """Address and token: those given first, then those of the local service.

    Raises:
        ServiceError: no local service has left its address.
        AuthenticationError: no token came with the address, and it is not the local service's.
    """
    from autotune.settings import Settings

    settings = Settings()
    local_url = read_address(settings.service_file)
    if url is None and local_url is None:
        raise ServiceError(
            f"no service runs with the data directory {settings.data_dir}; start one with "
            "`autotune serve`, or name one with --url"
        )
    address = url or local_url or ""
    if token is not None:
        return address, token
    if local_url is None or address.rstrip("/") != local_url.rstrip("/"):
        raise AuthenticationError(f"no token is known for {address}")
    return address, read_token(settings.token_file)


def read_address(service_file: Path) -> str | None:
    """The address in the file that a running service leaves; None where there is none."""
    try:
        return str(json.loads(service_file.read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_token(token_file: Path) -> str:
    """The user token in the service's file.

    Raises:
        AuthenticationError: it is not there, or is another user's.
    """
    try:
        return token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise AuthenticationError(
            f"cannot read the service's token {token_file}: {error.strerror}; pass --token"
        ) from error
