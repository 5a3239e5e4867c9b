"""The gthread worker that does not freeze on silent clients, and that starts and stops the service around its loop.

The main loop collects each request's head and small body itself, so a thread is only spent on what is whole; bodies
that a thread must read are counted, and a client too slow for its thread is let go (see `Pace` and `ThreadBudget`).
Those that say nothing, or half of it, go when there is no room for a new connection, the oldest first.
The order of a life: own DATA_DIR, build the application, start the service, serve; at a signal, the service is told
at once while the last requests are answered. It knows nothing of what the application does but which of its routes
take large bodies: `app.extensions["gpt_worker_body_limits"]` has by method and path how many bytes, or None for those
where the application knows the sender and the limit before it reads; all others take SMALL_BODY_BYTES.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import re
import resource
import select
import selectors
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from types import FrameType
from typing import Any, NoReturn, Protocol

from gunicorn.arbiter import Arbiter
from gunicorn.config import Config
from gunicorn.glogging import Logger
from gunicorn.http import errors as http_errors
from gunicorn.systemd import listen_fds
from gunicorn.util import is_ipv6, unquote_to_wsgi_str
from gunicorn.workers.gthread import TConn, ThreadWorker

from config import Settings, SettingsError
from gpt_worker.drives import check_settings
from gpt_worker.errors import GptWorkerError, StartGivenUp
from gpt_worker.ownership import InUse, Ownership, check_database
from gpt_worker.places import SMALL_BODY_BYTES, SPARE_THREADS, WEB_THREADS

THREADS = WEB_THREADS
GRACEFUL_TIMEOUT_S = 28
REFUSED = 2  # the exit status of a server that may not start

HEAD_WAIT_S = 10.0  # from a connection's or request's first readiness to the end of its header block
MAX_HEAD_BYTES = 64 * 1024
SMALL_BODY_WAIT_S = 30.0  # from the end of the head to the end of a small body
SILENCE_S = 30.0  # in which a client sends nothing of its body, or takes nothing of its reply
SLOWEST_BYTES_PER_S = 1024  # on average, once a thread has waited SILENCE_S for the client in all
SLOW_AFTER_S = 2.0  # of waiting in all; a client that is slow then goes when threads are short
SLOW_BYTES_PER_S = 16 * 1024
LOOK_S = 0.5  # between two looks of a waiting thread at whether threads are short
SEND_AHEAD_BYTES = 64 * 1024  # of a reply, beyond what is on its way: so a client's pace is seen
MAX_RECEIVING = THREADS - SPARE_THREADS  # threads that read bodies
MAX_STRANGERS = 16  # threads that read bodies of whom the application does not know before they are read
MAX_OF_NETWORK = MAX_STRANGERS // 2  # of those, for the strangers of one network
MAX_BUSY = THREADS - SPARE_THREADS // 2  # with more requests than that at work, threads are short
RETRY_AFTER_S = 5
LINGER_S = 2.0  # so that the last bytes of a reply reach a client that is still sending
QUICK_STOP_S = 1.5  # gunicorn's arbiter kills a worker 2 s after a quick shutdown was asked for
FIRST_LOCK_WAIT_S = 2.0  # covers another server's look at the lock, not another server
NEXT_LOCK_WAIT_S = GRACEFUL_TIMEOUT_S + 10.0
SAME_SIGNAL_S = 0.5  # a process group's SIGTERM also comes from make, or from a supervisor
OPEN_FILES = 16_384
READ_BYTES = 64 * 1024
ACCEPTED_AT_ONCE = 32  # connections a turn of the main loop; it keeps room for so many
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's <malloc.h>
LARGE_BYTES = 16 << 20
ARENAS = 2  # Python's own lock lets few threads allocate at once, so more of them save no waiting
# So many new objects before garbage is looked for: an upload's tasks, two slices of them, come and go without cycles.
GARBAGE_OBJECTS = 20_000

logger = logging.getLogger(__name__)


class Service(Protocol):
    """What the worker asks of `app.extensions["gpt_worker"]`."""

    def start(self, is_wanted: Callable[[], bool]) -> None:
        """Start the threads; DATA_DIR is owned. Raises StartGivenUp if it waits and `is_wanted` no more."""

    def begin_shutdown(self) -> None:
        """Take nothing new and let go of every waiting request; returns at once."""

    def stop(self) -> None:
        """Wait for the calls in flight, for 25 s at most, and commit. Requests are still being answered."""

    def abort(self) -> None:
        """Drop the calls in flight and commit what there is, so that `stop` returns within a second."""


def refuse(message: str) -> NoReturn:
    """End this process, which is only starting, with one line and exit status 2."""
    print(f"gpt-worker: {message}", file=sys.stderr, flush=True)
    sys.exit(REFUSED)


# The client's end


class ClientTooSlow(ConnectionResetError):
    """The client went silent, or sent or took too little; to gunicorn, a client that has gone."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the client is too slow")


class HeadTooSlow(Exception):
    """The header block did not end in time."""


class BodyTooSlow(Exception):
    """The small body did not end in time."""


class BodyCutOff(Exception):
    """The client has stopped sending before the end of its small body."""


class TooManyBodies(Exception):
    """No thread is left for a body that may take long to arrive."""


@dataclass(slots=True)
class Pace:
    """How fast a client sends its body, or takes its reply, while a thread waits for it.

    Only the time of waiting counts, and only the bytes since the first wait: neither our own work nor a stream
    that has little to say makes a client slow.
    """

    waited_s: float = 0.0
    silent_s: float = 0.0
    moved_bytes: int = 0

    def waited(self, duration_s: float) -> None:
        """The client kept a thread waiting."""
        self.waited_s += duration_s
        self.silent_s += duration_s

    def moved(self, count_bytes: int) -> None:
        """The client sent or took something."""
        self.silent_s = 0.0
        if self.waited_s:
            self.moved_bytes += count_bytes

    @property
    def is_too_slow(self) -> bool:
        """Whether the client has lost its thread whatever else happens."""
        return self.silent_s >= SILENCE_S or self._is_below(SLOWEST_BYTES_PER_S, SILENCE_S)

    @property
    def is_slow(self) -> bool:
        """Whether its thread is wanted back when threads are short."""
        return self._is_below(SLOW_BYTES_PER_S, SLOW_AFTER_S)

    def _is_below(self, bytes_per_s: int, after_s: float) -> bool:
        return self.waited_s >= after_s and self.moved_bytes < bytes_per_s * self.waited_s


class ThreadBudget:
    """Which connections are with the threads, waiting ones included, and which of those still send their body."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: set[socket.socket] = set()
        self._receiving: dict[socket.socket, str | None] = {}  # a stranger's with their network
        # A stranger's body, or another, since a slow one made room.
        self._has_refused = {True: False, False: False}

    def begin(self, sock: socket.socket) -> None:
        """A request goes to a thread."""
        with self._lock:
            self._busy.add(sock)

    def begin_with_body(self, sock: socket.socket) -> bool:
        """Whether a request may go to a thread that may have to read its body."""
        with self._lock:
            if len(self._busy) >= MAX_BUSY:
                self._has_refused[False] = True
                return False
            self._busy.add(sock)
            return True

    def begin_receiving(self, sock: socket.socket, stranger: str | None = None) -> bool:
        """Whether a thread may read a body; `stranger`: the network of a sender of whom no more is known."""
        with self._lock:
            others = list(self._receiving.values())
            known = others.count(None)
            if stranger is None:
                is_full = known >= MAX_RECEIVING
            else:
                is_full = len(others) - known >= MAX_STRANGERS or others.count(stranger) >= MAX_OF_NETWORK
            if is_full:
                self._has_refused[stranger is not None] = True
                return False
            self._receiving[sock] = stranger
            return True

    def end_receiving(self, sock: socket.socket) -> None:
        """The body is read."""
        with self._lock:
            self._receiving.pop(sock, None)

    def end(self, sock: socket.socket) -> None:
        """The thread is free."""
        with self._lock:
            self._receiving.pop(sock, None)
            self._busy.discard(sock)

    def let_go(self, sock: socket.socket) -> bool:
        """Whether the thread that waits for this slow client is wanted back; it counts as free from now on."""
        with self._lock:
            is_stranger = self._receiving.get(sock) is not None
            makes_room = sock in self._receiving and self._has_refused[is_stranger]
            if len(self._busy) > MAX_BUSY or makes_room:
                self._has_refused[is_stranger] &= not makes_room
                self._receiving.pop(sock, None)
                self._busy.discard(sock)
                return True
            return False


class ClientSocket(socket.socket):
    """A connection that no blocking read or write holds for ever.

    The bounds are on silence and on the pace, not on the whole: a client that keeps up has all its time
    (`socket.settimeout` would bound a whole `sendall`). A timeout that somebody set goes before ours.
    """

    threads: ThreadBudget
    head_deadline_s: float | None = None

    def begin_request(self, head_deadline_s: float) -> None:
        """The next bytes are a request's head, and its client's pace is unknown."""
        self.head_deadline_s = head_deadline_s
        self._receiving, self._sending = Pace(), Pace()

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        if flags != 0 or self.gettimeout() is not None:
            return super().recv(bufsize, flags)
        if self.head_deadline_s is None:
            self._keep_pace(select.POLLIN, self._receiving)
        elif not self._is_ready(select.POLLIN, self.head_deadline_s - time.monotonic()):
            raise HeadTooSlow
        received = super().recv(bufsize)
        self._receiving.moved(len(received))
        return received

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        if self.gettimeout() is not None:
            super().sendall(data, flags)
            return
        left = memoryview(data).cast("B")
        while left:
            try:
                sent = self.send(left, flags | socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._keep_pace(select.POLLOUT, self._sending)
            else:
                self._sending.moved(sent)
                left = left[sent:]

    def _keep_pace(self, event: int, pace: Pace) -> None:
        """Wait until the socket is ready. Raises ClientTooSlow."""
        is_ready = False
        while not is_ready:
            began_s = time.monotonic()
            is_ready = self._is_ready(event, LOOK_S)
            pace.waited(time.monotonic() - began_s)
            if pace.is_too_slow or (pace.is_slow and self.threads.let_go(self)):
                raise ClientTooSlow

    def _is_ready(self, event: int, wait_s: float) -> bool:
        poll = select.poll()
        poll.register(self, event)
        return bool(poll.poll(max(0.0, wait_s) * 1000))


class RequestBody:
    """gunicorn's body of a request, up to its limit, with faults raised as HTTP errors that any Flask handler answers.

    A body over the limit is refused when the application wants it, which may have a better answer than that.
    """

    def __init__(
        self, body: Any, length: int | None, limit: int | None, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._body = body
        self._left = length  # None: chunked, and its end not seen
        self._room = sys.maxsize if limit is None else limit
        self._limit = limit
        self._on_end = on_end

    @property
    def is_read(self) -> bool:
        """Whether nothing of it is left."""
        return self._left == 0

    def read(self, size: int | None = None) -> bytes:
        return self._take(self._body.read, size, to_end=True)

    def readline(self, size: int | None = None) -> bytes:
        return self._take(self._body.readline, size, to_end=False)

    def readlines(self, hint: int | None = None) -> list[bytes]:
        lines, taken = [], 0
        while not (hint and hint > 0 and taken >= hint) and (line := self.readline()):
            lines.append(line)
            taken += len(line)
        return lines

    def _take(self, read: Callable[[int], Any], size: int | None, *, to_end: bool) -> bytes:
        if (self._left or 0) > self._room:
            self._refuse()
        asked = sys.maxsize if size is None or size < 0 else size
        allowed = min(asked, self._room + 1)  # one more shows that there is more
        with _client_faults_as_http_errors():
            data = bytes(read(allowed))
        self._room -= len(data)
        if self._room < 0:
            self._refuse()
        if self._left is not None:
            self._left -= len(data)
        elif asked and (not data or (to_end and len(data) < allowed)):
            self._left = 0
        if self._left == 0:
            self._on_end()
        return data

    def _refuse(self) -> NoReturn:
        # Here, as the arbiter, which loads this file too, saves 2.5 MB.
        from werkzeug.exceptions import HTTPException

        error = HTTPException(f"No more than {self._limit} bytes are taken here.")
        error.code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        raise error

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


def _body_length(req: Any) -> int | None:
    """The length of a request's body as its head tells; None: chunked."""
    if any(name == "TRANSFER-ENCODING" for name, _ in req.headers):
        return None
    return next((int(value) for name, value in req.headers if name == "CONTENT-LENGTH"), 0)


@contextlib.contextmanager
def _client_faults_as_http_errors() -> Iterator[None]:
    from werkzeug.exceptions import BadRequest, ClientDisconnected, RequestTimeout

    try:
        yield
    except ClientTooSlow as error:
        raise RequestTimeout("The body stopped coming, or came too slowly.") from error
    except http_errors.ParseException as error:
        raise BadRequest("The chunks of the body are malformed.") from error
    except OSError as error:
        raise ClientDisconnected from error


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A client's connection and what has come of its next request: its head, and a small body behind it."""

    def __init__(self, cfg: Config, sock: ClientSocket, client: Any, server: Any) -> None:
        super().__init__(cfg, sock, client, server)
        self.head = bytearray()
        self.wanted_bytes = 0  # of `head`; 0 until the head is whole
        self.body_is_here = True

    @property
    def network(self) -> str:
        """What counts as one client, whatever addresses it has."""
        from gpt_worker.user_limits import network  # here, as the arbiter loads no database

        return network(self.client[0] if isinstance(self.client, tuple) else None)


def is_whole_head(head: bytes | bytearray, max_line_bytes: int) -> bool:
    """Whether the parser can say something about these first bytes of a request without reading more.

    True for a head that has ended, and for one that is wrong already: too long a request line, or a bare line feed.
    """
    if b"\r\n\r\n" in head or head.count(b"\n") != head.count(b"\r\n"):
        return True
    return len(head) > max_line_bytes + 4 and b"\r\n" not in head[2 : max_line_bytes + 4]


_BY_THREAD = re.compile(rb"\r\n(?:transfer-encoding|expect):", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*0*([0-9]+)[ \t]*\r\n", re.IGNORECASE)


def collectable_bytes(begun: bytes | bytearray) -> int | None:
    """How long a request is whose head is whole; None: its body is large, chunked or waits for "100 Continue".

    What is malformed ends with its head: the parser refuses it without reading on.
    """
    end = begun.find(b"\r\n\r\n") + 4
    if end < 4:
        return 0
    if _BY_THREAD.search(begun, 0, end):
        return None
    length = _LENGTH.search(begun, 0, end)
    if length is None:
        return end
    if len(length[1]) > len(str(SMALL_BODY_BYTES)) or int(length[1]) > SMALL_BODY_BYTES:
        return None
    return end + int(length[1])


# gunicorn's own error pages

# By kind of error; the first that fits counts.
_PARSE_PROBLEMS: dict[type[Exception], tuple[int, str]] = {
    HeadTooSlow: (408, f"The headers did not arrive within {HEAD_WAIT_S:.0f} seconds."),
    BodyTooSlow: (408, f"The body did not arrive within {SMALL_BODY_WAIT_S:.0f} seconds."),
    BodyCutOff: (400, "The body broke off."),
    TooManyBodies: (503, "Too many requests with large bodies at once."),
    http_errors.LimitRequestLine: (414, "The request line is too long."),
    http_errors.LimitRequestHeaders: (431, "The headers are too large."),
    http_errors.UnsupportedTransferCoding: (501, "Only the transfer coding chunked is known."),
    http_errors.ExpectationFailed: (417, "Only the expectation 100-continue is known."),
    http_errors.ForbiddenProxyRequest: (403, "This proxy is not allowed here."),
    http_errors.ConfigurationProblem: (500, "The server is configured wrongly."),
    http_errors.InvalidRequestLine: (400, "The request line is malformed."),
    http_errors.InvalidHTTPVersion: (400, "Only HTTP/1.0 and HTTP/1.1 are spoken here."),
    http_errors.InvalidHeader: (400, "A header is malformed."),
    http_errors.InvalidHeaderName: (400, "The name of a header is malformed."),
    http_errors.ParseException: (400, "The request is malformed."),
}
_SERVER_FAULTS = (http_errors.InvalidResponseHeader, http_errors.InvalidResponseHeaderName)


def describe_error(error: Exception) -> tuple[HTTPStatus, str]:
    """The status and the sentence for an error that no application saw; it shows nothing that the client sent."""
    if not isinstance(error, _SERVER_FAULTS):
        for kind, (status, detail) in _PARSE_PROBLEMS.items():
            if isinstance(error, kind):
                return HTTPStatus(status), detail
    return HTTPStatus.INTERNAL_SERVER_ERROR, "The request failed; the log tells more under this id."


def render_problem(status: HTTPStatus, detail: str, request_id: str) -> bytes:
    """A whole HTTP response that carries a problem (RFC 9457) and closes the connection."""
    body = json.dumps(
        {
            "type": "about:blank",
            "title": status.phrase,
            "status": status.value,
            "detail": detail,
            "request_id": request_id,
        },
        ensure_ascii=False,
    ).encode()
    retry_after = f"Retry-After: {RETRY_AFTER_S}\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        "Content-Type: application/problem+json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"X-Request-Id: {request_id}\r\n{retry_after}"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


# The worker


class WebWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """One process that serves: a main loop for connections, `THREADS` threads for requests, one service."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threads = ThreadBudget()
        self.body_conns: deque[Connection] = deque()
        self.lingering_conns: deque[Connection] = deque()
        self.lock: Ownership | None = None
        self.service: Service | None = None
        self.body_limits: Mapping[tuple[str, str], int | None] = {}
        self._quick_since_s: float | None = None

    # Start

    def init_process(self) -> None:
        threading.excepthook = _log_thread_death
        _raise_file_limit()
        return_large_memory()
        super().init_process()

    def load_wsgi(self) -> None:
        """Own the data, build the application, start its service; a refusal is one line, and ends the arbiter too."""
        is_started = threading.Event()
        self._in_background(partial(self._notify_until, is_started), "start-heartbeat")
        try:
            self._own(Settings.from_env())
            super().load_wsgi()
            service: Service = self.wsgi.extensions["gpt_worker"]
            self.body_limits = self.wsgi.extensions["gpt_worker_body_limits"]
            service.start(lambda: bool(self.alive))
            self.service = service
            gc.collect()
            gc.freeze()  # what stays for good, all code included, is looked through no more
            gc.set_threshold(GARBAGE_OBJECTS)
        except (SettingsError, InUse) as error:
            print(f"gpt-worker: {error}", file=sys.stderr, flush=True)
            self._leave(REFUSED)
        except StartGivenUp:
            self._leave(0)
        except Exception:
            logger.exception("The service could not start.", extra={"action": "start_failed"})
            self._leave(REFUSED)
        finally:
            is_started.set()

    def _own(self, settings: Settings) -> None:
        """Take the locks; after a reload the worker before this one holds them until it has stopped."""
        lock = Ownership(settings)
        deadline_s = time.monotonic() + (FIRST_LOCK_WAIT_S if self.age == 1 else NEXT_LOCK_WAIT_S)
        while True:
            try:
                lock.acquire(wait_s=0.5)
                self.lock = lock
                return
            except InUse:
                if not self.alive:
                    self._leave(0)
                if time.monotonic() > deadline_s:
                    raise

    def _notify_until(self, is_started: threading.Event) -> None:
        """Keep the arbiter from taking a long start for a hang."""
        while not is_started.wait(1.0):
            self.notify()

    # Serve

    def run(self) -> None:
        self.poller.register(
            self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks
        )
        while self.alive and self.is_parent_alive():
            self.set_accept_enabled(self._make_room())
            self._turn(wait_s=1.0)
        self._drain()
        self._leave(0)

    def _turn(self, wait_s: float) -> None:
        self.notify()
        self.wait_for_and_dispatch_events(wait_s)
        self.murder_keepalived()
        self.murder_pending()
        while self.lingering_conns and self.lingering_conns[0].timeout <= time.monotonic():
            self._drop(self.lingering_conns[0], self.lingering_conns)

    def _make_room(self) -> bool:
        """Whether there is room for new connections, for which those go that do nothing, the oldest first."""
        while self.nr_conns + ACCEPTED_AT_ONCE > self.worker_connections:
            conns = self._least_wanted()
            if conns is None:
                return False
            self._drop(conns[0], conns)
        return True

    def _least_wanted(self) -> "deque[Connection] | None":
        """The idle ones, else those that have their answer, else whichever has been with its head or body longer."""
        heads, bodies = self.pending_conns, self.body_conns
        for conns in (self.keepalived_conns, self.lingering_conns):
            if conns:
                return conns
        if heads and bodies:
            head_since_s, body_since_s = heads[0].timeout - HEAD_WAIT_S, bodies[0].timeout - SMALL_BODY_WAIT_S
            return heads if head_since_s <= body_since_s else bodies
        return heads or bodies or None

    def accept(self, listener: Any) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, address = listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    logger.warning(
                        "No file descriptor is left for a connection.", extra={"action": "accept_failed"}
                    )
                    time.sleep(0.05)
                elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    raise
                return
            sock = ClientSocket(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
            sock.threads = self.threads
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SEND_AHEAD_BYTES)
            self.nr_conns += 1
            self._await_head(Connection(self.cfg, sock, address, listener.getsockname()))

    def on_client_socket_readable(self, conn: Connection, client: ClientSocket) -> None:
        """A kept-alive connection has something to say: the time for its next head runs from here."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self._await_head(conn)
        self.on_pending_socket_readable(conn, client)

    def on_pending_socket_readable(self, conn: Connection, client: ClientSocket) -> None:
        """Collect the head, and a small body after it."""
        conns = self.body_conns if conn.wanted_bytes else self.pending_conns
        try:
            received = client.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        conn.head += received
        if not received and conn.wanted_bytes:
            self._forget(conn, conns)
            self._answer_error(conn, BodyCutOff())
        elif not received:
            self._drop(conn, conns)
        elif conn.wanted_bytes:
            if len(conn.head) >= conn.wanted_bytes:
                self._forget(conn, conns)
                self._dispatch(conn)
        elif self._is_whole(conn):
            self._forget(conn, conns)
            self._dispatch(conn)
        elif len(conn.head) > MAX_HEAD_BYTES:
            self._forget(conn, conns)
            self._answer_error(conn, http_errors.LimitRequestHeaders("head over its limit"))

    def _dispatch(self, conn: Connection) -> None:
        """Give a request whose head is whole to a thread, once its body is there too or a thread may wait for it."""
        wanted_bytes = collectable_bytes(conn.head)
        if wanted_bytes is not None and len(conn.head) < wanted_bytes:
            conn.wanted_bytes = wanted_bytes
            self._await(conn, self.body_conns, SMALL_BODY_WAIT_S)
            return
        conn.wanted_bytes = 0
        conn.body_is_here = wanted_bytes is not None
        if conn.body_is_here:
            self.threads.begin(conn.sock)
        elif not self.threads.begin_with_body(conn.sock):
            self._answer_error(conn, TooManyBodies())
            return
        conn.data_ready = True
        self.enqueue_req(conn)

    def murder_pending(self) -> None:
        """Close connections whose head or small body did not come in time; one that had begun is told why."""
        for conns, error in ((self.pending_conns, HeadTooSlow), (self.body_conns, BodyTooSlow)):
            while conns and conns[0].timeout <= time.monotonic():
                conn = conns[0]
                if conn.head:
                    self._forget(conn, conns)
                    self._answer_error(conn, error())
                else:
                    self._drop(conn, conns)

    def handle(self, conn: Connection) -> object:
        conn.sock.setblocking(True)
        conn.init()
        conn.parser.unreader.unread(bytes(conn.head))
        conn.head.clear()
        conn.sock.begin_request(time.monotonic() + HEAD_WAIT_S)
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Connection) -> bool:
        conn.sock.head_deadline_s = None
        body, closes = req.body, req.should_close
        length = _body_length(req)
        limit = self.body_limits.get((req.method, unquote_to_wsgi_str(req.path)), SMALL_BODY_BYTES)
        req.body = RequestBody(body, length, limit, partial(self.threads.end_receiving, conn.sock))
        # A body over its limit is not read, so its thread is not counted.
        is_wanted = limit is None or (length or 0) <= limit
        stranger = None if limit is None else conn.network
        if not conn.body_is_here and is_wanted and not self.threads.begin_receiving(conn.sock, stranger):
            raise TooManyBodies
        # Asked when the reply's head is written: a client that is refused with something unsent must be told of the
        # close. No thread waits for what nobody wants to have.
        req.should_close = lambda: closes() or not (conn.body_is_here or req.body.is_read)
        try:
            return bool(super().handle_request(req, conn))
        finally:
            req.body = body  # gunicorn drains what was left unread, and knows its own errors
            del req.should_close

    def finish_request(self, conn: Connection, future: "Future[Any]") -> None:
        self.threads.end(conn.sock)
        if future.cancelled() or future.exception() is not None or not future.result():
            self._linger(conn)
            return
        conn.head += conn.parser.unreader.take_buffered()
        if self._is_whole(conn):
            self._dispatch(conn)
        elif conn.head:
            self._await_head(conn)
        else:
            super().finish_request(conn, future)

    def handle_error(self, req: Any, client: ClientSocket, addr: Any, exc: Exception) -> None:
        """Answer what the application never saw, as a problem; gunicorn's own page is HTML."""
        status, detail = describe_error(exc)
        request_id = uuid.uuid4().hex
        facts = {"action": "bad_request", "status": status.value, "request_id": request_id}
        if isinstance(exc, TooManyBodies):
            logger.info(detail, extra=facts)
        elif status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
            logger.error("A request failed outside the application.", exc_info=exc, extra=facts)
        else:
            logger.debug("A malformed request was refused: %s", detail, extra=facts)
        # So short a page fits into the socket's buffer, or nobody reads it.
        with contextlib.suppress(OSError):
            client.send(render_problem(status, detail, request_id), socket.MSG_DONTWAIT)

    def _is_whole(self, conn: Connection) -> bool:
        return is_whole_head(conn.head, self.cfg.limit_request_line)

    def _await_head(self, conn: Connection) -> None:
        self._await(conn, self.pending_conns, HEAD_WAIT_S)

    def _await(self, conn: Connection, conns: "deque[Connection]", wait_s: float) -> None:
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + wait_s
        conns.append(conn)
        callback = partial(self.on_pending_socket_readable, conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, callback)

    def _answer_error(self, conn: Connection, error: Exception) -> None:
        self.handle_error(None, conn.sock, conn.client, error)
        self._linger(conn)

    def _linger(self, conn: Connection) -> None:
        """Close in two steps (RFC 9112, section 9.6), without gunicorn's wait for the client in the main loop."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
            callback = partial(self._on_lingering_readable, conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, callback)
        except (OSError, ValueError):
            self.nr_conns -= 1
            conn.close()
            return
        conn.timeout = time.monotonic() + LINGER_S
        self.lingering_conns.append(conn)

    def _on_lingering_readable(self, conn: Connection, client: ClientSocket) -> None:
        try:
            received = client.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._drop(conn, self.lingering_conns)

    def _forget(self, conn: Connection, conns: "deque[Connection]") -> None:
        self.poller.unregister(conn.sock)
        conns.remove(conn)

    def _drop(self, conn: Connection, conns: "deque[Connection]") -> None:
        self._forget(conn, conns)
        self.nr_conns -= 1
        conn.close()

    # Stop

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """SIGINT or SIGQUIT: stop at once, but cleanly; the time is counted from the first."""
        if self._quick_since_s is None:
            self._quick_since_s = time.monotonic()
        if not self.booted:
            self._leave(0)
        self.handle_exit(sig, frame)
        self.method_queue.defer(lambda: None)  # handle_exit wakes the loop only once

    def _drain(self) -> None:
        """Tell the service at once, and answer on open connections until it has stopped and no request is left."""
        self.alive = False
        began_s = time.monotonic()
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        stopping = self._in_background(self._stop_service, "service-stop")
        aborting: threading.Thread | None = None
        while stopping.is_alive() or self._has_requests(began_s):
            if self._quick_since_s is not None and aborting is None and self.service is not None:
                aborting = self._in_background(self.service.abort, "service-abort")
            if time.monotonic() > self._stop_by(began_s):
                logger.warning("The stop took too long and was cut short.", extra={"action": "stop_cut"})
                break
            self._turn(wait_s=0.05)

    def _stop_by(self, began_s: float) -> float:
        if self._quick_since_s is not None:
            return self._quick_since_s + QUICK_STOP_S
        return began_s + float(self.cfg.graceful_timeout) - 1.0

    def _has_requests(self, began_s: float) -> bool:
        """Whether a reply is being made, or a client that has just connected may still ask for one."""
        idle = len(self.keepalived_conns) + len(self.pending_conns) + len(self.body_conns)
        if self.nr_conns > idle + len(self.lingering_conns):
            return True
        is_quick = self._quick_since_s is not None
        return self.nr_conns > 0 and not is_quick and time.monotonic() < began_s + LINGER_S

    def _stop_service(self) -> None:
        if self.service is None:
            return
        self.service.begin_shutdown()
        self.service.stop()

    def _in_background(self, target: Any, name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def _leave(self, status: int) -> NoReturn:
        """End the process without joining threads: a call in flight may have minutes to go."""
        if self.lock is not None:
            self.lock.release()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _log_thread_death(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        facts = {"action": "thread_died", "thread": args.thread.name if args.thread else "unknown"}
        logger.error("A thread died of a bug.", exc_info=args.exc_value, extra=facts)


def _raise_file_limit() -> None:
    """Allow as many open files as the system lets us, up to OPEN_FILES: many systems start at 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def return_large_memory() -> None:
    """Have the C library return a large piece of memory when it is freed, such as the 19 MiB of a hashed password.

    glibc does so only until one is freed: from then on it keeps pieces of that size, in the thread's own arena.
    Naming the two sizes ends that; smaller pieces are kept as before, since returning and fetching them anew costs
    a busy service much of its CPU. But each thread keeping its own is too much: with eight arenas a core, what 128
    threads had in pieces of 2 MiB left 370 MiB behind, and with two 40. musl and macOS have no such function.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # here, as the arbiter needs none

        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, ARENAS)
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)  # twice, as glibc itself would choose


# The arbiter's side


class ServerLogger(Logger):  # type: ignore[misc]  # gunicorn has no types
    """Hands gunicorn's records to our logging.

    It is also the first of our code that sees gunicorn's final settings, flags and GUNICORN_CMD_ARGS included,
    before a worker class or a preloaded application is imported: so what is not supported is refused here.
    """

    # What gunicorn adds when a worker refuses to start, which has said why, in one line.
    ECHOES = frozenset({"Worker (pid:%s) exited with code %s.", "Shutting down: %s", "Reason: %s"})

    def __init__(self, cfg: Config) -> None:
        reason = unsupported(cfg)
        if reason is not None:
            refuse(reason)
        super().__init__(cfg)

    def setup(self, cfg: Config) -> None:
        super().setup(cfg)
        self.error_log.propagate = True

    def error(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if msg in self.ECHOES and (len(args) < 2 or args[1] == REFUSED):
            self.debug(msg, *args, **kwargs)
        else:
            super().error(msg, *args, **kwargs)

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        error = sys.exception()
        if isinstance(error, GptWorkerError):  # as what it tells of is gone, say
            self.info("A reply was cut off: %s.", error)
        else:
            super().exception(msg, *args, **kwargs)

    def _set_handler(self, log: logging.Logger, output: str | None, *args: Any, **kwargs: Any) -> None:
        if log is not self.error_log or output != "-":
            super()._set_handler(log, output, *args, **kwargs)


def unsupported(cfg: Config) -> str | None:
    """The one line against gunicorn settings that would break the service, or None."""
    if cfg.workers != 1:
        return (
            f"{cfg.workers} worker processes were asked for, but the service is one process of many threads: "
            "leave out --workers, WEB_CONCURRENCY and GUNICORN_CMD_ARGS"
        )
    if cfg.preload_app:
        return "preload is not supported, because threads do not outlive a fork: leave out --preload"
    given = cfg.settings["worker_class"].get()  # `cfg.worker_class_str` calls sync by another name
    worker_class = given if isinstance(given, str) else given.__name__
    if worker_class not in (WebWorker.__name__, f"{__name__}.{WebWorker.__name__}"):
        return f"the worker class {worker_class} is not supported: leave out --worker-class"
    if cfg.threads != THREADS:
        return f"the number of threads is fixed at {THREADS}: leave out --threads"
    if cfg.max_requests != 0:
        return "restarting after a number of requests is not supported: leave out --max-requests"
    if cfg.is_ssl:
        return "TLS is not spoken here: leave out --certfile and --keyfile, and put a proxy in front"
    return None


def take_charge(server: Arbiter, settings: Settings) -> None:
    """Refuse a start that must fail, and fit the arbiter's signals to a service that is one process.

    Called before the first fork; the locks are only looked at here, the worker takes them for itself.
    """
    listens_as_set = _address(settings) in server.address and not listen_fds(unset_environment=False)
    lock = Ownership(settings)
    try:
        lock.acquire(wait_s=0.5)
        lock.release()
        _check_machine(settings, with_address=listens_as_set)
    except (InUse, SettingsError) as error:
        refuse(str(error))

    hang_up, queue_signal = server.handle_hup, server.signal
    ending_since_s: float | None = None

    def reload_if_settings_are_good() -> None:
        try:
            fresh = Settings.from_env()
            check_database(fresh.database)
            moves = listens_as_set and _address(fresh) not in server.address
            _check_machine(fresh, with_address=moves)
        except SettingsError as error:
            server.log.error("The reload was refused and the old settings stay: %s", error)
        else:
            hang_up()

    def refuse_more_workers() -> None:
        server.log.warning("SIGTTIN is ignored: the service is one process.")

    def queue_or_hurry(sig: int, frame: FrameType | None) -> None:
        """A second SIGTERM means at once, which gunicorn ignores; one that comes twice at a time is one."""
        nonlocal ending_since_s
        if sig == signal.SIGTERM:
            now_s = time.monotonic()
            ending_since_s = ending_since_s or now_s
            if now_s - ending_since_s > SAME_SIGNAL_S:
                sig = signal.SIGQUIT
        queue_signal(sig, frame)

    server.WORKER_BOOT_ERROR = REFUSED  # a worker that leaves with it ends the arbiter, with the same status
    server.handle_hup = reload_if_settings_are_good
    server.handle_ttin = refuse_more_workers
    server.signal = queue_or_hurry


def _address(settings: Settings) -> tuple[str, int]:
    """As it stands in gunicorn's list of addresses."""
    return settings.host.lower(), settings.port


def _check_machine(settings: Settings, *, with_address: bool) -> None:
    """Raise SettingsError where this machine lacks what the settings name."""
    if settings.embedded:
        # Here: it and `subprocess` are half a megabyte to the arbiter of a service that has keys.
        from gpt_worker.embedded import EmbeddedModelMissing, check_installed

        try:
            check_installed(settings.model_path)
        except EmbeddedModelMissing as error:
            raise SettingsError(str(error)) from error
    check_settings(settings)
    if with_address:
        check_address(settings.host, settings.port)


def check_address(host: str, port: int) -> None:
    """Bind it as gunicorn will, and let go of it again; raises SettingsError where that fails."""
    try:
        with socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise SettingsError(explain_bind_error(error, host, port)) from error


def explain_bind_error(error: OSError, host: str, port: int) -> str:
    """The one line about an address that can't be listened on: which setting is wrong, and what to do."""
    if isinstance(error, socket.gaierror):
        return (
            f"HOST {host} is not known ({error.strerror}): name an address of this machine, such as 0.0.0.0"
        )
    if error.errno == errno.EADDRINUSE:
        return f"PORT {port} is in use on {host}: stop what listens there, or set another PORT"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"PORT {port} is not permitted to this user: set one above 1023, and put a proxy in front"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"HOST {host} is not an address of this machine: set one that is, or 0.0.0.0 for all"
    return f"HOST {host} can't be listened on ({error.strerror}): set another, such as 0.0.0.0"
