"""Commits of unknown result: the connection is lost at the commit, once before the server has it and once after."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from gpt_worker.store.tasks import SLICE_TASKS
from tests.link import Link
from tests.receiver import Receiver
from tests.servers import Server, query
from tests.service import Service
from tests.stand import KEYS, Stand, asked_otherwise, assert_refused
from tests.upstream import Upstream

pytestmark = pytest.mark.services


BOTH = pytest.mark.parametrize("is_delivered", [True, False], ids=["committed", "not committed"])
STEPS = {
    "its key": b"INSERT INTO idempotency_keys",
    "the job": b"INSERT INTO jobs",
    "its tasks": b"INSERT INTO tasks",
    "the end": b"queued",
}
COUNTS = "SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM tasks)"
LONG = [f"long {number}" for number in range(2000)]


@dataclass
class Shared:
    """A service that all these tests use, since none of them ends it."""

    stand: Stand
    link: Link
    upstream: Upstream
    receiver: Receiver


@pytest.fixture(scope="module")
def shared_cut(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream(KEYS))
        receiver = stack.enter_context(Receiver())
        database = stack.enter_context(server.database())
        link = stack.enter_context(Link(server.port))
        env = {**database, "DB_PORT": str(link.port), "REQUEST_API": receiver.url}
        stand = stack.enter_context(Stand(tmp_path_factory.mktemp("cut"), upstream, env))
        assert stand.admin
        yield Shared(stand, link, upstream, receiver)


@pytest.fixture
def shared(shared_cut: Shared) -> Iterator[Shared]:
    shared_cut.upstream.reset()
    yield shared_cut
    assert "Traceback" not in shared_cut.stand.stderr()


@BOTH
@pytest.mark.parametrize("step", STEPS)
def test_submit_cut_at_a_commit_can_be_repeated(shared: Shared, step: str, is_delivered: bool) -> None:
    stand = shared.stand
    token = stand.user(f"{step.replace(' ', '-')}-{is_delivered}@example.org")
    data = {f"id {number}": f"text {number}" for number in range(20)}

    def submit() -> requests.Response:
        return stand.submit(data, token=token, idempotency_key="once", prefer="respond-async")

    cut = shared.link.cut_at_commit(STEPS[step], is_delivered=is_delivered)
    reply = submit()
    cut.wait()

    if reply.status_code != 202:
        assert_refused(reply)
    stand.wait_until(lambda: submit().status_code == 202)
    job_id = submit().json()["id"]
    if reply.status_code == 202:
        assert reply.json()["id"] == job_id
    assert stand.wait_finished(job_id)["counts"]["answered"] == 20
    assert [job["id"] for job in stand.get("/jobs", token).json()["data"]] == [job_id]
    assert asked_otherwise(shared.upstream, data.values()) == {}
    of_nobody = "SELECT count(*) FROM jobs WHERE status = 'receiving'"
    stand.wait_until(lambda: query(stand, of_nobody) == [(0,)])  # what was half stored is cleaned up
    of_none = "SELECT count(*) FROM tasks WHERE job_id NOT IN (SELECT id FROM jobs)"
    assert query(stand, of_none) == [(0,)]


@BOTH
def test_upload_without_a_key_cut_at_its_first_commit_is_taken_back(
    shared: Shared, is_delivered: bool
) -> None:
    stand, texts = shared.stand, [f"line {number}" for number in range(2 * SLICE_TASKS)]
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts)
    file = {"Content-Type": "application/jsonl", "Prefer": "respond-async"}
    before = query(stand, COUNTS)

    cut = shared.link.cut_at_commit(b"INSERT INTO jobs", is_delivered=is_delivered)
    reply = stand.post("/jobs", stand.admin, data=lines, headers=file)
    cut.wait()

    assert_refused(reply)
    stand.wait_until(lambda: query(stand, COUNTS) == before)
    assert shared.upstream.calls() == []


@BOTH
def test_cancel_cut_at_its_commit_stops_the_job_if_it_is_stored(shared: Shared, is_delivered: bool) -> None:
    stand, job_id = shared.stand, begin_long(shared)

    cut = shared.link.cut_at_commit(b"UPDATE jobs", b"cancelled", is_delivered=is_delivered)
    assert_refused(stand.delete(f"/jobs/{job_id}", stand.admin))
    cut.wait()

    if not is_delivered:
        assert stand.job(job_id, results=False)["status"] == "running"
        assert stand.delete(f"/jobs/{job_id}", stand.admin).status_code == 200
    job = stand.wait_finished(job_id)
    assert job["status"] == "cancelled"
    shared.upstream.wait_until_idle()
    assert job["counts"]["answered"] == len(shared.upstream.calls()) < len(LONG)


@BOTH
def test_purge_cut_at_its_commit_is_carried_out_if_it_is_stored(shared: Shared, is_delivered: bool) -> None:
    stand, job_id = shared.stand, begin_long(shared)
    of_job = f"SELECT count(*) FROM tasks WHERE job_id = '{job_id}'"

    cut = shared.link.cut_at_commit(b"result_files", b"discarded", is_delivered=is_delivered)
    assert_refused(stand.delete(f"/jobs/{job_id}?purge=true", stand.admin))
    cut.wait()

    purged_again = stand.delete(f"/jobs/{job_id}?purge=true", stand.admin)
    assert purged_again.status_code == (404 if is_delivered else 204)
    stand.wait_until(lambda: query(stand, of_job) == [(0,)])
    stand.wait_until_nothing_is_sent()
    assert len(shared.upstream.calls()) < len(LONG)


@BOTH
def test_retry_cut_at_its_commit_goes_on_if_it_is_stored(shared: Shared, is_delivered: bool) -> None:
    stand, job_id = shared.stand, begin_long(shared, {"deadline_s": 3600.0006})
    stand.delete(f"/jobs/{job_id}", stand.admin)
    assert stand.wait_finished(job_id)["counts"]["failed"] > 0

    cut = shared.link.cut_at_commit(b"deadline_at=", is_delivered=is_delivered)
    assert_refused(stand.post(f"/jobs/{job_id}/retry", stand.admin))
    cut.wait()

    if not is_delivered:
        assert stand.post(f"/jobs/{job_id}/retry", stand.admin).status_code == 202
    job = stand.wait_finished(job_id, 60)
    assert (job["status"], job["run"], job["counts"]["answered"]) == ("succeeded", 2, len(LONG))
    assert asked_otherwise(shared.upstream, LONG) == {}


@BOTH
@pytest.mark.parametrize("task", ["task 7", "task 399"])
def test_answers_cut_at_their_commit_are_stored_once(shared: Shared, task: str, is_delivered: bool) -> None:
    cut = shared.link.cut_at_commit(f"answer to: {task}".encode(), is_delivered=is_delivered)

    shared.stand.begin_work()

    cut.wait()
    shared.stand.assert_ends_as_if_nothing_had_been()


@BOTH
def test_webhook_cut_at_its_commit_comes_under_one_id(shared: Shared, is_delivered: bool) -> None:
    stand = shared.stand
    before = len(shared.receiver.received())
    cut = shared.link.cut_at_commit(b"INSERT INTO delivery_attempts", is_delivered=is_delivered)

    job_id = stand.submit(["hello"], {"delivery": "webhook"}).json()["id"]

    cut.wait()
    stand.wait_until(lambda: delivery_of(stand, job_id)["status"] == "delivered")
    received = shared.receiver.received()[before:]
    assert len({(each.headers["webhook-id"], each.body) for each in received}) == 1
    assert len(delivery_of(stand, job_id)["attempts"]) == 1


def begin_long(shared: Shared, settings: dict[str, Any] | None = None) -> str:
    """A job that is at work, and will be for a while."""
    job = shared.stand.submit(LONG, settings, prefer="respond-async").json()
    shared.upstream.wait_for_calls(20)
    return str(job["id"])


def delivery_of(service: Service, job_id: str) -> dict[str, Any]:
    (delivery,) = service.get(f"/deliveries?job_id={job_id}", service.admin).json()["data"]
    found: dict[str, Any] = delivery
    return found
