"""A job as the outside sees it: the same object in replies, lists and webhooks. Reads rows; decides nothing."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from sqlalchemy.orm import Session

from gpt_worker.db import Database
from gpt_worker.domain import TaskState
from gpt_worker.errors import NotFound
from gpt_worker.models import JobRow
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.store.tasks import TaskResult

Results = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Answers, errors and finish reasons, each by task id."""

MAX_RESULT_TASKS = 10_000
MAX_RESULT_BYTES = 8 << 20
PAGE_TASKS = 1000
PAGE_CHARACTERS = 4 << 20  # of answers, which have up to four bytes each
PIECE_CHARACTERS = 128 << 10
CSV_HEADER = ("id", "result", "error_code", "finish_reason")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def render_time(moment: datetime | None) -> str | None:
    """`2026-01-31T12:00:00.000Z`, RFC 3339 in UTC."""
    return (
        None
        if moment is None
        else moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def render_job(
    session: Session, job: JobRow, *, with_results: bool, waiting: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The job object of the API. The three result members are null when left out or too large to stand in it."""
    owners = job_store.owner_emails(session, [job])
    results = _results(session, job.id) if with_results and results_fit(job) else None
    return _job(job, owners, results, waiting)


def render_list(
    session: Session, jobs: Sequence[JobRow], waiting: Mapping[str, dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """The job objects of a list, without results; `waiting` is by job id."""
    owners = job_store.owner_emails(session, jobs)
    return [_job(job, owners, None, waiting.get(job.id)) for job in jobs]


def _job(
    job: JobRow, owners: Mapping[str, str], told: Results | None, waiting: dict[str, Any] | None
) -> dict[str, Any]:
    results, errors, finish_reasons = told or (None, None, None)
    return {
        "id": job.id,
        "status": job.status,
        "run": job.run,
        "model": job.model,
        "delivery": job.delivery,
        "owner": owners.get(job.owner_id or ""),
        "metadata": job.meta,
        "waiting": waiting,
        "counts": {
            "total": job.total,
            "answered": job.answered,
            "failed": job.failed,
            "pending": job.total - job.answered - job.failed,
        },
        "usage": {
            "requests": job.requests,
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": job.completion_tokens,
        },
        "results": results,
        "errors": errors,
        "finish_reasons": finish_reasons,
        "results_url": None if results_fit(job) else f"/jobs/{job.id}/results",
        "created_at": render_time(job.created_at),
        "started_at": render_time(job.started_at),
        "finished_at": render_time(job.finished_at),
    }


def results_fit(job: JobRow) -> bool:
    """Whether the results of a job of this size stand in the job object."""
    return job.total <= MAX_RESULT_TASKS and job.results_bytes <= MAX_RESULT_BYTES


def _results(session: Session, job_id: str) -> Results:
    results: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    finish_reasons: dict[str, Any] = {}
    for task in task_store.results_page(session, job_id, after=-1, limit=MAX_RESULT_TASKS).tasks:
        results[task.id] = task.answer
        if task.state == TaskState.FAILED:
            errors[task.id] = render_error(task)
        elif task.state == TaskState.ANSWERED and task.finish_reason != "stop":
            finish_reasons[task.id] = task.finish_reason
    return results, errors, finish_reasons


def render_error(task: TaskResult) -> dict[str, Any] | None:
    """`{"code", "message", "attempts"}` of a task that failed, else None."""
    if task.state != TaskState.FAILED:
        return None
    return {"code": task.error_code, "message": task.error_message, "attempts": task.attempts}


def results_jsonl(database: Database, job_id: str) -> Iterator[bytes]:
    """The decided tasks, `{"id", "result", "error", "finish_reason"}` a line, in order, in pieces of many lines."""
    return _in_pieces(
        _encode(
            {
                "id": task.id,
                "result": task.answer,
                "error": render_error(task),
                "finish_reason": task.finish_reason,
            }
        )
        + "\n"
        for task in _tasks(database, job_id)
        if task.state != TaskState.PENDING
    )


def results_json(database: Database, job_id: str) -> Iterator[bytes]:
    """`{"results": {…}, "errors": {…}}` with every id, in order; two walks, so that memory stays flat."""

    def members(entries: Iterator[tuple[str, Any]]) -> Iterator[str]:
        comma = ""
        for name, value in entries:
            yield f"{comma}{json.dumps(name)}:{json.dumps(value, ensure_ascii=False)}"
            comma = ","

    results = ((task.id, task.answer) for task in _tasks(database, job_id))
    errors = (
        (task.id, render_error(task)) for task in _tasks(database, job_id) if task.state == TaskState.FAILED
    )
    return _in_pieces(chain(['{"results":{'], members(results), ['},"errors":{'], members(errors), ["}}\n"]))


def _in_pieces(texts: Iterable[str]) -> Iterator[bytes]:
    """The texts as UTF-8, many of them a piece: each is sent by itself."""
    piece: list[str] = []
    length = 0
    for text in texts:
        piece.append(text)
        length += len(text)
        if length >= PIECE_CHARACTERS:
            yield "".join(piece).encode()
            piece, length = [], 0
    if piece:
        yield "".join(piece).encode()


def results_csv(database: Database, job_id: str) -> Iterator[bytes]:
    """`id,result,error_code,finish_reason` of the decided tasks; no cell that a spreadsheet would run as a formula."""
    writer = csv.writer(_Line())
    rows = (
        [_defused(cell or "") for cell in (task.id, task.answer, task.error_code, task.finish_reason)]
        for task in _tasks(database, job_id)
        if task.state != TaskState.PENDING
    )
    return _in_pieces(map(writer.writerow, chain([CSV_HEADER], rows)))


class _Line:
    """Has `csv` return each row as its line: `writerow` returns what `write` does."""

    def write(self, line: str) -> str:
        return line


def _defused(cell: str) -> str:
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def _tasks(database: Database, job_id: str) -> Iterator[TaskResult]:
    """Every task, in order; a page is read in a short transaction of its own, and kept no longer than it is needed.

    Raises NotFound once the job is deleted: its rows go slice by slice, and what is left must not pass for the whole.
    """
    after, limit, more = -1, PAGE_TASKS, True
    while more:
        with database.read() as session:
            page = task_store.results_page(session, job_id, after, limit, PAGE_CHARACTERS)
            if not job_store.is_visible(session, job_id):
                raise NotFound("the job was deleted while its results were read")
        tasks, more = page.tasks, page.more
        if tasks:
            after = tasks[-1].position
            limit = min(PAGE_TASKS, 4 * len(tasks))  # a server looks at all of their lengths first
        tasks.reverse()
        while tasks:
            yield tasks.pop()
