"""Logins apart from invitations, and invitations that end.

Responsible for: this one step. Not responsible for: when it is run (database.py), what tables mean (schema.py).
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the table of logins, and the time at which an invitation ends."""
    op.add_column("tokens", sa.Column("expires_at", sa.Double(), nullable=True))
    op.create_table(
        "logins",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["annotator_id"], ["annotators.id"], name=op.f("fk_logins_annotator_id")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_logins")),
    )
    op.create_index(op.f("ix_logins_annotator_id"), "logins", ["annotator_id"])
