"""The OpenAPI document: what it promises is what the routes do."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import autotune
from autotune.client import Client
from autotune.service.app import create_app
from autotune.service.broadcast import Broadcast
from autotune.service.context import ServiceContext
from autotune.settings import Settings
from storage.artifacts import ArtifactStore
from storage.database import open_database
from storage.repository import Repository
from tests.running_service import WaitingRunner

# What a client's method calls; `wait` polls `job`, `close` calls nothing.
CALLS = {
    "health": "get_health",
    "submit": "submit_job",
    "jobs": "list_jobs",
    "job": "get_job",
    "cancel": "cancel_job",
    "resume": "resume_job",
    "events": "list_events",
    "trials": "list_trials",
    "trial": "get_trial",
    "front": "get_front",
    "explain": "get_explanation",
    "portability": "get_portability",
    "export": "export_trial",
    "sensitivity": "list_sensitivities",
    "heat_map": "get_heat_map",
    "report": "get_report",
    "verify": "verify_model",
    "devices": "list_devices",
    "device": "get_device",
    "enrolment_token": "make_enrolment_token",
    "revoke_device": "revoke_device",
    "rotate_device_key": "rotate_device_key",
    "resume_device": "resume_device",
    "quarantine": "list_quarantine",
    "clear_quarantine": "clear_quarantine",
    "upload": "upload_file",
}
OPEN = {"get_health", "enrol"}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("openapi")
    with open_database("sqlite://") as database:
        context = ServiceContext(
            settings=Settings(data_dir=folder),
            repository=Repository(database),
            artifacts=ArtifactStore(folder / "artifacts"),
            broadcast=Broadcast(),
            runner=WaitingRunner(),
        )
        return create_app(context).openapi()


def operations(document: Any) -> dict[str, Any]:
    return {
        operation["operationId"]: {**operation, "path": path, "method": method}
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()


def test_every_reference_leads_somewhere(document: Any) -> None:
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= known


def test_the_document_names_its_release(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == autotune.__version__


def test_every_path_carries_the_version(document: Any) -> None:
    assert all(path.startswith("/v1/") for path in document["paths"])


def test_every_operation_has_a_name_of_its_own_and_is_described(document: Any) -> None:
    listed = [op["operationId"] for ms in document["paths"].values() for op in ms.values()]
    assert len(listed) == len(set(listed))
    assert all(operation["description"] for operation in operations(document).values())


def test_agents_and_users_have_keys_of_their_own(document: Any) -> None:
    for name, operation in operations(document).items():
        scheme = "AgentKey" if operation["path"].startswith("/v1/agent/") else "UserToken"
        expected = None if name in OPEN else [{scheme: []}]
        assert operation.get("security") == expected, name


def test_every_guarded_operation_says_that_it_may_refuse(document: Any) -> None:
    for name, operation in operations(document).items():
        assert name in OPEN or "401" in operation["responses"], name


def test_problems_are_described_as_problems(document: Any) -> None:
    for name, operation in operations(document).items():
        for status, response in operation["responses"].items():
            if int(status) >= 400 and operation["method"] != "head":
                schema = response["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (name, status)


def test_the_body_of_a_job_is_the_job_files_schema(document: Any) -> None:
    body = operations(document)["submit_job"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/JobSpec"}
    assert "latency_budget" in document["components"]["schemas"]["JobSpec"]["properties"]


def test_the_client_has_a_method_for_every_user_operation(document: Any) -> None:
    of_users = {
        name
        for name, operation in operations(document).items()
        if not operation["path"].startswith("/v1/agent/")
    }
    assert set(CALLS.values()) | {"find_upload"} == of_users


def test_every_method_of_the_client_is_in_the_table_above() -> None:
    methods = {
        name
        for name, _ in inspect.getmembers(Client, inspect.isfunction)
        if not name.startswith("_")
    }
    assert methods == set(CALLS) | {"wait", "close"}


def test_the_document_is_plain_json(document: Any, tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    assert json.loads((tmp_path / "openapi.json").read_text()) == document
