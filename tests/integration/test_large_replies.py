"""Large replies to clients that take them slowly: what they may hold, and what is left to others."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from gpt_worker.places import Places
from tests.service import Service

PLACES = Places().total
PLACES_EACH = Places().most_each
LARGE = ["x" * 100_000] * 6
"""Tasks whose answers do not fit into the buffers of a socket that is not read."""


@pytest.fixture(scope="module")
def hog(shared_service: Service) -> str:
    return shared_service.user("hog@example.org")


@pytest.fixture(scope="module")
def large_job(shared_service: Service, hog: str) -> str:
    return str(shared_service.submit(LARGE, token=hog).json()["id"])


@contextmanager
def unread(service: Service, head: str, token: str, body: bytes = b"") -> Iterator[socket.socket]:
    """A request of a client that does not take its reply."""
    lines = [f"{head} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30.0)
        client.connect(("127.0.0.1", service.port))
        client.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        yield client


def test_slow_readers_of_large_jobs_leave_threads_to_others(
    service: Service, hog: str, large_job: str
) -> None:
    small_job = service.submit(["small"], token=hog).json()["id"]
    with ExitStack() as stack:
        for _ in range(PLACES_EACH + 4):
            stack.enter_context(unread(service, f"GET /jobs/{large_job}", hog))
        service.wait_until(lambda: service.free_places() == PLACES - PLACES_EACH)

        refused = service.get(f"/jobs/{large_job}", hog)
        waits_not = service.submit(["inline"], token=hog)
        found = [service.get("/healthz"), service.get(f"/jobs/{small_job}", hog)]
        others = service.get(f"/jobs/{large_job}", service.admin)
        without = [
            service.get(f"/jobs/{large_job}?results=false", hog),
            service.delete(f"/jobs/{large_job}", hog),
            service.post(f"/jobs/{large_job}/retry", hog),
        ]

        assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
        assert waits_not.status_code == 202
        assert [reply.status_code for reply in [*found, others]] == [200] * 3
        assert found[1].json()["results"] == {"0": "answer to: small"}
        assert len(others.json()["results"]) == len(LARGE)
        assert [(reply.status_code, reply.json()["results"]) for reply in without] == [(200, None)] * 3
    service.wait_until(lambda: service.free_places() == PLACES)
    assert len(service.job(large_job, hog)["results"]) == len(LARGE)
    assert len(service.delete(f"/jobs/{large_job}", hog).json()["results"]) == len(LARGE)
    service.wait_finished(waits_not.json()["id"])


def test_inline_reply_holds_its_place_until_it_is_sent(service: Service, hog: str) -> None:
    body = json.dumps({"data": LARGE}).encode()
    with unread(service, "POST /jobs", hog, body) as client:
        begun = client.recv(12, socket.MSG_PEEK)

        assert begun == b"HTTP/1.1 200"
        assert service.free_places() == PLACES - 1
    service.wait_until(lambda: service.free_places() == PLACES)


def test_large_page_of_jobs_holds_a_place(service: Service, hog: str) -> None:
    metadata = {f"{number}" * 500: "x" * 500 for number in range(10)}
    for _ in range(30):
        service.submit(["small"], token=hog, metadata=metadata)
    with unread(service, "GET /jobs?limit=100", hog) as client:
        begun = client.recv(12, socket.MSG_PEEK)

        assert begun == b"HTTP/1.1 200"
        assert service.free_places() == PLACES - 1
    service.wait_until(lambda: service.free_places() == PLACES)
