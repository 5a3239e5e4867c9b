"""What the feeder brings into memory at once."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_worker.db import Database
from gpt_worker.domain import NewTask
from gpt_worker.fair_queue import LOW_TOKENS, FairQueue, JobRun
from gpt_worker.feeder import PAGE_TOKENS, Feeder
from gpt_worker.store import tasks as task_store
from tests import factories

PATIENCE_S = 30.0
LISTS = [{"role": "user", "content": [[]] * 40_000}]
WEIGHT = 320_000  # of these lists, roughly


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = factories.database(folder=tmp_path)
    yield made
    made.close()


class Dispatcher:
    """Takes tasks out of the queue as it is told to."""

    def __init__(self, database: Database) -> None:
        self.queue = FairQueue()
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self.feeder = Feeder(database, self.queue, self._lock, self)

    def end_early(self, job: JobRun) -> None:
        pass

    def expire(self, job: JobRun) -> None:
        pass

    def page_came(self) -> None:
        self._came.notify_all()

    def add(self, *jobs: JobRun) -> None:
        with self._lock:
            for job in jobs:
                self.queue.add(job)

    def end(self) -> None:
        with self._lock:
            self.feeder.end()

    def take(self, jobs: list[JobRun], count: int) -> tuple[list[tuple[str, int]], int]:
        """The next tasks, by job and position, one by one; and how many were in memory at most."""
        taken: list[tuple[str, int]] = []
        most = 0
        give_up_s = time.monotonic() + PATIENCE_S
        with self._lock:
            while len(taken) < count:
                job = next((job for job in jobs if job.fresh), None)
                most = max(most, sum(len(job.fresh) for job in jobs))
                if job is not None:
                    task = job.fresh[0]
                    job.pop(task)
                    taken.append((job.id, task.position))
                else:
                    self._came.wait(1.0)
                    assert time.monotonic() < give_up_s
                self.feeder.notify()
        return taken, most


@pytest.mark.parametrize(("jobs", "tasks"), [(1, 15), (15, 1)])
def test_prompts_that_take_much_memory_come_a_few_at_a_time(
    database: Database, jobs: int, tasks: int
) -> None:
    runs = []
    for _ in range(jobs):
        job = factories.store_job(database=database, tasks=0)
        with database.write() as session:  # with as few tokens as an earlier version counted
            task_store.add_tasks(
                session, job.id, 0, [NewTask(str(place), LISTS, 5) for place in range(tasks)]
            )
        run = factories.job_run(id=job.id, tasks=0)
        run.pending, run.exhausted, run.cursor = tasks, False, -1
        runs.append(run)
    dispatcher = Dispatcher(database)
    dispatcher.add(*runs)

    dispatcher.feeder.start()
    taken, most = dispatcher.take(runs, jobs * tasks)
    dispatcher.end()

    assert taken == [(run.id, place) for run in runs for place in range(tasks)]
    assert most <= (LOW_TOKENS + PAGE_TOKENS) // WEIGHT + 2
