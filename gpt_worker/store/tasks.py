"""Queries on tasks: storing them, reading what is still to be asked, recording what came of it.

Everything walks the primary key (job, position), never OFFSET, and touches at most a slice of rows at a time.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, CursorResult, Select, bindparam, delete, func, select, update
from sqlalchemy.orm import Session

from gpt_worker.domain import Answer, ErrorCode, Failure, NewTask, Outcome, Prompt, TaskState
from gpt_worker.models import TaskRow
from gpt_worker.prompts import encode, weigh
from gpt_worker.store import bulk
from gpt_worker.store.bulk import PendingUpdate

SLICE_TASKS = 3000  # a commit: the others' commits wait for it
CHARACTERS_PER_TOKEN = 4  # at most, by the estimate
_TASKS = bulk.TASKS

# A statement that is run all the time is built once, and below the ORM.
_ANSWER = PendingUpdate(("answer", "finish_reason", "attempts"), TaskState.ANSWERED)
_FAIL = PendingUpdate(("error_code", "error_message", "attempts"), TaskState.FAILED)
_CLOSE = PendingUpdate(("error_code", "error_message"), TaskState.FAILED)
_COUNT_ATTEMPTS = PendingUpdate(("attempts",), TaskState.PENDING)
_COUNT_CRASH = bulk.pending_update().values(crashes=_TASKS.c.crashes + 1)
_CLOSE_CRASHED = (
    bulk.pending_update()
    .where(_TASKS.c.crashes >= bindparam("b_crashes"))
    .values(
        state=int(TaskState.FAILED),
        error_code=bindparam("error_code"),
        error_message=bindparam("error_message"),
    )
)
_BEHIND = (_TASKS.c.job_id == bindparam("b_job"), _TASKS.c.position > bindparam("b_after"))


def _page_of(*columns: ColumnElement[Any], pending: bool) -> Select[Any]:
    """A statement: so many tasks of a job behind a position, in order, and of those still to be asked alone."""
    where = (*_BEHIND, _TASKS.c.state == TaskState.PENDING) if pending else _BEHIND
    return select(*columns).where(*where).order_by(_TASKS.c.position).limit(bindparam("b_limit"))


_PENDING = _page_of(
    _TASKS.c.position,
    _TASKS.c.prompt,
    _TASKS.c.tokens,
    _TASKS.c.attempts,
    _TASKS.c.crashes,
    pending=True,
)
_PENDING_LENGTHS = _page_of(func.length(_TASKS.c.prompt), pending=True)
_RESULTS = _page_of(
    _TASKS.c.position,
    _TASKS.c.id,
    _TASKS.c.state,
    _TASKS.c.answer,
    _TASKS.c.finish_reason,
    _TASKS.c.error_code,
    _TASKS.c.error_message,
    _TASKS.c.attempts,
    pending=False,
)
_RESULT_LENGTHS = _page_of(func.length(_TASKS.c.answer), pending=False)

Task = TypeVar("Task")


@dataclass(frozen=True, slots=True)
class Page(Generic[Task]):
    """Tasks in order; `more`: whether there may be others behind them."""

    tasks: list[Task]
    more: bool


@dataclass(frozen=True, slots=True)
class PendingTask:
    """A task still to be asked."""

    position: int
    prompt: Prompt
    tokens: int
    weight: int  # in tokens: what it counts for in memory
    attempts: int = 0  # charged tries, of this run
    crashes: int = 0  # of the process, while it was asked


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What stands of a task, decided or not."""

    position: int
    id: str
    state: int
    answer: str | None
    finish_reason: str | None
    error_code: str | None
    error_message: str | None
    attempts: int


def add_tasks(session: Session, job_id: str, first_position: int, tasks: Sequence[NewTask]) -> None:
    """Store one slice of a job's tasks, in order."""
    rows = [
        (position, id_, encode(prompt), tokens)
        for position, (id_, prompt, tokens) in enumerate(tasks, first_position)
    ]
    bulk.insert_tasks(session.connection(), job_id, rows)


def pending_page(session: Session, job_id: str, after: int, limit: int, max_tokens: int) -> Page[PendingTask]:
    """Up to `limit` tasks still to be asked, behind the position `after`, that end with the one that reaches
    `max_tokens` in weight.
    """
    connection = session.connection()
    given = {"b_job": job_id, "b_after": after, "b_limit": limit}
    limit = bulk.limit_within(connection, _PENDING_LENGTHS, given, CHARACTERS_PER_TOKEN * max_tokens)
    rows = connection.execute(_PENDING, given | {"b_limit": limit})
    page: list[PendingTask] = []
    for position, prompt, tokens, attempts, crashes in rows:
        weight = weigh(prompt, tokens)
        page.append(PendingTask(position, json.loads(prompt), tokens, weight, attempts, crashes))
        max_tokens -= weight
        if max_tokens <= 0:
            break
    rows.close()
    return Page(page, more=len(page) == limit or max_tokens <= 0)


class NotAllPending(Exception):
    """Of the tasks that were to be decided, some were so before, twice among them, or are gone."""


def record_decisions(session: Session, outcomes: Sequence[Outcome]) -> None:
    """Store answers to tasks of any jobs, and failures.

    Raises NotAllPending, after which the transaction is to be undone: it is not known of which jobs they were.
    """
    answers, failures = _answers(outcomes), _failures(outcomes)
    connection = session.connection()
    met = _ANSWER.run(connection, answers) + _FAIL.run(connection, failures)
    if met != sum(outcome.decision is not None for outcome in outcomes):
        raise NotAllPending


def record_answers(session: Session, outcomes: Iterable[Outcome]) -> int:
    """Store answers to tasks that are not decided yet; how many were."""
    return _ANSWER.run(session.connection(), _answers(outcomes))


def record_failures(session: Session, outcomes: Iterable[Outcome]) -> int:
    """Store failures of tasks that are not decided yet; how many were."""
    return _FAIL.run(session.connection(), _failures(outcomes))


def record_attempts(session: Session, outcomes: Iterable[Outcome]) -> None:
    """Note the charged tries of tasks that are asked again, so that they outlive this process."""
    attempts = {
        (outcome.job_id, outcome.position): outcome.attempts
        for outcome in outcomes
        if outcome.decision is None and outcome.attempts
    }
    _COUNT_ATTEMPTS.run(session.connection(), [(*task, tries) for task, tries in attempts.items()])


def _answers(outcomes: Iterable[Outcome]) -> list[bulk.Row]:
    """The rows of `_ANSWER`: the first answer to each task."""
    rows: dict[tuple[str, int], bulk.Row] = {}
    for outcome in outcomes:
        if isinstance(outcome.decision, Answer):
            task, answer = (outcome.job_id, outcome.position), outcome.decision
            rows.setdefault(task, (*task, answer.text, answer.finish_reason, outcome.attempts))
    return [*rows.values()]


def _failures(outcomes: Iterable[Outcome]) -> list[bulk.Row]:
    """The rows of `_FAIL`: the first failure of each task."""
    rows: dict[tuple[str, int], bulk.Row] = {}
    for outcome in outcomes:
        if isinstance(outcome.decision, Failure):
            task, failure = (outcome.job_id, outcome.position), outcome.decision
            rows.setdefault(task, (*task, failure.code, failure.message[:1000], outcome.attempts))
    return [*rows.values()]


def fail_pending(
    session: Session, job_id: str, failure: Failure, *, after: int, spare: Collection[int]
) -> tuple[int, int | None]:
    """Fail one slice of the tasks still to be asked, but for the positions to `spare`.

    Returns how many were failed, and the position to go on behind, or None at the end.
    """
    positions = session.scalars(
        select(TaskRow.position)
        .where(TaskRow.job_id == job_id, TaskRow.position > after, TaskRow.state == TaskState.PENDING)
        .order_by(TaskRow.position)
        .limit(SLICE_TASKS)
    ).all()
    if not positions:
        return 0, None
    message = failure.message[:1000]
    rows = [(job_id, position, failure.code, message) for position in positions if position not in spare]
    failed = _CLOSE.run(session.connection(), rows)
    return failed, positions[-1] if len(positions) == SLICE_TASKS else None


def count_crash(
    session: Session, job_id: str, positions: Collection[int], limit: int, failure: Failure
) -> int:
    """Count a crash for each of these tasks that is still to be asked, and fail those it was the `limit`th of.

    Returns how many were failed.
    """
    keys = [{"b_job": job_id, "b_position": position} for position in sorted(positions)]
    connection = session.connection()
    bulk.update_each(connection, _COUNT_CRASH, keys)
    closed = {"b_crashes": limit, "error_code": failure.code, "error_message": failure.message[:1000]}
    return bulk.update_each(connection, _CLOSE_CRASHED, [key | closed for key in keys])


@dataclass(frozen=True, slots=True)
class Reopened:
    """One slice of failed tasks that are pending again; `after`: where to go on, or None at the end."""

    tasks: int
    message_length: int
    after: int | None


def reopen_slice(session: Session, job_id: str, codes: Collection[ErrorCode] | None, after: int) -> Reopened:
    """Make one slice of the failed tasks (of these codes) behind `after` pending again."""
    failed = [TaskRow.job_id == job_id, TaskRow.state == TaskState.FAILED, TaskRow.position > after]
    if codes is not None:
        failed.append(TaskRow.error_code.in_(codes))
    rows = session.execute(
        select(TaskRow.position, func.length(TaskRow.error_message))
        .where(*failed)
        .order_by(TaskRow.position)
        .limit(SLICE_TASKS)
    ).all()
    if not rows:
        return Reopened(0, 0, None)
    last = rows[-1][0]
    session.execute(
        update(TaskRow)
        .where(*failed, TaskRow.position <= last)
        .values(state=TaskState.PENDING, error_code=None, error_message=None, attempts=0, crashes=0),
        execution_options={"synchronize_session": False},
    )
    more = last if len(rows) == SLICE_TASKS else None
    return Reopened(len(rows), sum(length or 0 for _, length in rows), more)


def results_page(
    session: Session, job_id: str, after: int, limit: int, max_characters: int | None = None
) -> Page[TaskResult]:
    """Up to `limit` tasks behind the position `after`, in order, decided or not.

    They end with the one that reaches `max_characters` in answers, if that is given.
    """
    connection = session.connection()
    given = {"b_job": job_id, "b_after": after, "b_limit": limit}
    if max_characters is not None:
        limit = bulk.limit_within(connection, _RESULT_LENGTHS, given, max_characters)
    rows = connection.execute(_RESULTS, given | {"b_limit": limit})
    left: float = inf if max_characters is None else max_characters
    page: list[TaskResult] = []
    for position, id_, state, stored, reason, code, message, attempts in rows:
        # Oracle stores '' as NULL: an answered task always has an answer.
        answer = (stored or "") if state == TaskState.ANSWERED else None
        page.append(TaskResult(position, id_, state, answer, reason, code, message, attempts))
        if answer is not None:
            left -= len(answer)
            if left <= 0:
                break
    rows.close()
    return Page(page, more=len(page) == limit or left <= 0)


def delete_slice(session: Session, job_id: str) -> int:
    """Delete one slice of a job's tasks; how many are gone."""
    last = session.scalar(
        select(TaskRow.position)
        .where(TaskRow.job_id == job_id)
        .order_by(TaskRow.position)
        .offset(SLICE_TASKS - 1)
        .limit(1)
    )
    statement = delete(TaskRow).where(TaskRow.job_id == job_id)
    if last is not None:
        statement = statement.where(TaskRow.position <= last)
    result = session.execute(statement, execution_options={"synchronize_session": False})
    assert isinstance(result, CursorResult)
    return result.rowcount
