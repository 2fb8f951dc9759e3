"""What vector servers hold of collections."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "stored_vectors",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("collection_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("place", text, nullable=False),
        sa.Column("owner", text, nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("timestamp", sa.BigInteger(), nullable=False),
        sa.Column("index_type", text, nullable=False),
        sa.Column("reason", text, nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
    )
