"""who owns a database that other hosts reach"""

import sqlalchemy as sa
from alembic import op

from gpt_worker.models import TABLE_OPTIONS, ShortText, UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "owners",
        sa.Column("name", ShortText(16), nullable=False),
        sa.Column("host", ShortText(255), nullable=False),
        sa.Column("place", ShortText(64), nullable=False),
        sa.Column("token", ShortText(32), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    op.drop_table("owners")
