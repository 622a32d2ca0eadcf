"""Jobs on several devices: their further targets, and what their trials are there.

The primary target stays where a single one always was; both columns are empty (NULL) in rows
of the first schema, and `[]` in jobs on one device.

Revision ID: 0002
Create Date: 2026-11-21
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("further_targets", sa.Text(), nullable=True))
    op.add_column("trials", sa.Column("further", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("trials", "further")
    op.drop_column("jobs", "further_targets")
