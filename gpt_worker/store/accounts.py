"""Queries on users, their tokens and the wrong passwords of an address."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import CursorResult, delete, false, func, select, update
from sqlalchemy.orm import Session

from gpt_worker.domain import Role
from gpt_worker.models import DeliveryRow, JobRow, LoginFailureRow, TokenRow, UserRow


def any_user(session: Session) -> bool:
    return session.scalar(select(UserRow.id).limit(1)) is not None


def add_user(session: Session, user: UserRow) -> None:
    session.add(user)
    session.flush()  # a token of the same transaction refers to it


def find_user(session: Session, user_id: str) -> UserRow | None:
    return session.get(UserRow, user_id)


def find_user_by_email(session: Session, email: str) -> UserRow | None:
    return session.scalar(select(UserRow).where(UserRow.email == email))


def list_users(session: Session, *, before: str | None, limit: int) -> Sequence[UserRow]:
    """Up to `limit` users, newest first, behind the cursor `before`."""
    statement = select(UserRow).order_by(UserRow.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(UserRow.id < before)
    return session.scalars(statement).all()


def count_other_admins(session: Session, user_id: str) -> int:
    """How many enabled admins there are beside this user."""
    statement = select(func.count()).select_from(UserRow)
    statement = statement.where(
        UserRow.role == Role.ADMIN, UserRow.disabled == false(), UserRow.id != user_id
    )
    return session.scalar(statement) or 0


def delete_user(session: Session, user_id: str, heir_id: str) -> None:
    """The database takes the user's tokens along; their jobs and deliveries become the heir's."""
    for rows in (JobRow, DeliveryRow):
        session.execute(
            update(rows).where(rows.owner_id == user_id).values(owner_id=heir_id),
            execution_options={"synchronize_session": False},
        )
    session.execute(delete(UserRow).where(UserRow.id == user_id))


def add_token(session: Session, token: TokenRow) -> None:
    session.add(token)


def find_token(session: Session, token_id: str) -> tuple[TokenRow, UserRow] | None:
    """The token and its user, in one query."""
    statement = (
        select(TokenRow, UserRow).join(UserRow, UserRow.id == TokenRow.user_id).where(TokenRow.id == token_id)
    )
    row = session.execute(statement).one_or_none()
    return None if row is None else (row[0], row[1])


def list_api_tokens(session: Session, user_id: str, *, before: str | None, limit: int) -> Sequence[TokenRow]:
    """Up to `limit` of the user's tokens for scripts (no logins), newest first, behind `before`."""
    statement = select(TokenRow).where(TokenRow.user_id == user_id, TokenRow.name.is_not(None))
    if before is not None:
        statement = statement.where(TokenRow.id < before)
    return session.scalars(statement.order_by(TokenRow.id.desc()).limit(limit)).all()


def delete_token(session: Session, user_id: str, token_id: str) -> bool:
    """Whether the user had that token."""
    result = session.execute(delete(TokenRow).where(TokenRow.id == token_id, TokenRow.user_id == user_id))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def delete_tokens(session: Session, user_id: str, *, but: str | None = None) -> None:
    """End every token of the user, except `but`."""
    statement = delete(TokenRow).where(TokenRow.user_id == user_id)
    if but is not None:
        statement = statement.where(TokenRow.id != but)
    session.execute(statement)


def delete_expired_tokens(session: Session, now: datetime) -> None:
    session.execute(delete(TokenRow).where(TokenRow.expires_at <= now))


def find_login_failure(session: Session, email_hash: str) -> LoginFailureRow | None:
    return session.get(LoginFailureRow, email_hash)


def save_login_failure(session: Session, failure: LoginFailureRow) -> None:
    session.merge(failure)


def clear_login_failures(session: Session, email_hash: str) -> None:
    session.execute(delete(LoginFailureRow).where(LoginFailureRow.email_hash == email_hash))


def delete_old_login_failures(session: Session, before: datetime) -> None:
    session.execute(delete(LoginFailureRow).where(LoginFailureRow.last_failed_at < before))
