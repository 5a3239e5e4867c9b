"""The row that says which service owns the database; it is locked by whoever reads it here, until their commit.

Times are the database's own: hosts need not agree on theirs.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import FunctionElement, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session

from gpt_worker.models import OwnerRow, UtcDateTime

NAME = "gpt-worker"
UPDATE_LOCK = "WITH (UPDLOCK, HOLDLOCK)"  # SQL Server's words for FOR UPDATE
_LOCKED = (
    select(OwnerRow).where(OwnerRow.name == NAME).with_for_update().with_hint(OwnerRow, UPDATE_LOCK, "mssql")
)
_LOCKED_TOKEN = (
    select(OwnerRow.token)
    .where(OwnerRow.name == NAME)
    .with_for_update()
    .with_hint(OwnerRow, UPDATE_LOCK, "mssql")
)


class UtcClock(FunctionElement[datetime]):
    """The database's time in UTC, at this statement and not at the beginning of its transaction."""

    type = UtcDateTime()
    inherit_cache = True


CLOCKS = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')",
    "postgresql": "timezone('utc', clock_timestamp())",
    "mysql": "UTC_TIMESTAMP(3)",
    "mssql": "SYSUTCDATETIME()",
    "oracle": "SYS_EXTRACT_UTC(SYSTIMESTAMP)",
}


@compiles(UtcClock)
def _render(_element: UtcClock, compiler: Any, **_options: Any) -> str:
    return CLOCKS[compiler.dialect.name]


def now(session: Session) -> datetime:
    time: datetime = session.execute(select(UtcClock())).scalar_one()
    return time


def locked(session: Session) -> OwnerRow | None:
    """The row, which nobody else changes before this transaction ends; None if there is none yet."""
    return session.scalar(_LOCKED, execution_options={"populate_existing": True})


def locked_token(session: Session) -> str | None:
    """The owner's token alone: asked in every writing transaction."""
    return session.scalar(_LOCKED_TOKEN)


def save(session: Session, *, host: str, place: str, token: str, expires_at: datetime) -> None:
    session.merge(OwnerRow(name=NAME, host=host, place=place, token=token, expires_at=expires_at))
