"""Brings a database to the schema of this release, once, whoever comes first.

Owns the run of Alembic and its lock; the steps themselves lie in `migrations/versions`. All
pending steps are one transaction: it holds SQLite's write lock, or an advisory lock on
PostgreSQL, so that of two services that start together one migrates and the other finds the
work done, and a crash on the way leaves the old schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from storage.errors import DatabaseUnavailable

_SCRIPTS: Final = Path(__file__).with_name("migrations")
_MIGRATION_LOCK: Final = 0x45_41_54_55_4E_45  # any number that no one else locks: "EATUNE"


def migrate(engine: Engine) -> None:
    """Apply what is missing; nothing is written where nothing is.

    Raises:
        DatabaseUnavailable: the schema is newer than this release, or made by another program.
    """
    with engine.connect() as connection:
        if _is_current(connection):
            return
    if engine.dialect.name == "sqlite":
        _migrate_sqlite(engine)
    else:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            _upgrade(connection)


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for this connection, for the steps of this release."""
    config = Config()
    # A per cent sign would start an interpolation.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _migrate_sqlite(engine: Engine) -> None:
    with engine.connect() as connection:
        # A table is changed by copying it, which a foreign key must not turn into deletions;
        # the switch works outside transactions only (sqlite.org/lang_altertable.html).
        _set_foreign_keys(connection, "OFF")
        try:
            with connection.execution_options(sqlite_begin="EXCLUSIVE").begin():
                _upgrade(connection)
        finally:
            _set_foreign_keys(connection, "ON")


def _set_foreign_keys(connection: Connection, state: str) -> None:
    driver_connection = connection.connection.driver_connection
    if driver_connection is not None:
        driver_connection.execute(f"PRAGMA foreign_keys={state}").close()


def _upgrade(connection: Connection) -> None:
    if not _is_current(connection):
        command.upgrade(alembic_config(connection), "head")


def _is_current(connection: Connection) -> bool:
    scripts = ScriptDirectory.from_config(alembic_config(connection))
    known = {script.revision for script in scripts.walk_revisions()}
    found = set(MigrationContext.configure(connection).get_current_heads())
    if not found <= known:
        raise DatabaseUnavailable(
            f"the database has schema {', '.join(sorted(found - known))}, which this release "
            f"does not know (its newest is {scripts.get_current_head()}); "
            "use the release that wrote it, or a newer one"
        )
    return found == set(scripts.get_heads())
