"""One bounded POST, against small real servers on loopback that do what endpoints do at their worst."""

import base64
import contextlib
import gzip
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import pytest

from gpt_worker import transport as transport_module
from gpt_worker.addresses import is_loopback
from gpt_worker.reply_body import BUDGET_BYTES, FREE_BYTES, LARGE_REPLIES, Hold
from gpt_worker.transport import (
    CallLeft,
    ConnectionStale,
    DeadlinePassed,
    ProxyUnusable,
    RawReply,
    ReplyTooLarge,
    Transport,
    TransportError,
    Watchdog,
    leaving_when,
)
from tests.clock import eventually

SECRET = "sk-very-secret"
DEADLINE_S = 0.3
AT_ONCE_S = 0.7  # a deadline, the watchdog's next look, and a slow machine
GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Odd: Yes\r\n\r\n{}"

Answer = Callable[[socket.socket, int], None]


class Server:
    """Reads one request after another and answers each with `answer(connection, its number)`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.closing = threading.Event()
        self.requests: list[bytes] = []
        self._start(self._accept)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while (request := read_request(connection)) is not None:
                self.requests.append(request)
                self._answer(connection, len(self.requests))

    def close(self) -> None:
        self.closing.set()
        for one in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)


def read_request(connection: socket.socket) -> bytes | None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += (piece := connection.recv(65536))
        if not piece:
            return None
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        ),
        0,
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


Serve = Callable[[Answer], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def says(*pieces: bytes, closes: bool = False) -> Answer:
    def answer(connection: socket.socket, _number: int) -> None:
        for piece in pieces:
            connection.sendall(piece)
        if closes:
            connection.shutdown(socket.SHUT_RDWR)

    return answer


def drips(start: bytes, drop: bytes) -> Answer:
    """Never silent for long, and never done."""

    def answer(connection: socket.socket, _number: int) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(drop)
            threading.Event().wait(0.02)

    return answer


def says_nothing(connection: socket.socket, _number: int) -> None:
    connection.recv(1)


def post(transport: Transport, *, deadline_s: float = 10.0, body: bytes = b"{}") -> RawReply:
    return transport.post("/chat/completions", {"authorization": f"Bearer {SECRET}"}, body, deadline_s)


def to(server: Server, *, loopback_only: bool = True) -> Transport:
    return Transport(server.url, 4, loopback_only=loopback_only)


# A good exchange


def test_whole_reply_is_read(serve: Serve) -> None:
    server = serve(says(GOOD))

    reply = post(to(server), body=b'{"a": 1}')

    assert (reply.status, reply.body, reply.headers.get("x-odd")) == (200, b"{}", "Yes")
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert f"authorization: Bearer {SECRET}".encode() in head
    assert body == b'{"a": 1}'


def test_connection_is_kept_alive(serve: Serve) -> None:
    peers: list[object] = []

    def answer(connection: socket.socket, _number: int) -> None:
        peers.append(connection.getpeername())
        connection.sendall(GOOD)

    transport = to(serve(answer))

    for _ in range(3):
        post(transport)

    assert len(set(peers)) == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 22\r\n\r\n"
        + gzip.compress(b"{}", mtime=0),
    ],
)
def test_reply_is_unpacked(serve: Serve, reply: bytes) -> None:
    assert post(to(serve(says(reply)))).body == b"{}"


def test_interim_reply_is_passed_over(serve: Serve) -> None:
    reply = post(to(serve(says(b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n", GOOD))))

    assert (reply.status, reply.body, reply.headers) == (200, b"{}", {"content-length": "2", "x-odd": "Yes"})


def test_reply_without_a_length_ends_with_its_connection(serve: Serve) -> None:
    server = serve(says(b"HTTP/1.1 200 OK\r\nX: 1\r\nx:2\r\n\r\n{", b"}", closes=True))
    transport = to(server)

    for _ in range(2):
        reply = post(transport)
        assert (reply.body, reply.headers) == (b"{}", {"x": "1, 2"})


def test_request_says_no_more_than_it_must(serve: Serve) -> None:
    server = serve(says(GOOD))

    post(to(server), body="“é”".encode())

    assert server.requests[0].decode() == (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAccept-Encoding: identity\r\n"
        f"authorization: Bearer {SECRET}\r\nContent-Length: 8\r\n\r\n“é”"
    )


def test_header_with_a_line_break_is_not_sent(serve: Serve) -> None:
    server = serve(says(GOOD))

    with pytest.raises(TransportError) as caught:
        to(server).post("/x", {"authorization": f"Bearer {SECRET}\r\nx: y"}, b"{}", 10.0)

    assert SECRET not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_bad_status_is_a_reply(serve: Serve, status: int) -> None:
    server = serve(says(f"HTTP/1.1 {status} No\r\ncontent-length: 0\r\n\r\n".encode()))

    assert post(to(server)).status == status


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_not_followed(serve: Serve, status: int) -> None:
    elsewhere = serve(says(GOOD))
    head = f"HTTP/1.1 {status} Away\r\nlocation: {elsewhere.url}\r\ncontent-length: 0\r\n\r\n"

    reply = post(to(serve(says(head.encode()))))

    assert reply.status == status
    assert elsewhere.requests == []


# One deadline for the whole call


@pytest.mark.parametrize(
    "answer",
    [
        says_nothing,
        drips(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        drips(b"HTTP/1.1 200 OK\r\nx: ", b"y"),
        drips(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b" "),
        drips(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        drips(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        drips(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 100000\r\n\r\n", b" "),
        drips(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["silence", "headers", "one header", "body", "chunks", "endless body", "closing body", "continue"],
)
def test_call_ends_at_its_deadline(serve: Serve, answer: Answer) -> None:
    transport, began_s = to(serve(answer)), time.monotonic()

    with pytest.raises(DeadlinePassed):
        post(transport, deadline_s=DEADLINE_S)

    assert DEADLINE_S <= time.monotonic() - began_s < DEADLINE_S + AT_ONCE_S


def test_call_that_is_late_does_not_hurt_the_next(serve: Serve) -> None:
    def answer(connection: socket.socket, number: int) -> None:
        (says_nothing if number == 1 else says(GOOD))(connection, number)

    transport = to(serve(answer))
    with pytest.raises(DeadlinePassed):
        post(transport, deadline_s=DEADLINE_S)

    assert post(transport).body == b"{}"


def test_cut_ends_the_calls_of_its_own_transport_alone(serve: Serve) -> None:
    answer = threading.Event()

    def waits(connection: socket.socket, _number: int) -> None:
        answer.wait(10)
        connection.sendall(GOOD)

    server, ended = serve(waits), dict[str, object]()

    def call(name: str, transport: Transport) -> None:
        try:
            ended[name] = post(transport).status
        except TransportError as error:
            ended[name] = type(error)

    cut, other = to(server), to(server)
    calls = [threading.Thread(target=call, args=args) for args in (("cut", cut), ("other", other))]
    for one in calls:
        one.start()
    eventually(lambda: len(server.requests) == 2)

    cut.cut()

    eventually(lambda: ended.get("cut") is DeadlinePassed)
    assert "other" not in ended
    answer.set()
    for one in calls:
        one.join(10)
    assert ended["other"] == 200


def test_connection_made_after_the_deadline_is_cut_as_well() -> None:
    ours, theirs = socket.socketpair()
    call = transport_module._Call(
        time.monotonic() - 1, Transport("http://127.0.0.1:9", 1, loopback_only=True)
    )
    watchdog = Watchdog()

    with ours, theirs, watchdog.watch(call):
        eventually(lambda: call.cut)  # in vain: it was still looking up the host's name
        call.sock = ours

        theirs.settimeout(5)
        assert theirs.recv(1) == b""


# Bounds


def test_too_large_reply_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_REPLY_BYTES", 1000)
    fits, over = (
        f"HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n".encode() + b" " * size for size in (1000, 1001)
    )

    assert len(post(to(serve(says(fits)))).body) == 1000
    with pytest.raises(ReplyTooLarge):
        post(to(serve(says(over))))


def test_endless_reply_is_refused_before_its_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_REPLY_BYTES", 1 << 20)

    def floods(connection: socket.socket, _number: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 65536)

    with pytest.raises(ReplyTooLarge):
        post(to(serve(floods)))


def test_gzip_bomb_is_not_unpacked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_REPLY_BYTES", 1 << 20)
    bomb = gzip.compress(bytes(32 << 20), 1)
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(bomb)}\r\n\r\n"
    transport = to(serve(says(head.encode(), bomb)))

    tracemalloc.start()
    try:
        with pytest.raises(ReplyTooLarge):
            post(transport)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 8 << 20


@pytest.mark.parametrize("framing", [b"-1\r\n", b"7fffffff\r\n", b"+5\r\n", b"100000000\r\n"])
def test_chunk_of_an_odd_size_is_not_read(serve: Serve, framing: bytes) -> None:
    sent_bytes = 0

    def floods(connection: socket.socket, _number: int) -> None:
        nonlocal sent_bytes
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + framing)
        for _ in range(512):
            sent_bytes += connection.send(bytes(65536))
        connection.shutdown(socket.SHUT_RDWR)

    server = serve(floods)

    with pytest.raises(TransportError):
        post(to(server))

    assert sent_bytes < 16 << 20


def test_interim_replies_have_an_end(serve: Serve) -> None:
    server = serve(says(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, GOOD))

    with pytest.raises(TransportError, match="HTTPException"):
        post(to(server))


@pytest.mark.parametrize(
    "packed",
    [
        (b"br", b"zzzz"),
        (b"deflate", zlib.compress(b"{}")),
        (b"gzip, gzip", gzip.compress(gzip.compress(b"{}"))),
        (b"gzip", b"zzzz"),
        (b"gzip", gzip.compress(b"{}")[:-1]),
        (b"gzip", gzip.compress(b"{}") * 2),
    ],
)
def test_body_that_can_not_be_unpacked_leaves_the_status(serve: Serve, packed: tuple[bytes, bytes]) -> None:
    encoding, body = packed
    head = b"HTTP/1.1 429 No\r\nretry-after: 3\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n"

    def answer(connection: socket.socket, number: int) -> None:
        connection.sendall(head % (encoding, len(body)) + body if number == 1 else GOOD)

    transport = to(serve(answer))

    reply = post(transport)

    assert (reply.status, reply.headers["retry-after"], reply.body) == (429, "3", b"")
    assert post(transport).body == b"{}"


def test_gzip_of_many_members_is_given_up_before_the_deadline(serve: Serve) -> None:
    empty = gzip.compress(b"")
    body = empty * (4 * (1 << 20) // len(empty))
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body)
    server, began_s = serve(says(head, body)), time.monotonic()

    reply = post(to(server), deadline_s=30.0)

    assert reply.body == b""
    assert time.monotonic() - began_s < 15


# Many large replies at once


def large(size_bytes: int) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size_bytes + b" " * size_bytes


@pytest.fixture
def full_budget() -> Iterator[list[Hold]]:
    """All there is for large replies is taken, until the list is cleared."""
    holds = [LARGE_REPLIES.reserve(BUDGET_BYTES, lambda: None)]
    yield holds
    holds.clear()


def test_large_reply_waits_until_another_is_done_with(serve: Serve, full_budget: list[Hold]) -> None:
    transport, replies = to(serve(says(large(FREE_BYTES + 1)))), list[RawReply]()
    call = threading.Thread(target=lambda: replies.append(post(transport)))

    call.start()
    eventually(lambda: LARGE_REPLIES.waiting == 1)
    full_budget.clear()
    call.join(10)

    (reply,) = replies
    assert len(reply.body) == FREE_BYTES + 1
    assert LARGE_REPLIES.free_bytes == BUDGET_BYTES - FREE_BYTES - 1
    del reply
    replies.clear()
    assert LARGE_REPLIES.free_bytes == BUDGET_BYTES


def test_small_reply_waits_for_none(serve: Serve, full_budget: list[Hold]) -> None:
    assert len(post(to(serve(says(large(FREE_BYTES))))).body) == FREE_BYTES


def test_wait_for_other_replies_ends_at_the_deadline(serve: Serve, full_budget: list[Hold]) -> None:
    transport, began_s = to(serve(says(large(FREE_BYTES + 1)))), time.monotonic()

    with pytest.raises(DeadlinePassed):
        post(transport, deadline_s=DEADLINE_S)

    assert time.monotonic() - began_s < DEADLINE_S + AT_ONCE_S
    assert LARGE_REPLIES.waiting == 0


def test_broken_large_reply_gives_back_what_it_held(serve: Serve) -> None:
    transport = to(serve(says(large(2 * FREE_BYTES)[:-1], closes=True)))

    with pytest.raises(TransportError) as caught:
        post(transport)

    assert LARGE_REPLIES.free_bytes == BUDGET_BYTES
    assert caught.value.__cause__ is not None


# Whoever asked is gone


def test_call_is_left_when_nobody_waits_for_it(serve: Serve) -> None:
    server, gone = serve(says_nothing), threading.Event()
    began_s = time.monotonic()
    threading.Timer(0.1, gone.set).start()

    with pytest.raises(CallLeft), leaving_when(gone.is_set):
        to(server).get("/models", {}, 10.0)

    assert time.monotonic() - began_s < AT_ONCE_S
    with pytest.raises(DeadlinePassed):
        post(to(server), deadline_s=DEADLINE_S)


def test_get_has_no_body(serve: Serve) -> None:
    server = serve(says(GOOD))

    reply = to(server).get("/models", {"accept": "application/json"}, 10.0)

    assert reply.body == b"{}"
    assert server.requests[0].decode() == (
        f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAccept-Encoding: identity\r\n"
        "accept: application/json\r\n\r\n"
    )


# What breaks


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
        b"SMTP ready\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-len",
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
    ],
)
def test_broken_reply_is_a_transport_error(serve: Serve, reply: bytes) -> None:
    transport = to(serve(says(reply, closes=True)))

    with pytest.raises(TransportError) as caught:
        post(transport)

    assert type(caught.value) is TransportError
    assert SECRET not in str(caught.value)


def test_refused_connection_is_a_transport_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(TransportError, match="ConnectionRefusedError"):
        post(Transport(f"http://127.0.0.1:{port}/v1", 1, loopback_only=True))


# Connections that went stale


def test_kept_connection_that_closes_on_use_is_stale(serve: Serve) -> None:
    def answer(connection: socket.socket, number: int) -> None:
        says(GOOD)(connection, number) if number != 2 else connection.shutdown(socket.SHUT_RDWR)

    transport = to(serve(answer))
    post(transport)

    with pytest.raises(ConnectionStale):
        post(transport)

    assert post(transport).status == 200


def test_new_connection_that_closes_at_once_is_not_stale(serve: Serve) -> None:
    with pytest.raises(TransportError) as caught:
        post(to(serve(says(closes=True))))

    assert not isinstance(caught.value, ConnectionStale)


def test_connection_that_breaks_after_it_answered_is_not_stale(serve: Serve) -> None:
    def answer(connection: socket.socket, number: int) -> None:
        if number == 1:
            connection.sendall(GOOD)
            return
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
        threading.Event().wait(0.05)
        # A reset, not an end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()

    transport = to(serve(answer))
    post(transport)

    with pytest.raises(TransportError) as caught:
        post(transport)

    assert not isinstance(caught.value, ConnectionStale)


def test_kept_connection_that_was_closed_meanwhile_is_replaced(serve: Serve) -> None:
    closed = threading.Event()

    def answer(connection: socket.socket, number: int) -> None:
        connection.sendall(GOOD)
        if number == 1:
            connection.shutdown(socket.SHUT_RDWR)
            closed.set()

    transport = to(serve(answer))
    post(transport)
    assert closed.wait(10)

    assert post(transport).status == 200


# Where it may go


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8080/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://localhost/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://[::1]:80/v1", True),
        ("http://0.0.0.0/v1", False),
        ("http://localhost.example.org/v1", False),
        ("http://127.0.0.1.example.org/v1", False),
        ("http://127.0.0.1@example.org/v1", False),
        ("https://api.openai.com/v1", False),
        ("http://10.0.0.1/v1", False),
        ("", False),
    ],
)
def test_loopback_is_told_by_the_host(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback


def test_loopback_only_reaches_nothing_outside() -> None:
    transport = Transport("http://192.0.2.1/v1", 1, loopback_only=True)

    with pytest.raises(TransportError, match="NODE_ENV=test"):
        post(transport)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_loopback_never_goes_by_a_proxy(serve: Serve, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    proxy, server = serve(says(GOOD)), serve(says(GOOD))
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")

    post(to(server))

    assert (len(server.requests), proxy.requests) == (1, [])


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_proxy_gets_its_user_and_password(serve: Serve, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    proxy = serve(says(GOOD))
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"{scheme}ada:p%40ss@127.0.0.1:{proxy.port}")
    transport = Transport("http://endpoint.example/v1", 1, loopback_only=False)

    post(transport)

    head = proxy.requests[0].split(b"\r\n\r\n")[0].lower()
    assert b"\r\nproxy-authorization: basic " + base64.b64encode(b"ada:p@ss").lower() in head


def test_proxy_is_told_the_whole_address(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(says(GOOD))
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    transport = Transport("http://endpoint.example/v1", 1, loopback_only=False)

    post(transport)

    head = proxy.requests[0].split(b"\r\n\r\n")[0].lower()
    assert head.startswith(b"post http://endpoint.example/v1/chat/completions http/1.1\r\n")
    assert b"\r\nhost: endpoint.example" in head


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 2\r\nContent-Length: 2\r\n",
        b"Content-Length : 2\r\n",
        b"Transfer-Encoding: identity, chunked\r\n",
    ],
)
def test_odd_ways_to_tell_a_length_are_read(serve: Serve, head: bytes) -> None:
    body = b"2\r\n{}\r\n0\r\n\r\n" if b"chunked" in head else b"{}"
    server = serve(says(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body))

    assert post(to(server), deadline_s=3.0).body == b"{}"


@pytest.mark.parametrize("length", [b"+2", b"two", b"2, 3", b"-1"])
def test_length_that_is_no_number_fails_at_once(serve: Serve, length: bytes) -> None:
    server = serve(says(b"HTTP/1.1 200 OK\r\nContent-Length: " + length + b"\r\n\r\n{}"))

    with pytest.raises(TransportError) as raised:
        post(to(server))

    assert not isinstance(raised.value, DeadlinePassed)


@pytest.mark.parametrize(
    ("name", "value"),
    [("https_proxy", "socks5://127.0.0.1:1"), ("all_proxy", "ftp://x"), ("https_proxy", "http://h:99999")],
)
def test_proxy_that_cannot_be_used_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv(name, value)

    with pytest.raises(ProxyUnusable) as raised:
        Transport("https://api.example.org/v1", 1, loopback_only=False)

    assert name.upper() in str(raised.value)
    assert value not in str(raised.value)
