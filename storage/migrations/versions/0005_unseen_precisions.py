"""What nobody saw is unknown: groups that were written down as planned, with the reason `not seen`.

Until now such a group's effective precision repeated its plan, so that it counted as quantized.

Revision ID: 0005
Create Date: 2026-11-22
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_TRIALS = sa.table(
    "trials", sa.column("id"), sa.column("compression", sa.Text), sa.column("further", sa.Text)
)
_UNSEEN = "not seen"


def upgrade() -> None:
    connection = op.get_bind()
    for column in (_TRIALS.c.compression, _TRIALS.c.further):
        concerned = sa.select(_TRIALS.c.id, column).where(column.contains(_UNSEEN))
        for key, text in connection.execute(concerned).all():
            document = json.loads(text)
            for group in _groups(document):
                if str(group.get("reason") or "").startswith(_UNSEEN):
                    group["effective"] = None
            written = json.dumps(document, separators=(",", ":"))
            connection.execute(
                sa.update(_TRIALS).where(_TRIALS.c.id == key).values({column.name: written})
            )


def downgrade() -> None:
    """Nothing: a reader of the older schema takes a null for a precision that it does not know."""


def _groups(document: Any) -> Iterator[dict[str, Any]]:
    """The layer groups of a trial's `compression`, and of those of its further targets."""
    parts = document if isinstance(document, list) else [{"compression": document}]
    for part in parts:
        yield from (part.get("compression") or {}).get("groups", ())
