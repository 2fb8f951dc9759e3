"""Which kind of vectors a server holds of a collection: its search vectors, or those that copies are compared by."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("stored_vectors", sa.Column("kind", sa.String(8), nullable=False, server_default="search"))
    op.add_column("stored_vectors", sa.Column("whitening", sa.LargeBinary(), nullable=True))
    op.add_column("stored_vectors", sa.Column("whitening_sha256", sa.LargeBinary(32), nullable=True))
