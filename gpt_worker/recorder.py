"""The one writer of outcomes: commits them in groups, closes and ends jobs, and puts their webhooks in the outbox.

A group is whatever arrived during the previous commit, so a lone answer waits for nothing. Every update is guarded,
so a commit of unknown result can be made again. While commits fail, nothing new is sent (`healthy`).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gpt_worker.db import Database
from gpt_worker.domain import Answer, DeliveryMode, Failure, Outcome, utc_now
from gpt_worker.models import JobRow
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.jobs import JobProgress

log = logging.getLogger(__name__)

MAX_INBOX = 1000
MAX_INBOX_BYTES = 32 << 20
FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 5.0


@dataclass(slots=True)
class _Closing:
    """What of a job was not sent fails alike, a slice a commit."""

    job_id: str
    failure: Failure
    spare: Collection[int]
    after: int | None = -1


@dataclass(slots=True)
class _Group:
    """What one commit stores."""

    outcomes: list[Outcome]
    started: list[str]


class Recorder:
    """One thread; `put` blocks while it lags."""

    def __init__(self, database: Database, webhook_url: str) -> None:
        self._database = database
        self._webhook_url = webhook_url
        self._condition = threading.Condition()
        self._outcomes: list[Outcome] = []
        self._outcomes_bytes = 0
        self._started: list[str] = []
        self._closings: deque[_Closing] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.healthy = True
        self.commits = 0
        self.on_ended: Callable[[str, int], None] = lambda _job_id, _run: None
        self.on_delivery: Callable[[], None] = lambda: None
        self.on_recovered: Callable[[], None] = lambda: None

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Commit what is in the inbox and end; whether that was done in time."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def put(self, outcome: Outcome) -> None:
        """Hand over what became of a call; blocks while the inbox is full."""
        with self._condition:
            self._condition.wait_for(
                lambda: len(self._outcomes) < MAX_INBOX and self._outcomes_bytes < MAX_INBOX_BYTES
            )
            self._outcomes.append(outcome)
            self._outcomes_bytes += outcome.size_bytes
            if len(self._outcomes) == 1:
                self._condition.notify_all()

    def job_started(self, job_id: str) -> None:
        with self._condition:
            self._started.append(job_id)
            self._condition.notify_all()

    def close_job(self, job_id: str, failure: Failure, spare: Collection[int]) -> None:
        """Fail every task of a job that is still pending, but for those in flight; ends the job if none is."""
        with self._condition:
            self._closings.append(_Closing(job_id, failure, spare))
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._outcomes or self._started or self._closings or self._stopping
                )
                group = _Group(self._outcomes, self._started)
                closing = self._closings[0] if self._closings else None
                if self._stopping and not (group.outcomes or group.started or closing):
                    return
                self._outcomes, self._outcomes_bytes, self._started = [], 0, []
                self._condition.notify_all()
            self._persist(lambda group=group: self._commit_group(group))  # type: ignore[misc]
            if closing is not None:
                self._persist(lambda closing=closing: self._commit_slice(closing))  # type: ignore[misc]
                if closing.after is None:
                    with self._condition:
                        self._closings.popleft()

    def _persist(self, commit: Callable[[], list[JobRow]]) -> None:
        """Commit until it is done, then tell who waits for it."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                ended = commit()
                break
            except SQLAlchemyError:
                if self.healthy:
                    log.exception(
                        "answers can't be stored; nothing is sent meanwhile", extra={"action": "record"}
                    )
                self.healthy = False
                if self._stopping:
                    return
                threading.Event().wait(retry_s)
                retry_s = min(LONGEST_RETRY_S, 2 * retry_s)
        self.commits += 1
        if not self.healthy:
            self.healthy = True
            log.info("answers are stored again", extra={"action": "record"})
            self.on_recovered()
        for job in ended:
            self.on_ended(job.id, job.run)
            if job.delivery == DeliveryMode.WEBHOOK:
                self.on_delivery()

    def _commit_group(self, group: _Group) -> list[JobRow]:
        if not group.outcomes and not group.started:
            return []
        now = utc_now()
        by_job: dict[str, list[Outcome]] = {}
        for outcome in group.outcomes:
            by_job.setdefault(outcome.job_id, []).append(outcome)
        with self._database.write(urgent=True) as session:
            for job_id in group.started:
                job_store.start(session, job_id, now)
            for job_id, outcomes in by_job.items():
                progress = JobProgress(
                    answered=task_store.record_answers(session, outcomes),
                    failed=task_store.record_failures(session, outcomes),
                    results_bytes=sum(map(_result_bytes, outcomes)),
                )
                for outcome in outcomes:
                    progress.add_call(outcome.calls, outcome.usage)
                job_store.add_progress(session, job_id, progress)
            return self._end_jobs(session, by_job, now)

    def _commit_slice(self, closing: _Closing) -> list[JobRow]:
        if closing.after is None:
            return []
        with self._database.write(urgent=True) as session:
            failed, after = task_store.fail_pending(
                session, closing.job_id, closing.failure, after=closing.after, spare=closing.spare
            )
            job_store.add_progress(
                session,
                closing.job_id,
                JobProgress(failed=failed, results_bytes=failed * len(closing.failure.message)),
            )
            ended = self._end_jobs(session, [closing.job_id], utc_now()) if after is None else []
        closing.after = after
        return ended

    def _end_jobs(self, session: Session, job_ids: Collection[str], now: datetime) -> list[JobRow]:
        ended: list[JobRow] = []
        for job_id in job_ids:
            job = job_store.end_if_done(session, job_id, now)
            if job is None:
                continue
            if job.delivery == DeliveryMode.WEBHOOK:
                delivery_store.add_job_delivery(
                    session, job_id=job.id, owner_id=job.owner_id, run=job.run, url=self._webhook_url, now=now
                )
            ended.append(job)
        return ended


def _result_bytes(outcome: Outcome) -> int:
    if isinstance(outcome.decision, Answer):
        return len(outcome.decision.text.encode())
    return len(outcome.decision.message) if outcome.decision else 0
