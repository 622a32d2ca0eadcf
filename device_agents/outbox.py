"""Results on their way: durable before the first upload, deleted once acknowledged.

Owns the files only; when and where they are sent is `agent.py`'s business. A result is sent
at least once and accepted at most once, because it carries its lease's fencing token.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from device_agents.errors import DeviceDiskFull
from device_agents.files import durable_file, mark_newest, remove_parts, sync_folder
from device_agents.protocol import MeasurementResult

SUFFIX = ".json"
PROMISE = "measuring.promise"
DAMAGED_SUFFIX = ".damaged"


class Outbox:
    """A folder of results that the service has not acknowledged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_parts(folder)

    def put(self, result: MeasurementResult) -> None:
        """Store a result; when this returns it survives a power cut.

        Raises:
            DeviceDiskFull: there is no room.
        """
        path = self._path(result)
        with durable_file(path) as file:
            file.write(result.model_dump_json().encode())
        mark_newest(path)

    def promise(self, result: MeasurementResult) -> None:
        """Keep what is to be said if the agent does not live to say better; only the last one.

        Without room there is no promise: the lease runs out instead.
        """
        with suppress(DeviceDiskFull), durable_file(self._folder / PROMISE) as file:
            file.write(result.model_dump_json().encode())

    def withdraw(self) -> None:
        """The promise is not needed: the agent lived. When this returns a power cut keeps it so."""
        (self._folder / PROMISE).unlink(missing_ok=True)
        sync_folder(self._folder)

    def redeem(self) -> None:
        """At a start: what an earlier process promised is a result now.

        Unless that process came to keep the better one and only not to withdraw the promise.

        Raises:
            DeviceDiskFull: there is no room.
        """
        with suppress(FileNotFoundError, ValidationError):
            content = (self._folder / PROMISE).read_bytes()
            promised = MeasurementResult.model_validate_json(content)
            if not self._path(promised).exists():
                self.put(promised)
        self.withdraw()

    def pending(self) -> list[MeasurementResult]:
        """All results not acknowledged yet, oldest first.

        A file that holds no result (the disk failed) is put aside with the ending `.damaged`.
        """
        results = []
        paths = self._folder.glob(f"*{SUFFIX}")
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                results.append(MeasurementResult.model_validate_json(path.read_bytes()))
            except ValidationError:
                path.replace(path.with_suffix(DAMAGED_SUFFIX))
        return results

    def acknowledge(self, result: MeasurementResult) -> None:
        """Forget a result; a second time is harmless."""
        self._path(result).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _path(self, result: MeasurementResult) -> Path:
        # The ids come from the service: hashed, so that none of them can name another file.
        identity = f"{result.lease_id}\n{result.fencing_token}\n{result.measurement_id}"
        return self._folder / (hashlib.sha256(identity.encode()).hexdigest()[:32] + SUFFIX)
