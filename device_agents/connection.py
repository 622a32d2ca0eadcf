"""The agent's side of the HTTP routes: one method per message.

Owns the door to httpx and the translation of its errors and of status codes. When to call,
how often to try again and what a reply means is `agent.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit
from uuid import uuid4

import httpx
from pydantic import BaseModel, ValidationError

from device_agents.errors import (
    ArtifactMissing,
    DeviceAgentError,
    EnrolmentRefused,
    IncompatibleProtocol,
    ServiceUnreachable,
)
from device_agents.protocol import (
    PROBLEM_TYPE,
    PROTOCOL_VERSION,
    REQUEST_HEADER,
    ArtifactSegments,
    DeviceDescription,
    EnrolReply,
    EnrolRequest,
    Heartbeat,
    HeartbeatReply,
    Lease,
    LeaseRequest,
    MeasurementResult,
    NewKey,
)
from device_agents.segments import Segment

SLOWEST_BYTES_PER_S = 4000
"""Half of a 64 kbit/s line: a body that takes longer than its size at this rate is not coming."""
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416  # RFC 9110, sections 15.3.7 and 15.5.17
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

REFUSED = frozenset({400, 404, 409, 410, 413, 422})
"""A service's answers to a result that trying again will not change."""

Reply = TypeVar("Reply", bound=BaseModel)


class Acknowledgement(Enum):
    """What the service says to a result; after either the agent may forget it."""

    ACCEPTED = "accepted"
    REFUSED = "refused"


class Acceptance(BaseModel):
    """What a service says to a result that it has stored."""

    accepted: Literal[True]


class Greeting(BaseModel):
    """What a service says to anyone."""

    status: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """The bytes of an artifact from `offset` on."""

    offset: int
    chunks: Iterator[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """After how many seconds of silence a connection counts as dead.

    A half-open connection looks like a slow one. A heartbeat is small and is given up soon, so
    that another one still renews the lease; `long_poll_margin_s` is on top of the poll itself.
    """

    connect_s: float = 5.0
    read_s: float = 30.0
    heartbeat_s: float = 5.0
    long_poll_margin_s: float = 10.0


PATIENT = Timeouts()


def require_address(url: str) -> SplitResult:
    """The parts of a service's address.

    Raises:
        DeviceAgentError: it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DeviceAgentError(
            f"{url!r} is not a service's address; it looks like http://192.168.1.10:8577"
        )
    return parts


class ServiceConnection:
    """A connection to one service; usable from several threads.

    Every method raises `ServiceUnreachable` if there is no usable answer (trying again may
    help), `EnrolmentRefused` if token or key are not known, and `IncompatibleProtocol` if the
    service wants another release of the agent.
    """

    def __init__(
        self, url: str, *, agent_key: str | None = None, timeouts: Timeouts = PATIENT
    ) -> None:
        parts = require_address(url)
        self.url = url.rstrip("/")
        self._timeouts = timeouts
        self._client = httpx.Client(
            base_url=self.url,
            timeout=self._after(timeouts.read_s),
            trust_env=parts.hostname not in LOOPBACK,  # no proxy leads back to this machine
            event_hooks={"request": [_name], "response": [_require_own]},
        )
        self.use_key(agent_key)

    def __enter__(self) -> ServiceConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def use_key(self, agent_key: str | None) -> None:
        """Identify with this key from now on."""
        if agent_key is None:
            self._client.headers.pop("Authorization", None)
        else:
            self._client.headers["Authorization"] = f"Bearer {agent_key}"

    def greet(self) -> None:
        """Return if what answers here is a service."""
        try:
            response = self._client.get("/v1/health")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        _require_success(response)
        _parse(Greeting, response)

    def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Trade a one-use token for an identity."""
        return _parse(EnrolReply, self._post("/v1/agent/enrol", request))

    def describe(self, device: DeviceDescription) -> None:
        """Say what the device is by now; a service that is too old to hear it is left alone."""
        response = self._send("/v1/agent/description", device)
        if response.status_code not in (404, 405):
            _require_success(response)

    def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReply:
        """Say that the agent is alive."""
        timeout = self._after(self._timeouts.heartbeat_s)
        return _parse(HeartbeatReply, self._post("/v1/agent/heartbeat", heartbeat, timeout=timeout))

    def new_key(self) -> NewKey:
        """The agent's next key, good as soon as it is used; the current one is until then."""
        timeout = self._after(self._timeouts.heartbeat_s)  # no heartbeat is sent meanwhile
        return _parse(NewKey, self._post("/v1/agent/key", None, timeout=timeout))

    def lease(self, *, wait_s: float, request_id: str) -> Lease | None:
        """Work, or None if there was none for `wait_s` seconds.

        The same `request_id` again brings the same lease: its answer may have been lost.
        """
        request = LeaseRequest(
            protocol_version=PROTOCOL_VERSION, wait_s=wait_s, request_id=request_id
        )
        timeout = self._after(wait_s + self._timeouts.long_poll_margin_s)
        response = self._post("/v1/agent/lease", request, timeout=timeout)
        return None if response.status_code == 204 else _parse(Lease, response)

    @contextmanager
    def download(
        self, sha256: str, *, offset: int = 0, stop: int | None = None
    ) -> Iterator[Download]:
        """An artifact's bytes, not yet verified, from `offset` up to `stop` if the service can.

        Raises:
            ArtifactMissing: the service does not have it.
        """
        headers = {"Accept-Encoding": "identity"}
        if offset or stop is not None:
            headers["Range"] = f"bytes={offset}-{'' if stop is None else stop - 1}"
        path = f"/v1/agent/artifacts/{sha256}"
        try:
            with self._client.stream("GET", path, headers=headers) as response:
                if response.status_code == 404 and _is_problem(response):
                    raise ArtifactMissing(f"the service does not have artifact {sha256[:8]}")
                if response.status_code == RANGE_NOT_SATISFIABLE:
                    yield Download(offset=offset, chunks=iter(()))  # all of it is here already
                    return
                if not response.is_success:
                    response.read()
                _require_success(response)
                is_partial = response.status_code == PARTIAL_CONTENT
                # As they arrive: chunks of a fixed size would lose the last one with the line.
                yield Download(offset=offset if is_partial else 0, chunks=response.iter_raw())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def segments(self, sha256: str) -> tuple[Segment, ...]:
        """The parts of an artifact; none where the service cannot tell."""
        try:
            response = self._client.get(f"/v1/agent/artifacts/{sha256}/segments")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code in (404, 405):
            return ()
        _require_success(response)
        found = _parse(ArtifactSegments, response).segments
        return tuple(Segment(identity=name, size_bytes=size) for name, size in found)

    def upload(self, result: MeasurementResult) -> Acknowledgement:
        """Send a result; REFUSED if it came too late or the service cannot read it.

        Only what the service itself says counts: the agent forgets the one copy after it.
        """
        response = self._send("/v1/agent/results", result)
        if response.status_code in REFUSED and _is_problem(response):
            return Acknowledgement.REFUSED
        _require_success(response)
        _parse(Acceptance, response)
        return Acknowledgement.ACCEPTED

    def _post(self, path: str, message: BaseModel | None, **options: Any) -> httpx.Response:
        response = self._send(path, message, **options)
        _require_success(response)
        return response

    def _send(self, path: str, message: BaseModel | None, **options: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        content = message.model_dump_json() if message is not None else ""
        # The whole body fits into the kernel's buffers: the wait for the answer is the upload.
        options.setdefault(
            "timeout", self._after(self._timeouts.read_s + len(content) / SLOWEST_BYTES_PER_S)
        )
        try:
            return self._client.post(path, content=content, headers=headers, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _after(self, read_s: float) -> httpx.Timeout:
        return httpx.Timeout(read_s, connect=self._timeouts.connect_s)

    def _unreachable(self, error: httpx.HTTPError) -> ServiceUnreachable:
        cause = str(error) or type(error).__name__
        return ServiceUnreachable(
            f"the service at {self.url} does not answer: {cause}; check the "
            "address, and that `autotune serve` runs there"
        )


def _name(request: httpx.Request) -> None:
    request.headers[REQUEST_HEADER] = uuid4().hex


def _require_own(response: httpx.Response) -> None:
    """Refuse the answer to another request; httpx then closes the connection that brought it."""
    asked = response.request.headers[REQUEST_HEADER]
    if response.headers.get(REQUEST_HEADER, asked) != asked:
        raise httpx.RemoteProtocolError("the answer to another request came twice")


def _require_success(response: httpx.Response) -> None:
    if response.is_success:
        return
    detail = _detail(response)
    # Either of the two ends the agent for good: a portal on the way must not.
    status = response.status_code if _is_problem(response) else None
    if status in (401, 403):
        way_out = "make another token with `autotune device enroll`"
        advice = "" if "autotune device enroll" in detail else f"; {way_out}"
        raise EnrolmentRefused(f"the service refused this agent: {detail}{advice}")
    if status == 426:
        raise IncompatibleProtocol(f"the service wants another release of the agent: {detail}")
    raise ServiceUnreachable(f"the service answered {response.status_code}: {detail}")


def _is_problem(response: httpx.Response) -> bool:
    media_type = response.headers.get("Content-Type", "").partition(";")[0]
    return bool(media_type.strip().lower() == PROBLEM_TYPE)


def _detail(response: httpx.Response) -> str:
    try:
        document = response.json()
        return str(document.get("detail") or document["title"])
    except (ValueError, KeyError, AttributeError):
        return response.reason_phrase or "no reason given"


def _parse(message: type[Reply], response: httpx.Response) -> Reply:
    try:
        return message.model_validate_json(response.content)
    except ValidationError as error:
        raise ServiceUnreachable(
            f"what answered at {response.url} is not an edge-autotune service "
            f"({error.error_count()} fields of {message.__name__} are wrong)"
        ) from error
