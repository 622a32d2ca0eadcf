"""A fleet: work of pools, drained devices, canaries, key rotation, crashes and quarantine.

Rows of the schema before are measurements of one device each, devices that are not drained,
and agents whose first key is still theirs.

Revision ID: 0003
Create Date: 2026-11-21
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.DateTime(timezone=True)

_ADDED: dict[str, dict[str, sa.types.TypeEngine[Any]]] = {
    "measurements": {
        "pool": sa.Text(),
        "fingerprint": sa.Text(),
        "avoid_device_id": sa.String(),
        "distrusted_because": sa.Text(),
    },
    "devices": {
        "drained_by": sa.String(),
        "drained_because": sa.Text(),
        "canary": sa.Text(),
        "canary_at": _TIME,
        "canary_passed_at": _TIME,
    },
    "agents": {
        "next_key_hash": sa.String(),
        "previous_key_hash": sa.String(),
        "key_changed_at": _TIME,
    },
    "enrolment_tokens": {"used_by": sa.Text()},
}
_FLAGS = {"measurements": "is_canary", "agents": "is_rotation_due"}
_INDEXES: dict[str, tuple[str, list[str], bool]] = {
    "ix_measurements_pool_fingerprint_state_serial": (
        "measurements",
        ["pool", "fingerprint", "state", "serial"],
        False,
    ),
    "ix_agents_next_key_hash": ("agents", ["next_key_hash"], True),
    "ix_agents_previous_key_hash": ("agents", ["previous_key_hash"], True),
}


def upgrade() -> None:
    for table, columns in _ADDED.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind, nullable=True))
    for table, name in _FLAGS.items():
        flag: sa.Column[bool] = sa.Column(
            name, sa.Boolean(), server_default=sa.false(), nullable=False
        )
        op.add_column(table, flag)
    for name, (table, keys, is_unique) in _INDEXES.items():
        op.create_index(name, table, keys, unique=is_unique)
    op.create_table(
        "crashes",
        sa.Column("serial", _SERIAL, nullable=False),
        sa.Column("measurement_id", sa.String(), nullable=False),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("artifact_sha256", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("runtime", sa.Text(), nullable=False),
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["measurement_id"], ["measurements.id"], name="fk_crashes_measurement_id"
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_crashes_device_id"),
        sa.PrimaryKeyConstraint("serial", name="pk_crashes"),
        sa.UniqueConstraint(
            "measurement_id", "fencing_token", name="uq_crashes_measurement_id_fencing_token"
        ),
    )
    op.create_index(
        "ix_crashes_artifact_sha256_fingerprint_runtime",
        "crashes",
        ["artifact_sha256", "fingerprint", "runtime"],
    )
    op.create_table(
        "quarantine",
        sa.Column("artifact_sha256", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("runtime", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_quarantine_job_id"),
        sa.PrimaryKeyConstraint("artifact_sha256", "fingerprint", "runtime", name="pk_quarantine"),
    )


def downgrade() -> None:
    op.drop_table("quarantine")
    op.drop_table("crashes")
    for name, (table, _, _) in _INDEXES.items():
        op.drop_index(name, table)
    for table, name in _FLAGS.items():
        op.drop_column(table, name)
    for table, columns in _ADDED.items():
        for name in columns:
            op.drop_column(table, name)
