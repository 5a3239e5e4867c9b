"""An Idempotency-Key under pressure: fifty clients at once, a kill in the middle, and its age."""

import contextlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests

from tests.servers import query
from tests.service import Service
from tests.upstream import Upstream

pytestmark = pytest.mark.every_database

Start = Callable[..., tuple[Service, Upstream]]
CLIENTS = 50
DATA = [f"task {number}" for number in range(200)]


def submit(service: Service, key: str, data: Any = DATA) -> requests.Response:
    return service.submit(data, idempotency_key=key, prefer="respond-async")


def submit_at_once(
    service: Service, key: str, then: Callable[[], None] = lambda: None
) -> list[requests.Response]:
    """The replies to as many clients as there are, who begin at the same moment; `then` is done meanwhile."""
    token, together = service.admin, threading.Barrier(CLIENTS + 1)
    replies: list[requests.Response] = []

    def client() -> None:
        together.wait()
        with contextlib.suppress(requests.RequestException):
            replies.append(service.submit(DATA, token=token, idempotency_key=key, prefer="respond-async"))

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    together.wait()
    then()
    for each in clients:
        each.join()
    return replies


def job_ids(service: Service) -> list[str]:
    return [job["id"] for job in service.get("/jobs?limit=100", service.admin).json()["data"]]


def age_keys(service: Service, age: timedelta) -> None:
    """Make every key that old, in the database of the running service."""
    moment = (datetime.now(UTC) - age).strftime("%Y-%m-%d %H:%M:%S.%f")
    query(service, "UPDATE idempotency_keys SET created_at = :moment", moment=moment)
    assert query(service, "SELECT count(*) FROM idempotency_keys") == [(1,)]


def test_fifty_submits_at_once_make_one_job(start: Start) -> None:
    service, upstream = start()

    replies = submit_at_once(service, "fifty")

    assert len(replies) == CLIENTS
    assert {reply.status_code for reply in replies} <= {202, 409}
    accepted = [reply for reply in replies if reply.status_code == 202]
    (job_id,) = {reply.json()["id"] for reply in accepted}
    assert [reply.headers.get("Idempotency-Replayed") for reply in accepted].count(None) == 1
    assert job_ids(service) == [job_id]
    service.wait_finished(job_id)
    assert len(upstream.calls()) == len(DATA)


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1])
def test_kill_among_fifty_submits_leaves_at_most_one_job_and_a_key_that_works(
    start: Start, after_s: float
) -> None:
    service, _ = start()
    told = submit_at_once(service, "killed", lambda: kill_after(service, after_s))

    service.start()

    reply = submit(service, "killed")
    assert reply.status_code == 202
    assert {early.json()["id"] for early in told if early.status_code == 202} <= {reply.json()["id"]}
    assert job_ids(service) == [reply.json()["id"]]
    assert submit(service, "killed").headers["Idempotency-Replayed"] == "true"


def kill_after(service: Service, seconds: float) -> None:
    threading.Event().wait(seconds)
    service.kill()


def test_key_is_kept_for_24_hours(start: Start) -> None:
    service, _ = start()
    first = submit(service, "old").json()["id"]

    age_keys(service, timedelta(hours=23, minutes=59))
    assert submit(service, "old").json()["id"] == first
    assert submit(service, "old", ["another request"]).status_code == 422
    age_keys(service, timedelta(hours=24, seconds=1))

    reply = submit(service, "old", ["another request"])
    assert reply.status_code == 202
    assert reply.json()["id"] != first
    assert "Idempotency-Replayed" not in reply.headers
