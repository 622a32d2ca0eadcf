"""The schema that the migrations make is the one that `tables.py` describes, on both back ends."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from search_spaces import Candidate
from storage.database import open_database
from storage.repository import Repository
from storage.schema import alembic_config
from storage.tables import Base

PARTS = (
    "get_columns",
    "get_pk_constraint",
    "get_foreign_keys",
    "get_unique_constraints",
    "get_indexes",
)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'autotune.db'}"
    url: str = request.getfixturevalue("empty_postgresql")
    return url


@pytest.fixture
def engine(empty_url: str) -> Iterator[Engine]:
    engine = create_engine(empty_url)
    yield engine
    engine.dispose()


def schema(engine: Engine) -> dict[str, Any]:
    """What the back end itself says about every table, in a form that can be compared."""
    inspector = inspect(engine)
    tables = set(inspector.get_table_names()) - {"alembic_version"}
    return {
        table: {part: _comparable(getattr(inspector, part)(table)) for part in PARTS}
        for table in sorted(tables)
    }


def _comparable(part: Any) -> Any:
    if isinstance(part, list):
        return sorted((_comparable(entry) for entry in part), key=repr)
    return {key: repr(value) for key, value in part.items()}


def test_a_migrated_schema_equals_a_fresh_one(empty_url: str, engine: Engine) -> None:
    open_database(empty_url).close()
    migrated = schema(engine)
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    assert schema(engine) == {}
    Base.metadata.create_all(engine)
    assert migrated == schema(engine)
    assert migrated.keys() == Base.metadata.tables.keys()


def test_alembic_has_nothing_to_add_to_a_migrated_schema(empty_url: str, engine: Engine) -> None:
    open_database(empty_url).close()
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_services_that_start_together_migrate_once(empty_url: str, engine: Engine) -> None:
    start = threading.Barrier(4)

    def open_together(_: int) -> None:
        start.wait()
        open_database(empty_url, exclusive=False).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_together, range(4)))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM alembic_version")) == 1


def test_jobs_and_trials_of_the_first_schema_are_on_one_device(
    empty_url: str, engine: Engine
) -> None:
    at_schema(engine, "0001")
    with engine.begin() as connection:
        insert_old_trial(connection)
    with contextlib.closing(open_database(empty_url)) as database:
        repository = Repository(database)
        (trial,) = repository.list_trials("j-1")
        assert (repository.get_job("j-1").further_targets, trial.further) == ((), ())


def test_groups_that_nobody_saw_lose_the_precision_that_they_were_planned_in(
    empty_url: str, engine: Engine
) -> None:
    at_schema(engine, "0004")
    unseen = {"group": "a", "planned": "w8a8", "effective": "w8a8", "reason": "not seen: silent"}
    seen = {**unseen, "group": "b", "reason": None}
    compression = {"groups": [unseen, seen], "kernels": "x86-vnni"}
    with engine.begin() as connection:
        insert_old_trial(connection)
        connection.execute(
            text("UPDATE trials SET compression = :compression, further = :further"),
            {
                "compression": json.dumps(compression),
                "further": json.dumps([{"device_id": "d-2", "compression": compression}]),
            },
        )
    with contextlib.closing(open_database(empty_url)) as database:
        (trial,) = Repository(database).list_trials("j-1")
    for kept in (trial.compression, trial.further[0].compression):
        assert kept is not None and kept["kernels"] == "x86-vnni"
        assert [g["effective"] for g in kept["groups"]] == [None, "w8a8"]


def at_schema(engine: Engine, revision: str) -> None:
    """What a release with that schema left behind."""
    with engine.begin() as connection:
        command.upgrade(alembic_config(connection), revision)


def insert_old_trial(connection: Connection) -> None:
    """A finished job with one baseline, in columns that every schema has."""
    connection.execute(
        text(
            "INSERT INTO jobs (id, name, state, phase, spec, cancel_requested, sensitivity, "
            "created_at) VALUES ('j-1', 'old', 'finished', 'finished', '{}', false, '[]', "
            "'2026-11-20 12:00:00')"
        )
    )
    connection.execute(
        text(
            "INSERT INTO trials (id, job_id, number, candidate, candidate_digest, "
            "proposed_by, state, created_at) VALUES ('t-1', 'j-1', 0, :candidate, 'd', "
            "'baseline', 'finished', '2026-11-20 12:00:00')"
        ),
        {"candidate": Candidate().canonical_json()},
    )
