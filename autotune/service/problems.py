"""Errors at the door: every exception becomes problem details (RFC 9457) with a status.

Owns the one table from error classes to statuses. `Problem.error` is the name of a class in
`autotune.errors`, so that the client raises the same class with the same message.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from autotune import errors
from autotune.api_types import Problem
from autotune.search.failures import in_users_terms
from autotune.service.versions import UPGRADE_HEADER
from device_agents.protocol import PROBLEM_TYPE
from search_spaces.errors import SearchSpaceError
from storage import errors as storage_errors

MEDIA_TYPE = PROBLEM_TYPE

_log = logging.getLogger(__name__)


class Refusal(Exception):
    """An error with a status of its own choice, where the class alone does not say it."""

    def __init__(self, status: int, error: errors.AutotuneError) -> None:
        super().__init__(str(error))
        self.status = status
        self.error = error


# Status by error class, most special first: the first class that fits decides.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidJob, 422),
    (errors.InvalidModel, 422),
    (errors.InvalidData, 422),
    (errors.InvalidSettings, 422),
    (errors.UntrustedCode, 403),
    (errors.NotFoundError, 404),
    (errors.AuthenticationError, 401),
    (errors.DatabaseInUse, 503),
    (errors.DiskFull, 507),
    (errors.DeviceUnavailable, 409),
    (errors.JobNotReady, 409),
    (errors.CompressionError, 422),
    (errors.BundleError, 422),
    (errors.UpgradeRequired, 426),
    (errors.ServiceError, 500),
)

_BY_HTTP_STATUS: dict[int, type[errors.AutotuneError]] = {
    400: errors.InvalidJob,
    401: errors.AuthenticationError,
    404: errors.NotFoundError,
    413: errors.InvalidData,
}


def problem_of(error: Exception) -> Problem:
    """What a client is told about an error; what it cannot act on stays in the log."""
    if isinstance(error, Refusal):
        return _problem(error.status, error.error)
    error = in_users_terms(error)
    if isinstance(error, errors.AutotuneError):
        status = next((s for known, s in _STATUS if isinstance(error, known)), 500)
        return _problem(status, error)
    if isinstance(error, storage_errors.StaleLease):
        return _problem(409, errors.ServiceError(str(error)))
    if isinstance(error, storage_errors.DatabaseUnavailable):
        return _problem(503, errors.ServiceError(str(error)))
    if isinstance(error, storage_errors.StorageError):
        return _problem(500, errors.ServiceError(str(error)))
    _log.error("a request failed", exc_info=error)
    return _problem(
        500, errors.ServiceError("an error inside the service; its log has the details")
    )


def install_problem_handlers(app: FastAPI) -> None:
    """Make every error of the app a problem."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    for known in (Refusal, errors.AutotuneError, storage_errors.StorageError, SearchSpaceError):
        app.add_exception_handler(known, _on_error)
    app.add_exception_handler(Exception, _on_error)


def problem_response(error: Exception) -> JSONResponse:
    """The answer that an error stands for."""
    return _response(problem_of(error))


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside success, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content}
        for status in statuses
    }


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    return _response(problem_of(error))


async def _on_validation(_: Request, error: Exception) -> JSONResponse:
    entries = error.errors() if isinstance(error, RequestValidationError) else []
    text = "the request is not valid:\n" + "\n".join(f"  {line}" for line in _lines(entries))
    return _response(_problem(422, errors.InvalidJob(text)))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        return _response(problem_of(error))
    kind = _BY_HTTP_STATUS.get(error.status_code, errors.ServiceError)
    asked = f"{request.method} {request.url.path}"
    detail = {
        404: f"there is no route {asked}",
        405: f"{asked}: this address does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return _response(_problem(error.status_code, kind(detail)), error.headers)


def _problem(status: int, error: errors.AutotuneError) -> Problem:
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=str(error),
        error=type(error).__name__,
    )


def _response(problem: Problem, headers: Any = None) -> JSONResponse:
    headers = dict(headers or {})
    if problem.status == HTTPStatus.UNAUTHORIZED:
        headers.setdefault("WWW-Authenticate", "Bearer")
    if problem.status == HTTPStatus.UPGRADE_REQUIRED:
        headers |= UPGRADE_HEADER
    return JSONResponse(
        problem.model_dump(), status_code=problem.status, media_type=MEDIA_TYPE, headers=headers
    )


def _lines(entries: Sequence[Any]) -> list[str]:
    lines = []
    for entry in entries:
        if entry["type"] == "json_invalid":
            place = entry["loc"][-1]
            lines.append(f"the body is not JSON: {entry['ctx']['error']}, at character {place}")
            continue
        where = ".".join(str(part) for part in entry["loc"])
        got = "" if entry["type"] == "missing" else f" (got {entry['input']!r})"
        lines.append(f"{where}: {entry['msg']}{got}")
    return lines
