"""Runs migrations on the connection that `database.migrate` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from kernel_pytorch.guard.history.models import VERSION_TABLE, Tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Tables.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
