"""What the service's responses mean: the error behind a status, the events of a stream.

Owns reading them; nothing here sends anything. Sending, and sending again, is `client.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import httpx
from pydantic import ValidationError

from autotune import errors
from autotune.api_types import Event, Problem

_BY_STATUS: Final[dict[int, type[errors.AutotuneError]]] = {
    401: errors.AuthenticationError,
    404: errors.NotFoundError,
    413: errors.InvalidData,
    507: errors.DiskFull,
}


def parse_events(lines: Iterator[str]) -> Iterator[Event | None]:
    """Events of a stream of server-sent events; None for the one that ends it.

    Comments and fields that are not used here are skipped (WHATWG HTML, section 9.2.6).
    """
    kind = ""
    content: list[str] = []
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            kind = value
        elif field == "data":
            content.append(value)
        elif line == "" and kind == "end":
            yield None
            return
        elif line == "":
            if content:
                yield Event.model_validate_json("\n".join(content))
            kind, content = "", []


def error_of(response: httpx.Response) -> errors.AutotuneError:
    """The error that a response stands for: by the problem's name, else by the status."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        asked = f"{response.request.method} {response.request.url}"
        kind = _BY_STATUS.get(response.status_code, errors.ServiceError)
        return kind(f"{asked} was answered with status {response.status_code}")
    named = getattr(errors, problem.error, None)
    is_known = isinstance(named, type) and issubclass(named, errors.AutotuneError)
    return named(problem.detail) if is_known else errors.ServiceError(problem.detail)  # type: ignore[misc]
