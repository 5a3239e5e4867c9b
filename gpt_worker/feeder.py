"""Feeds the fair queue: pages of pending tasks from the database, and the ends of jobs that are past their deadline.

One thread, asleep while no job wants a page and none is late. It shares the dispatcher's lock, and never queries
while it holds it.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from gpt_worker.backoff import Tries
from gpt_worker.db import Database, log_failure
from gpt_worker.domain import utc_now
from gpt_worker.fair_queue import PAGE_TASKS, FairQueue, JobRun, QueuedTask
from gpt_worker.store import tasks as task_store
from gpt_worker.store.tasks import Page, PendingTask

log = logging.getLogger(__name__)

PAGE_TOKENS = 1_000_000
PAGES_AT_ONCE = 16  # of small jobs, which would each wake every key for a few tasks
RETRY_READ_S = 1.0


class Fed(Protocol):
    """What the feeder asks of the dispatcher."""

    def end_early(self, job: JobRun) -> None: ...

    def expire(self, job: JobRun) -> None: ...

    def page_came(self) -> None:
        """New tasks are in the queue; the lock is held."""


class Feeder:
    """The thread that feeds one queue."""

    def __init__(self, database: Database, queue: FairQueue, lock: threading.Lock, fed: Fed) -> None:
        self._database = database
        self._queue = queue
        self._lock = lock
        self._wanted = threading.Condition(lock)
        self._fed = fed
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def notify(self) -> None:
        """A job may want a page; the lock is held."""
        self._wanted.notify()

    def end(self) -> None:
        """No more pages; the lock is held."""
        self._ended = True
        self._wanted.notify_all()

    def _run(self) -> None:
        while not self._ended:
            try:
                self._feed_once()
            except Exception:
                log.exception("the feeder ran into a bug and goes on", extra={"action": "feed"})
                threading.Event().wait(RETRY_READ_S)

    def _feed_once(self) -> None:
        with self._lock:
            jobs = self._queue.wanting_pages(PAGES_AT_ONCE)
            if not jobs and not self._ended:
                self._wanted.wait(self._until_next_deadline_s())
                jobs = self._queue.wanting_pages(PAGES_AT_ONCE)
            if self._ended:
                return
            late = self._queue.overdue(utc_now())
            for job in jobs:
                job.loading = True
        try:
            for run in late:
                self._fed.expire(run)
            for job in jobs:
                self._fed.end_early(job)
            if jobs:
                self._load_pages(jobs)
        finally:
            for job in jobs:
                job.loading = False

    def _load_pages(self, jobs: Sequence[JobRun]) -> None:
        """Read a page of each job, and of no further job once there is as much in all as one page may hold."""
        pages: list[tuple[JobRun, Page[PendingTask]]] = []
        left, read = PAGE_TOKENS, 0
        try:
            with self._database.read() as session:
                for job in jobs:
                    page = task_store.pending_page(session, job.id, job.cursor, PAGE_TASKS, left)
                    pages.append((job, page))
                    left -= sum(task.weight for task in page.tasks)
                    read += len(page.tasks)
                    if left <= 0 or read >= PAGE_TASKS:
                        break
        except SQLAlchemyError as error:
            job_id = jobs[min(len(pages), len(jobs) - 1)].id
            log_failure(
                log, "a page of tasks can't be read; trying again", error, action="feed", job_id=job_id
            )
            threading.Event().wait(RETRY_READ_S)
            return
        with self._lock:
            for job, page in pages:
                self._add(job, page)
            if any(page.tasks for _, page in pages):
                self._fed.page_came()

    def _add(self, job: JobRun, page: Page[PendingTask]) -> None:
        cursor = page.tasks[-1].position if page.tasks else job.cursor
        tasks = [
            QueuedTask(
                task.position,
                task.prompt,
                task.tokens,
                task.weight,
                Tries(task.attempts),
                pack_limit=1 if task.crashes else None,  # others shall not crash with it
            )
            for task in page.tasks
        ]
        job.add_page(tasks if job.closing is None else [], cursor, exhausted=not page.more)

    def _until_next_deadline_s(self) -> float | None:
        deadline = self._queue.next_deadline()
        return None if deadline is None else max(0.01, (deadline - utc_now()).total_seconds())
