"""What a task goes through is told truly, and outlives the process; a deadline is a deadline."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service import Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

KEYS = {name: KeyRules(organization=name, project="p") for name in ("sk-one", "sk-two")}


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(KEYS) as upstream:
        yield upstream


@pytest.fixture
def service(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    with Service(tmp_path, upstream=upstream) as service:
        yield service


def run(service: Service, data: Any, **settings: Any) -> dict[str, Any]:
    job_id = service.submit(data, settings, prefer="respond-async").json()["id"]
    service.wait_finished(job_id)
    return service.job(job_id)


def test_charged_tries_outlive_a_kill(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=500, times=None))
    job_id = service.submit({"a": "hello"}, prefer="respond-async").json()["id"]
    upstream.wait_for_calls(3, timeout_s=30)
    service.wait_until(lambda: service.job(job_id)["usage"]["requests"] >= 3)

    service.kill()
    service.start()
    service.wait_finished(job_id)

    job = service.job(job_id)
    assert job["errors"]["a"]["attempts"] == 5
    assert len(upstream.calls()) <= 6


def test_task_ended_by_the_deadline_tells_its_tries_and_the_last_trouble(
    service: Service, upstream: Upstream
) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=503, times=None, retry_after_s=30))

    job = run(service, {"a": "hello"}, deadline_s=2)

    error = job["errors"]["a"]
    assert error["code"] == "expired"
    assert error["attempts"] == job["usage"]["requests"] == 1
    assert "upstream_error" in error["message"]


def test_deadline_bounds_a_call_that_hangs(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None, seconds=60))

    job = run(service, {"a": "hello"}, deadline_s=2)

    assert job["status"] == "failed"
    assert job["errors"]["a"]["code"] in ("expired", "timeout")


def test_retries_do_not_make_a_small_job_look_large(service: Service, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, message="no " * 160, times=None))
    job = run(service, [f"task {number}" for number in range(50)])
    size_at_first = results_bytes(service)

    for again in (2, 3):
        service.post(f"/jobs/{job['id']}/retry", service.admin)
        service.wait_finished(job["id"])
        assert service.job(job["id"])["run"] == again

    assert results_bytes(service) == size_at_first > 50 * 100


def results_bytes(service: Service) -> int:
    (path,) = service.data_dir.glob("*.sqlite3")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT results_bytes FROM jobs").fetchone()[0])


@pytest.mark.slow
def test_many_large_answers_at_once_fit_into_memory(tmp_path: Path, upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HUGE_BODY, times=None, size_bytes=15 << 20))
    with Service(tmp_path, {"GPT_THREADS_PER_KEY": "64"}, upstream) as service:
        before_mib = most_memory_mib(service)

        job = service.submit([f"task {number}" for number in range(48)], prefer="respond-async").json()
        service.wait_until(
            lambda: service.job(job["id"], results=False)["finished_at"] is not None, timeout_s=90
        )

        assert service.job(job["id"], results=False)["counts"]["answered"] == 48
        assert most_memory_mib(service) - before_mib < 450


def most_memory_mib(service: Service) -> int:
    """The most that the process that serves has had in memory."""
    (worker,) = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
    status = Path(f"/proc/{worker}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def test_good_check_does_not_call_an_empty_key_full(service: Service, upstream: Upstream) -> None:
    def states() -> set[str]:
        return {key["state"] for key in service.get("/keys", service.admin).json()["data"]}

    for key in KEYS:
        upstream.set_key(key, exhausted_after=0)
    service.submit({"a": "hello"}, prefer="respond-async")
    service.wait_until(lambda: states() == {"out of quota"})

    checked = service.post("/keys/0/check", service.admin).json()

    assert checked["state"] == "out of quota"
