"""When a client is too slow for its thread, and which requests the main loop collects itself."""

import io
import json
import selectors
import socket
import time
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from gunicorn.config import Config
from gunicorn.glogging import Logger
from werkzeug.exceptions import HTTPException

from gpt_worker import web_worker
from gpt_worker.places import SMALL_BODY_BYTES
from gpt_worker.web_worker import (
    ACCEPTED_AT_ONCE,
    MAX_BUSY,
    MAX_OF_NETWORK,
    MAX_RECEIVING,
    MAX_STRANGERS,
    ClientSocket,
    Connection,
    Pace,
    RequestBody,
    ThreadBudget,
    WebWorker,
    collectable_bytes,
    render_problem,
)
from tests.clock import FakeClock

KIB = 1024


def pace(seconds: int, bytes_per_s: float) -> Pace:
    """Of a client that has been waited for so long, and moved something each second."""
    pace = Pace()
    for _ in range(seconds):
        pace.waited(1.0)
        pace.moved(int(bytes_per_s))
    return pace


@pytest.mark.parametrize(
    ("seconds", "bytes_per_s", "is_slow", "is_too_slow"),
    [
        pytest.param(1, 1, False, False, id="just begun"),
        pytest.param(2, 1, True, False, id="drips"),
        pytest.param(29, 1, True, False, id="drips for less than 30 s"),
        pytest.param(30, 1, True, True, id="drips for 30 s"),
        pytest.param(30, 1 * KIB, True, False, id="slow"),
        pytest.param(300, 16 * KIB, False, False, id="fast enough"),
        pytest.param(11_000, 100_000, False, False, id="1 GiB at 100 KB/s"),
    ],
)
def test_pace_is_an_average_over_the_time_of_waiting(
    seconds: int, bytes_per_s: float, is_slow: bool, is_too_slow: bool
) -> None:
    client = pace(seconds, bytes_per_s)

    assert (client.is_slow, client.is_too_slow) == (is_slow, is_too_slow)


def test_silent_client_is_too_slow_however_fast_it_was() -> None:
    client = pace(10, 1 << 20)

    client.waited(30.0)

    assert client.is_too_slow


def test_stream_that_says_little_makes_nobody_slow() -> None:
    client = Pace()

    for _ in range(10_000):
        client.moved(1)

    assert not client.is_slow


def test_slow_client_keeps_its_thread_while_threads_are_free() -> None:
    threads, sockets = ThreadBudget(), [socket.socket() for _ in range(MAX_BUSY + 1)]
    for sock in sockets[:-1]:
        threads.begin(sock)

    kept = threads.let_go(sockets[0])
    threads.begin(sockets[-1])
    lost = [threads.let_go(sock) for sock in sockets[:2]]

    assert not kept
    assert lost == [True, False]  # one was enough
    close(sockets)


def test_bodies_have_their_own_bound() -> None:
    threads, sockets = ThreadBudget(), [socket.socket() for _ in range(MAX_RECEIVING + 1)]

    taken = [threads.begin_receiving(sock) for sock in sockets]
    threads.end_receiving(sockets[0])
    later = threads.begin_receiving(sockets[-1])

    assert taken == [True] * MAX_RECEIVING + [False]
    assert later
    close(sockets)


def test_refused_body_makes_one_slow_one_leave() -> None:
    threads, sockets = ThreadBudget(), [socket.socket() for _ in range(MAX_RECEIVING + 1)]
    for sock in sockets[:-1]:
        threads.begin_receiving(sock)

    before = threads.let_go(sockets[0])
    threads.begin_receiving(sockets[-1])
    after = [threads.let_go(sock) for sock in sockets[:2]]

    assert not before
    assert after == [True, False]
    close(sockets)


def test_bodies_of_strangers_are_few_and_fewer_of_one_network() -> None:
    threads, sockets = ThreadBudget(), [socket.socket() for _ in range(MAX_STRANGERS + 3)]
    networks = ["192.0.2.1"] * (MAX_OF_NETWORK + 1) + ["192.0.2.2"] * (MAX_STRANGERS - MAX_OF_NETWORK)

    taken = [threads.begin_receiving(sock, network) for sock, network in zip(sockets, networks, strict=False)]
    another, known = threads.begin_receiving(sockets[-2], "192.0.2.3"), threads.begin_receiving(sockets[-1])

    assert taken == [True] * MAX_OF_NETWORK + [False] + [True] * (MAX_STRANGERS - MAX_OF_NETWORK)
    assert (another, known) == (False, True)
    close(sockets)


def test_refused_stranger_makes_no_slow_user_leave() -> None:
    threads, sockets = ThreadBudget(), [socket.socket() for _ in range(MAX_OF_NETWORK + 2)]
    threads.begin_receiving(sockets[-1])
    for sock in sockets[:-1]:
        threads.begin_receiving(sock, "192.0.2.1")

    lost = [threads.let_go(sock) for sock in (sockets[-1], sockets[0], sockets[1])]

    assert lost == [False, True, False]
    close(sockets)


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("GET / HTTP/1.1\r\nHost: x", 0),
        ("POST / HTTP/1.1\r\ncontent-LENGTH:  012 ", 12),
        (f"POST / HTTP/1.1\r\nContent-Length: {SMALL_BODY_BYTES}", SMALL_BODY_BYTES),
        (f"POST / HTTP/1.1\r\nContent-Length: {SMALL_BODY_BYTES + 1}", None),
        ("POST / HTTP/1.1\r\nContent-Length: " + "9" * 8000, None),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked", None),
        ("POST / HTTP/1.1\r\nContent-Length: 2\r\nexpect: 100-continue", None),
        ("POST / HTTP/1.1\r\nContent-Length: two", 0),
        ("POST / HTTP/1.1\r\nX-Content-Length: 2", 0),
    ],
)
def test_small_bodies_are_collected(head: str, expected: int | None) -> None:
    whole_head = f"{head}\r\n\r\n".encode()

    wanted = collectable_bytes(whole_head + b"Content-Length: 7\r\n\r\n")

    assert wanted == (None if expected is None else len(whole_head) + expected)


@pytest.fixture
def worker() -> Iterator[WebWorker]:
    cfg = Config()
    cfg.set("threads", web_worker.THREADS)
    worker = WebWorker(1, 1, [], None, 30, cfg, Logger.__new__(Logger))
    worker.poller = selectors.DefaultSelector()
    yield worker
    worker.poller.close()
    worker.tmp.close()


def test_small_body_that_drips_is_a_408_after_30_s(
    worker: WebWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "monotonic", clock)
    ours, client = socket.socketpair()
    sock = ClientSocket(ours.family, ours.type, ours.proto, fileno=ours.detach())
    conn = Connection(worker.cfg, sock, ("", 0), ("", 0))
    worker._await_head(conn)
    client.sendall(b"POST /login HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
    worker.on_pending_socket_readable(conn, sock)

    for _ in range(30):
        client.sendall(b" ")
        worker.on_pending_socket_readable(conn, sock)
        worker.murder_pending()
        assert list(worker.body_conns) == [conn]
        clock.advance(1.0)
    worker.murder_pending()

    assert not worker.body_conns
    assert client.recv(12) == b"HTTP/1.1 408"
    client.close()
    sock.close()


def test_when_there_is_no_room_the_idle_go_first_and_then_who_took_longest(
    worker: WebWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "monotonic", clock)
    worker.worker_connections = ACCEPTED_AT_ONCE + 4
    names: dict[Connection, str] = {}
    clients = []

    def come(name: str, sent: bytes) -> Connection:
        ours, client = socket.socketpair()
        sock = ClientSocket(ours.family, ours.type, ours.proto, fileno=ours.detach())
        conn = Connection(worker.cfg, sock, ("", 0), ("", 0))
        names[conn] = name
        clients.append(client)
        worker.nr_conns += 1
        worker._await_head(conn)
        client.sendall(sent)
        worker.on_pending_socket_readable(conn, sock)
        clock.advance(1.0)
        return conn

    come("first head", b"GET /")
    come("first body", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
    come("second head", b"GET /")
    idle = come("idle", b"GET /")
    worker._forget(idle, worker.pending_conns)
    worker.keepalived_conns.append(idle)
    worker.poller.register(idle.sock, selectors.EVENT_READ)

    left = []
    for _ in range(5):
        assert worker._make_room()
        alive = (*worker.keepalived_conns, *worker.pending_conns, *worker.body_conns)
        left.append({names[conn] for conn in alive})
        worker.worker_connections -= 1

    assert left == [
        {"idle", "first head", "first body", "second head"},
        {"first head", "first body", "second head"},
        {"first body", "second head"},
        {"second head"},
        set(),
    ]
    worker.nr_conns = 1  # one that is at work
    assert not worker._make_room()
    close(clients)


@pytest.mark.parametrize(
    ("sent", "length", "sizes"),
    [
        pytest.param(b"x" * 10, 10, [4, 6, None], id="just as much"),
        pytest.param(b"x" * 11, 11, [], id="said to be more"),
        pytest.param(b"x" * 11, None, [4, 6], id="chunked, more in the end"),
        pytest.param(b"x" * 1000, None, [], id="chunked, much more"),
    ],
)
@pytest.mark.parametrize("how", ["read", "readline", "readlines"])
def test_body_is_read_up_to_its_limit(sent: bytes, length: int | None, sizes: list[int], how: str) -> None:
    ended: list[bool] = []
    stream = io.BytesIO(sent)
    body = RequestBody(stream, length, 10, lambda: ended.append(True))
    for size in sizes:
        body.read(size)

    if len(sent) == 10:
        assert not getattr(body, how)()
        assert (body.is_read, ended[:1]) == (True, [True])
        return
    with pytest.raises(HTTPException) as caught:
        getattr(body, how)()

    assert caught.value.code == 413
    assert "10 bytes" in (caught.value.description or "")
    assert stream.tell() <= (0 if length else 11)
    assert not body.is_read


def test_problem_of_the_server_is_in_utf_8_like_those_of_the_app() -> None:
    head, body = render_problem(HTTPStatus.BAD_REQUEST, "Bearer …", "id").split(b"\r\n\r\n")

    assert "Bearer …".encode() in body
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert json.loads(body)["detail"] == "Bearer …"
