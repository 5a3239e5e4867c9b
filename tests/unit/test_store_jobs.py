"""Queries on jobs, on a real SQLite file."""

from pathlib import Path

from sqlalchemy import inspect

from gpt_worker.domain import Caller, Role
from gpt_worker.store import jobs as job_store
from tests import factories


def test_list_reads_no_settings(tmp_path: Path) -> None:
    database = factories.database(folder=tmp_path)
    factories.store_job(database=database, tasks=1)

    with database.read() as session:
        (job,) = job_store.list_jobs(
            session, Caller(role=Role.ADMIN), everyone=True, status=None, before=None, limit=100
        )

    assert inspect(job).unloaded == {"settings"}
    database.close()
