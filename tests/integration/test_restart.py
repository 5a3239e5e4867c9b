"""Kills and restarts: every answer arrives, what was answered is not asked again, what was set stays."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import requests

from tests.receiver import Receiver, verified
from tests.servers import query
from tests.service import ADMIN_EMAIL, PASSWORD, Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

pytestmark = pytest.mark.every_database

Start = Callable[..., tuple[Service, Upstream]]
ANSWERED = 1


def slow_keys(count: int, latency_s: float) -> dict[str, KeyRules]:
    return {f"sk-restart-{number}": KeyRules(latency_s=latency_s) for number in range(count)}


def test_killed_service_ends_its_job_and_asks_no_answered_task_again(start: Start) -> None:
    service, upstream = start(slow_keys(5, 0.1), {"GPT_THREADS_PER_KEY": "16"})
    data = {f"id {number}": f"task {number}" for number in range(2000)}
    first = service.submit(data, prefer="respond-async", idempotency_key="survives")
    job_id = first.json()["id"]
    upstream.wait_for_calls(700)

    service.kill()

    upstream.wait_until_idle()
    sent_before = {call.user_text for call in upstream.calls()}
    answered_before = {
        data[id_] for (id_,) in query(service, f"SELECT id FROM tasks WHERE state = {ANSWERED}")
    }
    assert 0 < len(answered_before) < 2000
    service.start()
    job = service.wait_finished(job_id)
    assert service.job(job_id)["results"] == {id_: f"answer to: {text}" for id_, text in data.items()}
    assert (job["status"], job["run"]) == ("succeeded", 1)
    assert job["counts"] == {"total": 2000, "answered": 2000, "failed": 0, "pending": 0}
    asked = Counter(call.user_text for call in upstream.calls())
    assert {text for text in answered_before if asked[text] != 1} == set()
    again = {text for text, times in asked.items() if times > 1}
    assert again == sent_before - answered_before
    assert max(asked.values()) <= 2
    assert job["usage"]["requests"] == 2000
    replay = service.submit(data, idempotency_key="survives")
    assert (replay.json()["id"], replay.headers["Idempotency-Replayed"]) == (job_id, "true")


def test_killed_service_keeps_its_accounts_modes_jobs_and_webhook_schedule(
    start: Start, receiver: Receiver
) -> None:
    service, upstream = start(env={"REQUEST_API": receiver.url})
    user = service.user("ada@example.org")
    receiver.script(500)
    secret = service.get("/webhooks/secret", service.admin).json()["secret"]
    done = service.submit({"b": "B", "a": "A"}, token=user).json()
    owed = service.submit(["hello"], {"delivery": "webhook"}, user).json()["id"]
    modes = {"delivery": "webhook", "registration": True, "auth": False}
    assert service.patch("/settings", service.admin, json=modes).json() == modes
    receiver.wait_for(1)
    refused = wait_for_attempt(service, user, owed)
    asked = len(upstream.calls())

    service.kill()
    service.start()

    first, second = receiver.wait_for(2)
    due_s = (datetime.fromisoformat(refused["next_attempt_at"]) - datetime.now(UTC)).total_seconds()
    assert due_s <= 0.1, "it came before its time"
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert verified(second, secret)["data"]["id"] == owed
    assert service.get("/settings").json() == modes
    assert service.job(done["id"], user) == done
    assert service.get("/me", user).json()["email"] == "ada@example.org"
    assert service.login(ADMIN_EMAIL, PASSWORD)
    assert service.login("ada@example.org")
    assert len(upstream.calls()) == asked


def wait_for_attempt(service: Service, token: str, job_id: str) -> dict[str, Any]:
    """The job's delivery, once an attempt is stored."""
    deadline_s = time.monotonic() + 10.0
    while True:
        (delivery,) = service.get(f"/deliveries?job_id={job_id}", token).json()["data"]
        if delivery["attempts"]:
            found: dict[str, Any] = delivery
            return found
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_terminated_service_lets_waiters_go_and_asks_nothing_twice(start: Start) -> None:
    service, upstream = start(slow_keys(2, 0.2), {"GPT_THREADS_PER_KEY": "4"})
    data = [f"task {number}" for number in range(150)]
    replies: list[requests.Response] = []
    assert service.admin
    waiter = threading.Thread(target=lambda: replies.append(service.submit(data)))
    waiter.start()
    upstream.wait_for_calls(10)

    service.signal(signal.SIGTERM)

    waiter.join(20.0)
    (reply,) = replies
    job_id = reply.json()["id"]
    assert (reply.status_code, reply.headers["Location"]) == (202, f"/jobs/{job_id}")
    assert service.wait_exit() == 0
    for key in upstream.keys:
        upstream.set_key(key, latency_s=0.0)
    service.start()
    assert service.wait_finished(job_id)["status"] == "succeeded"
    assert service.job(job_id)["results"] == {
        str(number): f"answer to: {text}" for number, text in enumerate(data)
    }
    assert len(upstream.calls()) == len(data)


def test_next_start_ends_every_job_as_it_must(start: Start) -> None:
    service, upstream = start()
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, times=6))
    retried = service.submit(["bad"] * 6).json()["id"]
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    cancelled = service.submit(["a"] * 6, prefer="respond-async").json()["id"]
    late = service.submit(["b"] * 6, {"deadline_s": 1}, prefer="respond-async").json()["id"]
    deadline_s = time.monotonic() + 1.0
    kept = service.submit(["c"] * 6, prefer="respond-async").json()["id"]
    assert service.post(f"/jobs/{retried}/retry", service.admin).status_code == 202
    upstream.wait_for_in_flight(2)
    service.delete(f"/jobs/{cancelled}", service.admin)

    service.kill()
    upstream.clear_faults()
    upstream.release()
    while time.monotonic() < deadline_s:
        time.sleep(0.02)  # it passes while nobody is there
    service.start()

    ended = [service.wait_finished(job_id) for job_id in (retried, cancelled, late, kept)]
    assert [job["status"] for job in ended] == ["succeeded", "cancelled", "failed", "succeeded"]
    assert [job["run"] for job in ended] == [2, 1, 1, 1]
    assert {error["code"] for error in service.job(late)["errors"].values()} == {"expired"}
    assert {error["code"] for error in service.job(cancelled)["errors"].values()} == {"cancelled"}


def test_submit_that_was_cut_by_a_kill_leaves_nothing(start: Start) -> None:
    service, _ = start()
    token = service.admin
    stopped: list[str] = []

    def submit() -> None:
        try:
            service.submit(["x" * 100] * 60_000, token=token, prefer="respond-async")
        except requests.RequestException as error:
            stopped.append(type(error).__name__)

    client = threading.Thread(target=submit)
    client.start()
    wait_for_rows(service, "SELECT count(*) > 0 FROM jobs WHERE status = 'receiving'")
    service.kill()
    client.join()
    half_stored = query(service, "SELECT count(*) FROM tasks")[0][0]

    service.start()

    assert stopped
    assert 0 < half_stored < 60_000
    assert service.get("/jobs", token).json()["data"] == []
    wait_for_rows(service, "SELECT count(*) = 0 FROM tasks")
    wait_for_rows(service, "SELECT count(*) = 0 FROM jobs")


def wait_for_rows(service: Service, statement: str) -> None:
    """Returns once the statement says 1."""
    deadline_s = time.monotonic() + 20.0
    while query(service, statement) != [(1,)]:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.mark.slow
def test_task_in_flight_at_five_crashes_is_asked_no_more(start: Start, receiver: Receiver) -> None:
    service, upstream = start(slow_keys(2, 0.0), {"REQUEST_API": receiver.url})
    hang = Fault(kind=FaultKind.HANG, contains="deadly", times=None)
    upstream.add_fault(hang)
    data = {"a": "deadly", **{f"id {number}": f"task {number}" for number in range(40)}}
    job_id = service.submit(data, {"delivery": "webhook"}).json()["id"]
    service.wait_until(lambda: counts(service, job_id)["answered"] == 40)
    wait_until_asked(upstream, "deadly", 1)

    for crash in range(1, 5):
        service.kill()
        service.start()
        wait_until_asked(upstream, "deadly", crash + 1)
    service.signal(signal.SIGTERM)
    service.wait_until(lambda: stops(service))
    service.kill()  # it was asked to stop, so this is no crash
    service.start()
    wait_until_asked(upstream, "deadly", 6)
    assert counts(service, job_id) == {"total": 41, "answered": 40, "failed": 0, "pending": 1}
    service.kill()
    service.start()

    job = service.wait_finished(job_id)
    assert (job["status"], job["counts"]["failed"]) == ("partial", 1)
    stored = service.job(job_id)
    assert stored["results"] == {
        id_: None if id_ == "a" else f"answer to: {text}" for id_, text in data.items()
    }
    assert stored["errors"] == {
        "a": {
            "code": "interrupted",
            "message": "the service itself failed 5 times while this task was asked",
            "attempts": 0,
        }
    }
    (message,) = receiver.wait_for(1)
    assert json.loads(message.body)["data"]["errors"] == stored["errors"]
    asked = Counter(call.user_text for call in upstream.calls())
    assert asked == {**dict.fromkeys(data.values(), 1), "deadly": 6}
    upstream.clear_faults()
    assert service.post(f"/jobs/{job_id}/retry", service.admin).status_code == 202
    assert service.wait_finished(job_id)["status"] == "succeeded"


def counts(service: Service, job_id: str) -> dict[str, int]:
    of_job: dict[str, int] = service.job(job_id, results=False)["counts"]
    return of_job


def stops(service: Service) -> bool:
    try:
        return service.get("/readyz").status_code == 503
    except requests.ConnectionError:
        return True


def wait_until_asked(upstream: Upstream, text: str, times: int) -> None:
    deadline_s = time.monotonic() + 20.0
    while sum(call.user_text == text for call in upstream.calls()) < times:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
