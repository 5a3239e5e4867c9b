"""Deletes what nobody needs any more: discarded jobs, jobs past their retention, old keys and tokens. In slices.

It is also the thread that works off what the database would not let a request do; that goes first.
"""

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from gpt_worker.db import Database, log_failure, trouble_of
from gpt_worker.domain import utc_now
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import result_files as file_store
from gpt_worker.store import tasks as task_store

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 600.0
AFTER_TROUBLE_S = 5.0  # as long as the clients are told to wait
AFTER_BUG_S = 30.0


class Janitor:
    """One thread, asleep but for a sweep now and then."""

    def __init__(
        self,
        database: Database,
        retain_days: int,
        also: Callable[[], None],
        *,
        on_files: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._on_files = on_files  # there are files of jobs that are gone
        self._retain_days = retain_days
        self._also = also
        self._stopping = threading.Event()
        self._wanted = threading.Event()
        self._work_off: Callable[[], None] = lambda: None
        self._troubled = False  # and it has been told
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def start(self, work_off: Callable[[], None]) -> None:
        """Begin; `work_off` does what is owed, and is asked often."""
        self._work_off = work_off
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wanted.set()
        self._thread.join(5)

    def wake(self) -> None:
        """There is something to delete, or to work off."""
        self._wanted.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wanted.clear()
            try:
                self._work_off()
                self.sweep()
                wait_s = SWEEP_EVERY_S
                self._troubled = False
            except Exception as error:
                trouble = trouble_of(error)
                if not (trouble and self._troubled):
                    log_failure(log, "cleaning up failed; trying again", error, action="sweep")
                self._troubled = trouble is not None
                wait_s = AFTER_TROUBLE_S if trouble else AFTER_BUG_S
            self._wanted.wait(wait_s)

    def sweep(self) -> None:
        """Delete what is due, a slice a commit."""
        now = utc_now()
        with self._database.write() as session:
            job_store.drop_old_keys(session, now - timedelta(hours=24))
            if self._retain_days:
                job_store.discard_older(session, now - timedelta(days=self._retain_days))
        if self._retain_days:
            self._prune_deliveries(now - timedelta(days=self._retain_days))
        self._also()
        with self._database.read() as session:
            job_ids = job_store.discarded_jobs(session)
        for job_id in job_ids:
            self._delete(job_id)

    def _prune_deliveries(self, finished_before: datetime) -> None:
        pruned = delivery_store.SLICE_DELIVERIES
        while pruned == delivery_store.SLICE_DELIVERIES and not self._stopping.is_set():
            with self._database.write() as session:
                pruned = delivery_store.prune(session, finished_before)

    def _delete(self, job_id: str) -> None:
        while not self._stopping.is_set():
            self._work_off()  # a large job must not keep that waiting
            with self._database.write() as session:
                if task_store.delete_slice(session, job_id):
                    continue
                has_files = file_store.drop_for_job(session, job_id, utc_now())
                job_store.delete_job(session, job_id)
            if has_files:
                self._on_files()
            return
