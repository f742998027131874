"""The first table: runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the table of runs."""
    op.create_table(
        "kpt_runs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("stored", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("change", sa.Double(), nullable=True),
        sa.Column("change_low", sa.Double(), nullable=True),
        sa.Column("change_high", sa.Double(), nullable=True),
        sa.Column("base_ms", sa.Double(), nullable=True),
        sa.Column("head_ms", sa.Double(), nullable=True),
        sa.Column("base_revision", sa.String(), nullable=False),
        sa.Column("head_revision", sa.String(), nullable=False),
        sa.Column("device", sa.String(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_kpt_runs"),
    )
    op.create_index("ix_kpt_runs_name_created", "kpt_runs", ["name", "created"])
    op.create_index("ix_kpt_runs_created", "kpt_runs", ["created"])
