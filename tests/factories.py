"""Builders of the service's values that fill in what does not matter to a test. Keyword-only."""

import threading
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from flask import Flask

from config import ApiKey, Settings
from gpt_worker.backoff import Problem, ProblemKind
from gpt_worker.db import Database, db
from gpt_worker.domain import (
    Answer,
    DeliveryMode,
    ErrorCode,
    JobSettings,
    JobStatus,
    NewTask,
    Outcome,
    Usage,
    new_id,
    utc_now,
)
from gpt_worker.fair_queue import JobRun, QueuedTask
from gpt_worker.gpt import Reply
from gpt_worker.lanes import Lane
from gpt_worker.limit_headers import Limit, LimitHeaders
from gpt_worker.models import JobRow, UserRow
from gpt_worker.store import jobs as job_store
from gpt_worker.store import tasks as task_store
from gpt_worker.transport import RawReply

APP_KEY = "unit-tests-only-0123456789-abcdefghij"
MODEL = "gpt-test"


def settings(*, data_dir: Path, **env: str) -> Settings:
    """The settings of a test service; `env` are further variables."""
    return Settings.from_env(
        {"NODE_ENV": "test", "DATA_DIR": str(data_dir), "APP_KEY": APP_KEY, **env}, data_dir / "no.env"
    )


def database(*, folder: Path) -> Database:
    """A real SQLite file with every table."""
    app = Flask("test")
    made = Database(app, f"sqlite:///{folder / 'test.sqlite3'}")
    with app.app_context():
        db.create_all()
    return made


def headers(
    *,
    requests: tuple[int, int, float | None] | None = None,
    tokens: tuple[int, int, float | None] | None = None,
    retry_after_s: float | None = None,
) -> LimitHeaders:
    """What a reply tells: (limit, remaining, reset_s) of each."""
    return LimitHeaders(
        Limit(*requests) if requests else None, Limit(*tokens) if tokens else None, retry_after_s
    )


def queued_task(*, position: int = 0, tokens: int = 10, prompt: str = "Say hello") -> QueuedTask:
    return QueuedTask(position, prompt, tokens, weight=tokens)


def job_run(
    *,
    id: str = "",  # noqa: A002
    run: int = 1,
    owner: str = "ada",
    tasks: int = 0,
    tokens: int = 10,
    deadline_at: datetime | None = None,
    **settings: Any,
) -> JobRun:
    """A job whose tasks are all in memory; `settings` are fields of `JobSettings`."""
    job = JobRun(
        id=id or new_id(),
        run=run,
        owner=owner,
        model=MODEL,
        settings=JobSettings(**settings),
        deadline_at=deadline_at or utc_now() + timedelta(days=1),
        pending=tasks,
    )
    job.add_page(
        [queued_task(position=position, tokens=tokens) for position in range(tasks)],
        tasks - 1,
        exhausted=True,
    )
    return job


def lane(*, number: int = 0, max_threads: int = 4) -> Lane:
    key = ApiKey(number, f"sk-test-{number:04}", "http://127.0.0.1:9/v1")
    return Lane(key, max_threads, threading.Lock())


def problem(*, kind: ProblemKind = ProblemKind.TRANSIENT, **fields: Any) -> Problem:
    codes = {
        ProblemKind.RATE_LIMITED: ErrorCode.RATE_LIMITED,
        ProblemKind.QUOTA_EXHAUSTED: ErrorCode.QUOTA_EXHAUSTED,
        ProblemKind.KEY_REFUSED: ErrorCode.KEY_REFUSED,
        ProblemKind.MODEL_UNAVAILABLE: ErrorCode.MODEL_UNAVAILABLE,
        ProblemKind.TOO_LARGE: ErrorCode.CONTEXT_LENGTH,
        ProblemKind.FINAL: ErrorCode.BAD_REQUEST,
        ProblemKind.STALE: ErrorCode.CONNECTION,
    }
    filled = {"code": codes.get(kind, ErrorCode.UPSTREAM_ERROR), "message": f"it is {kind}", **fields}
    return Problem(kind=kind, **filled)


def reply(*, text: str = "Hello", tokens: int = 0, **fields: Any) -> Reply[Answer]:
    """A good answer, whose usage tells `tokens` prompt tokens if there are any."""
    return Reply(Answer(text), Usage(tokens, 0), **fields)


def trouble(*, kind: ProblemKind = ProblemKind.TRANSIENT, **fields: Any) -> Reply[Answer]:
    """A reply that is a problem; `fields` are those of `Problem`."""
    return Reply(problem(kind=kind, **fields))


def raw_reply(*, status: int = 200, body: bytes = b"", headers: Mapping[str, str] | None = None) -> RawReply:
    return RawReply(status, headers or {}, body)


def outcome(*, job_id: str, position: int = 0, **fields: Any) -> Outcome:
    """A call that was answered."""
    filled = {"decision": Answer("Hello"), "attempts": 1, "calls": 1, "usage": Usage(10, 2), **fields}
    return Outcome(job_id, position, **filled)


def store_user(*, database: Database, email: str = "ada@example.org") -> str:
    """The id of a stored user."""
    user = UserRow(
        id=new_id(), email=email, password_hash="none", role="user", disabled=False, created_at=utc_now()
    )
    with database.write() as session:
        session.add(user)
    return user.id


def store_job(
    *,
    database: Database,
    tasks: int = 1,
    ids: list[str] | None = None,
    tokens: int = 10,
    owner_id: str | None = None,
    delivery: DeliveryMode = DeliveryMode.INLINE,
    status: JobStatus = JobStatus.QUEUED,
    model: str = MODEL,
    deadline_s: float = 86_400,
    **settings: Any,
) -> JobRow:
    """A stored job with its tasks; `settings` are fields of `JobSettings`."""
    names = ids or [f"t{number}" for number in range(tasks)]
    job = JobRow(
        id=new_id(),
        owner_id=owner_id,
        status=JobStatus.RECEIVING,
        run=1,
        model=model,
        delivery=delivery,
        settings=JobSettings(**settings).to_json(),
        meta={},
        priority=settings.get("priority", 0),
        created_at=utc_now(),
        deadline_at=utc_now() + timedelta(seconds=deadline_s),
    )
    with database.write() as session:
        job_store.add_job(session, job)
        session.flush()
        task_store.add_tasks(session, job.id, 0, [NewTask(name, f"task {name}", tokens) for name in names])
        job_store.queue(session, job.id, len(names), 0)
    with database.write() as session:
        stored = job_store.get_job(session, job.id)
        assert stored is not None
        stored.status = status
    return stored
