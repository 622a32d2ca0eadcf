"""What jobs taught about the latency of their devices.

Revision ID: 0004
Create Date: 2026-11-21
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "latency_models",
        sa.Column("device_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name="fk_latency_models_device_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_latency_models_job_id"),
        sa.PrimaryKeyConstraint("device_id", "job_id", name="pk_latency_models"),
    )


def downgrade() -> None:
    op.drop_table("latency_models")
