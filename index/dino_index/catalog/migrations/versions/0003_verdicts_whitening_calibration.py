"""Verdicts on pairs of pictures; whitening and calibration of collections, in versions."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.create_table(
        "verdict",
        sa.Column("first_sha256", sa.LargeBinary(32), primary_key=True),
        sa.Column("second_sha256", sa.LargeBinary(32), primary_key=True),
        sa.Column("decision", sa.String(8), nullable=False),
        sa.Column("note", text, nullable=False, server_default=sa.text("''")),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "whitening",
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), primary_key=True),
        sa.Column("model_id", sa.Integer(), sa.ForeignKey("model.id"), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "calibration",
        sa.Column("collection_id", sa.Integer(), sa.ForeignKey("collection.id"), primary_key=True),
        sa.Column("model_id", sa.Integer(), sa.ForeignKey("model.id"), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("value", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
