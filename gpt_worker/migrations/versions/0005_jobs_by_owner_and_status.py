"""an index for the unfinished jobs of one user, and for a list of one's jobs by status"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_owner_status", "jobs", ["owner_id", "status", "id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_jobs_owner_status", table_name="jobs")
