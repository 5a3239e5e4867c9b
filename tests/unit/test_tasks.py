"""Queries on tasks that are more than rows in and out: which of them a crash counts for, which it fails, and how much
a page reads.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from gpt_worker.db import Database
from gpt_worker.domain import Answer, ErrorCode, Failure, NewTask, Prompt, TaskState
from gpt_worker.models import JobRow, TaskRow
from gpt_worker.store import tasks as task_store
from gpt_worker.store.bulk import ROWS, EachUpdate
from tests import factories

INTERRUPTED = Failure(ErrorCode.INTERRUPTED, "the service itself failed")
CANCELLED = Failure(ErrorCode.CANCELLED, "the job was cancelled")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


def crash(database: Database, job: JobRow, *positions: int, limit: int = 5) -> int:
    with database.write() as session:
        return task_store.count_crash(session, job.id, set(positions), limit, INTERRUPTED)


def crashes(database: Database, job: JobRow) -> list[int]:
    return [row.crashes for row in rows(database, job)]


def rows(database: Database, job: JobRow) -> list[TaskRow]:
    with database.read() as session:
        return [*session.scalars(select(TaskRow).where(TaskRow.job_id == job.id).order_by(TaskRow.position))]


def test_crash_counts_for_the_tasks_that_were_in_flight_alone(database: Database) -> None:
    job, other = (factories.store_job(database=database, tasks=3) for _ in range(2))

    crash(database, job, 0, 2)
    crash(database, job, 2, 77)

    assert (crashes(database, job), crashes(database, other)) == ([1, 0, 2], [0, 0, 0])


def test_task_fails_at_its_last_crash_and_not_before(database: Database) -> None:
    job = factories.store_job(database=database, tasks=2)
    with database.write() as session:
        task_store.record_attempts(
            session, [factories.outcome(job_id=job.id, position=1, decision=None, attempts=3)]
        )

    failed = [crash(database, job, 0, 1) for _ in range(4)] + [crash(database, job, 1)]

    assert failed == [0, 0, 0, 0, 1]
    first, second = rows(database, job)
    assert (first.state, first.error_code, first.crashes) == (TaskState.PENDING, None, 4)
    assert (second.state, second.error_code, second.attempts) == (TaskState.FAILED, "interrupted", 3)
    assert second.error_message == INTERRUPTED.message


def test_crash_does_not_count_for_a_task_that_is_decided(database: Database) -> None:
    job = factories.store_job(database=database, tasks=2)
    with database.write() as session:
        task_store.record_answers(session, [factories.outcome(job_id=job.id)])

    failed = crash(database, job, 0, 1, limit=1)

    assert failed == 1
    assert [row.state for row in rows(database, job)] == [TaskState.ANSWERED, TaskState.FAILED]
    assert crashes(database, job) == [0, 1]


def test_charged_tries_are_no_crashes(database: Database) -> None:
    job = factories.store_job(database=database)
    with database.write() as session:
        task_store.record_attempts(session, [factories.outcome(job_id=job.id, decision=None, attempts=4)])

    assert crash(database, job, 0) == 0


def test_reopened_task_starts_with_no_crash(database: Database) -> None:
    job = factories.store_job(database=database, tasks=3)
    for _ in range(4):
        crash(database, job, 0, 1)
    crash(database, job, 0)
    with database.write() as session:
        task_store.fail_pending(session, job.id, CANCELLED, after=-1, spare=())

    with database.write() as session:
        task_store.reopen_slice(session, job.id, [ErrorCode.INTERRUPTED], -1)
    assert crashes(database, job) == [0, 4, 0]
    with database.write() as session:
        task_store.reopen_slice(session, job.id, None, -1)

    assert crashes(database, job) == [0, 0, 0]
    assert crash(database, job, 0, 1) == 0


def test_tasks_of_every_form_come_back_as_they_were(database: Database) -> None:
    forms: list[Prompt] = [
        "plain",
        'a "quote", a \\ and\na line; Привіт, 🙂 and \u2028',
        [{"role": "user", "content": "Привіт"}],
        {"lang": "fr", "n": 1.5},
    ]
    tasks = [NewTask(f"t{place}", forms[place % len(forms)], place) for place in range(2 * ROWS + 7)]
    job = factories.store_job(database=database, tasks=1)

    with database.write() as session:
        task_store.add_tasks(session, job.id, 1, tasks)

    with database.read() as session:
        page = task_store.pending_page(session, job.id, 0, 1000, 1_000_000).tasks
        ids = [task.id for task in task_store.results_page(session, job.id, 0, 1000).tasks]
    assert [(task.position, task.prompt, task.tokens) for task in page] == [
        (place, task.prompt, task.tokens) for place, task in enumerate(tasks, 1)
    ]
    assert [(task.attempts, task.crashes) for task in page] == [(0, 0)] * len(tasks)
    assert ids == [task.id for task in tasks]


# Pages


def read_bytes(session: Session) -> list[int]:
    """The sizes of all texts that the driver makes of the database's from now on."""
    sizes: list[int] = []

    def note(stored: bytes) -> str:
        sizes.append(len(stored))
        return stored.decode()

    connection: Any = session.connection().connection.dbapi_connection
    connection.text_factory = note
    return sizes


def store_prompts(database: Database, prompts: list[Prompt], tokens: int) -> JobRow:
    job = factories.store_job(database=database, tasks=0)
    tasks = [NewTask(str(place), prompt, tokens) for place, prompt in enumerate(prompts)]
    with database.write() as session:
        task_store.add_tasks(session, job.id, 0, tasks)
    return job


@pytest.mark.parametrize(
    ("prompt", "tokens", "length"),
    [
        ("a" * 4000, 1000, 10),
        ([{"role": "user", "content": "a" * 4000}], 1000, 10),
        ([{"role": "user", "content": [[]] * 1250}], 5, 1),  # as an earlier version counted them
        ("a" * 400_000, 100_000, 1),
    ],
    ids=["text", "messages", "lists", "long"],
)
def test_page_reads_no_more_than_it_may_have_in_memory(
    database: Database, prompt: Prompt, tokens: int, length: int
) -> None:
    job = store_prompts(database, [prompt] * 30, tokens)

    with database.read() as session:
        sizes = read_bytes(session)
        page = task_store.pending_page(session, job.id, 4, 500, 10_000)

    assert [task.position for task in page.tasks] == [*range(5, 5 + length)]
    assert page.more
    assert len(sizes) == length


def test_short_page_is_the_last_and_a_full_one_may_not_be(database: Database) -> None:
    job = store_prompts(database, ["a"] * 4, 1)

    with database.read() as session:
        pages = [task_store.pending_page(session, job.id, -1, limit, 100) for limit in (3, 4, 5)]
        pages.append(task_store.pending_page(session, job.id, -1, 500, 4))
        pages.append(task_store.pending_page(session, job.id, 3, 500, 4))

    assert [(len(page.tasks), page.more) for page in pages] == [
        (3, True),
        (4, True),
        (4, False),
        (4, True),
        (0, False),
    ]


@pytest.mark.parametrize(
    ("max_characters", "length", "more"),
    [(None, 8, False), (8001, 8, False), (8000, 8, True), (2001, 3, True), (2000, 2, True), (1, 1, True)],
)
def test_page_of_results_ends_with_the_answer_that_fills_it(
    database: Database, max_characters: int | None, length: int, more: bool
) -> None:
    job = factories.store_job(database=database, ids=[f"{place}" for place in range(8)])
    outcomes = [
        factories.outcome(job_id=job.id, position=place, decision=Answer("ü" * 1000)) for place in range(8)
    ]
    with database.write() as session:
        task_store.record_answers(session, outcomes)

    with database.read() as session:
        sizes = read_bytes(session)
        page = task_store.results_page(session, job.id, -1, 1000, max_characters)

    assert [(task.id, len(task.answer or "")) for task in page.tasks] == [
        (str(place), 1000) for place in range(length)
    ]
    assert page.more is more
    assert sizes.count(2000) == length


@pytest.mark.parametrize("update", [task_store._ANSWER, task_store._COUNT_ATTEMPTS], ids=["answers", "tries"])
def test_rows_are_found_by_their_key_in_tables_that_were_analysed(
    database: Database, update: EachUpdate
) -> None:
    factories.store_job(database=database, tasks=300)
    with database.write() as session:
        session.execute(text("ANALYZE"))
    statement = update._on_sqlite[256]

    with database.read() as session:
        plan = session.connection().exec_driver_sql(
            f"EXPLAIN QUERY PLAN {statement}", (None,) * statement.count("?")
        )
        steps = [row[3] for row in plan]

    assert any(step.startswith("SEARCH tasks") for step in steps)
    assert [step for step in steps if "BLOOM" in step or step == "SCAN tasks"] == []
