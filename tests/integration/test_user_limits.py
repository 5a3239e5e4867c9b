"""The limits of one user against the real service: jobs, tasks and requests a minute, and that nothing stays."""

import socket
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from gpt_worker.client import patience
from gpt_worker.client.bodies import Body
from gpt_worker.client.credentials import Credentials
from gpt_worker.client.errors import Busy, Passing
from gpt_worker.client.server import Server
from gpt_worker.client.submitting import submit
from tests.openapi_document import Document
from tests.service import Service
from tests.upstream import Fault, FaultKind, Upstream

Start = Callable[..., tuple[Service, Upstream]]


def start_hanging(start: Start, **env: str) -> tuple[Service, Upstream]:
    """A service whose jobs don't end until `let_go`."""
    service, upstream = start(env=env)
    assert service.admin
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    return service, upstream


def let_go(upstream: Upstream) -> None:
    upstream.clear_faults()
    upstream.release()


def send(service: Service, tasks: int = 1, **options: Any) -> requests.Response:
    return service.submit(["hello"] * tasks, prefer="respond-async", **options)


def accepted(reply: requests.Response) -> str:
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def assert_refused(reply: requests.Response, setting: str) -> None:
    """A 429 that names the setting and says when to come back."""
    assert reply.status_code == 429, reply.text
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert setting in reply.json()["detail"]
    assert 10 <= int(reply.headers["Retry-After"]) <= 60


def rows(service: Service, what: str) -> int:
    with closing(sqlite3.connect(service.data_dir / "gpt-worker.sqlite3")) as database:
        (count,) = database.execute(f"SELECT count(*) FROM {what}").fetchone()
    return int(count)


# Jobs


def test_parallel_submits_stop_at_the_limit_and_leave_nothing_behind(start: Start) -> None:
    service, upstream = start_hanging(start, MAX_USER_JOBS="10")

    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(lambda n: send(service, 3, idempotency_key=f"key {n}"), range(50)))

    taken = [accepted(reply) for reply in replies if reply.status_code != 429]
    refused = [number for number, reply in enumerate(replies) if reply.status_code == 429]
    assert (len(taken), len(refused)) == (10, 40)
    for number in refused:
        assert_refused(replies[number], "MAX_USER_JOBS")
    service.wait_until(lambda: rows(service, "jobs") == 10)
    assert (rows(service, "tasks"), rows(service, "idempotency_keys")) == (30, 10)

    let_go(upstream)
    for job_id in taken:
        service.wait_finished(job_id)
    later = send(service, 3, idempotency_key=f"key {refused[0]}")
    assert accepted(later) not in taken
    assert "Idempotency-Replayed" not in later.headers


def test_users_have_limits_of_their_own_and_strangers_share_one(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_JOBS="1")
    bob = service.user("bob@example.org")
    service.patch("/settings", service.admin, json={"auth": False})
    callers = [service.admin, bob, None]

    first = [send(service, token=token) for token in callers]
    second = [send(service, token=token) for token in callers]

    assert [reply.status_code for reply in first] == [202] * 3
    for reply in second:
        assert_refused(reply, "MAX_USER_JOBS")


def test_what_makes_no_new_job_is_let_through_at_the_limit(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_JOBS="1")
    job_id = accepted(send(service, idempotency_key="mine"))

    again = send(service, idempotency_key="mine")
    dry_run = send(service, params={"dry_run": "true"})

    assert accepted(again) == job_id
    assert again.headers["Idempotency-Replayed"] == "true"
    assert dry_run.status_code == 200


def test_cancelled_job_gives_its_place_back(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_JOBS="1")
    job_id = accepted(send(service))

    service.delete(f"/jobs/{job_id}", service.admin)

    accepted(send(service))


def test_retry_counts_as_a_job_and_changes_nothing_when_refused(start: Start) -> None:
    service, upstream = start(env={"MAX_USER_JOBS": "1"})
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="bad"))
    failed = service.submit(["bad"]).json()
    upstream.add_fault(Fault(kind=FaultKind.HANG))
    running = accepted(send(service))

    refused = service.post(f"/jobs/{failed['id']}/retry", service.admin)

    assert_refused(refused, "MAX_USER_JOBS")
    assert service.job(failed["id"]) == failed
    let_go(upstream)
    service.wait_finished(running)
    accepted(service.post(f"/jobs/{failed['id']}/retry", service.admin))
    assert service.wait_finished(failed["id"])["status"] == "succeeded"


# Tasks


def test_upload_is_refused_as_soon_as_its_tasks_are_too_many(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_TASKS="10500")
    accepted(send(service, 4000))
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\n"
        f"Content-Type: application/jsonl\r\nContent-Length: {1 << 30}\r\n\r\n"
    )

    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
        client.sendall(head.encode() + b'{"text": "a"}\n' * 30_000)  # of a gigabyte that never comes
        reply = client.makefile("rb").readline()

    assert reply.startswith(b"HTTP/1.1 429")
    service.wait_until(lambda: rows(service, "jobs") == 1)
    assert rows(service, "tasks") == 4000
    body = b'{"text": "a"}\n' * 6500
    fits = service.post(
        "/jobs",
        service.admin,
        data=body,
        headers={"Content-Type": "application/jsonl", "Prefer": "respond-async"},
    )
    accepted(fits)


def test_uploads_count_while_they_come(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_TASKS="20000")
    head = (
        f"POST /jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\n"
        f"Content-Type: application/jsonl\r\nContent-Length: {1 << 30}\r\n\r\n"
    )

    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
        client.sendall(head.encode() + b'{"text": "%s"}\n' % (b"a" * 80) * 14_000)
        service.wait_until(lambda: rows(service, "tasks") >= 10_000)
        refused = send(service, 15_001)

    assert_refused(refused, "MAX_USER_TASKS")
    service.wait_until(lambda: rows(service, "jobs") == 0)
    accepted(send(service, 15_001))


def test_tasks_are_counted_over_all_jobs_until_they_are_decided(start: Start) -> None:
    service, upstream = start_hanging(start, MAX_USER_TASKS="100")
    running = accepted(send(service, 60))

    refused = send(service, 41, idempotency_key="later")

    assert_refused(refused, "MAX_USER_TASKS")
    accepted(send(service, 40))
    let_go(upstream)
    service.wait_finished(running)
    accepted(send(service, 41, idempotency_key="later"))


def test_parallel_submits_do_not_exceed_the_tasks(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_TASKS="100")

    with ThreadPoolExecutor(30) as threads:
        replies = list(threads.map(lambda _: send(service, 7), range(30)))

    statuses = [reply.status_code for reply in replies]
    assert (statuses.count(202), statuses.count(429)) == (14, 16)
    service.wait_until(lambda: rows(service, "tasks") == 98)


def test_job_that_could_never_fit_is_a_413(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_TASKS="100")

    reply = send(service, 101)

    assert reply.status_code == 413
    assert "MAX_USER_TASKS" in reply.json()["detail"]


def test_retry_counts_its_tasks_over_all_slices(start: Start) -> None:
    service, upstream = start_hanging(start, MAX_USER_TASKS="13000")
    job_id = accepted(send(service, 12_000))
    service.delete(f"/jobs/{job_id}", service.admin)
    let_go(upstream)
    service.wait_finished(job_id)
    failed = service.job(job_id)["counts"]["failed"]
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    other = accepted(send(service, 13_000 - failed + 1))

    for body in ({}, {"codes": ["cancelled"]}):
        assert_refused(service.post(f"/jobs/{job_id}/retry", service.admin, json=body), "MAX_USER_TASKS")
        assert service.job(job_id)["counts"]["failed"] == failed

    service.delete(f"/jobs/{other}", service.admin)
    accepted(service.post(f"/jobs/{job_id}/retry", service.admin))


# The client


def test_client_tells_the_wait_and_comes_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    service, upstream = start_hanging(start, MAX_USER_JOBS="1")
    running = accepted(send(service))
    waits: list[float] = []
    said: list[str] = []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))

    def on_wait(trouble: Passing, wait_s: float) -> None:
        said.append(str(trouble))
        let_go(upstream)
        service.wait_finished(running)

    body = Body({"Content-Type": "application/jsonl"}, b'{"text": "hello"}\n')
    job = submit(Server(Credentials(service.url, service.admin)), body, on_wait)

    assert waits == [60.0]
    assert said[0].startswith("refused for the next 60 s: ")
    assert "MAX_USER_JOBS" in said[0]
    assert service.wait_finished(job["id"])["status"] == "succeeded"


def test_client_that_still_sends_a_large_file_hears_why_it_is_refused(start: Start) -> None:
    service, _ = start_hanging(start, MAX_USER_JOBS="1")
    accepted(send(service))
    body = Body({"Content-Type": "application/jsonl"}, b'{"text": "hello"}\n' * 2_000_000)

    with pytest.raises(Busy, match="MAX_USER_JOBS"):
        Server(Credentials(service.url, service.admin)).ask("POST", "/jobs", data=body, headers=body.headers)


# Requests


def exhaust(service: Service, path: str, token: str | None) -> requests.Response:
    """The first reply that is a refusal of too many requests."""
    deadline_s = time.monotonic() + 20
    while (reply := service.get(path, token)).status_code != 429:
        assert time.monotonic() < deadline_s
    return reply


def test_requests_a_minute_are_counted_for_each_user_and_address(start: Start) -> None:
    service, _ = start(env={"MAX_USER_REQUESTS_PER_MINUTE": "30"})
    bob = service.user("bob@example.org")
    document = Document(service.get("/openapi.json").json())

    refused = exhaust(service, "/me", bob)

    assert document.undescribed(refused) == []
    assert "MAX_USER_REQUESTS_PER_MINUTE" in refused.json()["detail"]
    assert 1 <= int(refused.headers["Retry-After"]) <= 2
    assert service.get("/me", service.admin).status_code == 200
    assert service.get("/docs").status_code == 200
    assert exhaust(service, "/nothing", None).json()["status"] == 429
    assert service.get("/me", "no token").status_code == 429, "guesses at tokens count too"
    assert [service.get(path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3
    assert service.post("/", data=b"{}").status_code == 401
    assert service.get("/me", service.admin).status_code == 200


def test_zero_is_no_limit(start: Start) -> None:
    names = ("MAX_USER_JOBS", "MAX_USER_TASKS", "MAX_USER_REQUESTS_PER_MINUTE")
    service, _ = start_hanging(start, **dict.fromkeys(names, "0"))

    replies = [send(service, 20) for _ in range(5)]

    assert [reply.status_code for reply in replies] == [202] * 5
    assert service.get("/docs").status_code == 200
