"""What the database holds, read from a copy of its files, so that its own recovery is left to the service."""

import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PENDING, ANSWERED, FAILED = 0, 1, 2
HIDDEN = ("receiving", "discarded")


@dataclass(frozen=True, slots=True)
class Task:
    position: int
    id: str
    text: str
    state: int
    answer: str | None
    error_code: str | None


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    mark: str
    status: str
    run: int
    webhook: bool
    total: int
    answered: int
    failed: int
    finished: bool
    tasks: list[Task]


@dataclass(frozen=True, slots=True)
class Delivery:
    id: str
    job_id: str | None
    run: int
    status: str
    body: str | None


@dataclass(frozen=True)
class Snapshot:
    """All of it; `faults` are what SQLite itself finds wrong. Hidden jobs are left out."""

    jobs: dict[str, Job]
    deliveries: dict[str, Delivery]
    faults: list[str]

    @cached_property
    def by_mark(self) -> dict[str, list[Job]]:
        marks: dict[str, list[Job]] = {}
        for job in self.jobs.values():
            marks.setdefault(job.mark, []).append(job)
        return marks

    @cached_property
    def by_text(self) -> dict[str, tuple[Job, Task]]:
        return {task.text: (job, task) for job in self.jobs.values() for task in job.tasks}


EMPTY = Snapshot({}, {}, [])


def take(data_dir: Path) -> Snapshot:
    """While nobody serves. An absent database, or one without tables, holds nothing."""
    files = list(data_dir.glob("*.sqlite3*"))
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        for file in files:
            if not file.name.endswith("-shm"):  # made anew from the log, as after a crash of the machine
                shutil.copy(file, directory)
        names = list(Path(directory).glob("*.sqlite3"))
        return _read(names[0]) if names else EMPTY


def _read(path: Path) -> Snapshot:
    with closing(sqlite3.connect(path)) as database:
        (told,) = database.execute("PRAGMA integrity_check").fetchone()
        faults = [] if told == "ok" else [str(told)]
        faults += [f"foreign key: {row}" for row in database.execute("PRAGMA foreign_key_check")]
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return Snapshot({}, {}, faults)
        tasks: dict[str, list[Task]] = {}
        for job_id, position, id_, prompt, state, answer, code in database.execute(
            "SELECT job_id, position, id, prompt, state, answer, error_code FROM tasks ORDER BY job_id, position"
        ):
            tasks.setdefault(job_id, []).append(Task(position, id_, _text(prompt), state, answer, code))
        jobs = {
            row[0]: Job(
                id=row[0],
                mark=json.loads(row[1]).get("mark", ""),
                status=row[2],
                run=row[3],
                webhook=row[4] == "webhook",
                total=row[5],
                answered=row[6],
                failed=row[7],
                finished=row[8] is not None,
                tasks=tasks.get(row[0], []),
            )
            for row in database.execute(
                "SELECT id, meta, status, run, delivery, total, answered, failed, finished_at FROM jobs"
            )
            if row[2] not in HIDDEN
        }
        deliveries = {
            row[0]: Delivery(*row)
            for row in database.execute("SELECT id, job_id, run, status, body FROM deliveries")
        }
    return Snapshot(jobs, deliveries, faults)


def _text(prompt: str) -> str:
    parsed: Any = json.loads(prompt)
    return parsed if isinstance(parsed, str) else prompt
