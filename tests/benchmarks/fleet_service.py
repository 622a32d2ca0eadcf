"""A real service process whose measurements come from its standard input, for `fleet`.

`python -m tests.benchmarks.fleet_service DATA_DIR READY_FILE LEASE_TTL_S`: database, routes and
server are the service's own; in the place of the job runner stands one that obeys commands, one
JSON document a line, and answers each with one on standard output:

- `{"enrol": n}`: n devices, each `{"agent_id", "device_id", "key"}`;
- `{"devices": null}`: the ids of all devices; `{"open": null}`: how many measurements are not done;
- `{"token": null}`: an enrolment token for a real agent;
- `{"artifact": "TEXT"}`: keeps the text, `{"sha256", "size_bytes"}`;
- `{"queue": [[device_id, request], ...]}`: measurements, each `{"measurement_id",
  "available_s"}` with the time on the system's monotonic clock at which it was committed.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

from autotune.errors import NotFoundError
from autotune.search.verification import VerificationOutcome
from autotune.service.security import hash_secret, new_secret
from autotune.service.server import serve
from autotune.settings import Settings
from device_agents.device import describe_device
from device_agents.protocol import MeasurementRequest
from storage.artifacts import ArtifactStore
from storage.records import JobRecord, MeasurementState
from storage.repository import Repository


class CommandedRunner:
    """Runs no job: queues what it is told to, for one job that it made."""

    def __init__(self, repository: Repository, artifacts: ArtifactStore) -> None:
        self._repository = repository
        self._artifacts = artifacts
        self._description = describe_device(probe=lambda: ())

    def start(self) -> None:
        """Take commands until the input ends."""
        threading.Thread(target=self._obey, daemon=True).start()

    def stop(self) -> None:
        """Nothing is under way."""

    def wake(self, topic: str) -> None:
        """Nobody waits."""

    def end_cancelled(self, job_id: str) -> None:
        """No job runs."""

    def verify(self, job: JobRecord, model: bytes) -> VerificationOutcome:
        """There is nothing to verify with."""
        raise NotFoundError("this service only hands out measurements")

    def _obey(self) -> None:
        self._job = self._repository.create_job(spec={}, name="fleet")
        commands = {
            "enrol": self._enrol,
            "token": self._token,
            "devices": self._devices,
            "open": self._open,
            "artifact": self._artifact,
            "queue": self._queue,
        }
        for line in sys.stdin:
            [(name, argument)] = json.loads(line).items()
            print(json.dumps(commands[name](argument)), flush=True)

    def _devices(self, _: None) -> list[str]:
        return [device.id for device in self._repository.list_devices()]

    def _open(self, _: None) -> int:
        measurements = self._repository.list_measurements(self._job.id)
        return sum(x.state is not MeasurementState.DONE for x in measurements)

    def _token(self, _: None = None) -> str:
        token = new_secret("eet")
        self._repository.add_enrolment_token(hash_secret(token), expires_in_s=600)
        return token

    def _enrol(self, n: int) -> list[dict[str, str]]:
        return [self._enrolled(f"simulated-{number}") for number in range(n)]

    def _enrolled(self, name: str) -> dict[str, str]:
        token, key = self._token(), new_secret("eak")
        device, agent = self._repository.enrol(
            hash_secret(token),
            name=name,
            description=self._description,
            agent_key_hash=hash_secret(key),
        )
        return {"agent_id": agent.id, "device_id": device.id, "key": key}

    def _artifact(self, text: str) -> dict[str, Any]:
        stored = self._artifacts.put(text.encode())
        return {"sha256": stored.sha256, "size_bytes": stored.size_bytes}

    def _queue(self, wanted: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        return [self._queued(device_id, request) for device_id, request in wanted]

    def _queued(self, device_id: str, request: dict[str, Any]) -> dict[str, Any]:
        name = f"m-{secrets.token_hex(8)}"
        self._repository.enqueue_measurement(
            job_id=self._job.id,
            trial_id=None,
            device_id=device_id,
            request=MeasurementRequest.model_validate(request | {"measurement_id": name}),
        )
        return {"measurement_id": name, "available_s": time.monotonic()}


def main() -> int:
    data_dir, ready_file, lease_ttl_s = sys.argv[1:]
    serve(
        Settings(data_dir=Path(data_dir), port=0, lease_ttl_s=float(lease_ttl_s)),
        ready_file=Path(ready_file),
        make_runner=lambda repository, artifacts, _: CommandedRunner(repository, artifacts),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
