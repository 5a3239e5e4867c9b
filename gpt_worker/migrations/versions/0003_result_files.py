"""files of results, on the drive"""

import sqlalchemy as sa
from alembic import op

from gpt_worker.models import TABLE_OPTIONS, ShortText, UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "result_files",
        sa.Column("job_id", ShortText(32), nullable=False),
        sa.Column("run", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("state", ShortText(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", UtcDateTime(), nullable=True),
        sa.Column("sha256", ShortText(64), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("written_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("job_id", "run"),
        **TABLE_OPTIONS,
    )
    with op.batch_alter_table("result_files", schema=None) as batch_op:
        batch_op.create_index("ix_result_files_due", ["state", "next_attempt_at"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("result_files", schema=None) as batch_op:
        batch_op.drop_index("ix_result_files_due")

    op.drop_table("result_files")
