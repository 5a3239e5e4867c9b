"""What can be done with a job: submit, look, wait, cancel, retry, purge.

A submit is stored whole before it is answered, and handed to the dispatcher after its last commit. What the database
fails in the middle of one is taken back, and a retry gone on with, as soon as it works again (`work_off`). A commit
that raises may have landed: then what is stored is looked at, and what follows from it is done.
"""

import logging
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from itertools import chain

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from config import Settings
from gpt_worker.db import Database, log_failure, trouble_of
from gpt_worker.dispatcher import Dispatcher
from gpt_worker.domain import (
    HIDDEN,
    UNFINISHED,
    Caller,
    DeliveryMode,
    EncodedPrompt,
    ErrorCode,
    Failure,
    JobSettings,
    JobStatus,
    NewTask,
    new_id,
    utc_now,
)
from gpt_worker.errors import Conflict, DiskLow, Invalid, NotFound, TooLarge
from gpt_worker.models import IdempotencyRow, JobRow
from gpt_worker.prompts import encode
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import result_files as file_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.tasks import SLICE_TASKS, Reopened
from gpt_worker.user_limits import check_room

log = logging.getLogger(__name__)

MIN_FREE_BYTES = 200 << 20
LOOK_EVERY_S = 1.0
CLOSE_WAIT_S = 2.0
SLICE_TOKENS = 2_000_000  # about 8 MB of prompts
EVERY_RUN = sys.maxsize
NOBODY = "-"  # whose Idempotency-Keys those without a token share; Oracle would take '' for NULL
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


StillAdmitted = Callable[[Session], None]
"""Raises when who asked may ask no more; looked at in the transaction that stores what they ask for."""


def always(_session: Session) -> None:
    """Of whoever needs no token."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submit; `replayed` if an earlier submit with the same key made it."""

    job_id: str
    replayed: bool = False


@dataclass(slots=True)
class _Incoming:
    """A job that is being stored; `job.total` is how many of its tasks are."""

    job: JobRow
    claim: IdempotencyRow | None
    still_admitted: StillAdmitted
    told: int  # how many tasks there will be, if that is known
    ids_bytes: int = 0
    may_be_stored: bool = False  # a commit of it was begun, whatever became of that


@dataclass(slots=True)
class _Reopening:
    """A run that has begun with its first slice of tasks, and what of it is still to be reopened."""

    job: JobRow
    codes: Collection[ErrorCode] | None
    after: int | None  # the position to go on behind, or None when every slice is reopened
    left: int  # tasks that are not reopened yet
    key: tuple[str, int]  # the job's id, and the run
    deadline_at: datetime  # by which it is known from another one of the same run


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
            freeze_owed  # makes the bodies of a job's webhooks before its next run changes them
        )
        self._on_discarded = on_discarded  # wakes who calls `work_off` and deletes what is discarded
        self._owed: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._waiters: dict[str, set[threading.Event]] = {}
        # By job and run: its owner, and the tasks that the job's own counts don't show yet, since it is being received
        # or reopened. Changed in writing sessions.
        self._coming: dict[tuple[str, int | None], tuple[str | None, int]] = {}
        self._closing = False

    # Submitting

    def submit(
        self,
        caller: Caller,
        request: JobRequest,
        idempotency: Idempotency | None = None,
        still_admitted: StillAdmitted = always,
    ) -> Submitted:
        """Store a job and queue it; it is safe once this returns.

        An upload may last: `still_admitted` is asked in each of its commits, and what it raises takes the job back.

        Raises:
            DiskLow: nothing was stored.
            Invalid: from reading `request.tasks`, or for an Idempotency-Key used for another request.
            TooMany, TooLarge: with it, the caller would have more than a user may have.
            Conflict: the first submit with this Idempotency-Key is still being stored.
        """
        claim: IdempotencyRow | None = None
        if idempotency is not None:
            claim = self._claim(caller, idempotency, still_admitted)
            if claim.job_id is not None:
                return Submitted(claim.job_id, replayed=True)
        job = _new_job(caller, request)
        told = len(request.tasks) if isinstance(request.tasks, Sized) else 0
        incoming = _Incoming(job, claim, still_admitted, told)
        try:
            self.check_disk()
            self._store_slices(incoming, request.tasks)
        except BaseException:
            if incoming.may_be_stored or claim is not None:
                self._do_at_last(lambda: self._take_back(job.id, claim))
            raise
        finally:
            self._coming.pop((job.id, job.run), None)
        self._hand_over(job)
        log.info("job accepted", extra={"action": "submit", "job_id": job.id, "tasks": job.total})
        return Submitted(job.id)

    def check_disk(self) -> None:
        """Raises DiskLow when there is too little disk left to accept work."""
        if shutil.disk_usage(self._settings.data_dir).free < MIN_FREE_BYTES:
            raise DiskLow("less than 200 MiB of disk are free: no new work is accepted, running jobs go on")

    def check_limits(self, caller: Caller, key_hash: str | None) -> None:
        """What is known before a submit's body is read: TooMany if the caller may have no further job or task now.

        A submit whose Idempotency-Key is known may be one of a job that there is, and is let through.
        """
        with self._database.read() as session:
            if key_hash is None or not job_store.knows_key(session, caller.user_id or "", key_hash):
                self._check_room(session, caller.user_id, 1)

    def _check_room(self, session: Session, owner_id: str | None, tasks: int) -> None:
        """Raises TooMany or TooLarge if one more job of so many tasks were too much; exact in a writing session."""
        if self._settings.max_user_jobs is None and self._settings.max_user_tasks is None:
            return
        unfinished = job_store.unfinished_of(session, owner_id)
        coming = sum(left for owner, left in list(self._coming.values()) if owner == owner_id)
        known = replace(unfinished, pending=unfinished.pending + coming)
        check_room(known, tasks, self._settings, utc_now())

    def _claim(
        self, caller: Caller, idempotency: Idempotency, still_admitted: StillAdmitted
    ) -> IdempotencyRow:
        """The key, which is ours now; or that of an earlier submit, with its job."""
        now = utc_now()
        claim = IdempotencyRow(
            user_key=caller.user_id or NOBODY,
            key_hash=idempotency.key_hash,
            request_hash=idempotency.request_hash,
            job_id=None,
            created_at=now,
        )
        with self._write(partial(self._free, claim)) as session:
            still_admitted(session)
            job_store.drop_old_keys(session, now - timedelta(hours=24))
            earlier = job_store.claim_key(session, claim)
            if earlier is None:
                return claim
            if earlier.request_hash != idempotency.request_hash:
                raise Invalid.at("this key was used for another request", "header", "Idempotency-Key")
            if earlier.job_id is None:
                raise Conflict("the first submit with this Idempotency-Key is still being stored; try again")
            return earlier

    def _store_slices(self, incoming: _Incoming, tasks: Iterable[NewTask]) -> None:
        """One commit a slice; the last commit, which may be the only one, makes the job visible.

        Of a large job, a slice is stored by another thread while this one reads the next.
        """
        slices = _slices(tasks)
        first, second = next(slices, []), next(slices, None)
        if second is None:
            self._store_slice(incoming, first, is_last=True)
        else:
            with SHORT_TURNS, ThreadPoolExecutor(1, "upload") as writer:
                storing = writer.submit(self._store_slice, incoming, first)
                for current in chain((second,), slices):
                    storing.result()
                    storing = writer.submit(self._store_slice, incoming, current)
                storing.result()
            self._store_slice(incoming, [], is_last=True)
        incoming.job.status = JobStatus.QUEUED

    def _store_slice(self, incoming: _Incoming, tasks: Sequence[NewTask], *, is_last: bool = False) -> None:
        job = incoming.job
        stored = job.total + len(tasks)
        with self._database.write() as session:
            incoming.still_admitted(session)
            self._coming.pop((job.id, job.run), None)
            self._check_room(session, job.owner_id, max(incoming.told, stored))
            if not job.total:
                job_store.add_job(session, job)
                session.flush()
            self._add_tasks(session, job, tasks)
            incoming.ids_bytes += len("".join([task.id for task in tasks]).encode())
            if is_last:
                job_store.queue(session, job.id, stored, incoming.ids_bytes)
                if incoming.claim is not None:
                    job_store.bind_key(session, incoming.claim, job.id)
            else:
                self._coming[job.id, job.run] = job.owner_id, max(incoming.told, stored)
            incoming.may_be_stored = True
        job.total = stored

    def _add_tasks(self, session: Session, job: JobRow, tasks: Sequence[NewTask]) -> None:
        """Store the next tasks of a job; TooLarge, which names the task, for one that the database does not take."""
        try:
            task_store.add_tasks(session, job.id, job.total, tasks)
        except TooLarge as error:
            for task in tasks:
                if not self._database.takes(job.id + task.id + encode(task.prompt)):
                    raise TooLarge(f"The prompt of the task {task.id!r} is too large. {error}") from error
            raise

    def _take_back(self, job_id: str, claim: IdempotencyRow | None) -> None:
        """A submit has failed: what is stored of it goes, and its Idempotency-Key is free again."""
        with self._database.write() as session:
            job_store.discard(session, job_id)
            if claim is not None:
                job_store.free_key(session, claim)
        self._let_go(job_id)

    def _free(self, claim: IdempotencyRow) -> None:
        """Its Idempotency-Key is free again, if it was ever taken."""
        with self._database.write() as session:
            job_store.free_key(session, claim)

    # What must be done though the database fails

    @contextmanager
    def _write(self, settle: Callable[[], None]) -> Iterator[Session]:
        """A writing transaction; if its commit raises, `settle` is owed.

        That commit may have landed all the same, or may still land; and the caller may have come again before `settle`
        is called. So that looks at what is stored before it acts.
        """
        commits = False
        try:
            with self._database.write() as session:
                yield session
                commits = True
        except BaseException:
            if commits:
                self._owe(settle)
            raise

    def _do_at_last(self, step: Callable[[], None]) -> None:
        """Do it now, or when the database works again; it may be begun more than once."""
        try:
            step()
        except Exception as error:
            message = "what a failed submit has stored is taken back later"
            log_failure(log, message, error, logging.WARNING, action="owe")
            self._owe(step)

    def _owe(self, step: Callable[[], None]) -> None:
        self._owed.append(step)
        self._on_discarded()

    def work_off(self) -> None:
        """Do what is still owed; one thread's work, and none if nothing is.

        Raises what shows that the database can't be used yet.
        """
        while self._owed:
            step = self._owed.popleft()
            try:
                step()
            except Exception as error:
                if trouble_of(error):
                    self._owed.appendleft(step)
                    raise
                log.exception(
                    "something is left unsettled until the next start", extra={"action": "work_off"}
                )

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
        with self._write(partial(self._settle, job_id)) as session:
            job = self._found(job_store.find_job(session, job_id, caller))
            job_store.cancel(session, job_id)
        # Also one that was cancelled before: that may have failed its caller.
        if closed := self._close_cancelled(job):
            # Worth the moment: so the reply shows what was not sent as cancelled.
            closed.wait(CLOSE_WAIT_S)

    def purge(self, caller: Caller, job_id: str) -> None:
        """The job is gone, with all that belongs to it; what is in flight lands nowhere."""
        with self._write(partial(self._settle, job_id)) as session:
            self._found(job_store.find_job(session, job_id, caller))
            delivery_store.drop_for_job(session, job_id)
            file_store.drop_for_job(session, job_id, utc_now())
            job_store.discard(session, job_id)
        self._let_go(job_id)

    def _settle(self, job_id: str) -> None:
        """Do what follows from what is stored of a job, since nobody knows whether a cancel or purge of it is."""
        with self._database.write() as session:
            job = job_store.lock_job(session, job_id)
        if job is None or job.status in HIDDEN:
            self._let_go(job_id)
        else:
            self._close_cancelled(job)

    def _close_cancelled(self, job: JobRow) -> threading.Event | None:
        """Close a job that is cancelled and not finished; the event is set when that is stored. May come twice."""
        if job.status != JobStatus.CANCELLED or job.finished_at is not None:
            return None
        return self._dispatcher.close(job.id, job.run, CANCELLED)

    def _let_go(self, job_id: str) -> None:
        """A job is gone for good. May come twice."""
        self._dispatcher.forget(job_id, EVERY_RUN)
        self._release(job_id)
        self._on_discarded()

    def retry(
        self,
        caller: Caller,
        job_id: str,
        codes: Collection[ErrorCode] | None,
        still_admitted: StillAdmitted = always,
    ) -> bool:
        """Ask the tasks without an answer (of these codes) again, as the job's next run; False if there is none.

        A run that has begun goes on, also if this raises because the database failed it. `still_admitted` is asked in
        the commit that begins it.

        Raises:
            Conflict: the job is unfinished.
            TooMany, TooLarge: with these tasks, the job's owner would have more than a user may have.
        """
        self.find(caller, job_id)
        self.check_disk()
        reopening = self._begin_run(caller, job_id, codes, still_admitted)
        if reopening is None:
            return False
        try:
            self._reopen_rest(reopening)
        except BaseException:
            self._owe(partial(self._go_on, reopening))
            raise
        return True

    def _begin_run(
        self,
        caller: Caller,
        job_id: str,
        codes: Collection[ErrorCode] | None,
        still_admitted: StillAdmitted,
    ) -> _Reopening | None:
        """Reopen the first slice, which makes it the job's next run; None if there is nothing to reopen."""
        while True:
            self._freeze_owed(job_id)
            reopening: _Reopening | None = None
            try:
                with self._database.write() as session:
                    still_admitted(session)
                    job = self._found(job_store.find_job(session, job_id, caller))
                    _check_finished(job)
                    if delivery_store.has_unfrozen(session, job):
                        continue  # the run has ended only now, and its webhook is still to be made
                    first = task_store.reopen_slice(session, job_id, codes, -1)
                    if not first.tasks:
                        return None
                    reopening = self._queue_again(session, job, codes, first)
            except BaseException:
                if reopening is not None:  # then it was the commit, which may have landed
                    self._owe(partial(self._go_on, reopening))
                raise
            return reopening

    def _queue_again(
        self, session: Session, job: JobRow, codes: Collection[ErrorCode] | None, first: Reopened
    ) -> _Reopening:
        """The next run of a job whose first slice is reopened; all of its slices count from now on."""
        run = job.id, job.run + 1
        self._coming.pop(run, None)  # of a retry whose commit has not landed
        tasks = first.tasks
        if codes is None:
            tasks = job.failed
        elif first.after is not None:
            tasks += job_store.count_failed(session, job.id, codes, first.after)
        self._check_room(session, job.owner_id, tasks)
        # In whole milliseconds, as every store keeps it: it is looked for there.
        lasts_ms = round(JobSettings.from_json(job.settings).deadline_s * 1000)
        deadline_at = utc_now() + timedelta(milliseconds=lasts_ms)
        job_store.reopen(job, deadline_at)
        _count_reopened(job, first)
        reopening = _Reopening(job, codes, first.after, tasks - first.tasks, run, deadline_at)
        self._coming[reopening.key] = job.owner_id, reopening.left
        return reopening

    def _go_on(self, reopening: _Reopening) -> None:
        """Do what is left of a run that the database has failed, if it is the one that is stored as begun."""
        begun = (*reopening.key, JobStatus.QUEUED, reopening.deadline_at)
        with self._database.write() as session:
            job = job_store.lock_job(session, reopening.key[0])
            if job is None or (job.id, job.run, job.status, job.deadline_at) != begun:
                self._coming.pop(reopening.key, None)
                return
        reopening.job = job
        self._reopen_rest(reopening)

    def _reopen_rest(self, reopening: _Reopening) -> None:
        """Reopen what is left of a run's tasks, a slice a commit, and hand the job over; goes on where it failed."""
        job_id, run = reopening.key
        while reopening.after is not None:
            with self._database.write() as session:
                job = job_store.get_job(session, job_id)
                if job is None or (job.run, job.status) != (run, JobStatus.QUEUED):
                    break  # cancelled or purged meanwhile: what was not reopened yet stays failed
                reopened = task_store.reopen_slice(session, job_id, reopening.codes, reopening.after)
                _count_reopened(job, reopened)
                left = reopening.left - reopened.tasks
                self._coming[reopening.key] = job.owner_id, left
            reopening.job, reopening.after, reopening.left = job, reopened.after, left
        self._coming.pop(reopening.key, None)
        if reopening.after is None:
            self._hand_over(reopening.job)

    def _hand_over(self, job: JobRow) -> None:
        """Give a queued job to the dispatcher, unless it was cancelled or purged before that could know of it."""
        self._dispatcher.add(job)
        try:
            with self._database.read() as session:
                stored = job_store.get_job(session, job.id)
        except SQLAlchemyError:
            # It is stored and queued: a failure now would have the client submit it again.
            log.warning("a queued job can't be read back", extra={"action": "submit", "job_id": job.id})
            return
        if stored is None or stored.status not in UNFINISHED:
            self._dispatcher.forget(job.id, job.run)


def _new_job(caller: Caller, request: JobRequest) -> JobRow:
    """A job of which nothing is stored yet."""
    now = utc_now()
    return JobRow(
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


def _check_finished(job: JobRow) -> None:
    """Raises Conflict if the job's run goes on."""
    if job.finished_at is not None:
        return
    if job.status == JobStatus.CANCELLED:
        raise Conflict(
            "the job is cancelled, but calls in flight still land: retry it when finished_at is set"
        )
    raise Conflict("the job is not finished yet: wait for it, or cancel it first")


def _count_reopened(job: JobRow, reopened: Reopened) -> None:
    job.failed -= reopened.tasks
    job.results_bytes -= reopened.message_length


class ShortTurns:
    """While somebody is inside, Python's threads take turns ten times as often.

    A thread that reads a large upload never waits for anything; each time another one does, however briefly, it then
    waits for a whole turn of the reader's, and a small job waits dozens of times. With more turns everything costs
    more, so they are taken only while there is such a reader.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(self._usual_s / 10)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._usual_s)


SHORT_TURNS = ShortTurns()  # as there is one interpreter


def _slices(tasks: Iterable[NewTask]) -> "Iterator[list[NewTask]]":
    """The tasks of one commit each: so many, and so large together, that neither memory nor the gate is held long."""
    current: list[NewTask] = []
    tokens = 0
    for task in tasks:
        current.append(task if isinstance(task.prompt, str) else _with_encoded_prompt(task))
        tokens += task.tokens
        if len(current) == SLICE_TASKS or tokens >= SLICE_TOKENS:
            yield current
            current, tokens = [], 0
    if current:
        yield current


def _with_encoded_prompt(task: NewTask) -> NewTask:
    """Thousands wait for their commit, and only as text does a prompt take no more than its tokens tell."""
    return task._replace(prompt=EncodedPrompt(encode(task.prompt)))
