"""The one writer, on a real SQLite file: what is stored, what is stored once, and how jobs end."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from gpt_worker import recorder as recorder_module
from gpt_worker.db import Database
from gpt_worker.domain import (
    Answer,
    DeliveryMode,
    DeliveryStatus,
    ErrorCode,
    Failure,
    FileState,
    JobStatus,
    Usage,
)
from gpt_worker.models import DeliveryRow, JobRow, ResultFileRow
from gpt_worker.recorder import Recorder
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.tasks import SLICE_TASKS, TaskResult
from tests import factories
from tests.clock import eventually

CANCELLED = Failure(ErrorCode.CANCELLED, "the job was cancelled")
LATE = Failure(ErrorCode.TIMEOUT, "no whole reply")
HOOK = "http://127.0.0.1:9/hook"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


@dataclass
class Desk:
    """A recorder at work, and what it tells the others."""

    recorder: Recorder
    ended: list[tuple[str, int]] = field(default_factory=list)
    deliveries: int = 0
    recovered: threading.Event = field(default_factory=threading.Event)

    def finish(self) -> None:
        """Store all that was handed over."""
        assert self.recorder.stop(10.0)


@pytest.fixture
def closed_desk(database: Database) -> Desk:
    """One whose recorder has not begun: all that it is handed is its first group."""
    made = Desk(Recorder(database, HOOK))

    def count_delivery() -> None:
        made.deliveries += 1

    made.recorder.on_ended = lambda job_id, run: made.ended.append((job_id, run))
    made.recorder.on_delivery = count_delivery
    made.recorder.on_recovered = made.recovered.set
    return made


@pytest.fixture
def desk(closed_desk: Desk) -> Iterator[Desk]:
    closed_desk.recorder.start()
    yield closed_desk
    closed_desk.recorder.stop(10.0)


def job_of(database: Database, job: JobRow) -> JobRow:
    with database.read() as session:
        row = job_store.get_job(session, job.id)
    assert row is not None
    return row


def results(database: Database, job: JobRow) -> list[TaskResult]:
    with database.read() as session:
        return task_store.results_page(session, job.id, -1, 100_000).tasks


def deliveries(database: Database) -> list[DeliveryRow]:
    with database.read() as session:
        return [*session.scalars(select(DeliveryRow))]


def fail_once_after_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next commit is made, and its result is lost on the way back."""

    def lose(_session: Session) -> None:
        event.remove(Session, "after_commit", lose)
        raise OperationalError("COMMIT", {}, Exception("the line was cut"))

    event.listen(Session, "after_commit", lose)


def break_tasks(database: Database) -> None:
    with database.write() as session:
        session.execute(text("ALTER TABLE tasks RENAME TO away"))


def mend_tasks(database: Database) -> None:
    with database.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO tasks"))


# Storing


def test_answer_is_stored_with_its_counts_and_usage(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=2)

    desk.recorder.put(
        factories.outcome(job_id=job.id, position=1, decision=Answer("Bon", "length"), attempts=3)
    )
    desk.finish()

    stored, task = job_of(database, job), results(database, job)[1]
    assert (stored.answered, stored.failed, stored.requests) == (1, 0, 1)
    assert (stored.prompt_tokens, stored.completion_tokens, stored.results_bytes) == (10, 2, 3)
    assert (task.answer, task.finish_reason, task.attempts) == ("Bon", "length", 3)
    assert (stored.finished_at, desk.ended) == (None, [])


def test_call_that_decided_nothing_still_counts(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database)

    desk.recorder.put(factories.outcome(job_id=job.id, decision=None, usage=Usage()))
    desk.finish()

    assert (job_of(database, job).requests, job_of(database, job).answered) == (1, 0)


def test_long_message_is_cut(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database)

    desk.recorder.put(factories.outcome(job_id=job.id, decision=Failure(ErrorCode.BAD_REQUEST, "x" * 5000)))
    desk.finish()

    message = results(database, job)[0].error_message
    assert message is not None
    assert len(message) == 1000


def test_answer_that_the_database_does_not_take_fails_its_task_alone(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "takes", lambda text: len(text) < 100)
    job = factories.store_job(database=database, tasks=2)

    for position, text_ in enumerate(("x" * 100, "short")):
        desk.recorder.put(factories.outcome(job_id=job.id, position=position, decision=Answer(text_)))
    desk.finish()

    large, small = results(database, job)
    assert (large.answer, large.error_code) == (None, ErrorCode.BAD_RESPONSE)
    assert small.answer == "short"
    stored = job_of(database, job)
    assert (stored.status, stored.answered, stored.failed) == (JobStatus.PARTIAL, 1, 1)


def test_nothing_is_to_be_asked_while_the_database_may_be_another_s(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=1)

    desk.recorder.suspend()
    desk.recorder.put(factories.outcome(job_id=job.id))
    eventually(lambda: job_of(database, job).answered == 1)
    healthy_when_suspended = desk.recorder.healthy
    desk.recorder.resume()

    assert not healthy_when_suspended
    assert desk.recorder.healthy
    assert desk.recovered.is_set()


def test_task_is_decided_once(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=2)

    for decision in (Answer("first"), Answer("second"), LATE):
        desk.recorder.put(factories.outcome(job_id=job.id, decision=decision))
        eventually(lambda: desk.recorder.waiting == 0)
    desk.finish()

    assert (job_of(database, job).answered, job_of(database, job).failed) == (1, 0)
    assert results(database, job)[0].answer == "first"


@pytest.mark.parametrize(
    ("decisions", "status"),
    [
        ([Answer("a"), Answer("b")], JobStatus.SUCCEEDED),
        ([Answer("a"), LATE], JobStatus.PARTIAL),
        ([LATE, LATE], JobStatus.FAILED),
    ],
)
def test_job_ends_with_its_last_task(
    database: Database, desk: Desk, decisions: list[Answer | Failure], status: JobStatus
) -> None:
    job = factories.store_job(database=database, tasks=2)

    desk.recorder.job_started(job.id)
    for position, decision in enumerate(decisions):
        desk.recorder.put(factories.outcome(job_id=job.id, position=position, decision=decision))
    desk.finish()

    stored = job_of(database, job)
    assert stored.status == status
    assert stored.started_at is not None
    assert stored.finished_at is not None
    assert desk.ended == [(job.id, 1)]


def test_started_job_runs(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database)

    desk.recorder.job_started(job.id)
    desk.finish()

    assert job_of(database, job).status == JobStatus.RUNNING


def test_cancelled_job_stays_cancelled(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, status=JobStatus.CANCELLED)

    desk.recorder.put(factories.outcome(job_id=job.id))
    desk.finish()

    stored = job_of(database, job)
    assert (stored.status, stored.answered) == (JobStatus.CANCELLED, 1)
    assert stored.finished_at is not None


def test_discarded_job_does_not_end(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, status=JobStatus.DISCARDED, delivery=DeliveryMode.WEBHOOK)

    desk.recorder.put(factories.outcome(job_id=job.id))
    desk.finish()

    assert (desk.ended, deliveries(database)) == ([], [])


def test_outcome_of_a_job_that_is_gone_hurts_nobody(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database)

    desk.recorder.put(factories.outcome(job_id="gone"))
    desk.recorder.put(factories.outcome(job_id=job.id))
    desk.finish()

    assert job_of(database, job).status == JobStatus.SUCCEEDED


def test_many_threads_lose_nothing(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=400)

    def put(first: int) -> None:
        for position in range(first, 400, 8):
            desk.recorder.put(factories.outcome(job_id=job.id, position=position))

    threads = [threading.Thread(target=put, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    desk.finish()

    stored = job_of(database, job)
    assert (stored.answered, stored.requests, stored.status) == (400, 400, JobStatus.SUCCEEDED)
    assert desk.ended == [(job.id, 1)]


# Groups of many jobs


def test_many_jobs_that_end_together_take_few_statements(database: Database, closed_desk: Desk) -> None:
    jobs = [factories.store_job(database=database, delivery=DeliveryMode.WEBHOOK) for _ in range(300)]
    statements: list[str] = []

    @event.listens_for(database._engine, "before_cursor_execute")
    def before_cursor_execute(_connection: object, _cursor: object, statement: str, *_others: object) -> None:
        statements.append(statement)

    for job in jobs:
        closed_desk.recorder.job_started(job.id)
        closed_desk.recorder.put(factories.outcome(job_id=job.id))
    closed_desk.recorder.start()
    closed_desk.finish()

    assert len(statements) < 20
    assert closed_desk.recorder.commits == 1
    assert closed_desk.ended == [(job.id, 1) for job in jobs]
    assert closed_desk.deliveries == 300
    with database.read() as session:
        stored = session.scalars(select(JobRow)).all()
        files = session.scalars(select(ResultFileRow)).all()
    assert {(row.status, row.answered, row.requests, row.prompt_tokens) for row in stored} == {
        (JobStatus.SUCCEEDED, 1, 1, 10)
    }
    assert all(row.started_at == row.finished_at is not None for row in stored)
    assert {row.job_id for row in deliveries(database)} == {job.id for job in jobs}
    assert {(row.job_id, row.run, row.state) for row in files} == {
        (job.id, 1, FileState.PENDING) for job in jobs
    }


def test_each_job_of_a_group_gets_what_is_its_own(database: Database, closed_desk: Desk) -> None:
    whole, partial, none, open_, cancelled = (
        factories.store_job(database=database, tasks=2, status=status)
        for status in (*[JobStatus.RUNNING] * 4, JobStatus.CANCELLED)
    )
    again = None
    made: dict[str, tuple[Answer | Failure | None, ...]] = {
        whole.id: (Answer("a"), Answer("bc")),
        partial.id: (LATE, Answer("d")),
        none.id: (LATE, LATE),
        open_.id: (Answer("e"), again),
        cancelled.id: (Answer("f"), LATE),
    }

    for position in range(2):
        for job_id, decisions in made.items():
            closed_desk.recorder.put(
                factories.outcome(
                    job_id=job_id, position=position, decision=decisions[position], attempts=position + 1
                )
            )
    closed_desk.recorder.start()
    closed_desk.finish()

    rows = [job_of(database, job) for job in (whole, partial, none, open_, cancelled)]
    assert [(row.status, row.answered, row.failed, row.results_bytes) for row in rows] == [
        (JobStatus.SUCCEEDED, 2, 0, 3),
        (JobStatus.PARTIAL, 1, 1, 1 + len(LATE.message)),
        (JobStatus.FAILED, 0, 2, 2 * len(LATE.message)),
        (JobStatus.RUNNING, 1, 0, 1),
        (JobStatus.CANCELLED, 1, 1, 1 + len(LATE.message)),
    ]
    assert [(task.answer, task.attempts) for task in results(database, open_)] == [("e", 1), (None, 2)]
    assert closed_desk.ended == [(job_id, 1) for job_id in made if job_id != open_.id]


def test_group_that_decides_a_task_twice_counts_it_once(database: Database, closed_desk: Desk) -> None:
    job, other = (factories.store_job(database=database, tasks=2) for _ in range(2))

    for decision in (Answer("first"), Answer("second"), LATE):
        closed_desk.recorder.put(factories.outcome(job_id=job.id, decision=decision))
    closed_desk.recorder.put(factories.outcome(job_id=other.id))
    closed_desk.recorder.start()
    closed_desk.finish()

    stored = job_of(database, job)
    assert (stored.answered, stored.failed, stored.requests) == (1, 0, 3)
    assert results(database, job)[0].answer == "first"
    assert (job_of(database, other).answered, job_of(database, other).requests) == (1, 1)
    assert closed_desk.ended == []


# Webhooks


@pytest.mark.parametrize(("delivery", "owed"), [(DeliveryMode.WEBHOOK, 1), (DeliveryMode.INLINE, 0)])
def test_webhook_is_owed_in_the_commit_that_ends_the_job(
    database: Database, desk: Desk, delivery: DeliveryMode, owed: int
) -> None:
    job = factories.store_job(database=database, delivery=delivery)

    desk.recorder.put(factories.outcome(job_id=job.id))
    desk.finish()

    rows = deliveries(database)
    assert (len(rows), desk.deliveries) == (owed, owed)
    assert all(
        (row.job_id, row.run, row.url, row.status) == (job.id, 1, HOOK, DeliveryStatus.PREPARING)
        for row in rows
    )


def retry(database: Database, job: JobRow) -> None:
    with database.write() as session:
        row = job_store.get_job(session, job.id)
        assert row is not None
        row.failed -= task_store.reopen_slice(session, job.id, None, -1).tasks
        job_store.reopen(row, row.deadline_at)


def test_next_run_owes_a_webhook_of_its_own(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, delivery=DeliveryMode.WEBHOOK)
    desk.recorder.put(factories.outcome(job_id=job.id, decision=LATE))
    eventually(lambda: desk.ended)
    retry(database, job)

    desk.recorder.put(factories.outcome(job_id=job.id))
    desk.finish()

    assert desk.ended == [(job.id, 1), (job.id, 2)]
    assert [row.run for row in deliveries(database)] == [1, 2]


# Closing


def test_closed_job_fails_what_was_not_sent(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=3, status=JobStatus.RUNNING)
    desk.recorder.put(factories.outcome(job_id=job.id, position=1))

    desk.recorder.close_job(job.id, job.run, CANCELLED, ())
    desk.finish()

    assert [task.error_code for task in results(database, job)] == ["cancelled", None, "cancelled"]
    assert (job_of(database, job).failed, job_of(database, job).status) == (2, JobStatus.PARTIAL)
    assert desk.ended == [(job.id, 1)]


def test_closed_job_waits_for_the_calls_in_flight(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=3, delivery=DeliveryMode.WEBHOOK)
    assert desk.recorder.close_job(job.id, job.run, CANCELLED, frozenset({1})).wait(10)
    assert (job_of(database, job).failed, desk.ended, deliveries(database)) == (2, [], [])

    desk.recorder.put(factories.outcome(job_id=job.id, position=1))
    desk.finish()

    assert (job_of(database, job).answered, desk.ended) == (1, [(job.id, 1)])
    assert len(deliveries(database)) == 1


def test_large_job_is_closed_in_slices_and_others_go_between(database: Database, desk: Desk) -> None:
    large = factories.store_job(database=database, tasks=2 * SLICE_TASKS + 10)
    small = factories.store_job(database=database)
    spare = frozenset({0, SLICE_TASKS - 1, SLICE_TASKS, 2 * SLICE_TASKS})

    done = desk.recorder.close_job(large.id, large.run, CANCELLED, spare)
    desk.recorder.put(factories.outcome(job_id=small.id))
    assert done.wait(10)

    pending = {task.position for task in results(database, large) if task.error_code is None}
    assert pending == spare
    assert desk.ended == [(small.id, 1)]
    for position in spare:
        desk.recorder.put(factories.outcome(job_id=large.id, position=position))
    desk.finish()
    assert desk.ended == [(small.id, 1), (large.id, 1)]
    assert job_of(database, large).failed == 2 * SLICE_TASKS + 10 - len(spare)


def test_slice_of_nothing_but_spare_tasks_is_not_the_end(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=SLICE_TASKS + 1)

    desk.recorder.close_job(job.id, job.run, CANCELLED, frozenset(range(SLICE_TASKS)))
    desk.finish()

    assert results(database, job)[-1].error_code == "cancelled"


def test_answer_that_lands_before_the_close_is_kept(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=2)

    desk.recorder.put(factories.outcome(job_id=job.id, position=0))
    desk.recorder.close_job(job.id, job.run, CANCELLED, frozenset({0}))
    desk.finish()

    assert (job_of(database, job).answered, job_of(database, job).failed) == (1, 1)
    assert desk.ended == [(job.id, 1)]


def test_job_closed_twice_ends_with_one_webhook(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=2, delivery=DeliveryMode.WEBHOOK)

    desk.recorder.close_job(job.id, job.run, CANCELLED, ())
    desk.recorder.close_job(job.id, job.run, LATE, ())
    desk.finish()

    assert [task.error_code for task in results(database, job)] == ["cancelled", "cancelled"]
    assert len(deliveries(database)) == 1


def test_end_of_a_run_that_comes_late_does_not_touch_the_next(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database, tasks=2)
    assert desk.recorder.close_job(job.id, 1, LATE, ()).wait(10)
    retry(database, job)

    assert desk.recorder.close_job(job.id, 1, CANCELLED, ()).wait(10)

    assert [task.error_code for task in results(database, job)] == [None, None]
    assert (job_of(database, job).run, desk.ended) == (2, [(job.id, 1)])


# Commits that fail


def test_group_stored_twice_counts_once(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = factories.store_job(database=database, tasks=1, delivery=DeliveryMode.WEBHOOK)
    fail_once_after_commit(monkeypatch)

    desk.recorder.put(factories.outcome(job_id=job.id))
    assert desk.recovered.wait(10)
    desk.finish()

    stored = job_of(database, job)
    assert (stored.answered, stored.requests, stored.prompt_tokens, stored.results_bytes) == (1, 1, 10, 5)
    assert len(deliveries(database)) == 1


def test_try_that_decided_nothing_counts_once_in_a_group_stored_twice(
    database: Database, closed_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = (factories.store_job(database=database, tasks=2) for _ in range(2))
    fail_once_after_commit(monkeypatch)

    closed_desk.recorder.put(factories.outcome(job_id=job.id, decision=None))
    closed_desk.recorder.put(factories.outcome(job_id=other.id))
    closed_desk.recorder.start()
    assert closed_desk.recovered.wait(10)
    closed_desk.finish()

    stored = [job_of(database, each) for each in (job, other)]
    assert [(row.answered, row.requests, row.prompt_tokens) for row in stored] == [(0, 1, 10), (1, 1, 10)]


def test_group_whose_commit_came_to_nothing_is_stored(database: Database, closed_desk: Desk) -> None:
    job = factories.store_job(database=database)

    def refuse(_session: Session) -> None:
        event.remove(Session, "before_commit", refuse)
        raise OperationalError("COMMIT", {}, Exception("the line was cut"))

    event.listen(Session, "before_commit", refuse)
    closed_desk.recorder.put(factories.outcome(job_id=job.id))
    closed_desk.recorder.start()
    assert closed_desk.recovered.wait(10)
    closed_desk.finish()

    assert (job_of(database, job).answered, job_of(database, job).requests) == (1, 1)
    assert closed_desk.ended == [(job.id, 1)]


def test_end_stored_by_a_commit_that_seemed_to_fail_is_told(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = factories.store_job(database=database)
    fail_once_after_commit(monkeypatch)

    desk.recorder.put(factories.outcome(job_id=job.id))
    assert desk.recovered.wait(10)
    desk.finish()

    assert desk.ended == [(job.id, 1)]


def test_slice_stored_twice_counts_once(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = factories.store_job(database=database, tasks=3)
    fail_once_after_commit(monkeypatch)

    assert desk.recorder.close_job(job.id, job.run, CANCELLED, ()).wait(10)
    desk.finish()

    assert (job_of(database, job).failed, desk.ended) == (3, [(job.id, 1)])


def test_answers_wait_for_the_database_and_are_stored_then(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database)
    break_tasks(database)
    desk.recorder.put(factories.outcome(job_id=job.id))
    eventually(lambda: not desk.recorder.healthy)

    mend_tasks(database)

    assert desk.recovered.wait(10)
    desk.finish()
    assert desk.recorder.healthy
    assert job_of(database, job).status == JobStatus.SUCCEEDED


def test_full_inbox_holds_its_senders(
    database: Database, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_INBOX", 3)
    job = factories.store_job(database=database, tasks=10)
    break_tasks(database)
    desk.recorder.put(factories.outcome(job_id=job.id, position=0))
    eventually(lambda: not desk.recorder.healthy)
    rest = [factories.outcome(job_id=job.id, position=position) for position in range(1, 10)]

    def send() -> None:
        for outcome in rest:
            desk.recorder.put(outcome)

    sender = threading.Thread(target=send)
    sender.start()
    eventually(lambda: desk.recorder.waiting == 3)
    assert sender.is_alive()

    mend_tasks(database)

    sender.join(10)
    desk.finish()
    assert job_of(database, job).answered == 10


@pytest.mark.parametrize("closes", [False, True])
def test_recorder_that_can_not_store_still_stops(database: Database, desk: Desk, closes: bool) -> None:
    job = factories.store_job(database=database)
    break_tasks(database)
    if closes:
        desk.recorder.close_job(job.id, job.run, CANCELLED, ())
    else:
        desk.recorder.put(factories.outcome(job_id=job.id))
    eventually(lambda: not desk.recorder.healthy)

    assert desk.recorder.stop(10.0)

    mend_tasks(database)
    assert job_of(database, job).status == JobStatus.QUEUED


def test_bug_in_a_group_does_not_end_the_recorder(database: Database, desk: Desk) -> None:
    job = factories.store_job(database=database)
    unstorable: Any = factories.outcome(job_id=job.id, usage=Usage(10**30, 0))

    desk.recorder.put(unstorable)

    eventually(lambda: not desk.recorder.healthy)
    assert desk.recorder.stop(10.0)
