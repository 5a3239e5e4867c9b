"""Jobs beside each other: what of a user's jobs counts, and what becomes of a submit or retry that fails half-way."""

import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from gpt_worker.db import Database
from gpt_worker.deliveries import Deliveries
from gpt_worker.domain import (
    Caller,
    DeliveryMode,
    DeliveryStatus,
    ErrorCode,
    Failure,
    JobSettings,
    JobStatus,
    NewTask,
    Role,
    utc_now,
)
from gpt_worker.errors import Conflict, Invalid, NotFound, TooLarge, TooMany, Unauthenticated
from gpt_worker.jobs import SLICE_TOKENS, Idempotency, JobRequest, Jobs, ShortTurns
from gpt_worker.models import JobRow
from gpt_worker.store import deliveries as delivery_store
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.jobs import JobProgress, Unfinished
from gpt_worker.store.tasks import SLICE_TASKS
from gpt_worker.write_gate import DatabaseUnusable
from tests import factories

CANCELLED = Failure(ErrorCode.CANCELLED, "")
KEY = Idempotency("a" * 64, "b" * 64)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Database]:
    """A database that knows its file, as that of a service does."""
    made = Database(Flask("test"), f"sqlite:///{tmp_path / 'served.sqlite3'}")
    made.migrate()
    yield made
    made.close()


class Told:
    """What a dispatcher that sends nothing is told."""

    def __init__(self) -> None:
        self.added: list[JobRow] = []
        self.closed: list[tuple[str, int]] = []
        self.forgotten: list[str] = []

    def close(self, job_id: str, run: int, _failure: Failure) -> threading.Event:
        self.closed.append((job_id, run))
        stored = threading.Event()
        stored.set()
        return stored


def make_jobs(
    database: Database,
    handed_over: list[JobRow] | None = None,
    freeze_owed: Callable[[str], None] = lambda _job_id: None,
    told: Told | None = None,
    **env: str,
) -> Jobs:
    """The real thing, but that nothing is sent."""
    told = told or Told()
    added = told.added if handed_over is None else handed_over
    dispatcher: Any = SimpleNamespace(
        add=added.append, close=told.close, forget=lambda job_id, _run: told.forgotten.append(job_id)
    )
    settings = factories.settings(data_dir=database.path.parent, **env)
    return Jobs(database, dispatcher, settings, freeze_owed=freeze_owed, on_discarded=lambda: None)


def request(tasks: Iterator[NewTask]) -> JobRequest:
    return JobRequest(
        settings=JobSettings(), model=factories.MODEL, delivery=DeliveryMode.INLINE, metadata={}, tasks=tasks
    )


def one_a_slice(count: int) -> Iterator[NewTask]:
    """So large that each is stored in a commit of its own."""
    return (NewTask(str(number), "a task", SLICE_TOKENS) for number in range(count))


class Mover:
    """Takes a database's file away, so that nothing can be written, and puts it back."""

    def __init__(self, database: Database) -> None:
        self._path = database.path
        self._elsewhere = database.path.with_suffix(".elsewhere")

    def take(self) -> None:
        self._path.rename(self._elsewhere)

    def put_back(self) -> None:
        self._elsewhere.rename(self._path)

    @contextmanager
    def away(self) -> Iterator[None]:
        self.take()
        yield
        self.put_back()

    def then(self, tasks: Iterator[NewTask]) -> Iterator[NewTask]:
        """Tasks, of which the third slice comes when the first is stored; then the file is gone."""
        for number, task in enumerate(tasks):
            if number == 2:
                self.take()
            yield task


BOTH = pytest.mark.parametrize("lands", [True, False], ids=["committed", "not committed"])


@contextmanager
def commit_lost(*, lands: bool, after: int = 0) -> Iterator[None]:
    """A commit, behind so many others, raises: once it is made, or instead of being made."""
    name = "after_commit" if lands else "before_commit"
    to_come = after

    def lose(_session: Session) -> None:
        nonlocal to_come
        to_come -= 1
        if to_come < 0:
            event.remove(Session, name, lose)
            raise OperationalError("COMMIT", {}, Exception("the line was cut"))

    event.listen(Session, name, lose)
    with pytest.raises(OperationalError, match="the line was cut"):
        yield


class Message(dict[str, Any]):
    """One that can be watched."""


def statuses(database: Database) -> list[str]:
    with database.read() as session:
        return sorted(job.status for job in session.query(JobRow))


def store_failed_job(database: Database, owner_id: str, tasks: int) -> str:
    """A finished job of which every task has failed."""
    job = factories.store_job(database=database, owner_id=owner_id, tasks=tasks)
    end_with_failures(database, job.id)
    return job.id


def end_with_failures(database: Database, job_id: str) -> None:
    with database.write() as session:
        after: int | None = -1
        while after is not None:
            failed, after = task_store.fail_pending(session, job_id, CANCELLED, after=after, spare=())
            job_store.add_progress(session, {job_id: JobProgress(failed=failed)})
    with database.write() as session:
        assert job_store.end(session, [job_id], utc_now())


def unfinished(database: Database, owner_id: str | None) -> Unfinished:
    with database.read() as session:
        return job_store.unfinished_of(session, owner_id)


def test_only_the_owners_queued_and_running_jobs_count(database: Database) -> None:
    ada = factories.store_user(database=database)
    bob = factories.store_user(database=database, email="bob@example.org")
    started_at = utc_now()
    for owner_id in (ada, None):
        for status in JobStatus:
            factories.store_job(database=database, owner_id=owner_id, tasks=5, status=status)
    job = factories.store_job(database=database, owner_id=ada, tasks=3)
    with database.write() as session:
        job_store.start(session, [job.id], started_at)
        job_store.add_progress(session, {job.id: JobProgress(answered=1, failed=1)})

    assert unfinished(database, ada) == Unfinished(
        jobs=3, pending=11, least_pending=1, decided=2, started_at=started_at
    )
    assert unfinished(database, None) == Unfinished(jobs=2, pending=10, least_pending=5)
    assert unfinished(database, bob) == Unfinished()


@pytest.mark.parametrize("codes", [None, [ErrorCode.CANCELLED]])
def test_slices_that_a_retry_has_yet_to_reopen_count_already(
    database: Database, monkeypatch: pytest.MonkeyPatch, codes: list[ErrorCode] | None
) -> None:
    tasks = 2 * SLICE_TASKS + 1
    caller = Caller(factories.store_user(database=database))
    job_id = store_failed_job(database, caller.user_id or "", tasks)
    jobs = make_jobs(database, MAX_USER_TASKS=str(tasks))
    reopen_slice = task_store.reopen_slice
    refusals: list[str] = []

    def watched(*arguments: Any) -> Any:
        if unfinished(database, caller.user_id).jobs:
            with pytest.raises(TooMany) as refused:
                jobs.check_limits(caller, None)
            refusals.append(str(refused.value))
        return reopen_slice(*arguments)

    monkeypatch.setattr(task_store, "reopen_slice", watched)

    assert jobs.retry(caller, job_id, codes)

    assert len(refusals) == 2
    assert all(f"{tasks} pending tasks" in refusal for refusal in refusals)
    assert unfinished(database, caller.user_id).pending == tasks


def test_refused_retry_changes_nothing(database: Database) -> None:
    caller = Caller(factories.store_user(database=database))
    job_id = store_failed_job(database, caller.user_id or "", 10)
    factories.store_job(database=database, owner_id=caller.user_id, tasks=1)
    jobs = make_jobs(database, MAX_USER_TASKS="10")

    with pytest.raises(TooMany):
        jobs.retry(caller, job_id, None)

    job = jobs.find(caller, job_id)
    assert (job.status, job.run, job.failed) == (JobStatus.FAILED, 1, 10)
    with database.read() as session:
        assert task_store.pending_page(session, job_id, -1, 100, 10**6).tasks == []


def test_retry_by_an_admin_counts_for_the_jobs_owner(database: Database) -> None:
    ada = factories.store_user(database=database)
    job_id = store_failed_job(database, ada, 10)
    factories.store_job(database=database, owner_id=ada)
    jobs = make_jobs(database, MAX_USER_JOBS="1")

    with pytest.raises(TooMany, match="MAX_USER_JOBS"):
        jobs.retry(Caller("root", role=Role.ADMIN), job_id, None)


# Whoever may ask no more


class Revoked:
    """Looks at a session as often as was asked, then refuses."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def __call__(self, session: Session) -> None:
        assert session.in_transaction()
        self._looks -= 1
        if self._looks < 0:
            raise Unauthenticated("The token was revoked.")


@pytest.mark.parametrize(
    ("looks", "stored"), [(0, []), (1, []), *((looks, [JobStatus.DISCARDED]) for looks in (2, 3, 4))]
)
def test_submit_of_whom_is_admitted_no_more_is_taken_back(
    database: Database, looks: int, stored: list[str]
) -> None:
    caller = Caller(factories.store_user(database=database))
    handed_over: list[JobRow] = []
    jobs = make_jobs(database, handed_over)

    with pytest.raises(Unauthenticated):
        jobs.submit(caller, request(one_a_slice(3)), KEY, Revoked(looks))

    assert (statuses(database), handed_over) == (stored, [])
    assert not jobs.submit(caller, request(one_a_slice(3)), KEY, Revoked(5)).replayed


def test_retry_of_whom_is_admitted_no_more_changes_nothing(database: Database) -> None:
    caller = Caller(factories.store_user(database=database))
    job_id = store_failed_job(database, caller.user_id or "", 10)
    jobs = make_jobs(database)

    with pytest.raises(Unauthenticated):
        jobs.retry(caller, job_id, None, Revoked(0))

    assert (jobs.find(caller, job_id).run, statuses(database)) == (1, [JobStatus.FAILED])
    assert jobs.retry(caller, job_id, None, Revoked(1))


# What the database fails half-way


def test_failed_submit_is_taken_back_when_the_database_works_again(served: Database) -> None:
    caller, jobs, file = Caller(factories.store_user(database=served)), make_jobs(served), Mover(served)

    with pytest.raises(DatabaseUnusable):
        jobs.submit(caller, request(file.then(one_a_slice(5))), KEY)
    with pytest.raises(DatabaseUnusable):
        jobs.work_off()
    file.put_back()
    with pytest.raises(Conflict):
        jobs.submit(caller, request(one_a_slice(1)), KEY)

    jobs.work_off()

    assert statuses(served) == [JobStatus.DISCARDED]
    assert not jobs.submit(caller, request(one_a_slice(1)), KEY).replayed


def test_refused_submit_tells_its_own_reason_though_it_can_not_be_taken_back(served: Database) -> None:
    caller, jobs, file = Caller(factories.store_user(database=served)), make_jobs(served), Mover(served)

    def bad() -> Iterator[NewTask]:
        yield from one_a_slice(1)
        file.take()
        raise Invalid.at("is bad", "line", 2)

    with pytest.raises(Invalid, match="is bad"):
        jobs.submit(caller, request(bad()), KEY)
    file.put_back()
    jobs.work_off()
    assert not jobs.submit(caller, request(one_a_slice(1)), KEY).replayed


def test_key_that_another_submit_has_taken_meanwhile_is_not_freed(served: Database) -> None:
    caller, jobs, file = Caller(factories.store_user(database=served)), make_jobs(served), Mover(served)
    with pytest.raises(DatabaseUnusable):
        jobs.submit(caller, request(file.then(one_a_slice(5))), KEY)
    file.put_back()
    with served.write() as session:
        job_store.drop_old_keys(session, utc_now() + timedelta(days=1))
    later = jobs.submit(caller, request(one_a_slice(1)), KEY)

    jobs.work_off()

    replayed = jobs.submit(caller, request(one_a_slice(1)), KEY)
    assert (replayed.job_id, replayed.replayed) == (later.job_id, True)


def test_submit_of_which_nothing_is_stored_leaves_nothing_to_settle(served: Database) -> None:
    caller, jobs, file = Caller(factories.store_user(database=served)), make_jobs(served), Mover(served)

    with file.away():
        for _ in range(3):
            with pytest.raises(DatabaseUnusable):
                jobs.submit(caller, request(one_a_slice(2)))
            jobs.work_off()

    assert statuses(served) == []


def fail_at_the_third_slice(file: Mover, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry finds the file gone when it has reopened two slices."""
    reopen_slice = task_store.reopen_slice
    slices = iter(range(3))

    def watched(*arguments: Any) -> Any:
        if next(slices) == 1:
            file.take()
        return reopen_slice(*arguments)

    monkeypatch.setattr(task_store, "reopen_slice", watched)


@pytest.mark.parametrize("codes", [None, [ErrorCode.CANCELLED]])
def test_retry_that_failed_between_slices_goes_on_when_the_database_works_again(
    served: Database, monkeypatch: pytest.MonkeyPatch, codes: list[ErrorCode] | None
) -> None:
    tasks = 2 * SLICE_TASKS + 1
    caller, file = Caller(factories.store_user(database=served)), Mover(served)
    handed_over: list[JobRow] = []
    jobs = make_jobs(served, handed_over, MAX_USER_TASKS=str(tasks))
    job_id = store_failed_job(served, caller.user_id or "", tasks)
    fail_at_the_third_slice(file, monkeypatch)

    with pytest.raises(DatabaseUnusable):
        jobs.retry(caller, job_id, codes)
    with pytest.raises(DatabaseUnusable):
        jobs.work_off()
    file.put_back()
    assert handed_over == []
    with pytest.raises(TooMany, match=f"{tasks} pending tasks"):
        jobs.check_limits(caller, None)

    jobs.work_off()

    (job,) = handed_over
    assert (job.id, job.run, job.status, job.failed) == (job_id, 2, JobStatus.QUEUED, 0)
    assert unfinished(served, caller.user_id).pending == tasks
    jobs.work_off()
    assert len(handed_over) == 1


def test_retry_that_failed_between_slices_and_was_cancelled_then_is_let_be(
    served: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = 2 * SLICE_TASKS + 1
    caller, file = Caller(factories.store_user(database=served)), Mover(served)
    handed_over: list[JobRow] = []
    jobs = make_jobs(served, handed_over, MAX_USER_TASKS=str(tasks))
    job_id = store_failed_job(served, caller.user_id or "", tasks)
    fail_at_the_third_slice(file, monkeypatch)
    with pytest.raises(DatabaseUnusable):
        jobs.retry(caller, job_id, None)
    file.put_back()
    with served.write() as session:
        assert job_store.cancel(session, job_id)

    jobs.work_off()

    assert handed_over == []
    assert jobs.find(caller, job_id).failed == 1
    jobs.check_limits(caller, None)


def test_task_that_the_database_does_not_take_is_named(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise TooLarge("A text is larger than the database takes.")

    monkeypatch.setattr(task_store, "add_tasks", refuse)
    monkeypatch.setattr(database, "takes", lambda text: len(text) < 1000)
    long = [NewTask(name, name * 1000, 250) for name in "bc"]

    with pytest.raises(TooLarge, match=r"The prompt of the task 'b' is too large\. A text is larger"):
        make_jobs(database).submit(Caller(), request(iter([NewTask("a", "short", 1), *long])))
    with pytest.raises(TooLarge, match=r"^A text is larger"):
        make_jobs(database).submit(Caller(), request(iter([NewTask("a", "short", 1)])))


# A commit of which nobody knows whether it has landed


@BOTH
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("key", [None, KEY])
def test_submit_whose_first_commit_raised_is_taken_back(
    database: Database, key: Idempotency | None, slices: int, lands: bool
) -> None:
    told, after = Told(), 2 if key else 0  # the key's own commit, which has a savepoint
    jobs = make_jobs(database, told=told)

    with commit_lost(lands=lands, after=after):
        jobs.submit(Caller(), request(one_a_slice(slices)), key)
    jobs.work_off()

    assert (statuses(database), told.added) == ([JobStatus.DISCARDED] if lands else [], [])
    again = jobs.submit(Caller(), request(one_a_slice(slices)), key)
    assert (again.replayed, len(told.added)) == (False, 1)


def test_job_of_a_submit_that_is_taken_back_late_may_have_been_retried_and_is_forgotten(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    jobs, discard = make_jobs(database, told=told), job_store.discard

    def fail_once(*_arguments: object) -> None:
        monkeypatch.setattr(job_store, "discard", discard)
        raise DatabaseUnusable("it is locked")

    monkeypatch.setattr(job_store, "discard", fail_once)
    with commit_lost(lands=True):
        jobs.submit(Caller(), request(one_a_slice(1)))
    [job] = jobs.list(Caller(), everyone=False, status=None, before=None, limit=9)
    jobs.cancel(Caller(), job.id)
    end_with_failures(database, job.id)
    assert jobs.retry(Caller(), job.id, None)
    jobs.work_off()

    assert (statuses(database), told.forgotten) == ([JobStatus.DISCARDED], [job.id])


@BOTH
def test_key_whose_commit_raised_is_free_again(database: Database, lands: bool) -> None:
    jobs = make_jobs(database)

    with commit_lost(lands=lands, after=1):
        jobs.submit(Caller(), request(one_a_slice(1)), KEY)
    if lands:
        with pytest.raises(Conflict):
            jobs.submit(Caller(), request(one_a_slice(1)), KEY)
    jobs.work_off()

    assert not jobs.submit(Caller(), request(one_a_slice(1)), KEY).replayed


def test_key_whose_commit_raised_stays_with_the_job_that_has_taken_it_meanwhile(database: Database) -> None:
    jobs = make_jobs(database)

    with commit_lost(lands=False, after=1):
        jobs.submit(Caller(), request(one_a_slice(1)), KEY)
    time.sleep(0.002)  # the time of a claim is told in milliseconds
    first = jobs.submit(Caller(), request(one_a_slice(1)), KEY)
    jobs.work_off()

    replayed = jobs.submit(Caller(), request(one_a_slice(1)), KEY)
    assert (replayed.job_id, replayed.replayed) == (first.job_id, True)


@BOTH
def test_cancel_whose_commit_raised_is_told_to_the_dispatcher_if_it_is_stored(
    database: Database, lands: bool
) -> None:
    told = Told()
    jobs, job = make_jobs(database, told=told), factories.store_job(database=database)

    with commit_lost(lands=lands):
        jobs.cancel(Caller(), job.id)
    jobs.work_off()

    assert told.closed == ([(job.id, 1)] if lands else [])
    assert statuses(database) == [JobStatus.CANCELLED if lands else JobStatus.QUEUED]


def test_cancel_of_a_cancelled_job_is_told_to_the_dispatcher_until_it_is_finished(database: Database) -> None:
    told = Told()
    jobs, job = make_jobs(database, told=told), factories.store_job(database=database)

    with commit_lost(lands=True):
        jobs.cancel(Caller(), job.id)
    jobs.cancel(Caller(), job.id)
    assert told.closed == [(job.id, 1)]
    with database.write() as session:
        stored = job_store.get_job(session, job.id)
        assert stored is not None
        stored.finished_at = utc_now()
    jobs.cancel(Caller(), job.id)
    jobs.work_off()

    assert told.closed == [(job.id, 1)]


def test_cancel_that_is_refused_leaves_nothing_to_settle(served: Database) -> None:
    jobs, file = make_jobs(served), Mover(served)

    with pytest.raises(NotFound):
        jobs.cancel(Caller(), "nothing")
    with file.away():
        jobs.work_off()


@BOTH
def test_purge_whose_commit_raised_is_told_to_the_dispatcher_if_it_is_stored(
    database: Database, lands: bool
) -> None:
    told = Told()
    jobs, job = make_jobs(database, told=told), factories.store_job(database=database)

    with commit_lost(lands=lands):
        jobs.purge(Caller(), job.id)
    jobs.work_off()

    assert told.forgotten == ([job.id] if lands else [])
    assert statuses(database) == [JobStatus.DISCARDED if lands else JobStatus.QUEUED]


def test_purge_whose_commit_raised_is_told_to_the_dispatcher_though_its_rows_are_gone(
    database: Database,
) -> None:
    told = Told()
    jobs, job = make_jobs(database, told=told), factories.store_job(database=database, tasks=0)

    with commit_lost(lands=True):
        jobs.purge(Caller(), job.id)
    with database.write() as session:
        job_store.delete_job(session, job.id)
    jobs.work_off()

    assert told.forgotten == [job.id]


@BOTH
@pytest.mark.parametrize("tasks", [10, 2 * SLICE_TASKS + 1])
def test_retry_whose_first_commit_raised_goes_on_if_it_is_stored(
    database: Database, tasks: int, lands: bool
) -> None:
    caller, told = Caller(factories.store_user(database=database)), Told()
    jobs = make_jobs(database, told=told, MAX_USER_TASKS=str(tasks))
    job_id = store_failed_job(database, caller.user_id or "", tasks)

    with commit_lost(lands=lands):
        jobs.retry(caller, job_id, None)
    assert told.added == []
    jobs.work_off()
    jobs.work_off()

    again = [(job.id, job.run, job.status, job.failed) for job in told.added]
    assert again == ([(job_id, 2, JobStatus.QUEUED, 0)] if lands else [])
    assert unfinished(database, caller.user_id).pending == (tasks if lands else 0)
    if not lands:
        jobs.check_limits(caller, None)
        assert jobs.retry(caller, job_id, None)
        assert [job.run for job in told.added] == [2]


def test_retry_whose_first_commit_raised_and_that_was_cancelled_then_is_let_be(database: Database) -> None:
    caller, told = Caller(factories.store_user(database=database)), Told()
    jobs = make_jobs(database, told=told, MAX_USER_TASKS="10")
    job_id = store_failed_job(database, caller.user_id or "", 10)

    with commit_lost(lands=True):
        jobs.retry(caller, job_id, None)
    jobs.cancel(caller, job_id)
    jobs.work_off()

    assert (told.added, told.closed) == ([], [(job_id, 2)])
    jobs.check_limits(caller, None)


def test_retry_whose_first_commit_did_not_land_leaves_the_run_to_the_next_one(database: Database) -> None:
    tasks = 2 * SLICE_TASKS + 1
    caller, told = Caller(factories.store_user(database=database)), Told()
    jobs = make_jobs(database, told=told, MAX_USER_TASKS=str(tasks))
    job_id = store_failed_job(database, caller.user_id or "", tasks)

    with commit_lost(lands=False):
        jobs.retry(caller, job_id, None)
    time.sleep(0.002)  # the time of a run is told in milliseconds
    assert jobs.retry(caller, job_id, None)
    jobs.work_off()

    assert [(job.run, job.failed) for job in told.added] == [(2, 0)]


def test_slice_of_a_retry_whose_commit_raised_is_counted_once(database: Database) -> None:
    tasks = 3 * SLICE_TASKS + 1
    caller, told = Caller(factories.store_user(database=database)), Told()
    jobs = make_jobs(database, told=told)
    job_id = store_failed_job(database, caller.user_id or "", tasks)

    with commit_lost(lands=True, after=1):
        jobs.retry(caller, job_id, None)
    jobs.work_off()

    assert [(job.run, job.failed, job.results_bytes) for job in told.added] == [(2, 0, 0)]
    assert unfinished(database, caller.user_id).pending == tasks


# A retry beside the end of the run before it


def test_webhook_of_a_run_that_ends_just_before_its_retry_is_not_lost(served: Database) -> None:
    settings = factories.settings(data_dir=served.path.parent, REQUEST_API="http://127.0.0.1:9/hook")
    deliveries = Deliveries(served, settings, version="1")
    caller = Caller(factories.store_user(database=served))
    job = factories.store_job(database=served, owner_id=caller.user_id, delivery=DeliveryMode.WEBHOOK)
    with served.write() as session:
        failed, _ = task_store.fail_pending(session, job.id, CANCELLED, after=-1, spare=())
        job_store.add_progress(session, {job.id: JobProgress(failed=failed)})
    owed: list[str] = []

    def freeze_and_end(job_id: str) -> None:
        """Nothing is owed yet; then, before the retry looks at the job, the recorder ends it."""
        deliveries.freeze_owed(job_id)
        if owed:
            return
        with served.write() as session:
            jobs = job_store.standings(session, [job_id])
            assert job_store.end(session, [job_id], utc_now())
            owed.extend(delivery_store.add_job_deliveries(session, jobs, "", utc_now()))

    assert make_jobs(served, freeze_owed=freeze_and_end).retry(caller, job.id, None)

    with served.read() as session:
        webhook = delivery_store.get_delivery(session, owed[0])
    assert webhook is not None
    assert webhook.status == DeliveryStatus.PENDING
    assert json.loads(webhook.body or "")["data"]["run"] == 1
    assert make_jobs(served).find(caller, job.id).run == 2


def test_refusal_of_a_retry_says_whether_calls_still_land(database: Database) -> None:
    caller = Caller(factories.store_user(database=database))
    queued = factories.store_job(database=database, owner_id=caller.user_id)
    cancelled = factories.store_job(database=database, owner_id=caller.user_id, status=JobStatus.CANCELLED)

    with pytest.raises(Conflict, match="wait for it, or cancel it first"):
        make_jobs(database).retry(caller, queued.id, None)
    with pytest.raises(Conflict, match="calls in flight still land: retry it when finished_at is set"):
        make_jobs(database).retry(caller, cancelled.id, None)


def test_turns_are_short_while_any_large_upload_is_read() -> None:
    usual_s = sys.getswitchinterval()
    turns = ShortTurns()

    with turns:
        with turns:
            pass
        during_s = sys.getswitchinterval()

    assert during_s == pytest.approx(usual_s / 10, rel=0.01)
    assert sys.getswitchinterval() == pytest.approx(usual_s)


def test_count_of_a_users_unfinished_jobs_reads_nobody_elses(database: Database) -> None:
    with database.read() as session:
        for statement in (job_store.UNFINISHED_OF_USER.params(b_owner="x"), job_store.UNFINISHED_OF_NOBODY):
            sql = str(statement.compile(session.get_bind(), compile_kwargs={"literal_binds": True}))
            [plan] = session.execute(text(f"EXPLAIN QUERY PLAN {sql}")).all()
            assert "ix_jobs_owner_status (owner_id=? AND status=?)" in plan.detail


def test_messages_that_wait_to_be_stored_are_text(database: Database) -> None:
    watched: list[weakref.ref[Message]] = []
    most = 0

    def tasks() -> Iterator[NewTask]:
        nonlocal most
        for number in range(SLICE_TASKS + 10):
            message = Message(role="user", content=f"task {number}")
            watched.append(weakref.ref(message))
            yield NewTask(str(number), [message], 15)
            most = max(most, sum(each() is not None for each in watched[-100:]))

    job_id = make_jobs(database).submit(Caller(), request(tasks())).job_id

    assert most <= 2
    with database.read() as session:
        page = task_store.pending_page(session, job_id, SLICE_TASKS - 1, 100, 10**6)
    assert [task.prompt for task in page.tasks] == [
        [{"role": "user", "content": f"task {number}"}] for number in range(SLICE_TASKS, SLICE_TASKS + 10)
    ]
