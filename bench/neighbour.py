"""Another user, who sends small inline jobs and waits for each: how long they take, alone or beside something else."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bench.work import MODEL, count_lost_and_wrong
from tests.service import Service


def small_job_s(service: Service, token: str, number: int) -> float:
    """From the request of three tasks to the last byte of the reply; every answer is checked."""
    tasks = {str(task): f"Say hello, number {number}.{task}" for task in range(3)}
    begin_s = time.monotonic()
    reply = service.submit(tasks, {"model": MODEL, "delivery": "inline"}, token)
    took_s = time.monotonic() - begin_s
    assert reply.status_code == 200, reply.text
    assert count_lost_and_wrong(tasks, reply.json()["results"]) == (0, 0), reply.text
    return took_s


class Neighbour:
    """One user at a pace: a job every so often, not as fast as they come back."""

    def __init__(self, service: Service, every_s: float) -> None:
        self._service = service
        self._token = service.user("neighbour@example.org")
        self._every_s = every_s
        self._sent = 0

    def alone_s(self, jobs: int) -> list[float]:
        """So many jobs, and how long each took."""
        return [self._one(threading.Event()) for _ in range(jobs)]

    @contextmanager
    def at_work(self) -> Iterator[list[float]]:
        """Jobs for as long as the block lasts, of which there is at least one; the list holds how long each took."""
        taken_s: list[float] = []
        over = threading.Event()

        def work() -> None:
            while not (taken_s and over.is_set()):
                taken_s.append(self._one(over))

        thread = threading.Thread(target=work, name="neighbour", daemon=True)
        thread.start()
        try:
            yield taken_s
        finally:
            over.set()
            thread.join()

    def _one(self, over: threading.Event) -> float:
        self._sent += 1
        took_s = small_job_s(self._service, self._token, self._sent)
        over.wait(max(0.0, self._every_s - took_s))
        return took_s
