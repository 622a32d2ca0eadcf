"""Where the local service is: its address and token, left by it in the data directory.

Owns reading that file. Writing it is the service's work, at its start, readable by its user
alone.
"""

from __future__ import annotations

import json

from autotune.errors import AuthenticationError, ServiceError


def local_service(url: str | None, token: str | None) -> tuple[str, str]:
    """Address and token, those given first, then those of the local service.

    Raises:
        ServiceError: no local service has left its address.
        AuthenticationError: the address given is another one's, and no token came with it.
    """
    from autotune.settings import Settings

    path = Settings().data_dir / "service.json"
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
        local_url, local_token = str(left["url"]), str(left["token"])
    except (OSError, ValueError, KeyError) as error:
        if url is None:
            raise ServiceError(
                f"no local service has left its address in {path}; start one with "
                "`autotune serve`, or name one with --url"
            ) from error
        local_url = local_token = ""
    if url is not None and url.rstrip("/") != local_url.rstrip("/") and token is None:
        raise AuthenticationError(f"no token is known for {url}; pass --token")
    return url or local_url, token or local_token
