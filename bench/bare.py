"""The yardstick of storing tasks: rows that are ready, one `executemany`, one commit, in the tables as we make them."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import create_engine

from gpt_worker.models import Base

PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")
JOB = """
INSERT INTO jobs (id, status, run, model, delivery, settings, meta, priority, total, answered, failed, results_bytes,
    requests, prompt_tokens, completion_tokens, created_at, deadline_at)
VALUES (?, 'receiving', 1, 'bare', 'inline', '{}', '{}', 0, 0, 0, 0, 0, 0, 0, 0, '2026-01-01', '2026-01-02')
"""
TASK = (
    "INSERT INTO tasks (job_id, position, id, prompt, tokens, state, attempts) VALUES (?, ?, ?, ?, ?, 0, 0)"
)


def bare_insert_s(tasks: list[tuple[str, str]], folder: Path) -> float:
    """Seconds to store these ids and prompts as pending tasks in a new database under `folder`."""
    job_id = "0" * 32
    rows = [(job_id, position, id_, prompt, 13) for position, (id_, prompt) in enumerate(tasks)]
    with TemporaryDirectory(prefix="bare-", dir=folder) as own:
        path = Path(own) / "bare.sqlite3"
        engine = create_engine(f"sqlite:///{path}")
        Base.metadata.create_all(engine)
        engine.dispose()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for pragma in PRAGMAS:
                connection.execute(f"PRAGMA {pragma}")
            connection.execute(JOB, (job_id,))
            begin_s = time.monotonic()
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(TASK, rows)
            connection.execute("COMMIT")
            return time.monotonic() - begin_s
