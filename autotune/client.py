"""The Python client: the nouns of the HTTP API as methods, its shapes as return values.

Owns the connection, its retries and uploading what a job names; what an error or an event looks
like on the wire is `responses.py`'s. It imports none of the heavy libraries.

    with Client("http://127.0.0.1:8577", token) as client:
        job = client.submit(read_job(Path("job.yaml")))
        print(client.wait(job.id).result)
"""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from autotune import errors
from autotune.analysis import Job
from autotune.api_explanation import Explanation
from autotune.api_types import (
    Device,
    EnrolmentToken,
    Event,
    Front,
    Health,
    Portability,
    Quarantined,
    Sensitivity,
    Trial,
    Upload,
    Verification,
)
from autotune.bundle_download import write_bundle
from autotune.limits import FurtherLimits
from autotune.responses import error_of, parse_events
from autotune.spec import JobSpec, map_files, upload_of

FINAL_STATES: Final = frozenset({"finished", "cancelled", "failed"})

RETRY_DELAYS_S: Final = (0.2, 0.5, 1.0)
"""Waits between attempts of a request that changes nothing."""

RECONNECT_S: Final = 60.0
"""An event stream that lost its service tries this long: a restart takes seconds."""

VERIFY_TIMEOUT_S: Final = 1800.0
"""A verification waits for the device and for a quiet window, and then measures."""

SILENCE_S: Final = 45.0
"""An event stream that is silent this long is dead; the service speaks every 10 s."""

_TRANSIENT: Final = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)
_UNAVAILABLE: Final = (502, 503, 504)
_MALFORMED: Final = "the token is empty or malformed; `autotune serve` says where its own lies"
_CHUNK_BYTES: Final = 1024**2

_Shape = TypeVar("_Shape")


class Client:
    """A connection to a service; use it with `with`, or call `close`.

    Every method raises the class of `autotune.errors` that the service names, ServiceError
    where it does not answer, and AuthenticationError for a wrong token. Jobs and devices are
    named by id, unique start of an id, or name; trials by number or id.

    Args:
        url: address of the service.
        token: a user token.
        timeout_s: how long one answer may take; uploads, exports and verifications take longer.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not (token.isascii() and token.isprintable() and token.strip()):
            raise errors.AuthenticationError(_MALFORMED)
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {token.strip()}"},
                timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 5.0)),
                transport=transport,
                # A proxy of the environment cannot reach what listens on this machine only.
                trust_env=not is_loopback(self.url),
                verify=_trusted_roots(self.url),
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise errors.ServiceError(f"{url!r} is not the address of a service") from error

    def __enter__(self) -> Self:
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
        self._http.close()

    def health(self) -> Health:
        """Whether the service answers, and its version; the token does not matter."""
        return self._get("/v1/health", Health)

    # Jobs

    def submit(self, spec: JobSpec) -> Job:
        """Submit a job; files it names that lie here are uploaded where the service lacks them.

        Folders (`imagefolder:`) and files that are not here are left as they are: the service
        looks for them on its own host.
        """
        sent = map_files(spec, self._upload_if_here)
        return self._send("POST", "/v1/jobs", Job, json=sent.model_dump(mode="json"))

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        return self._get("/v1/jobs", list[Job])

    def job(self, reference: str) -> Job:
        """One job."""
        return self._get(f"/v1/jobs/{_quoted(reference)}", Job)

    def cancel(self, reference: str) -> Job:
        """Ask a job to stop."""
        return self._send("POST", f"/v1/jobs/{_quoted(reference)}/cancel", Job)

    def resume(
        self, reference: str, extra_trials: int | None = None, *, time_s: float | None = None
    ) -> Job:
        """Take up a job that ended, with so many more trials, searching for `time_s` from now.

        A finished job needs one of the two. Its result stays until it has the next one.
        """
        asked = {"trials": extra_trials, "time_s": time_s}
        body = {name: value for name, value in asked.items() if value is not None}
        return self._send("POST", f"/v1/jobs/{_quoted(reference)}/resume", Job, json=body)

    def wait(self, reference: str, timeout_s: float | None = None, *, poll_s: float = 1.0) -> Job:
        """The job in its final state.

        Raises:
            JobNotReady: it did not end within `timeout_s`; it goes on.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            job = self.job(reference)
            if job.state in FINAL_STATES:
                return job
            if deadline is not None and time.monotonic() + poll_s > deadline:
                raise errors.JobNotReady(f"job {job.id} is {job.state} after {timeout_s:g} s")
            time.sleep(poll_s)

    def events(self, reference: str, after: int = 0) -> Iterator[Event]:
        """The job's events after number `after`, as they come, until the job has ended.

        A lost connection is taken up again where it broke.

        Raises:
            ServiceError: the service was away for longer than a minute.
        """
        path = f"/v1/jobs/{_quoted(reference)}/events"
        lost_at: float | None = None
        while True:
            try:
                for event in self._stream_events(path, after):
                    lost_at = None
                    if event is None:
                        return
                    after = event.id
                    yield event
                error: Exception = errors.ServiceError(f"{self.url} ended the event stream")
            except (httpx.TransportError, _Unavailable) as broken:
                error = broken
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > RECONNECT_S:
                raise self._unreachable(error) from error
            time.sleep(RETRY_DELAYS_S[-1])

    # Trials and answers

    def trials(self, reference: str) -> list[Trial]:
        """The job's trials, by number."""
        return self._get(f"/v1/jobs/{_quoted(reference)}/trials", list[Trial])

    def trial(self, reference: str, trial: str | int) -> Trial:
        """One trial."""
        return self._get(f"/v1/jobs/{_quoted(reference)}/trials/{_quoted(str(trial))}", Trial)

    def front(
        self,
        reference: str,
        budget: str | None = None,
        max_drop: float | None = None,
        *,
        device: str | None = None,
        **limits: Unpack[FurtherLimits],
    ) -> Front:
        """The front and the answer under `budget` (`3ms`, `0.5x`) and accuracy drop (fraction).

        What is left out is the job's own; on several devices it is the worst one's front.
        """
        limits.setdefault("max_accuracy_drop", max_drop)
        asked = {"latency_budget": budget, "device": device, **limits}
        params = {k: v for k, v in asked.items() if v is not None}
        return self._get(f"/v1/jobs/{_quoted(reference)}/front", Front, params=params)

    def explain(
        self, reference: str, trial: str | int | None = None, *, device: str | None = None
    ) -> Explanation:
        """Why a trial (the winner) is what it is, by layer group; on `device` of several."""
        asked = {"trial": None if trial is None else str(trial), "device": device}
        params = {name: value for name, value in asked.items() if value is not None}
        return self._get(f"/v1/jobs/{_quoted(reference)}/explanation", Explanation, params=params)

    def export(
        self,
        reference: str,
        path: Path,
        *,
        budget: str | None = None,
        select: str | None = None,
        device: str | None = None,
        **limits: Unpack[FurtherLimits],
    ) -> Path:
        """Write a trial's bundle: a zip where `path` ends in `.zip`, else a folder.

        The trial is the answer to `budget` and the limits that `front` takes, or `select`
        (`knee`, `fastest`, `most-accurate`, a trial), or the job's winner; on `device` alone, in
        the file for it, where one of several is named. An earlier bundle at `path` is replaced.

        Raises:
            BundleError: something else is at `path` or in it, or it cannot be written.
            DiskFull: there is no room for it.
        """
        asked = {"budget": budget, "select": select, "device": device, **limits}
        body = {k: v for k, v in asked.items() if v is not None}
        response = self._request("POST", f"/v1/jobs/{_quoted(reference)}/export", json=body)
        return write_bundle(Path(path), response.content)

    def portability(self, reference: str) -> Portability:
        """What the winner on each device of a job costs on the others."""
        return self._get(f"/v1/jobs/{_quoted(reference)}/portability", Portability)

    def sensitivity(self, reference: str) -> list[Sensitivity]:
        """What each choice for one group does; JobNotReady where nothing is known yet."""
        return self._get(f"/v1/jobs/{_quoted(reference)}/sensitivity", list[Sensitivity])

    def heat_map(self, reference: str, form: str = "svg") -> bytes:
        """The sensitivities as a picture: `svg`, `png` or `html`."""
        path = f"/v1/jobs/{_quoted(reference)}/sensitivity/heat-map"
        return self._request("GET", path, params={"form": form}).content

    def report(self, reference: str, *, device: str | None = None) -> str:
        """The job's report, about `device` where it has several: one HTML page."""
        params = {} if device is None else {"device": device}
        return self._request("GET", f"/v1/jobs/{_quoted(reference)}/report", params=params).text

    def verify(
        self, reference: str, model: bytes, *, device: str | None = None, trial: str | None = None
    ) -> Verification:
        """Measure a bundle's model again, on the job's device and on held-out data."""
        asked = {"device": device, "trial": trial}
        return self._send(
            "POST",
            f"/v1/jobs/{_quoted(reference)}/verify",
            Verification,
            params={key: value for key, value in asked.items() if value is not None},
            content=model,
            headers={"Content-Type": "application/octet-stream"},
            timeout=httpx.Timeout(self._timeout_s, read=VERIFY_TIMEOUT_S),
        )

    # Devices and uploads

    def devices(self) -> list[Device]:
        """All devices that enrolled, by name."""
        return self._get("/v1/devices", list[Device])

    def device(self, reference: str) -> Device:
        """One device."""
        return self._get(f"/v1/devices/{_quoted(reference)}", Device)

    def enrolment_token(self, pool: str | None = None) -> EnrolmentToken:
        """A token that enrols one agent, once."""
        body = {} if pool is None else {"pool": pool}
        return self._send("POST", "/v1/devices/enrolment-tokens", EnrolmentToken, json=body)

    def revoke_device(self, reference: str) -> Device:
        """End the key of the device's agent; what it is measuring goes back to the queue."""
        return self._change_device(reference, "revoke")

    def rotate_device_key(self, reference: str) -> Device:
        """Have the device's agent get a new key with its next heartbeat."""
        return self._change_device(reference, "rotate")

    def resume_device(self, reference: str) -> Device:
        """Give a drained device work again."""
        return self._change_device(reference, "resume")

    def _change_device(self, reference: str, change: str) -> Device:
        return self._send("POST", f"/v1/devices/{_quoted(reference)}/{change}", Device)

    def quarantine(self) -> list[Quarantined]:
        """The artifacts that crashed devices and are not sent to such any more, oldest first."""
        return self._get("/v1/quarantine", list[Quarantined])

    def clear_quarantine(self, digest: str) -> list[Quarantined]:
        """Let artifacts whose digest begins so be tried again; what was cleared."""
        path = f"/v1/quarantine/{_quoted(digest)}"
        return self._send("DELETE", path, list[Quarantined])

    def upload(self, path: Path) -> Upload:
        """Make a file available to jobs as `sha256:HEX`; not sent where it is there already.

        Raises:
            InvalidData: the file cannot be read, or changed while it was sent.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size_bytes = file.tell()
                where = f"/v1/uploads/{digest}"
                if self._try("HEAD", where).status_code == 200:
                    return Upload(sha256=digest, size_bytes=size_bytes)
                file.seek(0)
                return self._send(
                    "PUT",
                    where,
                    Upload,
                    content=iter(lambda: file.read(_CHUNK_BYTES), b""),
                    headers={
                        "Content-Type": "application/octet-stream",
                        "Content-Length": str(size_bytes),
                    },
                )
        except OSError as error:
            raise errors.InvalidData(f"cannot read {path}: {error.strerror}") from error

    def _upload_if_here(self, path: str) -> str:
        if upload_of(path) or not Path(path).is_file():
            return path
        return f"sha256:{self.upload(Path(path)).sha256}"

    # The connection

    def _get(self, path: str, shape: type[_Shape], **options: Any) -> _Shape:
        return self._parsed(self._request("GET", path, **options), shape)

    def _send(self, method: str, path: str, shape: type[_Shape], **options: Any) -> _Shape:
        return self._parsed(self._request(method, path, **options), shape)

    def _parsed(self, response: httpx.Response, shape: type[_Shape]) -> _Shape:
        try:
            return TypeAdapter(shape).validate_json(response.content, context=self)
        except ValidationError as error:
            raise errors.ServiceError(
                f"{response.request.url} answered something that is not {shape}; is it an "
                "edge-autotune service of a fitting version?"
            ) from error

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self._try(method, path, **options)
        if response.is_error:
            raise error_of(response)
        return response

    def _try(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The response; what changes nothing is tried again when the connection fails."""
        delays = iter(RETRY_DELAYS_S if method in ("GET", "HEAD") else ())
        while True:
            delay_s = next(delays, None)
            try:
                response = self._http.request(method, path, **options)
                if response.status_code not in _UNAVAILABLE or delay_s is None:
                    return response
            except httpx.TimeoutException as error:
                raise errors.ServiceError(
                    f"{self.url} did not answer {method} {path} in time ({error}); it may be busy"
                ) from error
            except _TRANSIENT as error:
                if delay_s is None:
                    raise self._unreachable(error) from error
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            time.sleep(delay_s)

    def _stream_events(self, path: str, after: int) -> Iterator[Event | None]:
        """Events of one connection; None at last where the service says that it was the last."""
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx.Timeout(self._timeout_s, read=SILENCE_S)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.status_code in _UNAVAILABLE:
                raise _Unavailable(f"status {response.status_code}")
            if response.is_error:
                response.read()
                raise error_of(response)
            yield from parse_events(response.iter_lines())

    def _unreachable(self, error: Exception) -> errors.ServiceError:
        return errors.ServiceError(
            f"the service at {self.url} cannot be reached ({error}); check the address, or start "
            "one with `autotune serve`"
        )


class _Unavailable(Exception):
    """The service is there but not ready."""


def _quoted(reference: str) -> str:
    """A reference as one segment of a path, whatever is in it.

    >>> _quoted("../devices"), _quoted("my job")
    ('..%2Fdevices', 'my%20job')
    """
    if reference in ("", ".", ".."):
        raise errors.NotFoundError(f"{reference!r} is not a name or an id")
    return quote(reference, safe="")


def is_loopback(url: str) -> bool:
    """The address is this very machine's."""
    try:
        host = httpx.URL(url).host
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except (ValueError, httpx.InvalidURL):
        return False


def _trusted_roots(url: str) -> ssl.SSLContext | bool:
    """The roots that httpx trusts; on this machine the system's, with SSL_CERT_FILE."""
    if url.startswith("https:") and is_loopback(url):
        return ssl.create_default_context()
    return True
