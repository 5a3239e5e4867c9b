"""Queries on tasks: storing them, reading what is still to be asked, recording what came of it.

Everything walks the primary key (job, position), never OFFSET, and touches at most a slice of rows at a time.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import CursorResult, Table, bindparam, delete, func, insert, select, update
from sqlalchemy.orm import Session

from gpt_worker.domain import ErrorCode, Failure, NewTask, Outcome, Prompt, TaskState
from gpt_worker.models import TaskRow

SLICE_TASKS = 5000
_TASKS = cast(Table, TaskRow.__table__)


@dataclass(frozen=True, slots=True)
class PendingTask:
    """A task still to be asked."""

    position: int
    prompt: Prompt
    tokens: int
    attempts: int = 0  # charged tries, of this run


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
    session.execute(
        insert(_TASKS),
        [
            {
                "job_id": job_id,
                "position": position,
                "id": task.id,
                "prompt": json.dumps(task.prompt, ensure_ascii=False, separators=(",", ":")),
                "tokens": task.tokens,
                "state": TaskState.PENDING,
                "attempts": 0,
            }
            for position, task in enumerate(tasks, first_position)
        ],
    )


def pending_page(session: Session, job_id: str, after: int, limit: int, max_tokens: int) -> list[PendingTask]:
    """Up to `limit` tasks still to be asked, behind the position `after`, of about `max_tokens` in all."""
    rows = session.execute(
        select(TaskRow.position, TaskRow.prompt, TaskRow.tokens, TaskRow.attempts)
        .where(TaskRow.job_id == job_id, TaskRow.position > after, TaskRow.state == TaskState.PENDING)
        .order_by(TaskRow.position)
        .limit(limit)
    ).yield_per(50)
    page: list[PendingTask] = []
    for position, prompt, tokens, attempts in rows:
        page.append(PendingTask(position, json.loads(prompt), tokens, attempts))
        max_tokens -= tokens
        if max_tokens <= 0:
            break
    rows.close()
    return page


def record_answers(session: Session, outcomes: Iterable[Outcome]) -> int:
    """Store answers of one job to tasks that are not decided yet; how many were."""
    rows = [
        {
            "b_job": outcome.job_id,
            "b_position": outcome.position,
            "state": TaskState.ANSWERED,
            "answer": outcome.decision.text,
            "finish_reason": outcome.decision.finish_reason,
            "attempts": outcome.attempts,
        }
        for outcome in outcomes
        if outcome.decision is not None and not isinstance(outcome.decision, Failure)
    ]
    return _update_pending(session, rows)


def record_failures(session: Session, outcomes: Iterable[Outcome]) -> int:
    """Store failures of one job's tasks that are not decided yet; how many were."""
    rows = [
        {
            "b_job": outcome.job_id,
            "b_position": outcome.position,
            "state": TaskState.FAILED,
            "error_code": outcome.decision.code,
            "error_message": outcome.decision.message[:1000],
            "attempts": outcome.attempts,
        }
        for outcome in outcomes
        if isinstance(outcome.decision, Failure)
    ]
    return _update_pending(session, rows)


def record_attempts(session: Session, outcomes: Iterable[Outcome]) -> None:
    """Note the charged tries of tasks that are asked again, so that they outlive this process."""
    rows = [
        {"b_job": outcome.job_id, "b_position": outcome.position, "attempts": outcome.attempts}
        for outcome in outcomes
        if outcome.decision is None and outcome.attempts
    ]
    _update_pending(session, rows)


def _update_pending(session: Session, rows: list[dict[str, Any]]) -> int:
    if not rows:
        return 0
    statement = update(_TASKS).where(
        _TASKS.c.job_id == bindparam("b_job"),
        _TASKS.c.position == bindparam("b_position"),
        _TASKS.c.state == TaskState.PENDING,
    )
    values: dict[str, Any] = {name: bindparam(name) for name in rows[0] if not name.startswith("b_")}
    result = session.connection().execute(statement.values(values), rows)
    return result.rowcount


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
    rows = [
        {
            "b_job": job_id,
            "b_position": position,
            "state": TaskState.FAILED,
            "error_code": failure.code,
            "error_message": failure.message[:1000],
        }
        for position in positions
        if position not in spare
    ]
    failed = _update_pending(session, rows)
    return failed, positions[-1] if len(positions) == SLICE_TASKS else None


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
        .values(state=TaskState.PENDING, error_code=None, error_message=None, attempts=0),
        execution_options={"synchronize_session": False},
    )
    more = last if len(rows) == SLICE_TASKS else None
    return Reopened(len(rows), sum(length or 0 for _, length in rows), more)


def results_page(session: Session, job_id: str, after: int, limit: int) -> list[TaskResult]:
    """Up to `limit` tasks behind the position `after`, in order, decided or not."""
    rows = session.execute(
        select(
            TaskRow.position,
            TaskRow.id,
            TaskRow.state,
            TaskRow.answer,
            TaskRow.finish_reason,
            TaskRow.error_code,
            TaskRow.error_message,
            TaskRow.attempts,
        )
        .where(TaskRow.job_id == job_id, TaskRow.position > after)
        .order_by(TaskRow.position)
        .limit(limit)
    )
    # Oracle stores '' as NULL: an answered task always has an answer.
    return [
        TaskResult(
            position,
            id_,
            state,
            (answer or "") if state == TaskState.ANSWERED else None,
            reason,
            code,
            message,
            attempts,
        )
        for position, id_, state, answer, reason, code, message, attempts in rows
    ]


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
