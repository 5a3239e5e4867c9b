"""A webhook receiver on a loopback socket: it records what comes and answers by a script.

The signature is checked by the `standardwebhooks` package, never by our own code.
"""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from standardwebhooks import Webhook


@dataclass(frozen=True)
class Received:
    """One request. Names of headers are in lower case; `at` is `time.monotonic()`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float


@dataclass(frozen=True)
class Answer:
    """A scripted reply."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Hang:
    """Silence for so many seconds (None: until `release` or the end of the receiver), then 200."""

    seconds: float | None = None


class Cut(Enum):
    """Ways to leave a request without a reply."""

    RESET = auto()
    CLOSE = auto()


Scripted = int | Answer | Hang | Cut


def redirect(location: str, status: int = 307) -> Answer:
    return Answer(status, {"Location": location})


class Receiver:
    """Answers with the scripted replies one after the other, then 200 to everything."""

    def __init__(self, replies: Iterable[Scripted] = ()) -> None:
        self._replies = deque(replies)
        self._received: list[Received] = []
        self._changed = threading.Condition()
        self._released = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/hook"

    def script(self, *replies: Scripted) -> None:
        """More replies, after those that wait."""
        with self._changed:
            self._replies.extend(replies)

    def received(self) -> list[Received]:
        """Everything so far, in the order of arrival."""
        with self._changed:
            return list(self._received)

    def wait_for(self, count: int, timeout_s: float = 10.0) -> list[Received]:
        """Everything so far, once that is at least `count` requests. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._received) >= count, timeout_s):
                raise TimeoutError(f"{len(self._received)} of {count} webhooks within {timeout_s} s")
            return list(self._received)

    def release(self) -> None:
        """Ends every hang, now and later."""
        self._released.set()

    def take(self, request: Received) -> Scripted:
        """Records a request and says what it gets; for the handler."""
        with self._changed:
            self._received.append(request)
            self._changed.notify_all()
            return self._replies.popleft() if self._replies else 200

    def hang(self, seconds: float | None) -> None:
        self._released.wait(seconds)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def verified(request: Received, secret: str) -> Any:
    """The JSON of a webhook whose signature holds; `secret` is `whsec_…`.

    Raises standardwebhooks.WebhookVerificationError.
    """
    return Webhook(secret).verify(request.body, request.headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        super().__init__(("127.0.0.1", 0), _Handler)

    def shutdown_request(self, request: Any) -> None:
        """Only closes, so that a reset is a reset: the usual way sends an orderly end before it."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that leaves in the middle is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: a connection a request, so nothing is left open when the receiver ends."""

    server: _Server
    timeout = 5.0

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        if len(body) < length:  # its sender was killed meanwhile: nothing was received
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        receiver = self.server.receiver
        reply = receiver.take(Received(self.command, self.path, headers, body, time.monotonic()))
        match reply:
            case Hang():
                receiver.hang(reply.seconds)
                self._answer(Answer())
            case Cut.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case Cut.CLOSE:
                pass
            case Answer():
                self._answer(reply)
            case int():
                self._answer(Answer(reply))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 — the names that http.server calls

    def _answer(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the name it has above
        """The test asks what came; nothing is printed."""
