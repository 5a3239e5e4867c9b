"""The server itself: what it refuses to start with, its signals, and clients that do not behave."""

import http.client
import json
import os
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from tests.service import Service
from tests.upstream import Upstream

PROBLEM_MEMBERS = {"type", "title", "status", "detail", "request_id"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture
def service(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    with Service(tmp_path, upstream=upstream) as service:
        yield service


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[Service]:
    """One service for the tests that leave it as it was."""
    with Service(tmp_path_factory.mktemp("server"), upstream=upstream) as service:
        yield service


def connect(service: Service, sent: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", service.port), timeout=30.0)
    sock.sendall(sent)
    return sock


def exchange(service: Service, sent: bytes) -> bytes:
    """Everything that the service answers to these bytes, until it closes."""
    with connect(service, sent) as sock:
        return b"".join(iter(lambda: sock.recv(65536), b""))


def health_takes_s(service: Service) -> float:
    began_s = time.monotonic()
    with connect(service, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as sock:
        assert sock.recv(12) == b"HTTP/1.1 200"
    return time.monotonic() - began_s


def assert_refused(outcome: tuple[int, str], word: str) -> None:
    status, stderr = outcome
    assert status == 2
    assert stderr.startswith("gpt-worker: ")
    assert word in stderr
    assert stderr.count("\n") == 1


# Start


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"PORT": "eighty"}, "PORT"),
        ({"NODE_ENV": "staging"}, "NODE_ENV"),
        ({"WEB_CONCURRENCY": "2"}, "2 worker processes"),
        ({"GUNICORN_CMD_ARGS": "--workers 3"}, "3 worker processes"),
        ({"GUNICORN_CMD_ARGS": "--preload"}, "preload"),
        ({"GUNICORN_CMD_ARGS": "--worker-class sync"}, "worker class"),
        ({"GUNICORN_CMD_ARGS": "--worker-class gevent"}, "worker class gevent"),
        ({"GUNICORN_CMD_ARGS": "--threads 4"}, "--threads"),
        ({"GUNICORN_CMD_ARGS": "--max-requests 100"}, "--max-requests"),
        ({"GUNICORN_CMD_ARGS": "--certfile /nowhere"}, "TLS"),
    ],
)
def test_bad_start_is_refused_in_one_line(
    tmp_path: Path, upstream: Upstream, env: dict[str, str], word: str
) -> None:
    service = Service(tmp_path, upstream=upstream)

    outcome = service.run_once(env)

    assert_refused(outcome, word)


def test_database_of_a_newer_version_is_refused(service: Service) -> None:
    service.terminate()
    with closing(sqlite3.connect(service.data_dir / "gpt-worker.sqlite3")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")

    status, stderr = service.run_once()

    assert status == 2
    assert stderr.splitlines()[-1].startswith("gpt-worker: the database ")
    assert "newer gpt-worker" in stderr


def test_second_server_on_the_same_data_is_refused_in_one_line(shared: Service) -> None:
    outcome = shared.run_once({"PORT": "1"})

    assert_refused(outcome, "in use by another gpt-worker")
    assert shared.get("/healthz").status_code == 200


def test_server_starts_again_on_the_data_of_a_killed_one(service: Service) -> None:
    service.kill()

    service.start()

    assert service.get("/healthz").status_code == 200


# Signals


def test_sigterm_ends_with_status_0(service: Service) -> None:
    began_s = time.monotonic()

    status = service.terminate()

    assert status == 0
    assert time.monotonic() - began_s < 10.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_interrupt_ends_with_status_0_at_once(service: Service, number: signal.Signals) -> None:
    began_s = time.monotonic()

    service.signal(number)

    assert service.wait_exit() == 0
    assert time.monotonic() - began_s < 15.0


def test_request_on_an_open_connection_is_answered_after_sigterm(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30.0)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    service.signal(signal.SIGTERM)
    time.sleep(0.5)

    connection.request("GET", "/readyz")
    reply = connection.getresponse()

    assert reply.status == 503
    assert reply.headers["Connection"] == "close"
    connection.close()
    assert service.wait_exit() == 0


def test_hangup_changes_the_worker_and_fails_no_request(service: Service) -> None:
    failures: list[str] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                health_takes_s(service)
            except (OSError, AssertionError) as error:
                failures.append(repr(error))
            time.sleep(0.01)

    clients = [threading.Thread(target=keep_asking) for _ in range(4)]
    for client in clients:
        client.start()
    before = worker_pids(service)

    service.signal(signal.SIGHUP)
    wait_until_worker_differs(service, before)

    done.set()
    for client in clients:
        client.join()
    assert failures == []


def test_more_workers_by_signal_are_ignored(service: Service) -> None:
    before = worker_pids(service)

    service.signal(signal.SIGTTIN)
    time.sleep(1.5)

    assert worker_pids(service) == before


def worker_pids(service: Service) -> list[int]:
    children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def wait_until_worker_differs(service: Service, before: list[int]) -> None:
    deadline_s = time.monotonic() + 45.0
    while set(worker_pids(service)) & set(before) or health_takes_s(service) > 1.0:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_killed_worker_is_replaced(service: Service) -> None:
    before = worker_pids(service)

    os.kill(before[0], signal.SIGKILL)
    wait_until_worker_differs(service, before)

    assert service.get("/healthz").status_code == 200


# Clients that do not behave


@pytest.mark.parametrize(
    ("count", "sent"),
    [
        pytest.param(400, b"", id="silent"),
        pytest.param(400, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: ", id="half a head"),
        pytest.param(64, b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", id="half a body"),
    ],
)
def test_clients_that_go_silent_do_not_slow_the_others(shared: Service, count: int, sent: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(shared, sent))

        slowest_s = max(health_takes_s(shared) for _ in range(5))

    assert slowest_s < 4.0


@pytest.mark.parametrize(
    ("path", "length", "answer"),
    [
        pytest.param("/login", 1000, b"", id="small"),
        pytest.param("/jobs", 100_000, b"HTTP/1.1 503", id="large"),
    ],
)
def test_200_dripping_bodies_do_not_slow_the_others(
    shared: Service, path: str, length: int, answer: bytes
) -> None:
    head = post_head(path, f"Authorization: Bearer {shared.admin}")
    with ExitStack() as stack:
        drips = [
            stack.enter_context(connect(shared, head + b"Content-Length: %d\r\n\r\n{" % length))
            for _ in range(200)
        ]
        slowest_s = health_takes_s(shared)
        for _ in range(3):
            for sock in drips:
                with suppress(OSError):  # it has been refused
                    sock.sendall(b" ")
            slowest_s = max(slowest_s, health_takes_s(shared))
            time.sleep(1.0)
        first, last = (received_so_far(sock) for sock in (drips[0], drips[-1]))

    assert slowest_s < 10.0
    assert first in (b"", b"HTTP/1.1 408")
    assert last == answer


def post_head(path: str, *headers: str) -> bytes:
    """The head of a request with JSON, but for its end and what tells of its body."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "".join(f"{line}\r\n" for line in lines).encode()


def received_so_far(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    try:
        return sock.recv(12)
    except BlockingIOError:
        return b""


MUCH = b"Content-Length: 15000000\r\n\r\n{"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
SIGNED = ("webhook-id: msg_1", "webhook-timestamp: 1", "webhook-signature: v1,none-of-ours")
AWAITED = b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n{"


@pytest.mark.parametrize("path", ["/login", "/register"])
def test_large_body_is_refused_before_it_comes_where_none_is_taken(shared: Service, path: str) -> None:
    began_s = time.monotonic()

    reply = exchange(shared, post_head(path) + MUCH)

    assert time.monotonic() - began_s < 10.0
    assert_problem(reply, 413)
    assert b"65536 bytes" in reply


def test_chunked_body_is_refused_when_it_gets_large_where_none_is_taken(shared: Service) -> None:
    reply = exchange(shared, post_head("/login") + CHUNKED + b"11000\r\n" + b" " * 0x11000 + b"\r\n")

    assert_problem(reply, 413)


@pytest.mark.parametrize("path", ["/jobs", "/task"])
@pytest.mark.parametrize("body", [MUCH, CHUNKED, AWAITED], ids=["long", "chunked", "awaited"])
def test_job_of_a_stranger_is_refused_before_it_comes(shared: Service, path: str, body: bytes) -> None:
    began_s = time.monotonic()

    reply = exchange(shared, post_head(path, "Authorization: Bearer none-of-ours") + body)

    assert time.monotonic() - began_s < 10.0
    assert_problem(reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"), 401)


@pytest.mark.parametrize("path", ["/login", "/"])
@pytest.mark.parametrize("body", [MUCH, CHUNKED, AWAITED], ids=["long", "chunked", "awaited"])
def test_drips_of_strangers_leave_the_threads_to_users(shared: Service, path: str, body: bytes) -> None:
    token = shared.admin
    with ExitStack() as stack:
        for _ in range(130):
            stack.enter_context(connect(shared, post_head(path, *SIGNED) + body))
        time.sleep(0.5)

        replies = [shared.submit(["x" * 100_000], token=token, prefer="respond-async") for _ in range(3)]

    assert [reply.status_code for reply in replies] == [202] * 3


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="silent"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: x\r\n", id="half a head"),
        pytest.param(b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{", id="half a body"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", id="idle"),
    ],
)
def test_whole_request_gets_in_where_those_that_do_nothing_took_all_connections(
    tmp_path: Path, upstream: Upstream, sent: bytes
) -> None:
    few = {"GUNICORN_CMD_ARGS": "--worker-connections 250"}
    with Service(tmp_path, few, upstream) as service, ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(connect(service, sent))

        slowest_s = max(health_takes_s(service) for _ in range(5))

    assert slowest_s < 4.0


def test_200_slow_readers_do_not_slow_the_others(service: Service) -> None:
    path, token = large_job(service), service.admin.encode()
    request = b"GET %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n" % (path.encode(), token)
    with ExitStack() as stack:
        for _ in range(200):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", service.port))
            sock.sendall(request)

        slowest_s = max(health_takes_s(service) for _ in range(5))

    assert slowest_s < 10.0


def test_a_reader_that_pauses_gets_its_whole_reply_while_threads_are_free(service: Service) -> None:
    path = large_job(service)
    whole = service.get(path, service.admin).content

    with service.get(path, service.admin, stream=True) as reply:
        time.sleep(4.0)
        late = reply.content

    assert late == whole


def large_job(service: Service) -> str:
    """The path of a finished job whose results are 2 MB."""
    data = {f"t{number}": "x" * 20_000 for number in range(100)}
    job_id: str = service.submit(data, prefer="respond-async").json()["id"]
    service.wait_finished(job_id)
    return f"/jobs/{job_id}"


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_in_many_pieces_is_taken(shared: Service, is_chunked: bool) -> None:
    body = json.dumps({"data": ["x" * 30_000] * 100}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {shared.admin}"}
    if not is_chunked:
        headers["Content-Length"] = str(len(body))
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30.0)

    connection.request("POST", "/jobs?dry_run=true", slow_pieces(body, 100), headers)
    reply = connection.getresponse()

    assert reply.status == 200
    connection.close()


def slow_pieces(body: bytes, count: int) -> Iterator[bytes]:
    """The body within about 2 s."""
    piece_bytes = len(body) // count + 1
    for start in range(0, len(body), piece_bytes):
        time.sleep(2.0 / count)
        yield body[start : start + piece_bytes]


def test_second_request_behind_a_body_in_pieces_is_answered_too(shared: Service) -> None:
    head = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    with connect(shared, head) as sock:
        time.sleep(0.2)
        sock.sendall(b"{")
        time.sleep(0.2)
        sock.sendall(b"}GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        reply = b"".join(iter(lambda: sock.recv(65536), b""))

    assert reply.startswith(b"HTTP/1.1 422 ")
    assert reply.count(b"HTTP/1.1 200 ") == 1


def test_dripping_head_is_bounded_as_a_whole(shared: Service) -> None:
    began_s = time.monotonic()
    with connect(shared, b"GET /healthz HTTP/1.1\r\n") as sock:
        sock.settimeout(0.5)
        reply = b""
        while not reply:
            sock.sendall(b"X")
            try:
                reply = sock.recv(65536)
            except TimeoutError:
                assert time.monotonic() - began_s < 15.0

    assert_problem(reply, 408)


def assert_problem(reply: bytes, status: int) -> None:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head
    problem = json.loads(body)
    assert problem.keys() >= PROBLEM_MEMBERS
    assert problem["status"] == status
    assert b"secret" not in body


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        pytest.param(400, b"secret\r\n\r\n", id="no request line"),
        pytest.param(400, b"GET / HTTP/1.1\nHost: secret\n\n", id="bare line feeds"),
        pytest.param(400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(400, b"GET / HTTP/1.1\r\nse cret: x\r\n\r\n", id="a header's name"),
        pytest.param(414, b"GET /" + b"a" * 9000, id="a line that does not end"),
        pytest.param(414, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", id="a long line"),
        pytest.param(417, b"GET / HTTP/1.1\r\nHost: x\r\nExpect: secret\r\n\r\n", id="an expectation"),
        pytest.param(431, b"GET / HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n", id="a long header"),
        pytest.param(431, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 120 + b"\r\n", id="many headers"),
        pytest.param(431, b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, id="a head that does not end"),
    ],
)
def test_malformed_request_is_a_problem(shared: Service, status: int, sent: bytes) -> None:
    reply = exchange(shared, sent)

    assert_problem(reply, status)


@pytest.mark.parametrize("prefix", [b"/x", b"/health"])
def test_no_header_moves_the_service_to_another_path(shared: Service, prefix: bytes) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"

    reply = exchange(shared, head + b"Script_Name: " + prefix + b"\r\n\r\n")

    assert reply.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", [b"Script_Name", b"Path_Info", b"SCRIPT_NAME", b"PATH_INFO"])
def test_forged_forwarder_header_changes_nothing(shared: Service, name: bytes) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"

    plain = exchange(shared, head + b"\r\n")
    forged = exchange(shared, head + name + b": /openapi.json\r\n\r\n")

    assert plain.startswith(b"HTTP/1.1 200 ")
    assert forged.partition(b"\r\n\r\n")[2] == plain.partition(b"\r\n\r\n")[2]


def test_request_line_of_8000_bytes_is_served(shared: Service) -> None:
    target = b"/healthz?" + b"a" * 8000

    reply = exchange(shared, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert reply.startswith(b"HTTP/1.1 200 ")


def test_second_request_in_one_piece_is_answered_too(shared: Service) -> None:
    first = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    second = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

    reply = exchange(shared, first + second)

    assert reply.count(b"HTTP/1.1 200 ") == 2


def test_connection_is_kept_after_a_body(shared: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30.0)

    ports: list[int] = []
    for _ in range(3):
        connection.request("POST", "/login", b"{}", {"Content-Type": "application/json"})
        connection.getresponse().read()
        assert connection.sock is not None
        ports.append(connection.sock.getsockname()[1])

    assert len(set(ports)) == 1
    connection.close()


def test_expectation_to_continue_is_met(shared: Service) -> None:
    head = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with connect(shared, head + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n") as sock:
        interim = sock.recv(65536)
        sock.sendall(b"{}")
        final = sock.recv(65536)

    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert final.startswith(b"HTTP/1.1 4")


def test_broken_chunk_is_the_clients_fault(shared: Service) -> None:
    head = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    reply = exchange(shared, head + b"Transfer-Encoding: chunked\r\n\r\nnot-a-size\r\n{}\r\n0\r\n\r\n")

    assert_problem(reply, 400)


def test_a_client_refused_with_much_unsent_is_told_that_the_connection_closes(shared: Service) -> None:
    refused = shared.post("/jobs", shared.admin, data=b"x" * (1 << 20), headers={"Content-Type": "image/png"})
    small = shared.post("/jobs", shared.admin, data=b"x" * 100, headers={"Content-Type": "image/png"})

    assert (refused.status_code, refused.headers["Connection"]) == (415, "close")
    assert (small.status_code, small.headers["Connection"]) == (415, "keep-alive")
