"""The service in numbers, scraped from a running one: they are right, tell nobody's text, and open to the right few."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.service import Env, Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

MODEL = "gpt-ours"
MARK = "s3cr3t-v4lue"
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[Upstream]:
    with Upstream({"sk-fake-key-0": KeyRules(rpm=60_000), "sk-fake-key-1": KeyRules(rpm=60_000)}) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def shared_env() -> Env:
    return {"GPT_MODEL": MODEL}


class Scraped:
    """The samples of one scrape; counters only grow while tests share a service, so tests look at what was added."""

    def __init__(self, service: Service) -> None:
        reply = service.get("/metrics", service.admin)
        assert reply.status_code == 200, reply.text
        self.text = reply.text
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
        }

    def get(self, name: str, **labels: str) -> float:
        return self._samples.get((f"gpt_worker_{name}", frozenset(labels.items())), 0.0)


def wait_for(service: Service, expected: float, name: str, **labels: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while (now := Scraped(service).get(name, **labels)) != expected:
        assert time.monotonic() < deadline_s, f"{name} {labels} is {now}"
        time.sleep(0.02)


def let_go(upstream: Upstream) -> None:
    upstream.clear_faults()
    upstream.release()


# The numbers


def test_finished_job_is_in_every_number(service: Service, upstream: Upstream) -> None:
    before = Scraped(service)
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="refused"))

    job = service.submit([*(f"task {number}" for number in range(9)), "refused"]).json()

    after = Scraped(service)

    def added(name: str, **labels: str) -> float:
        return after.get(name, **labels) - before.get(name, **labels)

    assert job["counts"]["failed"] == 1
    assert added("jobs", status="partial") == 1
    states = {state: added("tasks", state=state) for state in ("pending", "answered", "failed")}
    assert states == {"pending": 0, "answered": 9, "failed": 1}
    assert added("recorder_outcomes_total") == 10
    assert 1 <= added("recorder_commits_total") <= 12
    assert added("http_requests_total", method="POST", route="/jobs", status="200") == 1
    assert added("http_request_duration_seconds_count", route="/jobs") == 1
    used = upstream.counters()
    for number, key in enumerate(upstream.keys):
        assert added("key_requests_total", key=f"key {number}") == used[key]["calls"]
        tokens = used[key]["prompt_tokens"] + used[key]["completion_tokens"]
        assert added("key_tokens_total", key=f"key {number}") == tokens


def test_queue_and_calls_in_flight_are_told_while_a_job_runs(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    job_id = service.submit(["a", "b", "c", "d", "e"], prefer="respond-async").json()["id"]
    upstream.wait_for_calls(1)

    wait_for(service, 1, "jobs", status="running")
    scraped = Scraped(service)

    assert (scraped.get("queue_jobs"), scraped.get("queue_tasks")) == (1, 5)
    assert scraped.get("tasks", state="pending") == 5
    assert sum(scraped.get("key_in_flight", key=f"key {number}") for number in range(2)) >= 1
    let_go(upstream)
    service.wait_finished(job_id)
    wait_for(service, 0, "queue_jobs")


def test_who_waits_for_a_job_holds_a_place(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    job_id = service.submit(["a"], prefer="respond-async").json()["id"]
    total = Scraped(service).get("held_places")

    with service.get(f"/jobs/{job_id}/events", service.admin, stream=True):
        wait_for(service, total - 1, "held_places_free")

    wait_for(service, total, "held_places_free")
    let_go(upstream)
    service.wait_finished(job_id)


def test_limits_are_told_by_model_and_rate_limits_are_counted(service: Service, upstream: Upstream) -> None:
    before = sum(Scraped(service).get("key_rate_limited_total", key=f"key {n}") for n in range(2))
    upstream.add_fault(
        Fault(kind=FaultKind.STATUS, status=429, code="rate_limit_exceeded", retry_after_s=0.1)
    )

    job = service.submit([f"task {number}" for number in range(20)]).json()
    scraped = Scraped(service)

    assert job["status"] == "succeeded"
    assert sum(scraped.get("key_rate_limited_total", key=f"key {n}") for n in range(2)) == before + 1
    for number in range(2):
        labels = {"key": f"key {number}", "model": MODEL, "of": "requests"}
        assert scraped.get("key_limit", **labels) == 60_000
        assert 0 < scraped.get("key_remaining", **labels) <= 60_000


def test_webhooks_are_counted_by_status(service: Service) -> None:
    before = Scraped(service).get("deliveries", status="delivered")

    service.submit(["a"], {"delivery": "webhook"})

    wait_for(service, before + 1, "deliveries", status="delivered")


def test_service_says_what_it_is_and_since_when(service: Service) -> None:
    version = service.get("/healthz").json()["version"]
    text = Scraped(service).text

    assert f'gpt_worker_build_info{{version="{version}"}} 1.0' in text
    (start,) = [line for line in text.splitlines() if line.startswith("process_start_time_seconds ")]
    assert time.time() - float(start.rpartition(" ")[2]) < 600


def test_ten_thousand_jobs_do_not_make_a_scrape_slow(service: Service) -> None:
    job_id = service.submit(["a"]).json()["id"]
    with closing(sqlite3.connect(service.data_dir / "gpt-worker.sqlite3", timeout=30)) as database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(jobs)")]
        copied = ", ".join("printf('%032x', n)" if name == "id" else name for name in columns)
        database.execute(
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 10000)"
            f" INSERT INTO jobs ({', '.join(columns)}) SELECT {copied} FROM jobs, numbers WHERE id = ?",
            (job_id,),
        )
        database.commit()
        began_s = time.monotonic()

        scraped = Scraped(service)

        assert time.monotonic() - began_s < 5.0
        assert scraped.get("jobs", status="succeeded") > 10_000
        database.execute("DELETE FROM jobs WHERE id <= printf('%032x', 10000)")
        database.commit()


# Nobody's text


def test_nothing_that_a_caller_said_is_in_a_label(service: Service) -> None:
    user = service.user(f"{MARK}@example.org")
    reply = service.submit(
        {MARK: MARK},
        {"model": MARK, "instructions": MARK},
        user,
        metadata={MARK: MARK},
        idempotency_key=MARK,
    )
    job_id = reply.json()["id"]
    for path in (f"/jobs/{job_id}", f"/jobs/{MARK}", f"/{MARK}", f"/jobs/{job_id}/{MARK}?{MARK}={MARK}"):
        service.get(path, user)
    service.request(MARK.upper(), f"/{MARK}")

    scraped = Scraped(service)

    assert reply.json()["results"] == {MARK: f"answer to: {MARK}"}
    for secret in (MARK, MARK.upper(), job_id, "example.org", *("sk-fake-key-0", "sk-fake-key-1")):
        assert secret not in scraped.text
    assert scraped.get("http_requests_total", method="GET", route="(none)", status="404") >= 2
    assert scraped.get("http_requests_total", method="GET", route="/jobs/<id>", status="200") >= 1
    assert scraped.get("http_requests_total", method="(other)", route="(none)", status="404") >= 1
    assert scraped.get("key_limit", key="key 0", model="(other)", of="requests") + scraped.get(
        "key_limit", key="key 1", model="(other)", of="requests"
    ) in (60_000, 120_000)


# Who may scrape


def test_machine_itself_may_scrape_without_a_token(service: Service) -> None:
    reply = service.get("/metrics")

    assert reply.status_code == 200
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")


@pytest.mark.parametrize(
    "name", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "x-forwarded-anything", "X-Real-IP", "Via"]
)
def test_proxy_on_the_machine_needs_an_admins_token(service: Service, name: str) -> None:
    replies = [service.get("/metrics", token, headers={name: ""}) for token in (None, service.admin)]

    assert [reply.status_code for reply in replies] == [401, 200]


@pytest.mark.parametrize("auth", [True, False])
def test_token_counts_even_on_the_machine_itself(service: Service, auth: bool) -> None:
    user = service.user(f"user-{auth}@example.org")
    service.patch("/settings", service.admin, json={"auth": auth})

    statuses = [service.get("/metrics", token).status_code for token in (user, "x.y.z", service.admin)]

    assert statuses == [403, 401, 200]


# Readiness


def readyz(service: Service) -> tuple[int, Any]:
    reply = service.get("/readyz")
    return reply.status_code, reply.json()


def wait_for_readyz(service: Service, status: int) -> requests.Response:
    deadline_s = time.monotonic() + PATIENCE_S
    while (reply := service.get("/readyz")).status_code != status:
        assert time.monotonic() < deadline_s, reply.text
        time.sleep(0.02)
    return reply


def test_service_without_a_usable_key_is_ready_and_degraded(service: Service, upstream: Upstream) -> None:
    for key in upstream.keys:
        upstream.set_key(key, refused=True)
    job_id = service.submit(["a"], prefer="respond-async").json()["id"]

    wait_for(service, 1, "key_state", key="key 0", state="refused")
    wait_for(service, 1, "key_state", key="key 1", state="refused")

    assert readyz(service) == (200, {"status": "ready", "degraded": ["no usable key"]})
    for number, key in enumerate(upstream.keys):
        upstream.set_key(key, refused=False)
        assert service.post(f"/keys/{number}/check", service.admin).json()["state"] == "ready"
    service.wait_finished(job_id)
    assert readyz(service) == (200, {"status": "ready", "degraded": []})


def test_service_that_can_store_no_answers_is_not_ready_until_it_can(
    service: Service, upstream: Upstream
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))
    job_id = service.submit(["a"], prefer="respond-async").json()["id"]
    upstream.wait_for_calls(1)
    wait_for(service, 1, "jobs", status="running")
    path = service.data_dir / "gpt-worker.sqlite3"
    with closing(sqlite3.connect(path, timeout=30)) as database:
        database.execute("ALTER TABLE tasks RENAME TO tasks_away")
        let_go(upstream)

        reply = wait_for_readyz(service, 503)
        unhealthy = Scraped(service).get("recorder_healthy")
        database.execute("ALTER TABLE tasks_away RENAME TO tasks")

    assert reply.json()["detail"] == "The database takes no answers."
    assert int(reply.headers["Retry-After"]) > 0
    assert unhealthy == 0
    wait_for_readyz(service, 200)
    assert service.wait_finished(job_id)["status"] == "succeeded"
