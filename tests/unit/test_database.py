"""Opening a database: pragmas, ownership, migration, and errors that say what to do."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import OperationalError

from storage.columns import Documents
from storage.database import Database, _prepare_sqlite, _translate, open_database
from storage.errors import DatabaseFull, DatabaseLocked, DatabaseUnavailable, StorageError
from storage.latency_model import LatencyModel
from storage.repository import Repository
from storage.tables import JobRow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "autotune.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    with open_database(f"sqlite:///{path}") as opened:
        yield opened


def pragma(database: Database, name: str) -> object:
    with database.reading() as session:
        return session.scalar(text(f"PRAGMA {name}"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 30_000)],
)
def test_every_connection_is_durable_and_checks_references(
    database: Database, name: str, value: object
) -> None:
    with database.reading():  # a second connection beside the first
        assert pragma(database, name) == value


def test_many_may_open_a_new_file_at_the_same_time(tmp_path: Path) -> None:
    refusals = ["database is locked", "database is locked"]

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            if refusals and "journal_mode" in statement:
                raise sqlite3.OperationalError(refusals.pop())
            return super().execute(statement, *parameters)

    connection = sqlite3.connect(tmp_path / "new.db", factory=Connection)
    _prepare_sqlite(connection, None)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    refusals.append("disk I/O error")
    with pytest.raises(sqlite3.OperationalError, match="disk"):
        _prepare_sqlite(connection, None)
    connection.close()


def test_the_folder_of_a_new_database_is_made(database: Database, path: Path) -> None:
    assert database.url == f"sqlite:///{path}"
    assert path.is_file()


def test_a_writer_holds_the_write_lock_from_its_first_statement(
    database: Database, path: Path
) -> None:
    other = sqlite3.connect(path, timeout=0)
    with database.writing() as session:
        session.scalar(text("SELECT 1"))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    repository = Repository(database)
    repository.create_job(spec={}, name="before")
    with database.reading() as session:
        assert session.query(JobRow).count() == 1
        repository.create_job(spec={}, name="meanwhile")
        assert session.query(JobRow).count() == 1
    assert len(repository.list_jobs()) == 2


def test_a_block_that_raises_leaves_nothing_behind(database: Database) -> None:
    job = Repository(database).create_job(spec={}, name="kept")
    with pytest.raises(ZeroDivisionError), database.writing() as session:
        session.execute(text("UPDATE jobs SET name = 'lost'"))
        raise ZeroDivisionError
    assert Repository(database).get_job(job.id).name == "kept"


def test_a_second_owner_is_told_who_the_first_one_is(database: Database, path: Path) -> None:
    with pytest.raises(DatabaseLocked, match=r"autotune\.db belongs to .*process \d+ on"):
        open_database(f"sqlite:///{path}")


def test_one_who_does_not_want_to_own_the_file_may_open_it(database: Database, path: Path) -> None:
    job = Repository(database).create_job(spec={}, name="shared")
    with open_database(f"sqlite:///{path}", exclusive=False) as second:
        assert Repository(second).get_job("shared") == job


def test_closing_gives_the_file_to_the_next_owner(path: Path) -> None:
    for _ in range(2):
        database = open_database(f"sqlite:///{path}")
        database.close()
        database.close()


def test_a_failed_opening_gives_the_file_up_again(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database at all, but long enough to look at" * 20)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="not a database"):
            open_database(f"sqlite:///{path}")


def test_the_ownership_of_a_killed_process_is_free(path: Path) -> None:
    program = (
        "import sys, time; from storage.database import open_database; "
        f"open_database('sqlite:///{path}'); print('open', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        with pytest.raises(DatabaseLocked, match=f"process {owner.pid}"):
            open_database(f"sqlite:///{path}")
        owner.kill()
    open_database(f"sqlite:///{path}").close()


def test_a_migration_that_fails_leaves_the_old_schema(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE trials (mine TEXT)")  # in the way of a later statement
    raw.close()
    with pytest.raises(DatabaseUnavailable, match="trials already exists"):
        open_database(f"sqlite:///{path}")
    with sqlite3.connect(path) as raw:
        tables = {name for (name,) in raw.execute("SELECT name FROM sqlite_master")}
    raw.close()
    assert tables == {"trials"}


def test_a_newer_schema_is_refused(path: Path) -> None:
    with open_database(f"sqlite:///{path}") as database, database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseUnavailable, match=r"schema 9999.*newest is \d{4}"):
        open_database(f"sqlite:///{path}")


def test_a_full_disk_is_said_so_and_what_was_written_stays(database: Database) -> None:
    repository = Repository(database)
    repository.create_job(spec={}, name="kept")
    with database.reading() as session:  # the pool hands the same connection out again
        pages = session.scalar(text("PRAGMA page_count"))
        session.execute(text(f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(DatabaseFull, match="free some space"):
        repository.create_job(spec={"long": "x" * 100_000}, name="lost")
    assert [job.name for job in repository.list_jobs()] == ["kept"]


def test_a_disk_without_room_beside_the_file_is_a_full_one() -> None:
    cause = sqlite3.OperationalError("disk I/O error")
    cause.sqlite_errorname = "SQLITE_IOERR_SHMSIZE"  # as on a full tmpfs, when the file is opened
    error = _translate(OperationalError("PRAGMA journal_mode=WAL", {}, cause), "the database")
    assert isinstance(error, DatabaseFull)


def test_a_file_locked_by_another_program_is_said_so(database: Database, path: Path) -> None:
    repository = Repository(database)
    with database.reading() as session:
        session.execute(text("PRAGMA busy_timeout = 1"))
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseLocked, match="locked"):
        repository.create_job(spec={}, name="lost")
    other.close()


def test_a_document_of_a_newer_release_is_not_half_read(database: Database) -> None:
    repository = Repository(database)
    job = repository.create_job(spec={}, name="old")
    with database.writing() as session:
        session.execute(text("""UPDATE jobs SET inventory = '{"version": 99}'"""))
    with pytest.raises(StorageError, match="LayerInventory cannot be read"):
        repository.get_job(job.id)


@pytest.mark.parametrize("runtime", ['{"threads": 0}', '{"graph_level": "most"}', '{"cores": 1}'])
def test_a_list_with_an_option_of_a_newer_release_is_not_half_read(runtime: str) -> None:
    stored = f'[{{"version": 1, "runtime": {runtime}, "runtime_version": "2", "operators": []}}]'
    with pytest.raises(StorageError, match="LatencyModel cannot be read"):
        Documents(LatencyModel).process_result_value(stored, sqlite.dialect())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("not a url", "cannot be read"),
        ("mysql://host/name", "'mysql' is not a database"),
        ("sqlite:////proc/none/autotune.db", "cannot make the folder"),
        ("sqlite:////proc", "is a folder"),
        ("sqlite:///file:name?uri=true", "takes no options"),
        ("postgresql://user:secret@127.0.0.1:1/none", "127.0.0.1"),
    ],
)
def test_a_url_that_does_not_work_says_why_and_shows_no_password(url: str, words: str) -> None:
    with pytest.raises(DatabaseUnavailable, match=words) as caught:
        open_database(url)
    assert "secret" not in str(caught.value)


def test_threads_share_a_database_in_memory() -> None:
    with open_database("sqlite://") as database, ThreadPoolExecutor(4) as pool:
        repository = Repository(database)
        names = [f"job-{n}" for n in range(20)]
        list(pool.map(lambda name: repository.create_job(spec={}, name=name), names))
        assert {job.name for job in repository.list_jobs()} == set(names)
