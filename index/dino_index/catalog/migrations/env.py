"""Alembic's entry: runs migrations on the connection that `dino_index.catalog.database.upgrade` hands over."""

from alembic import context

from dino_index.catalog.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite changes a table by building it anew.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
