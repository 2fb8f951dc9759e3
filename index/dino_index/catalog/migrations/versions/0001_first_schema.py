"""Collections, images, embeddings, snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    big_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    # Sorted by code points everywhere, as SQLite does.
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "model",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False, unique=True),
        sa.Column("name", text, nullable=False),
        sa.Column("dim", sa.Integer(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
    )
    op.create_table(
        "collection",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False, unique=True),
        sa.Column("model_id", sa.Integer(), sa.ForeignKey("model.id"), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "source",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), nullable=False),
        sa.Column("path", text, nullable=False),
        sa.UniqueConstraint("collection_id", "path"),
    )
    op.create_table(
        "image",
        sa.Column("id", big_id, primary_key=True),
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), nullable=False),
        sa.Column("source_id", sa.Integer(), sa.ForeignKey("source.id"), nullable=False),
        sa.Column("path", text, nullable=False),
        sa.Column("sha256", sa.LargeBinary(32)),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("mtime_ns", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer()),
        sa.Column("height", sa.Integer()),
        sa.Column("label", text),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("error_code", sa.String(32)),
        sa.Column("error_message", text),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("source_id", "path"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_image_sha256", "image", ["sha256"])
    op.create_index("ix_image_generation", "image", ["collection_id", "generation"])
    op.create_table(
        "embedding",
        sa.Column("sha256", sa.LargeBinary(32), primary_key=True),
        sa.Column("model_id", sa.Integer(), sa.ForeignKey("model.id"), primary_key=True),
        sa.Column("kind", sa.String(8), primary_key=True),
        sa.Column("region", sa.String(32), primary_key=True),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
    )
    op.create_table(
        "removal",
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), primary_key=True),
        sa.Column("image_id", sa.BigInteger(), primary_key=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "snapshot",
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), primary_key=True),
        sa.Column("file_name", text, nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("index_type", text, nullable=False),
        sa.Column("num_vectors", sa.BigInteger(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(32), nullable=False),
    )
