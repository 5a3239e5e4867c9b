"""Queries on the service's toggles."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from gpt_worker.models import ModeRow


def all_modes(session: Session) -> dict[str, str]:
    """The toggles that were ever changed, name → value."""
    return {row.name: row.value for row in session.scalars(select(ModeRow))}


def save_mode(session: Session, name: str, value: str) -> None:
    session.merge(ModeRow(name=name, value=value))
