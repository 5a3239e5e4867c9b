"""first tables"""

import sqlalchemy as sa
from alembic import op

from gpt_worker.models import TABLE_OPTIONS, JsonText, LongText, ShortText, UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deliveries",
        sa.Column("id", ShortText(40), nullable=False),
        sa.Column("job_id", ShortText(32), nullable=True),
        sa.Column("owner_id", ShortText(32), nullable=True),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("type", ShortText(50), nullable=False),
        sa.Column("url", ShortText(2000), nullable=False),
        sa.Column("status", ShortText(16), nullable=False),
        sa.Column("body", LongText, nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("tries_left", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", UtcDateTime(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.create_index("ix_deliveries_due", ["status", "next_attempt_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_deliveries_job_id"), ["job_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_deliveries_owner_id"), ["owner_id"], unique=False)

    op.create_table(
        "idempotency_keys",
        sa.Column("user_key", ShortText(32), nullable=False),
        sa.Column("key_hash", ShortText(64), nullable=False),
        sa.Column("request_hash", ShortText(64), nullable=False),
        sa.Column("job_id", ShortText(32), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("user_key", "key_hash"),
        **TABLE_OPTIONS,
    )
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_idempotency_keys_created_at"), ["created_at"], unique=False)

    op.create_table(
        "login_failures",
        sa.Column("email_hash", ShortText(64), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("last_failed_at", UtcDateTime(), nullable=False),
        sa.Column("locked_until", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("email_hash"),
        **TABLE_OPTIONS,
    )
    with op.batch_alter_table("login_failures", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_login_failures_last_failed_at"), ["last_failed_at"], unique=False
        )

    op.create_table(
        "modes",
        sa.Column("name", ShortText(50), nullable=False),
        sa.Column("value", ShortText(200), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        **TABLE_OPTIONS,
    )
    op.create_table(
        "users",
        sa.Column("id", ShortText(32), nullable=False),
        sa.Column("email", ShortText(254), nullable=False),
        sa.Column("password_hash", ShortText(255), nullable=False),
        sa.Column("role", ShortText(16), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("email"),
        **TABLE_OPTIONS,
    )
    op.create_table(
        "delivery_attempts",
        sa.Column("delivery_id", ShortText(40), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sent_at", UtcDateTime(), nullable=False),
        sa.Column("took_s", sa.Double(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", ShortText(500), nullable=True),
        sa.ForeignKeyConstraint(["delivery_id"], ["deliveries.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("delivery_id", "number"),
        **TABLE_OPTIONS,
    )
    op.create_table(
        "jobs",
        sa.Column("id", ShortText(32), nullable=False),
        sa.Column("owner_id", ShortText(32), nullable=True),
        sa.Column("status", ShortText(16), nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("model", ShortText(200), nullable=False),
        sa.Column("delivery", ShortText(16), nullable=False),
        sa.Column("settings", JsonText(), nullable=False),
        sa.Column("meta", JsonText(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("answered", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("results_bytes", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=True),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.Column("deadline_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_jobs_finished_at"), ["finished_at"], unique=False)
        batch_op.create_index("ix_jobs_owner", ["owner_id", "id"], unique=False)
        batch_op.create_index("ix_jobs_status", ["status", "id"], unique=False)

    op.create_table(
        "tokens",
        sa.Column("id", ShortText(32), nullable=False),
        sa.Column("user_id", ShortText(32), nullable=False),
        sa.Column("name", ShortText(200), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        **TABLE_OPTIONS,
    )
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tokens_expires_at"), ["expires_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_tokens_user_id"), ["user_id"], unique=False)

    op.create_table(
        "tasks",
        sa.Column("job_id", ShortText(32), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", ShortText(200), nullable=False),
        sa.Column("prompt", LongText, nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("state", sa.SmallInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("answer", LongText, nullable=True),
        sa.Column("finish_reason", ShortText(50), nullable=True),
        sa.Column("error_code", ShortText(50), nullable=True),
        sa.Column("error_message", ShortText(1000), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("job_id", "position"),
        **TABLE_OPTIONS,
    )


def downgrade() -> None:
    op.drop_table("tasks")
    with op.batch_alter_table("tokens", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tokens_user_id"))
        batch_op.drop_index(batch_op.f("ix_tokens_expires_at"))

    op.drop_table("tokens")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("ix_jobs_status")
        batch_op.drop_index("ix_jobs_owner")
        batch_op.drop_index(batch_op.f("ix_jobs_finished_at"))

    op.drop_table("jobs")
    op.drop_table("delivery_attempts")
    op.drop_table("users")
    op.drop_table("modes")
    with op.batch_alter_table("login_failures", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_login_failures_last_failed_at"))

    op.drop_table("login_failures")
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_idempotency_keys_created_at"))

    op.drop_table("idempotency_keys")
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_deliveries_owner_id"))
        batch_op.drop_index(batch_op.f("ix_deliveries_job_id"))
        batch_op.drop_index("ix_deliveries_due")

    op.drop_table("deliveries")
