"""Queries on the outbox: webhook deliveries and the attempts to deliver them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Table, case, delete, exists, func, select, update
from sqlalchemy.orm import Session, defer

from gpt_worker.domain import HIDDEN, Caller, DeliveryStatus, new_id, utc_now
from gpt_worker.models import AttemptRow, DeliveryRow, JobRow
from gpt_worker.store import bulk
from gpt_worker.store.jobs import Standing

JOB_FINISHED = "job.finished"
SLICE_DELIVERIES = 1000
TRIES = 8  # of one schedule: the first attempt, and one after each of the seven waits
_DELIVERIES = cast(Table, DeliveryRow.__table__)
OWED = (DeliveryStatus.PREPARING, DeliveryStatus.PENDING)


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery whose time has come; `due_at` tells whether somebody gave it another time since."""

    id: str
    due_at: datetime
    url: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try: the receiver's status code, or why there was none."""

    sent_at: datetime
    took_s: float
    status_code: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """A delivery with its attempts, the first one first."""

    delivery: DeliveryRow
    attempts: Sequence[AttemptRow]


def add_job_deliveries(session: Session, jobs: Iterable[Standing], url: str, now: datetime) -> list[str]:
    """Owe the webhooks of jobs that end in this very commit; their ids."""
    rows = [
        {
            **_new(job.owner_id, JOB_FINISHED, url, DeliveryStatus.PREPARING, now),
            "job_id": job.id,
            "run": job.run,
        }
        for job in jobs
    ]
    if rows:
        bulk.insert_rows(session.connection(), _DELIVERIES, [*rows[0]], [(*row.values(),) for row in rows])
    return [row["id"] for row in rows]


def add_frozen(
    session: Session, *, owner_id: str | None, kind: str, url: str, body: str, now: datetime
) -> str:
    """Owe a message whose body stands already; its id."""
    delivery = DeliveryRow(**_new(owner_id, kind, url, DeliveryStatus.PENDING, now), body=body)
    session.add(delivery)
    return delivery.id


def _new(owner_id: str | None, kind: str, url: str, status: DeliveryStatus, now: datetime) -> dict[str, Any]:
    return {
        "id": f"msg_{new_id()}",
        "owner_id": owner_id,
        "type": kind,
        "url": url,
        "status": status,
        "attempts": 0,
        "tries_left": TRIES,
        "next_attempt_at": now,
        "created_at": now,
    }


def list_due(
    session: Session,
    *,
    now: datetime,
    besides: Collection[str],
    besides_urls: Collection[str],
    limit: int,
) -> list[Due]:
    """Up to `limit` deliveries whose time has come: first attempts before others, then the longest waiting first.

    Those `besides` are left out, and those to `besides_urls`, however many they are.
    """
    rows = session.execute(
        select(DeliveryRow.id, DeliveryRow.next_attempt_at, DeliveryRow.url)
        .where(
            DeliveryRow.status.in_(OWED),
            DeliveryRow.next_attempt_at <= now,
            DeliveryRow.id.not_in(besides),
            DeliveryRow.url.not_in(besides_urls),
        )
        .order_by(
            case((DeliveryRow.tries_left < TRIES, 1), else_=0), DeliveryRow.next_attempt_at, DeliveryRow.id
        )
        .limit(limit)
    )
    return [Due(id_, due_at, url) for id_, due_at, url in rows if due_at is not None]


def next_due_at(
    session: Session, *, besides: Collection[str], besides_urls: Collection[str]
) -> datetime | None:
    """When the first of the owed deliveries is due, but for those `besides` and those to `besides_urls`."""
    return session.scalar(
        select(func.min(DeliveryRow.next_attempt_at)).where(
            DeliveryRow.status.in_(OWED),
            DeliveryRow.id.not_in(besides),
            DeliveryRow.url.not_in(besides_urls),
        )
    )


def get_delivery(session: Session, delivery_id: str) -> DeliveryRow | None:
    return session.get(DeliveryRow, delivery_id)


def find_delivery(session: Session, delivery_id: str, caller: Caller) -> DeliveryRow | None:
    """The delivery, if this caller may see it: their own, or any for an admin."""
    delivery = session.get(DeliveryRow, delivery_id)
    if delivery is None:
        return None
    return delivery if caller.is_admin or delivery.owner_id == caller.user_id else None


def with_attempts(session: Session, deliveries: Sequence[DeliveryRow]) -> list[DeliveryRecord]:
    attempts: dict[str, list[AttemptRow]] = {delivery.id: [] for delivery in deliveries}
    for attempt in session.scalars(
        select(AttemptRow).where(AttemptRow.delivery_id.in_(attempts)).order_by(AttemptRow.number)
    ):
        attempts[attempt.delivery_id].append(attempt)
    return [DeliveryRecord(delivery, attempts[delivery.id]) for delivery in deliveries]


def list_deliveries(
    session: Session,
    caller: Caller,
    *,
    everyone: bool,
    job_id: str | None,
    status: DeliveryStatus | None,
    before: str | None,
    limit: int,
) -> list[DeliveryRecord]:
    """Up to `limit` deliveries, newest first, behind the cursor `before`: one's own, or all. No bodies."""
    statement = select(DeliveryRow).order_by(DeliveryRow.id.desc()).limit(limit)
    if not everyone:
        statement = statement.where(DeliveryRow.owner_id == caller.user_id)
    if job_id is not None:
        statement = statement.where(DeliveryRow.job_id == job_id)
    if status is not None:
        statement = statement.where(DeliveryRow.status == status)
    if before is not None:
        statement = statement.where(DeliveryRow.id < before)
    return with_attempts(session, session.scalars(statement.options(defer(DeliveryRow.body))).all())


def unfrozen_of_job(session: Session, job_id: str) -> Sequence[DeliveryRow]:
    """The job's deliveries that have no body yet."""
    return session.scalars(
        select(DeliveryRow).where(
            DeliveryRow.job_id == job_id, DeliveryRow.status == DeliveryStatus.PREPARING
        )
    ).all()


def has_unfrozen(session: Session, job: JobRow) -> bool:
    """Whether the webhook of the job's latest run has no body yet; a new run may only begin when it has."""
    owed = select(DeliveryRow.id).where(
        DeliveryRow.job_id == job.id,
        DeliveryRow.run == job.run,
        DeliveryRow.status == DeliveryStatus.PREPARING,
    )
    return session.scalar(owed.limit(1)) is not None


_AS_IT_WAS = exists().where(
    JobRow.id == DeliveryRow.job_id,
    JobRow.run == DeliveryRow.run,
    JobRow.finished_at.is_not(None),
    JobRow.status.not_in(HIDDEN),
)


def can_be_made(session: Session, delivery: DeliveryRow) -> bool:
    """Whether the job still stands as the run left it that the delivery tells of."""
    return session.scalar(select(DeliveryRow.id).where(DeliveryRow.id == delivery.id, _AS_IT_WAS)) is not None


def freeze_body(session: Session, delivery_id: str, body: str) -> None:
    """Store the body for good, unless there is one or the job has moved on from the run it tells of."""
    session.execute(
        update(DeliveryRow)
        .where(DeliveryRow.id == delivery_id, DeliveryRow.status == DeliveryStatus.PREPARING, _AS_IT_WAS)
        .values(status=DeliveryStatus.PENDING, body=body),
        execution_options={"synchronize_session": False},
    )


def record_attempt(
    session: Session,
    due: Due,
    attempt: Attempt,
    *,
    ended: DeliveryStatus | None,
    next_attempt_at: datetime | None,
    now: datetime,
) -> None:
    """Store an attempt, and that the delivery has `ended` with it or when it goes on.

    Safe to repeat after a commit of unknown result. A delivery given another time meanwhile keeps that.
    """
    delivery = session.get(DeliveryRow, due.id, populate_existing=True)
    known = select(AttemptRow.number).where(
        AttemptRow.delivery_id == due.id, AttemptRow.sent_at == attempt.sent_at
    )
    if delivery is None or session.scalar(known.limit(1)) is not None:
        return
    _add_attempt(session, delivery, attempt)
    if delivery.next_attempt_at != due.due_at:
        return
    delivery.tries_left -= 1
    delivery.next_attempt_at = next_attempt_at
    if ended is not None:
        delivery.status = ended
        delivery.finished_at = now


def _add_attempt(session: Session, delivery: DeliveryRow, attempt: Attempt) -> None:
    delivery.attempts += 1
    session.add(
        AttemptRow(
            delivery_id=delivery.id,
            number=delivery.attempts,
            sent_at=attempt.sent_at,
            took_s=attempt.took_s,
            status_code=attempt.status_code,
            error=attempt.error,
        )
    )


def restart(delivery: DeliveryRow, *, url: str, now: datetime) -> None:
    """Give a delivery a fresh schedule that begins now; its id and body stay."""
    delivery.url = url
    delivery.status = DeliveryStatus.PREPARING if delivery.body is None else DeliveryStatus.PENDING
    delivery.tries_left = TRIES
    delivery.next_attempt_at = now
    delivery.finished_at = None


def drop_for_job(session: Session, job_id: str) -> None:
    """In the commit that purges a job: its bodies go with it, and what was not delivered is given up."""
    now = utc_now()
    owed = select(DeliveryRow).where(DeliveryRow.job_id == job_id, DeliveryRow.status.in_(OWED))
    for delivery in session.scalars(owed):
        _add_attempt(session, delivery, Attempt(now, 0.0, None, "given up: the job was deleted"))
        delivery.status = DeliveryStatus.FAILED
        delivery.next_attempt_at = None
        delivery.finished_at = now
    session.flush()
    session.execute(update(DeliveryRow).where(DeliveryRow.job_id == job_id).values(body=None))


def prune(session: Session, finished_before: datetime, limit: int = SLICE_DELIVERIES) -> int:
    """Retention: delete a slice of the deliveries that ended before then, with their attempts; how many."""
    old = session.scalars(
        select(DeliveryRow.id).where(DeliveryRow.finished_at < finished_before).limit(limit)
    ).all()
    session.execute(delete(AttemptRow).where(AttemptRow.delivery_id.in_(old)))
    session.execute(delete(DeliveryRow).where(DeliveryRow.id.in_(old)))
    return len(old)


def count_by_status(session: Session) -> Mapping[DeliveryStatus, int]:
    """How many deliveries stand where; every status is there."""
    counts = dict.fromkeys(DeliveryStatus, 0)
    for status, count in session.execute(
        select(DeliveryRow.status, func.count()).group_by(DeliveryRow.status)
    ):
        counts[DeliveryStatus(status)] = count
    return counts
