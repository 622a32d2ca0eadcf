"""Agents of other releases: what the last one sent is answered today, an older one is told.

`recorded/protocol_1.json` is what an agent of protocol version 1 really sent and was answered,
in order: enrol, heartbeats with and without a lease, leases, results. It is never edited; a new
version of the protocol adds a file.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from device_agents.protocol import OLDEST_PROTOCOL_VERSION, PROTOCOL_VERSION, SPOKEN_VERSIONS
from storage.records import MeasurementState
from tests.running_service import RunningService, versioned

RECORDED = Path(__file__).parent / "recorded"


class Replay:
    """Sends recorded messages with today's names where the service had made some up."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        self.http = service.http()
        self.names: dict[str, Any] = {"token": service.client.enrolment_token().token}
        self.device_id = ""

    def send(self, exchange: dict[str, Any]) -> tuple[int, Any]:
        path, body = exchange["path"], dict(exchange["body"])
        body |= {key: self.names[key] for key in body.keys() & self.names if body[key] is not None}
        if path.endswith("/lease") and exchange["status"] == 200:
            device = self.service.repository.get_device(self.device_id)
            self.names["measurement_id"] = self.service.queue_measurement(device).id
        response = self.http.post(path, json=body)
        answer = response.json() if response.content else None
        if path.endswith("/enrol"):
            self.http = self.service.http(answer["agent_key"])
            self.device_id = answer["device_id"]
        if path.endswith("/lease") and answer:
            self.names |= {key: answer[key] for key in ("lease_id", "fencing_token")}
        return response.status_code, answer


def shape(document: Any) -> Any:
    """The keys and the kinds of values that an agent reads; null stands for any."""
    if isinstance(document, dict):
        return {key: shape(value) for key, value in document.items()}
    kinds = (bool, int | float, str, list)
    return next((number for number, kind in enumerate(kinds) if isinstance(document, kind)), None)


def assert_understood(recorded: Any, answer: Any) -> None:
    """Every key of the recorded answer is there with the same kind of value."""
    if isinstance(recorded, dict):
        for key, value in recorded.items():
            assert key in answer, key
            assert_understood(value, answer[key])
    elif recorded is not None and answer is not None:
        assert shape(answer) == shape(recorded)


@pytest.mark.parametrize("version", [v for v in SPOKEN_VERSIONS if v < PROTOCOL_VERSION])
def test_an_agent_of_an_earlier_version_works_with_todays_service(
    service: RunningService, version: int
) -> None:
    replay = Replay(service)
    for exchange in json.loads((RECORDED / f"protocol_{version}.json").read_text()):
        status, answer = replay.send(exchange)
        assert status == exchange["status"], (exchange["path"], answer)
        assert_understood(exchange["answer"], answer)
    done = service.repository.get_measurement(replay.names["measurement_id"])
    assert (done.state, done.outcome) == (MeasurementState.DONE, "runtime_crash")


@pytest.mark.parametrize("route", ["heartbeat", "lease", "enrol"])
@pytest.mark.parametrize("version", [OLDEST_PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
def test_an_agent_of_a_version_that_is_not_spoken_is_told_what_to_install(
    service: RunningService, route: str, version: int
) -> None:
    agent, _ = service.enrol()
    [enrol, *_] = json.loads((RECORDED / "protocol_1.json").read_text())
    body = versioned(token="x", device=enrol["body"]["device"]) | {"protocol_version": version}
    response = agent.post(f"/v1/agent/{route}", json=body)
    assert (response.status_code, response.json()["error"]) == (426, "UpgradeRequired")
    assert "pip install" in response.json()["detail"]
    older = version < PROTOCOL_VERSION
    assert ("on the device" if older else "on the service's machine") in response.json()["detail"]
    assert response.headers["Upgrade"] == f"edge-autotune/{PROTOCOL_VERSION}"
