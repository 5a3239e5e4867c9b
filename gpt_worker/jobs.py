"""What can be done with a job: submit, look, wait, cancel, retry, purge.

A submit is stored whole before it is answered, and handed to the dispatcher after its last commit.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

from config import Settings
from gpt_worker.db import Database
from gpt_worker.dispatcher import Dispatcher
from gpt_worker.domain import (
    HIDDEN,
    UNFINISHED,
    Caller,
    DeliveryMode,
    ErrorCode,
    Failure,
    JobSettings,
    JobStatus,
    NewTask,
    new_id,
    utc_now,
)
from gpt_worker.errors import Conflict, DiskLow, Invalid, NotFound
from gpt_worker.models import IdempotencyRow, JobRow
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.tasks import SLICE_TASKS

log = logging.getLogger(__name__)

MIN_FREE_BYTES = 200 << 20
LOOK_EVERY_S = 1.0
CLOSE_WAIT_S = 2.0
SLICE_TOKENS = 2_000_000  # about 8 MB of prompts
CANCELLED = Failure(ErrorCode.CANCELLED, "the job was cancelled before this task was sent")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job as it is asked for; `tasks` is read once."""

    settings: JobSettings
    model: str
    delivery: DeliveryMode
    metadata: Mapping[str, str]
    tasks: Iterable[NewTask]


@dataclass(frozen=True, slots=True)
class Idempotency:
    """An Idempotency-Key and the request it stands for, both hashed."""

    key_hash: str
    request_hash: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submit; `replayed` if an earlier submit with the same key made it."""

    job_id: str
    replayed: bool = False


class Jobs:
    """Every job of the service."""

    def __init__(
        self,
        database: Database,
        dispatcher: Dispatcher,
        settings: Settings,
        *,
        freeze_owed: Callable[[str], None],
        on_discarded: Callable[[], None],
    ) -> None:
        self._database = database
        self._dispatcher = dispatcher
        self._settings = settings
        self._freeze_owed = (
            freeze_owed  # makes the bodies of a job's webhooks before its next run changes what they tell
        )
        self._on_discarded = on_discarded
        self._lock = threading.Lock()
        self._waiters: dict[str, set[threading.Event]] = {}
        self._closing = False

    # Submitting

    def submit(
        self, caller: Caller, request: JobRequest, idempotency: Idempotency | None = None
    ) -> Submitted:
        """Store a job and queue it; it is safe once this returns.

        Raises:
            DiskLow: nothing was stored.
            Invalid: from reading `request.tasks`, or for an Idempotency-Key used for another request.
            Conflict: the first submit with this Idempotency-Key is still being stored.
        """
        if idempotency is None:
            self.check_disk()
            return Submitted(self._store(caller, request))
        earlier = self._claim(caller, idempotency)
        if earlier is not None:
            return Submitted(earlier, replayed=True)
        try:
            self.check_disk()
            return Submitted(self._store(caller, request, idempotency))
        except BaseException:
            with self._database.write() as session:
                job_store.free_key(session, caller.user_id or "", idempotency.key_hash)
            raise

    def check_disk(self) -> None:
        """Raises DiskLow when there is too little disk left to accept work."""
        if shutil.disk_usage(self._settings.data_dir).free < MIN_FREE_BYTES:
            raise DiskLow("less than 200 MiB of disk are free: no new work is accepted, running jobs go on")

    def _claim(self, caller: Caller, idempotency: Idempotency) -> str | None:
        row = IdempotencyRow(
            user_key=caller.user_id or "",
            key_hash=idempotency.key_hash,
            request_hash=idempotency.request_hash,
            job_id=None,
            created_at=utc_now(),
        )
        with self._database.write() as session:
            job_store.drop_old_keys(session, utc_now() - timedelta(hours=24))
            earlier = job_store.claim_key(session, row)
            if earlier is None:
                return None
            if earlier.request_hash != idempotency.request_hash:
                raise Invalid.at("this key was used for another request", "header", "Idempotency-Key")
            if earlier.job_id is None:
                raise Conflict("the first submit with this Idempotency-Key is still being stored; try again")
            return earlier.job_id

    def _store(self, caller: Caller, request: JobRequest, idempotency: Idempotency | None = None) -> str:
        now = utc_now()
        job = JobRow(
            id=new_id(),
            owner_id=caller.user_id,
            status=JobStatus.RECEIVING,
            run=1,
            model=request.model,
            delivery=request.delivery,
            settings=request.settings.to_json(),
            meta=dict(request.metadata),
            priority=request.settings.priority,
            total=0,
            answered=0,
            failed=0,
            results_bytes=0,
            requests=0,
            prompt_tokens=0,
            completion_tokens=0,
            created_at=now,
            deadline_at=now + timedelta(seconds=request.settings.deadline_s),
        )
        try:
            self._store_slices(job, request.tasks, caller, idempotency)
        except BaseException:
            self._discard(job.id)
            raise
        self._hand_over(job)
        log.info("job accepted", extra={"action": "submit", "job_id": job.id, "tasks": job.total})
        return job.id

    def _store_slices(
        self, job: JobRow, tasks: Iterable[NewTask], caller: Caller, idempotency: Idempotency | None
    ) -> None:
        """One commit a slice; the last one, which may be the only one, makes the job visible."""
        total = ids_bytes = 0
        slices = _slices(tasks)
        current = next(slices, [])
        while True:
            following = next(slices, None)
            with self._database.write() as session:
                if total == 0:
                    job_store.add_job(session, job)
                    session.flush()
                task_store.add_tasks(session, job.id, total, current)
                total += len(current)
                ids_bytes += sum(len(task.id.encode()) for task in current)
                if following is None:
                    job_store.queue(session, job.id, total, ids_bytes)
                    if idempotency is not None:
                        job_store.bind_key(session, caller.user_id or "", idempotency.key_hash, job.id)
            if following is None:
                break
            current = following
        job.total, job.status = total, JobStatus.QUEUED

    def _discard(self, job_id: str) -> None:
        with self._database.write() as session:
            job_store.discard(session, job_id)
        self._on_discarded()

    # Looking

    def find(self, caller: Caller, job_id: str) -> JobRow:
        """The job; NotFound if there is none that this caller may see."""
        with self._database.read() as session:
            return self._found(job_store.find_job(session, job_id, caller))

    def find_by_link(self, job_id: str) -> JobRow:
        """The job that a signed link names; NotFound if it is gone."""
        with self._database.read() as session:
            job = job_store.get_job(session, job_id)
        return self._found(None if job is None or job.status in HIDDEN else job)

    def list(
        self, caller: Caller, *, everyone: bool, status: JobStatus | None, before: str | None, limit: int
    ) -> "list[JobRow]":
        """Up to `limit` jobs, newest first, behind the job `before`."""
        with self._database.read() as session:
            return [
                *job_store.list_jobs(
                    session, caller, everyone=everyone, status=status, before=before, limit=limit
                )
            ]

    @staticmethod
    def _found(job: JobRow | None) -> JobRow:
        if job is None:
            raise NotFound("there is no such job")
        return job

    # Waiting

    def wait(self, job_id: str, timeout_s: float, client_left: Callable[[], bool]) -> bool:
        """Block until the job has ended; False if time passed, the client left or the service shuts down first."""
        ended = threading.Event()
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._waiters.setdefault(job_id, set()).add(ended)
        try:
            if self._has_ended(job_id):
                return True
            while not self._closing and (left_s := deadline_s - time.monotonic()) > 0:
                if ended.wait(min(LOOK_EVERY_S, left_s)):
                    return self._has_ended(job_id)
                if client_left():
                    break
            return False
        finally:
            with self._lock:
                waiters = self._waiters[job_id]
                waiters.discard(ended)
                if not waiters:
                    del self._waiters[job_id]

    def _has_ended(self, job_id: str) -> bool:
        with self._database.read() as session:
            job = job_store.get_job(session, job_id)
        return job is None or job.finished_at is not None or job.status in HIDDEN

    def ended(self, job_id: str, run: int) -> None:
        """The recorder has committed the end of a job."""
        self._dispatcher.forget(job_id, run)
        log.info("job ended", extra={"action": "end", "job_id": job_id})
        self._release(job_id)

    def begin_shutdown(self) -> None:
        """Nothing new is accepted, and whoever waits gets their 202."""
        self._closing = True
        with self._lock:
            waiting = list(self._waiters)
        for job_id in waiting:
            self._release(job_id)

    def _release(self, job_id: str) -> None:
        with self._lock:
            for waiter in self._waiters.get(job_id, ()):
                waiter.set()

    # Changing

    def cancel(self, caller: Caller, job_id: str) -> None:
        """Send nothing more of a job; calls in flight still land and are kept. A finished job is left as it is."""
        with self._database.write() as session:
            self._found(job_store.find_job(session, job_id, caller))
            cancelled = job_store.cancel(session, job_id)
        if cancelled:
            # Worth the moment: so the reply shows what was not sent as cancelled.
            self._dispatcher.close(job_id, CANCELLED).wait(CLOSE_WAIT_S)

    def purge(self, caller: Caller, job_id: str) -> None:
        """The job is gone, with all that belongs to it; what is in flight lands nowhere."""
        with self._database.write() as session:
            job = self._found(job_store.find_job(session, job_id, caller))
            run = job.run
            delivery_store.drop_for_job(session, job_id)
            job_store.discard(session, job_id)
        self._dispatcher.forget(job_id, run)
        self._release(job_id)
        self._on_discarded()

    def retry(self, caller: Caller, job_id: str, codes: Collection[ErrorCode] | None) -> bool:
        """Ask the tasks without an answer (of these codes) again, as the job's next run; False if there is none.

        Raises Conflict while the job is unfinished.
        """
        self.find(caller, job_id)
        self.check_disk()
        self._freeze_owed(job_id)
        after: int | None = -1
        run: int | None = None
        while after is not None:
            with self._database.write() as session:
                job = self._found(job_store.find_job(session, job_id, caller))
                if run is None and job.finished_at is None:
                    raise Conflict("the job is not finished yet: wait for it, or cancel it first")
                if run not in (None, job.run) or (run is not None and job.status != JobStatus.QUEUED):
                    return True  # cancelled meanwhile: what was not reopened yet stays failed
                reopened = task_store.reopen_slice(session, job_id, codes, after)
                if run is None and not reopened.tasks:
                    return False
                if run is None:
                    deadline_s = JobSettings.from_json(job.settings).deadline_s
                    job_store.reopen(job, utc_now() + timedelta(seconds=deadline_s))
                    run = job.run
                job.failed -= reopened.tasks
                job.results_bytes -= reopened.message_length
            after = reopened.after
        self._hand_over(job)
        return True

    def _hand_over(self, job: JobRow) -> None:
        """Give a queued job to the dispatcher, unless it was cancelled or purged before that could know of it."""
        self._dispatcher.add(job)
        with self._database.read() as session:
            stored = job_store.get_job(session, job.id)
        if stored is None or stored.status not in UNFINISHED:
            self._dispatcher.forget(job.id, job.run)


def _slices(tasks: Iterable[NewTask]) -> "Iterator[list[NewTask]]":
    """The tasks of one commit each: so many, and so large together, that neither memory nor the gate is held long."""
    current: list[NewTask] = []
    tokens = 0
    for task in tasks:
        current.append(task)
        tokens += task.tokens
        if len(current) == SLICE_TASKS or tokens >= SLICE_TOKENS:
            yield current
            current, tokens = [], 0
    if current:
        yield current
