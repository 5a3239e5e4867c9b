"""Queries on the files of results: what is to be written to the drive or deleted from it, and what is there."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import CursorResult, Table, delete, func, select, update
from sqlalchemy.orm import Session

from gpt_worker.domain import HIDDEN, FileState
from gpt_worker.models import JobRow, ResultFileRow
from gpt_worker.store import bulk

_FILES = cast(Table, ResultFileRow.__table__)
_OWED = ("job_id", "run", "state", "attempts", "next_attempt_at", "created_at")
OWED = (FileState.PENDING, FileState.DELETING)


@dataclass(frozen=True, slots=True)
class OwedFile:
    """A file to write or to delete; `attempts` have failed."""

    job_id: str
    run: int
    state: FileState
    attempts: int


def owe(session: Session, runs: Iterable[tuple[str, int]], now: datetime) -> None:
    """Owe the files of runs that end in this very commit, by their jobs' ids and their numbers."""
    rows = [(job_id, run, FileState.PENDING, 0, now, now) for job_id, run in runs]
    bulk.insert_rows(session.connection(), _FILES, _OWED, rows)


def list_due(session: Session, now: datetime, limit: int) -> list[OwedFile]:
    """Up to `limit` files whose time has come, the longest waiting first."""
    rows = session.execute(
        select(ResultFileRow.job_id, ResultFileRow.run, ResultFileRow.state, ResultFileRow.attempts)
        .where(ResultFileRow.state.in_(OWED), ResultFileRow.next_attempt_at <= now)
        .order_by(ResultFileRow.next_attempt_at)
        .limit(limit)
    )
    return [OwedFile(job_id, run, FileState(state), attempts) for job_id, run, state, attempts in rows]


def next_due_at(session: Session) -> datetime | None:
    """When the first of the owed files is due."""
    return session.scalar(
        select(func.min(ResultFileRow.next_attempt_at)).where(ResultFileRow.state.in_(OWED))
    )


def stands(session: Session, job_id: str, run: int) -> bool:
    """Whether the job is there as this run left it: its results are the run's."""
    found = session.scalar(
        select(JobRow.id).where(
            JobRow.id == job_id,
            JobRow.run == run,
            JobRow.finished_at.is_not(None),
            JobRow.status.not_in(HIDDEN),
        )
    )
    return found is not None


def _change(session: Session, file: OwedFile, **values: object) -> None:
    """Change a row that is still in the state in which it was found."""
    session.execute(
        update(ResultFileRow)
        .where(
            ResultFileRow.job_id == file.job_id,
            ResultFileRow.run == file.run,
            ResultFileRow.state == file.state,
        )
        .values(**values),
        execution_options={"synchronize_session": False},
    )


def note_written(session: Session, file: OwedFile, sha256: str, size_bytes: int, now: datetime) -> None:
    """The file is there; one that is to be deleted meanwhile stays so."""
    _change(
        session,
        file,
        state=FileState.WRITTEN,
        attempts=0,
        next_attempt_at=None,
        sha256=sha256,
        size_bytes=size_bytes,
        written_at=now,
    )


def postpone(session: Session, file: OwedFile, next_attempt_at: datetime) -> None:
    """An attempt has failed."""
    _change(session, file, attempts=file.attempts + 1, next_attempt_at=next_attempt_at)


def give_up(session: Session, file: OwedFile, now: datetime) -> None:
    """The results of the run are no more: what an earlier attempt may have left is deleted."""
    _change(session, file, state=FileState.DELETING, attempts=0, next_attempt_at=now)


def forget(session: Session, file: OwedFile) -> None:
    """The file is deleted."""
    session.execute(
        delete(ResultFileRow).where(ResultFileRow.job_id == file.job_id, ResultFileRow.run == file.run),
        execution_options={"synchronize_session": False},
    )


def drop_for_job(session: Session, job_id: str, now: datetime) -> bool:
    """In the commit that deletes a job: its files are to go; whether there are any that were not yet."""
    result = session.execute(
        update(ResultFileRow)
        .where(ResultFileRow.job_id == job_id, ResultFileRow.state != FileState.DELETING)
        .values(state=FileState.DELETING, attempts=0, next_attempt_at=now),
        execution_options={"synchronize_session": False},
    )
    assert isinstance(result, CursorResult)
    return result.rowcount > 0


def find_written(session: Session, job_id: str, run: int) -> ResultFileRow | None:
    """The file of a run, if it is there."""
    row = session.get(ResultFileRow, (job_id, run))
    return row if row is not None and row.state == FileState.WRITTEN else None


def write_again(session: Session, job_id: str, run: int, now: datetime) -> None:
    """A file that was written is gone, or another: it is owed once more."""
    file = OwedFile(job_id, run, FileState.WRITTEN, 0)
    _change(session, file, state=FileState.PENDING, attempts=0, next_attempt_at=now)


def count_by_state(session: Session) -> Mapping[FileState, int]:
    """How many files stand where; every state is there."""
    counts = dict.fromkeys(FileState, 0)
    for state, count in session.execute(
        select(ResultFileRow.state, func.count()).group_by(ResultFileRow.state)
    ):
        counts[FileState(state)] = count
    return counts
