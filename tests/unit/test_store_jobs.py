"""Queries on jobs, on a real SQLite file."""

from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from gpt_worker.domain import Caller, Role
from gpt_worker.models import JobRow
from gpt_worker.store import jobs as job_store
from gpt_worker.store.jobs import MAX_IDS, JobProgress
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


@pytest.mark.parametrize("jobs", [1, 2, 5, 65, 256, 257])
def test_progress_of_many_jobs_is_added_to_each(tmp_path: Path, jobs: int) -> None:
    database = factories.database(folder=tmp_path)
    model = factories.store_job(database=database)
    with database.write() as session:
        columns = [column.name for column in JobRow.__table__.columns]
        for number in range(1, jobs + 1):
            copied = ", ".join(
                {"id": f"'{number}'", "requests": f"{number}"}.get(name, name) for name in columns
            )
            session.execute(
                text(
                    f"INSERT INTO jobs ({', '.join(columns)}) SELECT {copied} FROM jobs WHERE id = '{model.id}'"
                )
            )

    with database.write() as session:
        job_store.add_progress(
            session, {f"{number}": JobProgress(requests=number, answered=3) for number in range(1, jobs + 1)}
        )

    with database.read() as session:
        found = job_store.standings(session, [model.id, *map(str, range(1, jobs + 1))])
    assert [(job.requests, job.answered) for job in found] == [
        (0, 0),
        *((2 * number, 3) for number in range(1, jobs + 1)),
    ]
    database.close()


def test_ids_of_many_jobs_go_in_parts(tmp_path: Path) -> None:
    database = factories.database(folder=tmp_path)
    first, last = (factories.store_job(database=database, tasks=0) for _ in range(2))
    ids = [first.id, *map(str, range(MAX_IDS)), last.id]

    with database.write() as session:
        ended = job_store.end(session, ids, first.created_at)
        ended_again = job_store.end(session, ids, first.created_at)
        found = job_store.standings(session, ids)

    assert (ended, ended_again) == (2, 0)
    assert [job.id for job in found] == [first.id, last.id]
    assert [job.finished_at for job in found] == [first.created_at] * 2
    database.close()
