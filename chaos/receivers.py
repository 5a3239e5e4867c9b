"""A webhook receiver under orders: what it does to a message stands in the message's own job, as metadata.

`{"fire": "500", "times": "2"}` misbehaves on the first two arrivals of a message, then takes it. The receiver as a
whole may be dead (it takes connections and says nothing) or away (nothing listens).
"""

import contextlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from standardwebhooks import WebhookVerificationError

from tests.receiver import Received, verified

GIB = 1 << 30
RETRY_AFTER_S = 8
DRIP_EVERY_S = 0.2
_RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: closing resets


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message as it came, and when: `at` is the wall clock, `number` counts the arrivals of one message from 1.

    `flaw` is what a receiver of Standard Webhooks says against its signature at that moment.
    """

    request: Received
    at: float
    number: int
    fire: str
    flaw: str | None

    @property
    def id(self) -> str:
        return self.request.headers["webhook-id"]

    @property
    def signed_at(self) -> int:
        return int(self.request.headers["webhook-timestamp"])


class FireReceiver:
    """Listens on a port of its own, which it keeps while it is away. `elsewhere` is where its redirects point."""

    def __init__(self, elsewhere: str) -> None:
        self.elsewhere = elsewhere
        self.dead = False
        self.secret = ""  # to be told before the first message
        self.sent_bytes: Counter[str] = Counter()  # of the replies without an end, by what was asked
        self._arrivals: list[Arrival] = []
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._revived = threading.Event()
        self._over = threading.Event()
        self._server: _Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/hook"

    def open(self) -> None:
        self._server = _Server(self._port, self)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Away: nothing listens any more; what is connected goes on."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def die(self) -> None:
        self._revived.clear()
        self.dead = True

    def revive(self) -> None:
        """Alive again; what hangs because it was dead is taken now."""
        self.dead = False
        self._revived.set()

    def arrivals(self) -> list[Arrival]:
        with self._lock:
            return list(self._arrivals)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._revived.set()
        self.close()

    def arrive(self, request: Received) -> str:
        """Records a message; what is to be done to it."""
        metadata = json.loads(request.body)["data"].get("metadata", {})
        flaw = self._flaw(request)
        with self._lock:
            id_ = request.headers["webhook-id"]
            self._numbers[id_] += 1
            number = self._numbers[id_]
            fire = metadata.get("fire", "200") if number <= int(metadata.get("times", "1")) else "200"
            self._arrivals.append(Arrival(request, time.time(), number, "dead" if self.dead else fire, flaw))
        return "dead" if self.dead else fire

    def _flaw(self, request: Received) -> str | None:
        try:
            verified(request, self.secret)
        except WebhookVerificationError as error:
            return str(error)
        return None

    def rest(self, seconds: float) -> bool:
        """Whether the receiver ends meanwhile."""
        return self._over.wait(seconds)

    def wait_revived(self) -> None:
        self._revived.wait()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, receiver: FireReceiver) -> None:
        self.receiver = receiver
        super().__init__(("127.0.0.1", port), _Handler)

    def shutdown_request(self, request: Any) -> None:
        """Only closes, so that a reset is a reset: the usual way sends an orderly end before it."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that leaves in the middle is what some of this is about."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Received("POST", self.path, headers, body, time.monotonic())
        fire = self.server.receiver.arrive(request)
        _FIRES[fire](self)

    def say(self, status: int, *headers: str) -> None:
        self.connection.sendall(
            "\r\n".join((f"HTTP/1.1 {status} x", *headers, "Content-Length: 0", "", "")).encode()
        )

    def hang(self) -> None:
        while not self.server.receiver.rest(0.05):
            self.connection.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1):
                    return

    def play_dead(self) -> None:
        self.server.receiver.wait_revived()
        self.say(200)

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def drip(self) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 10_000:
            self.connection.sendall(bytes([byte]))
            if self.server.receiver.rest(DRIP_EVERY_S):
                return

    def pour(self, status: int) -> None:
        """A reply of 1 GB, as far as somebody reads it."""
        self.connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: {GIB}\r\n\r\n".encode())
        sent, piece = 0, b"x" * (1 << 16)
        with contextlib.suppress(OSError):
            while sent < GIB:
                sent += self.connection.send(piece)
        self.server.receiver.sent_bytes[f"{status}"] = max(sent, self.server.receiver.sent_bytes[f"{status}"])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the name it has above
        """Nothing is printed."""


_FIRES: dict[str, Callable[[_Handler], None]] = {
    "200": lambda handler: handler.say(200),
    "500": lambda handler: handler.say(500),
    "302": lambda handler: handler.say(302, f"Location: {handler.server.receiver.elsewhere}"),
    "410": lambda handler: handler.say(410),
    "429": lambda handler: handler.say(429, f"Retry-After: {RETRY_AFTER_S}"),
    "hang": _Handler.hang,
    "dead": _Handler.play_dead,
    "reset": _Handler.reset,
    "drip": _Handler.drip,
    "1 GB": lambda handler: handler.pour(200),
    "1 GB and 500": lambda handler: handler.pour(500),
}
