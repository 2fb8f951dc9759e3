"""Metadata of images, the index type that a collection asks for, settings of the home, reports that were written."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    # In place: rebuilding `image` in batch mode would lose that its ids are never used again.
    op.add_column("image", sa.Column("metadata", sa.JSON(), nullable=False, server_default=sa.text("'{}'")))
    op.add_column("collection", sa.Column("index_type", text, nullable=False, server_default="auto"))
    op.add_column("snapshot", sa.Column("reason", text, nullable=False, server_default=sa.text("''")))
    op.create_table(
        "setting",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.JSON(), nullable=False),
    )
    op.create_table(
        "report",
        sa.Column("path", text, primary_key=True),
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=False),
    )
