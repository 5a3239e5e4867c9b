"""A job's progress as server-sent events, over real sockets: what is told, how often, to whom, and how it ends."""

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Self

import pytest

from gpt_worker.api.events import _frames
from gpt_worker.progress import Event
from tests.service import Env, Service
from tests.upstream import Fault, FaultKind, Upstream

Start = Callable[..., tuple[Service, Upstream]]
Told = tuple[str, dict[str, Any]]

PLACES = 96
PLACES_EACH = 80
PATIENCE_S = 15.0


class Stream:
    """An open stream of events; what is between two blank lines is read as one event."""

    def __init__(self, service: Service, job_id: str, token: str | None) -> None:
        self.reply = service.get(f"/jobs/{job_id}/events", token, stream=True, timeout=PATIENCE_S)
        self._lines = self.reply.iter_lines(chunk_size=1)
        self.moments: list[float] = []

    def __iter__(self) -> Iterator[Told]:
        fields: dict[str, str] = {}
        for line in self._lines:
            if line:
                name, _, value = line.decode().partition(": ")
                fields[name] = value
            elif "event" in fields:
                self.moments.append(time.monotonic())
                yield fields["event"], json.loads(fields["data"])
                fields = {}

    def next(self) -> Told:
        return next(iter(self))

    def rest(self) -> list[Told]:
        """Every event up to the end of the stream."""
        return list(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.reply.close()


@pytest.fixture(scope="module")
def shared_env() -> Env:
    """Few threads, so that a job takes a while."""
    return {"GPT_THREADS_PER_KEY": "2"}


@pytest.fixture
def follow(service: Service) -> Iterator[Callable[[str], Stream]]:
    with ExitStack() as stack:
        yield lambda job_id: stack.enter_context(Stream(service, job_id, service.admin))


def hang_all(upstream: Upstream) -> None:
    upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))


def let_go(upstream: Upstream) -> None:
    """What hangs gets its reply, and nothing hangs from now on."""
    upstream.clear_faults()
    upstream.release()


def submit(service: Service, tasks: int = 2, token: str | None = None) -> str:
    """The id of a job that nobody waits for."""
    data = [f"task {number}" for number in range(tasks)]
    reply = service.submit(data, None, token or service.admin, prefer="respond-async")
    assert reply.status_code == 202, reply.text
    return str(reply.json()["id"])


def wait_for_places(service: Service, free: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (now := service.free_places()) != free:
        assert time.monotonic() < deadline_s, f"{now} places are free"
        time.sleep(0.02)


# What is told


def test_finished_job_is_told_at_once_without_its_results(
    service: Service, follow: Callable[[str], Stream]
) -> None:
    job_id = service.submit({"a": "A", "b": "B"}).json()["id"]
    began_s = time.monotonic()

    stream = follow(job_id)
    (first, progress), (second, job) = stream.rest()

    assert time.monotonic() - began_s < 5.0
    assert (first, second) == ("progress", "finished")
    assert progress == {
        "status": "succeeded",
        "counts": {"total": 2, "answered": 2, "failed": 0, "pending": 0},
        "usage": job["usage"],
        "tasks_per_s": None,
        "eta_s": 0.0,
    }
    assert job == service.job(job_id, results=False)


def test_stream_is_neither_kept_nor_buffered(service: Service, follow: Callable[[str], Stream]) -> None:
    headers = follow(submit(service)).reply.headers

    assert headers["Content-Type"] == "text/event-stream"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["X-Request-Id"]


def test_first_progress_comes_before_anything_is_answered(
    service: Service, upstream: Upstream, follow: Callable[[str], Stream]
) -> None:
    hang_all(upstream)
    job_id = submit(service, tasks=3)
    upstream.wait_for_calls(1)

    stream = follow(job_id)
    name, progress = stream.next()

    assert name == "progress"
    assert progress["counts"] == {"total": 3, "answered": 0, "failed": 0, "pending": 3}
    assert (progress["tasks_per_s"], progress["eta_s"]) == (None, None)
    let_go(upstream)
    told = stream.rest()
    assert [name for name, _ in told][-1] == "finished"
    assert told[-1][1]["status"] == "succeeded"
    assert told[-1][1]["results"] is None
    assert told[-2][1]["counts"]["answered"] == 3


def test_progress_comes_twice_a_second_at_most_and_tells_rate_and_eta(
    service: Service, upstream: Upstream, follow: Callable[[str], Stream]
) -> None:
    for key in upstream.keys:
        upstream.set_key(key, latency_s=0.05)
    stream = follow(submit(service, tasks=120))

    told = stream.rest()

    for key in upstream.keys:
        upstream.set_key(key, latency_s=0.0)
    progresses = [data for name, data in told if name == "progress"]
    moments = stream.moments[: len(progresses)]
    assert len(progresses) >= 3
    assert len(progresses) <= 2 * (moments[-1] - moments[0]) + 2
    counts = [data["counts"]["answered"] for data in progresses]
    assert counts == sorted(set(counts))
    middle = progresses[len(progresses) // 2]
    assert middle["tasks_per_s"] > 0
    assert middle["eta_s"] == pytest.approx(middle["counts"]["pending"] / middle["tasks_per_s"], abs=0.2)
    assert told[-1][0] == "finished"


def test_cancelled_job_is_finished_when_its_last_call_has_landed(
    service: Service, upstream: Upstream, follow: Callable[[str], Stream]
) -> None:
    hang_all(upstream)
    job_id = submit(service, tasks=50)
    upstream.wait_for_calls(1)
    stream = follow(job_id)
    stream.next()

    service.delete(f"/jobs/{job_id}", service.admin)
    name, progress = stream.next()
    let_go(upstream)

    assert (name, progress["status"]) == ("progress", "cancelled")
    name, job = stream.rest()[-1]
    assert (name, job["status"]) == ("finished", "cancelled")
    assert job["finished_at"] is not None


def test_deleted_job_ends_the_stream_without_finished(
    service: Service, upstream: Upstream, follow: Callable[[str], Stream]
) -> None:
    hang_all(upstream)
    job_id = submit(service)
    upstream.wait_for_calls(1)
    stream = follow(job_id)
    stream.next()

    service.delete(f"/jobs/{job_id}?purge=true", service.admin)
    let_go(upstream)

    assert [name for name, _ in stream.rest() if name != "progress"] == []


def test_silence_is_a_comment_and_the_first_event_says_when_to_come_back() -> None:
    events = iter(
        [Event("progress", {"status": "queued"}), None, Event("finished", {"metadata": {"a": "ä\n"}})]
    )

    frames = b"".join(_frames(events, "1")).decode()

    assert frames == (
        'retry: 2000\nevent: progress\ndata: {"status":"queued"}\n\n'
        ": the job goes on\n\n"
        'event: finished\ndata: {"metadata":{"a":"ä\\n"}}\n\n'
    )


# To whom


def test_another_users_job_is_a_404_and_the_admin_sees_all(service: Service) -> None:
    ann, bob = service.user("ann-events@example.org"), service.user("bob-events@example.org")
    job_id = submit(service, token=ann)
    service.wait_finished(job_id)

    statuses = {}
    for who, token in {"ann": ann, "bob": bob, "admin": service.admin, "nobody": None}.items():
        with Stream(service, job_id, token) as stream:
            statuses[who] = stream.reply.status_code

    assert statuses == {"ann": 200, "bob": 404, "admin": 200, "nobody": 401}


def test_open_service_tells_anybody_of_ownerless_jobs(service: Service) -> None:
    owned = service.submit({"a": "A"}).json()["id"]
    service.patch("/settings", service.admin, json={"auth": False})
    ownerless = service.submit({"a": "A"}, None, None).json()["id"]

    with Stream(service, ownerless, None) as open_one, Stream(service, owned, None) as other:
        assert open_one.rest()[-1][0] == "finished"
        assert other.reply.status_code == 404


def test_unknown_job_is_a_404(service: Service) -> None:
    reply = service.get(f"/jobs/{'0' * 32}/events", service.admin)

    assert reply.status_code == 404
    assert reply.headers["Content-Type"] == "application/problem+json"


# The budget of held requests


def test_streams_share_the_places_and_give_them_back_when_clients_leave(
    service: Service, upstream: Upstream
) -> None:
    hang_all(upstream)
    tokens = service.user("one@example.org"), service.user("two@example.org")
    jobs = [submit(service, token=token) for token in tokens]
    with ExitStack() as stack:
        for job_id, token in zip(jobs, tokens, strict=True):
            open_streams(stack, service, job_id, token)
        wait_for_places(service, 0, PATIENCE_S)

        reply = service.get(f"/jobs/{jobs[0]}/events", service.admin)

        assert reply.status_code == 503
        assert int(reply.headers["Retry-After"]) > 0
        assert service.get("/healthz").status_code == 200
    wait_for_places(service, PLACES, 4.0)
    let_go(upstream)
    for job_id in jobs:
        assert service.wait_finished(job_id)["status"] == "succeeded"


def open_streams(stack: ExitStack, service: Service, job_id: str, token: str | None) -> None:
    """As many as one user may have, and a few more."""
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    request = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\n{authorization}\r\n".encode()
    for _ in range(PLACES_EACH + 4):
        sock = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S)
        stack.enter_context(sock).sendall(request)


@pytest.mark.parametrize("is_anonymous", [False, True])
def test_one_user_leaves_places_to_others(service: Service, upstream: Upstream, is_anonymous: bool) -> None:
    done = service.submit({"a": "A"}).json()["id"]
    hang_all(upstream)
    token = None if is_anonymous else service.user("hog@example.org")
    service.patch("/settings", service.admin, json={"auth": not is_anonymous})
    hanging = service.submit(["hangs"], token=token, prefer="respond-async").json()["id"]
    with ExitStack() as stack:
        open_streams(stack, service, hanging, token)
        wait_for_places(service, PLACES - PLACES_EACH, PATIENCE_S)

        refused = [
            service.get(f"/jobs/{hanging}/events", token),
            service.get(f"/jobs/{hanging}/results", token),
            service.post(
                "/jobs", token, data=b'{"text": "x"}', headers={"Content-Type": "application/jsonl"}
            ),
            service.submit(["x" * 100_000], token=token),
        ]
        at_once = service.submit(["waits"], token=token)
        others = [
            service.get(f"/jobs/{done}/events", service.admin),
            service.get(f"/jobs/{done}/results", service.admin),
        ]

        assert [(reply.status_code, "Retry-After" in reply.headers) for reply in refused] == [(503, True)] * 4
        assert at_once.status_code == 202
        assert [reply.status_code for reply in others] == [200, 200]
    let_go(upstream)
    wait_for_places(service, PLACES, PATIENCE_S)
    service.wait_finished(at_once.json()["id"])


def test_head_holds_no_place(service: Service) -> None:
    job_id = submit(service)

    reply = service.request("HEAD", f"/jobs/{job_id}/events", service.admin)

    assert reply.status_code == 200
    wait_for_places(service, PLACES, 2.0)


def test_client_of_http_1_0_gets_plain_bytes_up_to_the_end(service: Service) -> None:
    job_id = service.submit({"a": "A"}).json()["id"]
    request = f"GET /jobs/{job_id}/events HTTP/1.0\r\nAuthorization: Bearer {service.admin}\r\n\r\n".encode()

    with socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE_S) as sock:
        sock.sendall(request)
        received = b"".join(iter(lambda: sock.recv(65536), b""))

    head, _, body = received.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert body.startswith(b"retry: 2000\nevent: progress\n")
    assert body.endswith(b"}\n\n")


# The end of the service


def test_shutdown_ends_streams_at_once_without_finished(start: Start) -> None:
    service, upstream = start()
    hang_all(upstream)
    with Stream(service, submit(service), service.admin) as stream:
        stream.next()
        began_s = time.monotonic()

        service.signal(signal.SIGTERM)

        assert "finished" not in [name for name, _ in stream.rest()]
        assert time.monotonic() - began_s < 10.0
    let_go(upstream)
    assert service.wait_exit() == 0
