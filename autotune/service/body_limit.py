"""A bound on the size of every request's body, held before anything reads it.

FastAPI's own limit answers in plain text; this one answers with problem details like
everything else. A body that announces its size is refused at once, one that does not while
it is read.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autotune.errors import InvalidData
from autotune.service.problems import Refusal, problem_response

LimitOf = Callable[[str, str], int]
"""Method and path to the largest body in bytes."""


class BodyLimit:
    """ASGI middleware that refuses bodies over a limit with status 413."""

    def __init__(self, app: ASGIApp, *, limit_of: LimitOf) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what is read of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["method"], scope["path"])
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            await problem_response(_refusal(limit))(scope, receive, send)
            return
        n_read = 0

        async def counted() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > limit:
                # The one exception that FastAPI lets pass while it reads a body.
                raise HTTPException(413, str(_refusal(limit)))
            return message

        await self._app(scope, counted, send)


def _refusal(limit: int) -> Refusal:
    return Refusal(413, InvalidData(f"the body is larger than this service takes ({limit} bytes)"))
