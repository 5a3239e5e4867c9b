"""The tables. Queries stand in `store/`; migrations in `migrations/`.

Times are aware UTC, cut to milliseconds. Long texts are LONGTEXT on MySQL, whose TEXT ends at 64 KiB.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    NVARCHAR,
    TIMESTAMP,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    SmallInteger,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.dialects.mysql import DATETIME, LONGTEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

# Of SQL Server: every character, and "A" is not "a", whatever the database has as its default.
MSSQL_COLLATION = "Latin1_General_100_BIN2"
LongText = (
    Text()
    .with_variant(LONGTEXT(), "mysql", "mariadb")
    .with_variant(NVARCHAR(None, collation=MSSQL_COLLATION), "mssql")
)
# On MySQL: every character, transactions, and "A" is not "a", whatever the server or the database has as its default.
TABLE_OPTIONS: Mapping[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}


def ShortText(length: int) -> String:  # noqa: N802 (it stands where a type does)
    """Up to so many characters; SQL Server counts a character outside the basic plane as two."""
    return String(length).with_variant(NVARCHAR(2 * length, collation=MSSQL_COLLATION), "mssql")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time on the outside, a naive UTC one in the database."""

    impl = (
        DateTime()
        .with_variant(DATETIME(fsp=3), "mysql", "mariadb")
        .with_variant(TIMESTAMP(), "oracle")  # its DATE has whole seconds
    )
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[datetime]:
        if dialect.name != "mssql":
            return super().load_dialect_impl(dialect)
        # Here: its dialect is a megabyte of memory, to all who have another database.
        from sqlalchemy.dialects.mssql import DATETIME2

        return DATETIME2(3)  # type: ignore[no-untyped-call]

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class JsonText(TypeDecorator[dict[str, Any]]):
    """An object on the outside, its JSON text in the database: the same on all of them."""

    impl = LongText
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JsonText}  # noqa: RUF012 (SQLAlchemy reads it)
    __table_args__: Any = TABLE_OPTIONS


class UserRow(Base):
    __tablename__ = "users"

    id: Mapped[str] = mapped_column(ShortText(32), primary_key=True)
    email: Mapped[str] = mapped_column(ShortText(254), unique=True)
    password_hash: Mapped[str] = mapped_column(ShortText(255))
    role: Mapped[str] = mapped_column(ShortText(16))
    disabled: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]


class TokenRow(Base):
    """A token that counts. The token itself is nowhere: its `jti` alone opens nothing."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(ShortText(32), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    name: Mapped[str | None] = mapped_column(ShortText(200))  # None: made by a login
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None] = mapped_column(index=True)


class LoginFailureRow(Base):
    """Wrong passwords for an address, known or not, so that a lockout outlives a restart."""

    __tablename__ = "login_failures"

    email_hash: Mapped[str] = mapped_column(ShortText(64), primary_key=True)
    failures: Mapped[int]
    last_failed_at: Mapped[datetime] = mapped_column(index=True)
    locked_until: Mapped[datetime | None]


class ModeRow(Base):
    """One of the service's toggles; absent means its default."""

    __tablename__ = "modes"

    name: Mapped[str] = mapped_column(ShortText(50), primary_key=True)
    value: Mapped[str] = mapped_column(ShortText(200))


class JobRow(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_owner", "owner_id", "id"),
        Index("ix_jobs_owner_status", "owner_id", "status", "id"),
        Index("ix_jobs_status", "status", "id"),
        TABLE_OPTIONS,
    )

    id: Mapped[str] = mapped_column(ShortText(32), primary_key=True)
    owner_id: Mapped[str | None] = mapped_column(ForeignKey("users.id", ondelete="SET NULL"))
    status: Mapped[str] = mapped_column(ShortText(16))
    run: Mapped[int] = mapped_column(default=1)
    model: Mapped[str] = mapped_column(ShortText(200))
    delivery: Mapped[str] = mapped_column(ShortText(16))
    settings: Mapped[dict[str, Any]]
    meta: Mapped[dict[str, Any]]
    priority: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=0)
    answered: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    results_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    requests: Mapped[int] = mapped_column(default=0)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    completion_tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None] = mapped_column(index=True)
    deadline_at: Mapped[datetime]


class TaskRow(Base):
    """The queue itself: a job's pending tasks are what is still to be asked."""

    __tablename__ = "tasks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(ShortText(200))
    prompt: Mapped[str] = mapped_column(LongText)  # JSON: text, messages or variables
    tokens: Mapped[int]
    state: Mapped[int] = mapped_column(SmallInteger, default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    answer: Mapped[str | None] = mapped_column(LongText)
    finish_reason: Mapped[str | None] = mapped_column(ShortText(50))
    error_code: Mapped[str | None] = mapped_column(ShortText(50))
    error_message: Mapped[str | None] = mapped_column(ShortText(1000))
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))  # while it was in flight


class IdempotencyRow(Base):
    """An Idempotency-Key that was used; `job_id` is empty until its submit is committed."""

    __tablename__ = "idempotency_keys"

    user_key: Mapped[str] = mapped_column(ShortText(32), primary_key=True)
    key_hash: Mapped[str] = mapped_column(ShortText(64), primary_key=True)
    request_hash: Mapped[str] = mapped_column(ShortText(64))
    job_id: Mapped[str | None] = mapped_column(ShortText(32))
    created_at: Mapped[datetime] = mapped_column(index=True)


class DeliveryRow(Base):
    """The outbox: one webhook message, stored in the commit that made it due."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("ix_deliveries_due", "status", "next_attempt_at"), TABLE_OPTIONS)

    id: Mapped[str] = mapped_column(ShortText(40), primary_key=True)  # the webhook-id
    job_id: Mapped[str | None] = mapped_column(ShortText(32), index=True)
    owner_id: Mapped[str | None] = mapped_column(ShortText(32), index=True)
    run: Mapped[int] = mapped_column(default=1)
    type: Mapped[str] = mapped_column(ShortText(50))
    url: Mapped[str] = mapped_column(ShortText(2000))
    status: Mapped[str] = mapped_column(ShortText(16))
    body: Mapped[str | None] = mapped_column(LongText)  # frozen before the first attempt
    attempts: Mapped[int] = mapped_column(default=0)
    tries_left: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class AttemptRow(Base):
    """One try to deliver: when, and what the receiver said."""

    __tablename__ = "delivery_attempts"

    delivery_id: Mapped[str] = mapped_column(
        ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sent_at: Mapped[datetime]
    took_s: Mapped[float]
    status_code: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(ShortText(500))


class ResultFileRow(Base):
    """The file of one run's results: stored in the commit that ends the run, and kept until the file is deleted.

    It has no foreign key to its job, which it may outlive.
    """

    __tablename__ = "result_files"
    __table_args__ = (Index("ix_result_files_due", "state", "next_attempt_at"), TABLE_OPTIONS)

    job_id: Mapped[str] = mapped_column(ShortText(32), primary_key=True)
    run: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(ShortText(16))
    attempts: Mapped[int] = mapped_column(default=0)  # that failed, in this state
    next_attempt_at: Mapped[datetime | None]
    sha256: Mapped[str | None] = mapped_column(ShortText(64))  # of the lines, unpacked
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of the file, packed
    created_at: Mapped[datetime]
    written_at: Mapped[datetime | None]


class OwnerRow(Base):
    """The one service that may write, where the database is on a server; the only row."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(ShortText(16), primary_key=True)
    host: Mapped[str] = mapped_column(ShortText(255))  # for people
    place: Mapped[str] = mapped_column(ShortText(64))  # tells which lock file the owner holds
    token: Mapped[str] = mapped_column(ShortText(32))
    expires_at: Mapped[datetime]  # by the database's clock
