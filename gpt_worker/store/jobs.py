"""Queries on jobs and their idempotency keys."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import CursorResult, Table, bindparam, case, delete, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, defer

from gpt_worker.domain import HIDDEN, UNFINISHED, VISIBLE, Caller, ErrorCode, JobStatus, TaskState, Usage
from gpt_worker.models import DeliveryRow, IdempotencyRow, JobRow, TaskRow, UserRow
from gpt_worker.store.bulk import EachUpdate
from gpt_worker.store.owners import UPDATE_LOCK

MAX_IDS = 500  # in a statement; Oracle takes 1,000
_JOBS = cast(Table, JobRow.__table__)
_COUNTS = ("answered", "failed", "results_bytes", "requests", "prompt_tokens", "completion_tokens")

# A statement that is run all the time is built once, and below the ORM.
_ADD_PROGRESS = EachUpdate(_JOBS, ("id",), _COUNTS, adds=True)
_THESE = _JOBS.c.id.in_(bindparam("b_jobs", expanding=True))
_START = (
    update(_JOBS)
    .where(_THESE, _JOBS.c.status == JobStatus.QUEUED)
    .values(status=JobStatus.RUNNING, started_at=bindparam("b_at"))
)
_STANDINGS = select(
    _JOBS.c.id,
    _JOBS.c.run,
    _JOBS.c.owner_id,
    _JOBS.c.delivery,
    _JOBS.c.status,
    _JOBS.c.total,
    _JOBS.c.answered,
    _JOBS.c.failed,
    _JOBS.c.requests,
    _JOBS.c.finished_at,
).where(_THESE)
# succeeded: every task answered; partial: some; failed: none.
_END = (
    update(_JOBS)
    .where(
        _THESE,
        _JOBS.c.answered + _JOBS.c.failed >= _JOBS.c.total,
        _JOBS.c.finished_at.is_(None),
        _JOBS.c.status.not_in(HIDDEN),
    )
    .values(
        status=case(
            (_JOBS.c.status == JobStatus.CANCELLED, _JOBS.c.status),
            (_JOBS.c.answered == _JOBS.c.total, JobStatus.SUCCEEDED),
            (_JOBS.c.answered > 0, JobStatus.PARTIAL),
            else_=JobStatus.FAILED,
        ),
        finished_at=bindparam("b_at"),
    )
)
_UNFINISHED_OF = select(
    func.count(),
    func.sum(_JOBS.c.total - _JOBS.c.answered - _JOBS.c.failed),
    func.min(_JOBS.c.total - _JOBS.c.answered - _JOBS.c.failed),
    func.sum(_JOBS.c.answered + _JOBS.c.failed),
    func.min(_JOBS.c.started_at),
).where(_JOBS.c.status.in_(UNFINISHED))
UNFINISHED_OF_USER = _UNFINISHED_OF.where(_JOBS.c.owner_id == bindparam("b_owner"))
UNFINISHED_OF_NOBODY = _UNFINISHED_OF.where(_JOBS.c.owner_id.is_(None))


@dataclass(slots=True)
class JobProgress:
    """What one group of outcomes adds to a job's counts."""

    answered: int = 0
    failed: int = 0
    results_bytes: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add_call(self, calls: int, usage: Usage) -> None:
        self.requests += calls
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is."""

    id: str
    run: int
    owner_id: str | None
    delivery: str
    status: str
    total: int
    answered: int
    failed: int
    requests: int
    finished_at: datetime | None

    @property
    def is_to_end(self) -> bool:
        """Whether its tasks are all decided, and nobody has ended it."""
        is_decided = self.answered + self.failed >= self.total
        return is_decided and self.finished_at is None and self.status not in HIDDEN


@dataclass(frozen=True, slots=True)
class StatusCount:
    """How many jobs stand somewhere, and what is decided of their tasks."""

    jobs: int = 0
    answered: int = 0
    failed: int = 0
    pending: int = 0


@dataclass(frozen=True, slots=True)
class Unfinished:
    """The queued and running jobs of one user: how many, what is decided of their tasks, and since when they run."""

    jobs: int = 0
    pending: int = 0
    least_pending: int = 0  # of the job that is nearest to its end
    decided: int = 0
    started_at: datetime | None = None


def add_job(session: Session, job: JobRow) -> None:
    session.add(job)


def find_job(session: Session, job_id: str, caller: Caller) -> JobRow | None:
    """The job, if this caller may see it: their own, any for an admin, an ownerless one for the anonymous."""
    job = session.get(JobRow, job_id)
    if job is None or job.status in HIDDEN:
        return None
    return job if caller.is_admin or job.owner_id == caller.user_id else None


def get_job(session: Session, job_id: str) -> JobRow | None:
    return session.get(JobRow, job_id)


def is_visible(session: Session, job_id: str) -> bool:
    """Whether the job is there, whole, and not being deleted."""
    status = session.scalar(select(JobRow.status).where(JobRow.id == job_id))
    return status is not None and status not in HIDDEN


def lock_job(session: Session, job_id: str) -> JobRow | None:
    """The job as it is when no other transaction is about to change it, one of a connection that we lost among them."""
    statement = select(JobRow).where(JobRow.id == job_id).with_for_update()
    return session.scalars(statement.with_hint(JobRow, UPDATE_LOCK, "mssql")).one_or_none()


def run_of(session: Session, job_id: str) -> int | None:
    """Which run of the job is the last; None if it is gone."""
    return session.scalar(select(JobRow.run).where(JobRow.id == job_id))


def owner_emails(session: Session, jobs: Iterable[JobRow]) -> dict[str, str]:
    """The addresses of these jobs' owners, by their ids."""
    ids = {job.owner_id for job in jobs if job.owner_id}
    rows = session.execute(select(UserRow.id, UserRow.email).where(UserRow.id.in_(ids))) if ids else ()
    return {row.id: row.email for row in rows}


def list_jobs(
    session: Session,
    caller: Caller,
    *,
    everyone: bool,
    status: JobStatus | None,
    before: str | None,
    limit: int,
) -> Sequence[JobRow]:
    """Up to `limit` jobs without their settings, newest first, behind the cursor `before`: one's own, or everyone's."""
    statement = select(JobRow).options(defer(JobRow.settings)).order_by(JobRow.id.desc()).limit(limit)
    statement = statement.where(JobRow.status == status if status else JobRow.status.not_in(HIDDEN))
    if not everyone:
        statement = statement.where(JobRow.owner_id == caller.user_id)
    if before is not None:
        statement = statement.where(JobRow.id < before)
    return session.scalars(statement).all()


def open_jobs(session: Session) -> Sequence[JobRow]:
    """The jobs with work left, oldest first: queued and running ones, and cancelled ones not yet closed."""
    return session.scalars(
        select(JobRow)
        .where(JobRow.status.in_((*UNFINISHED, JobStatus.CANCELLED)), JobRow.finished_at.is_(None))
        .order_by(JobRow.id)
    ).all()


def count_by_status(session: Session) -> dict[JobStatus, StatusCount]:
    """Jobs and their tasks by the job's status, which are all there; from the jobs' own counts, no task is read."""
    counts = dict.fromkeys(VISIBLE, StatusCount())
    rows = session.execute(
        select(
            JobRow.status,
            func.count(),
            func.sum(JobRow.total),
            func.sum(JobRow.answered),
            func.sum(JobRow.failed),
        ).group_by(JobRow.status)
    )
    for status, jobs, total, answered, failed in rows:
        if status in counts:
            counts[JobStatus(status)] = StatusCount(
                jobs, int(answered), int(failed), int(total - answered - failed)
            )
    return counts


def unfinished_of(session: Session, owner_id: str | None) -> Unfinished:
    """What a user has unfinished, or with None those who have no token together; asked in every submit."""
    statement = UNFINISHED_OF_NOBODY if owner_id is None else UNFINISHED_OF_USER
    row = session.connection().execute(statement, {"b_owner": owner_id} if owner_id else {}).one()
    jobs, pending, least_pending, decided, started_at = row
    return (
        Unfinished(jobs, int(pending), int(least_pending), int(decided), started_at) if jobs else Unfinished()
    )


def count_failed(session: Session, job_id: str, codes: Collection[ErrorCode], after: int) -> int:
    """How many tasks of a job behind the position `after` have failed with one of these codes."""
    failed = (TaskRow.job_id == job_id, TaskRow.state == TaskState.FAILED, TaskRow.position > after)
    count = select(func.count()).select_from(TaskRow).where(*failed, TaskRow.error_code.in_(codes))
    return session.scalar(count) or 0


def queue(session: Session, job_id: str, total: int, results_bytes: int) -> None:
    """The last commit of a submit: the job is whole and can be seen."""
    session.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status == JobStatus.RECEIVING)
        .values(status=JobStatus.QUEUED, total=total, results_bytes=results_bytes)
    )


def start(session: Session, job_ids: Collection[str], at: datetime) -> None:
    """Those of the jobs that are queued run from now on."""
    for part in _in_parts(job_ids):
        session.connection().execute(_START, {"b_jobs": part, "b_at": at})


def add_progress(session: Session, progress: Mapping[str, JobProgress]) -> None:
    """Add to the counts of jobs, by their ids."""
    rows = [(job_id, *(getattr(added, name) for name in _COUNTS)) for job_id, added in progress.items()]
    _ADD_PROGRESS.run(session.connection(), rows)


def standings(session: Session, job_ids: Collection[str]) -> list[Standing]:
    """How far these jobs are, in their order, those that are gone left out: asked in every commit, it loads no job."""
    found: dict[str, Standing] = {}
    for part in _in_parts(job_ids):
        for id_, *values in session.connection().execute(_STANDINGS, {"b_jobs": part}):
            found[id_] = Standing(id_, *values)
    return [found[job_id] for job_id in job_ids if job_id in found]


def end(session: Session, job_ids: Collection[str], at: datetime) -> int:
    """End those of the jobs whose tasks are all decided; how many this call has ended."""
    return sum(
        session.connection().execute(_END, {"b_jobs": part, "b_at": at}).rowcount
        for part in _in_parts(job_ids)
    )


def _in_parts(job_ids: Collection[str]) -> Iterator[list[str]]:
    """So many ids as one statement may have."""
    ids = [*job_ids]
    for start in range(0, len(ids), MAX_IDS):
        yield ids[start : start + MAX_IDS]


def cancel(session: Session, job_id: str) -> bool:
    """Whether an unfinished job was cancelled by this call."""
    result = session.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status.in_(UNFINISHED))
        .values(status=JobStatus.CANCELLED)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def reopen(job: JobRow, deadline_at: datetime) -> None:
    """Queue a finished job again as its next run."""
    job.run += 1
    job.status = JobStatus.QUEUED
    job.finished_at = None
    job.deadline_at = deadline_at


def discard(session: Session, job_id: str) -> None:
    """Hide a job for good and free its Idempotency-Key; its rows are deleted in slices afterwards."""
    session.execute(update(JobRow).where(JobRow.id == job_id).values(status=JobStatus.DISCARDED))
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.job_id == job_id))


def discard_half_received(session: Session) -> None:
    """At start: nobody is sending these any more."""
    session.execute(
        update(JobRow).where(JobRow.status == JobStatus.RECEIVING).values(status=JobStatus.DISCARDED)
    )
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.job_id.is_(None)))


def discard_older(session: Session, finished_before: datetime) -> None:
    """Retention: hide jobs that were finished long ago, but for those whose webhook is still owed."""
    owed = exists().where(DeliveryRow.job_id == JobRow.id, DeliveryRow.finished_at.is_(None))
    session.execute(
        update(JobRow)
        .where(JobRow.finished_at < finished_before, JobRow.status.not_in(HIDDEN), ~owed)
        .values(status=JobStatus.DISCARDED),
        execution_options={"synchronize_session": False},
    )


def discarded_jobs(session: Session) -> Sequence[str]:
    return session.scalars(select(JobRow.id).where(JobRow.status == JobStatus.DISCARDED)).all()


def delete_job(session: Session, job_id: str) -> None:
    """Delete a job whose tasks are gone."""
    assert session.scalar(select(TaskRow.position).where(TaskRow.job_id == job_id).limit(1)) is None
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.job_id == job_id))
    session.execute(delete(JobRow).where(JobRow.id == job_id))


def claim_key(session: Session, row: IdempotencyRow) -> IdempotencyRow | None:
    """Take an Idempotency-Key; the row that has it already, or None when it is ours now."""
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        return session.get(IdempotencyRow, (row.user_key, row.key_hash))
    return None


def knows_key(session: Session, user_key: str, key_hash: str) -> bool:
    """Whether a submit has brought this Idempotency-Key."""
    return session.get(IdempotencyRow, (user_key, key_hash)) is not None


def free_key(session: Session, claim: IdempotencyRow) -> None:
    """Give an Idempotency-Key back, unless a later submit has taken it meanwhile."""
    session.execute(
        delete(IdempotencyRow).where(
            IdempotencyRow.user_key == claim.user_key,
            IdempotencyRow.key_hash == claim.key_hash,
            IdempotencyRow.created_at == claim.created_at,
        )
    )


def bind_key(session: Session, claim: IdempotencyRow, job_id: str) -> None:
    session.execute(
        update(IdempotencyRow)
        .where(IdempotencyRow.user_key == claim.user_key, IdempotencyRow.key_hash == claim.key_hash)
        .values(job_id=job_id)
    )


def drop_old_keys(session: Session, created_before: datetime) -> None:
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < created_before))
