"""The one writer of outcomes: commits them in groups, ends jobs, and owes their webhooks and files in the same commit.

A group is whatever arrived since the previous commit; a lone answer waits for nothing, nor do a job's last ones.
Every update is guarded, so a commit of unknown result can be made again. While commits fail, nothing new is sent
(`healthy`).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy.orm import Session

from gpt_worker.db import Database, log_failure
from gpt_worker.domain import Answer, DeliveryMode, ErrorCode, Failure, Outcome, utc_now
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import result_files as file_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.jobs import JobProgress, Standing
from gpt_worker.store.tasks import NotAllPending

log = logging.getLogger(__name__)

MAX_INBOX = 1000
MAX_INBOX_BYTES = 32 << 20
FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 5.0
COMMIT_GAP_S = 0.025  # a commit costs as much as several calls: on a fast endpoint, groups are let grow
ByJob = Mapping[str, list[Outcome]]
Recording = Callable[[Session, ByJob], dict[str, JobProgress]]
UNSTORABLE = Failure(ErrorCode.BAD_RESPONSE, "the answer is larger than the database takes")


@dataclass(slots=True)
class _Closing:
    """What of a job was not sent fails alike, a slice a commit."""

    job_id: str
    run: int
    failure: Failure
    spare: Collection[int]
    after: int | None = -1
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Group:
    """What one commit stores."""

    outcomes: list[Outcome]
    started: list[str]
    # Of its jobs that were asked for, when it is stored; known once a commit of it was tried.
    requests: dict[str, int] = field(default_factory=dict)

    @property
    def job_ids(self) -> set[str]:
        return {*self.started, *(outcome.job_id for outcome in self.outcomes)}


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
        self._hurry = False  # whether the inbox holds what may be a job's last outcome
        self._committed_s = -COMMIT_GAP_S
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._stores = True  # the last commit has succeeded
        self._suspended = False
        self.commits = 0
        self.stored = 0  # outcomes, since the start
        self.on_ended: Callable[[str, int], None] = lambda _job_id, _run: None
        self.on_committed: Callable[[Collection[str]], None] = lambda _job_ids: None
        self.on_delivery: Callable[[], None] = lambda: None
        self.on_file: Callable[[], None] = lambda: None
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

    @property
    def healthy(self) -> bool:
        """Whether answers are stored: else none should be asked for."""
        return self._stores and not self._suspended

    def suspend(self) -> None:
        """Have nothing asked for: it is not sure that answers can be stored."""
        self._suspended = True

    def resume(self) -> None:
        self._suspended = False
        self.on_recovered()

    @property
    def waiting(self) -> int:
        """How many outcomes are not yet on their way into a commit."""
        return len(self._outcomes)

    def put(self, outcome: Outcome, *, hurry: bool = True) -> None:
        """Hand over what became of a call; blocks while the inbox is full. `hurry`: it may be its job's last."""
        with self._condition:
            self._condition.wait_for(
                lambda: len(self._outcomes) < MAX_INBOX and self._outcomes_bytes < MAX_INBOX_BYTES
            )
            self._outcomes.append(outcome)
            self._outcomes_bytes += outcome.size_bytes
            wakes = hurry and not self._hurry
            self._hurry = self._hurry or hurry
            if wakes or len(self._outcomes) in (1, MAX_INBOX // 2):
                self._condition.notify_all()

    def job_started(self, job_id: str) -> None:
        with self._condition:
            self._started.append(job_id)
            self._condition.notify_all()

    def close_job(self, job_id: str, run: int, failure: Failure, spare: Collection[int]) -> threading.Event:
        """Fail every task of a job's run that is still pending, but for those in flight; ends the job if none is.

        The event is set when that is stored, or the job has another run by then.
        """
        closing = _Closing(job_id, run, failure, spare)
        with self._condition:
            self._closings.append(closing)
            self._condition.notify_all()
        return closing.done

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._outcomes or self._started or self._closings or self._stopping
                )
                gap_s = self._committed_s + COMMIT_GAP_S - time.monotonic()
                if gap_s > 0:
                    self._condition.wait_for(self._can_not_wait, gap_s)
                self._hurry = False
                group = _Group(self._outcomes, self._started)
                closing = self._closings[0] if self._closings else None
                if self._stopping and not (group.outcomes or group.started or closing):
                    return
                self._outcomes, self._outcomes_bytes, self._started = [], 0, []
                self._condition.notify_all()
            if group.outcomes or group.started:
                self._persist(lambda group=group: self._commit_group(group), group.job_ids)  # type: ignore[misc]
                self.stored += len(group.outcomes) if self._stores else 0
            if closing is not None:
                self._persist(lambda closing=closing: self._commit_slice(closing), (closing.job_id,))  # type: ignore[misc]
                if self._stopping and not self._stores:
                    return  # what could not be stored is asked again after the next start
                if closing.after is None:
                    with self._condition:
                        self._closings.popleft()
                    closing.done.set()

    def _can_not_wait(self) -> bool:
        return bool(self._hurry or self._closings or self._stopping or len(self._outcomes) >= MAX_INBOX // 2)

    def _persist(self, commit: Callable[[], list[Standing]], job_ids: Collection[str]) -> None:
        """Commit until it is done, then tell who waits for it."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                ended = commit()
                break
            except Exception as error:  # whatever it is, an answer that was paid for is not dropped
                if self._stores:
                    log_failure(
                        log, "answers can't be stored; nothing is sent meanwhile", error, action="record"
                    )
                self._stores = False
                if self._stopping:
                    log.error(
                        "the last answers can't be stored: they are asked for again after the next start",
                        extra={"action": "record"},
                    )
                    return
                threading.Event().wait(retry_s)
                retry_s = min(LONGEST_RETRY_S, 2 * retry_s)
        self.commits += 1
        self._committed_s = time.monotonic()
        if not self._stores:
            self._stores = True
            log.info("answers are stored again", extra={"action": "record"})
            self.on_recovered()
        self.on_committed(job_ids)
        for job in ended:
            self.on_ended(job.id, job.run)
            if job.delivery == DeliveryMode.WEBHOOK:
                self.on_delivery()
        if ended:
            self.on_file()

    def _commit_group(self, group: _Group) -> list[Standing]:
        """In few statements for all jobs of the group; in some for each, if it decides what is decided already."""
        try:
            return self._store_group(group, _record_together)
        except NotAllPending:
            return self._store_group(group, _record_singly)

    def _store_group(self, group: _Group, record: Recording) -> list[Standing]:
        now = utc_now()
        by_job: dict[str, list[Outcome]] = {}
        for outcome in group.outcomes:
            by_job.setdefault(outcome.job_id, []).append(self._storable(outcome))
        with self._database.write(urgent=True) as session:
            if not _is_stored(session, group):
                job_store.start(session, group.started, now)
                job_store.add_progress(session, record(session, by_job))
            jobs = self._end_jobs(session, by_job, now)
            group.requests = {job.id: job.requests for job in jobs if any(o.calls for o in by_job[job.id])}
        return _over(jobs)

    def _storable(self, outcome: Outcome) -> Outcome:
        """The outcome, or that its answer is too large for the database."""
        if isinstance(outcome.decision, Answer) and not self._database.takes(outcome.decision.text):
            return replace(outcome, decision=UNSTORABLE)
        return outcome

    def _commit_slice(self, closing: _Closing) -> list[Standing]:
        if closing.after is None:
            return []
        with self._database.write(urgent=True) as session:
            if job_store.run_of(session, closing.job_id) != closing.run:
                closing.after = None  # it has ended without this, and was retried
                return []
            failed, after = task_store.fail_pending(
                session, closing.job_id, closing.failure, after=closing.after, spare=closing.spare
            )
            progress = JobProgress(failed=failed, results_bytes=failed * len(closing.failure.message))
            job_store.add_progress(session, {closing.job_id: progress})
            jobs = self._end_jobs(session, [closing.job_id], utc_now()) if after is None else []
        closing.after = after
        return _over(jobs)

    def _end_jobs(self, session: Session, job_ids: Collection[str], now: datetime) -> list[Standing]:
        """End those whose tasks are all decided; how far the jobs were before."""
        jobs = job_store.standings(session, job_ids)
        if ending := [job for job in jobs if job.is_to_end]:
            job_store.end(session, [job.id for job in ending], now)
            webhooks = [job for job in ending if job.delivery == DeliveryMode.WEBHOOK]
            delivery_store.add_job_deliveries(session, webhooks, self._webhook_url, now)
            file_store.owe(session, [(job.id, job.run) for job in ending], now)
        return jobs


def _over(jobs: Iterable[Standing]) -> list[Standing]:
    """Those that have ended now, or by a commit that seemed to fail: who waits for them was not told."""
    return [job for job in jobs if job.is_to_end or job.finished_at is not None]


def _is_stored(session: Session, group: _Group) -> bool:
    """Whether a commit that seemed to fail has stored the group, whole as commits are; nobody else counts requests."""
    jobs = job_store.standings(session, group.requests)
    return any(job.requests == group.requests[job.id] for job in jobs)


def _record_together(session: Session, by_job: ByJob) -> dict[str, JobProgress]:
    """Raises NotAllPending if not all is recorded."""
    everything = [outcome for outcomes in by_job.values() for outcome in outcomes]
    task_store.record_decisions(session, everything)
    task_store.record_attempts(session, everything)
    return {job_id: _progress(outcomes, *_decided(outcomes)) for job_id, outcomes in by_job.items()}


def _record_singly(session: Session, by_job: ByJob) -> dict[str, JobProgress]:
    """By finding out for each job how many of its tasks are decided by this."""
    progress: dict[str, JobProgress] = {}
    for job_id, outcomes in by_job.items():
        answered = task_store.record_answers(session, outcomes)
        failed = task_store.record_failures(session, outcomes)
        if not (answered or failed) and any(_decided(outcomes)):
            continue  # this very group was stored already, by a commit that seemed to fail
        task_store.record_attempts(session, outcomes)
        progress[job_id] = _progress(outcomes, answered, failed)
    return progress


def _decided(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """How many of the outcomes are answers, and failures."""
    kinds = [type(outcome.decision) for outcome in outcomes]
    return kinds.count(Answer), kinds.count(Failure)


def _progress(outcomes: Iterable[Outcome], answered: int, failed: int) -> JobProgress:
    progress = JobProgress(answered, failed, sum(map(_result_bytes, outcomes)))
    for outcome in outcomes:
        progress.add_call(outcome.calls, outcome.usage)
    return progress


def _result_bytes(outcome: Outcome) -> int:
    if isinstance(outcome.decision, Answer):
        return len(outcome.decision.text.encode())
    return len(outcome.decision.message) if outcome.decision else 0
