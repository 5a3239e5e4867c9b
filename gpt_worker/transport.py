"""One request to an endpoint, bounded as a whole: in time, in size, and in where it may go. Knows nothing of GPT.

urllib3 connects (names, TLS, proxies); the exchange is ours, since a call bounds what one process can do: the SDK's
client costs many times its CPU, and urllib3's own exchange four times. The read timeouts of any client are per read, so
a dripping reply could hold a thread for ever: a watchdog cuts connections at their deadline.
"""

import contextlib
import io
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead, RemoteDisconnected
from typing import cast
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import parse_url

from gpt_worker.addresses import is_loopback
from gpt_worker.reply_body import BodyTooLarge, BodyUnreadable, Hold, read_body

CONNECT_TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 16 << 20
MAX_LINE_BYTES = 65536
MAX_HEADERS = 100
MAX_INTERIM_REPLIES = 100
WATCH_EVERY_S = 0.2
CLOSED = (RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


class TransportError(Exception):
    """No whole reply came: refused, reset, cut short. The message names no secret."""


class ProxyUnusable(TransportError):
    """The environment names a proxy that can't be used; the message names the variable and not its value."""


class DeadlinePassed(TransportError):
    """The call had not ended at its deadline."""


class ConnectionStale(TransportError):
    """A kept-alive connection was closed before a byte came back: most likely it was closed before we used it."""


class ReplyTooLarge(TransportError):
    """The reply was larger than any answer can be."""


class CallLeft(Exception):
    """Whoever asked does not wait for the reply any more, as `leaving_when` had said."""


@dataclass(frozen=True, slots=True)
class RawReply:
    """A whole reply; header names are in lower case. The body is empty if it was packed and can't be unpacked.

    Who keeps what a large body holds keeps its `hold` as long.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    hold: Hold | None = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class _Call:
    deadline_s: float
    owner: "Transport"
    sock: socket.socket | None = None
    reused: bool = True  # until a new connection is made for it
    cut: bool = False
    is_left: Callable[[], bool] | None = None

    @property
    def left(self) -> bool:
        return self.is_left is not None and self.is_left()

    def look(self) -> None:
        """Raises TimeoutError once the call is over: what was read before can take its time outside of any read."""
        if self.cut or time.monotonic() >= self.deadline_s:
            raise TimeoutError


class _Thread(threading.local):
    call: _Call  # so that a new connection can be told to the watchdog
    is_left: Callable[[], bool] | None = None


_thread = _Thread()


@contextlib.contextmanager
def leaving_when(is_left: Callable[[], bool]) -> Iterator[None]:
    """Calls that this thread makes in the block raise CallLeft soon after `is_left`, which must not wait, says so."""
    _thread.is_left = is_left
    try:
        yield
    finally:
        _thread.is_left = None


class _Watched:
    """Mixed into urllib3's connections: the running call learns at once which socket is about to carry it."""

    def _new_conn(self) -> socket.socket:
        new: socket.socket = super()._new_conn()  # type: ignore[misc]
        _thread.call.sock, _thread.call.reused = new, False
        return new


class _HttpConnection(_Watched, HTTPConnection):
    pass


class _HttpsConnection(_Watched, HTTPSConnection):
    pass


_Connection = _HttpConnection | _HttpsConnection


class _Response(HTTPResponse):
    """Reads its headers into a plain dict: http.client's email parser takes longer than all else of a call."""

    fp: io.BufferedReader

    def begin(self) -> None:
        for _ in range(MAX_INTERIM_REPLIES + 1):  # "continue", "early hints": the reply itself comes after it
            version, self.status, self.reason = self._read_status()  # type: ignore[attr-defined]
            headers = self._read_fields()
            if self.status >= 200:
                break
        else:
            raise HTTPException(f"more than {MAX_INTERIM_REPLIES} interim replies")
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        self.headers = self.msg = cast(HTTPMessage, headers)  # of which `get` is used
        self.chunked = headers.get("transfer-encoding", "").lower().endswith("chunked")
        self.chunk_left = None
        lengths = {length.strip() for length in headers.get("content-length", "").split(",")} - {""}
        if len(lengths) > 1 or not all(length.isascii() and length.isdecimal() for length in lengths):
            raise HTTPException("a Content-Length that is no number")
        self.length = int(lengths.pop()) if lengths and not self.chunked else None
        if self.status in (204, 304):
            self.length, self.chunked = 0, False
        ends = self.chunked or self.length is not None
        self.will_close = not ends or self._check_close()  # type: ignore[attr-defined]

    def _read_fields(self) -> dict[str, str]:
        """Header fields by their name in lower case; those that come twice are joined."""
        fields: dict[str, str] = {}
        for _ in range(MAX_HEADERS + 1):
            line = self.fp.readline(MAX_LINE_BYTES)
            if not line.endswith(b"\n"):
                raise IncompleteRead(line)
            if line in (b"\r\n", b"\n"):
                return fields
            name, _, value = line.decode("latin-1").partition(":")
            name, value = name.strip().lower(), value.strip()
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        raise HTTPException(f"more than {MAX_HEADERS} headers")


class Watchdog:
    """Cuts the connections of calls that are past their deadline; asleep while there are none."""

    def __init__(self) -> None:
        self._by_id: dict[int, _Call] = {}
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(self, call: _Call) -> Iterator[None]:
        with self._condition:
            self._by_id[id(call)] = call
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="call-watchdog", daemon=True)
                self._thread.start()
            elif len(self._by_id) == 1:
                self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                del self._by_id[id(call)]

    def cut_all(self, owner: "Transport") -> None:
        """Cut every call of one transport now."""
        with self._condition:
            for call in self._by_id.values():
                if call.owner is owner:
                    call.cut = True
                    _cut(call.sock)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._by_id)
                now_s = time.monotonic()
                for call in self._by_id.values():
                    if call.cut or call.deadline_s <= now_s or call.left:
                        call.cut = True
                        _cut(call.sock)  # again: it may have connected after the last time
            threading.Event().wait(WATCH_EVERY_S)


def _cut(sock: socket.socket | None) -> None:
    if sock is not None:
        with contextlib.suppress(OSError, ValueError):
            # Not SSLSocket.shutdown, which would take the TLS layer from under the reading thread.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


_watchdog = Watchdog()


class Transport:
    """The connections to one endpoint, as many as there are threads; they are kept alive and shared by threads."""

    def __init__(self, base_url: str, threads: int, *, loopback_only: bool) -> None:
        parts = urlsplit(base_url)
        self.host = parts.hostname or ""
        address = parse_url(base_url)  # with all that can't be sent as it is encoded
        self.path = (address.path or "").rstrip("/")
        self.base_url = base_url
        self.forbidden = loopback_only and not is_loopback(base_url)
        proxy = None if is_loopback(base_url) or proxy_bypass(self.host) else _proxy_for(parts.scheme)
        manager = _through_proxy(proxy) if proxy else urllib3.PoolManager()
        self._pool = manager.connection_from_url(base_url)
        self._pool.ConnectionCls = _HttpsConnection if self._pool.scheme == "https" else _HttpConnection
        self._tunnels = proxy is not None and parts.scheme == "https"
        self._own_headers = {"Host": address.netloc or "", "Accept-Encoding": "identity"}
        if proxy and not self._tunnels:
            self.path = address.url.rstrip("/")  # a proxy is told the whole address
            self._own_headers |= self._pool.proxy_headers
        self._idle: list[_Connection] = []
        self._max_idle = threads
        weakref.finalize(self, _close, self._idle)

    def get(self, path: str, headers: Mapping[str, str], deadline_s: float) -> RawReply:
        """As `post`, for a request without a body."""
        return self._send("GET", path, headers, b"", deadline_s)

    def post(self, path: str, headers: Mapping[str, str], body: bytes, deadline_s: float) -> RawReply:
        """Send and read a whole reply within `deadline_s`; redirects are not followed.

        Raises:
            DeadlinePassed, ReplyTooLarge, ConnectionStale, TransportError; CallLeft within `leaving_when`.
        """
        return self._send("POST", path, {**headers, "Content-Length": str(len(body))}, body, deadline_s)

    def _send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, deadline_s: float
    ) -> RawReply:
        if self.forbidden:
            raise TransportError("NODE_ENV=test reaches nothing outside this machine")
        call = _thread.call = _Call(time.monotonic() + deadline_s, self, is_left=_thread.is_left)
        try:
            with _watchdog.watch(call):
                request = self._head(method, path, headers) + body
                reply = self._exchange(call, method, request, deadline_s)
        except (urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError) as error:
            raise _explain(error, call, deadline_s) from error
        if call.cut:  # what looks like the end of a reply is where we cut it
            raise _cut_short(call, deadline_s)
        return reply

    def _head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {self.path}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (self._own_headers | dict(headers)).items()]
        lines += ["", ""]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise ValueError("a header can't hold a line break")
        return head.encode("latin-1")

    def _exchange(self, call: _Call, method: str, request: bytes, deadline_s: float) -> RawReply:
        connection = self._idle_connection() or self._new_connection(deadline_s)
        try:
            sock = connection.sock
            call.sock = sock
            sock.settimeout(deadline_s)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(request)  # a server may have answered, and closed, before it had read all
            with _Response(sock, method=method) as response:
                response.begin()
                call.reused = False  # it has answered: whatever happens now, it was not stale
                headers = cast(dict[str, str], response.headers)
                try:
                    data, hold = read_body(
                        response.fp,
                        response.length,
                        chunked=response.chunked,
                        encoding=headers.get("content-encoding", ""),
                        max_bytes=MAX_REPLY_BYTES,
                        look=call.look,
                    )
                except BodyUnreadable:  # its status still says what there is to say
                    data, hold, response.will_close = b"", None, True
                except BodyTooLarge:
                    raise ReplyTooLarge(f"the reply was larger than {MAX_REPLY_BYTES >> 20} MiB") from None
        except BaseException:
            connection.close()
            raise
        call.sock = None  # from here on it may be another's
        if response.will_close or len(self._idle) >= self._max_idle:
            connection.close()
        else:
            self._idle.append(connection)
        return RawReply(response.status, headers, data, hold)

    def _idle_connection(self) -> _Connection | None:
        """The connection that was used last and is still open."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if connection.is_connected:
                    return connection
                connection.close()
        return None

    def _new_connection(self, deadline_s: float) -> _Connection:
        connection = cast(_Connection, self._pool._new_conn())
        connection.timeout = min(CONNECT_TIMEOUT_S, deadline_s)
        try:
            if self._tunnels:
                self._pool._prepare_proxy(connection)
            else:
                connection.connect()
        except BaseException:
            connection.close()
            raise
        return connection

    def cut(self) -> None:
        """End every call in flight now; each raises DeadlinePassed."""
        _watchdog.cut_all(self)


def _close(connections: list[_Connection]) -> None:
    for connection in connections:
        connection.close()


def _cut_short(call: _Call, deadline_s: float) -> Exception:
    return CallLeft() if call.left else DeadlinePassed(f"no whole reply within {deadline_s:g} s")


def _explain(error: Exception, call: _Call, deadline_s: float) -> Exception:
    """What a failed exchange is to whoever asked.

    Apart from where it was caught: a traceback that held its own error would hold all that was read, too.
    """
    if call.cut or time.monotonic() >= call.deadline_s:
        return _cut_short(call, deadline_s)
    root = _root(error)
    if isinstance(root, TimeoutError):
        return TransportError("the endpoint did not accept the connection in time")
    if call.reused and isinstance(root, CLOSED):
        return ConnectionStale("the endpoint closed the connection")
    return TransportError(f"the connection failed ({type(root).__name__})")


def _proxy_for(scheme: str) -> str | None:
    """The proxy that the environment names for addresses of this scheme. Raises ProxyUnusable."""
    proxies = getproxies()
    name = scheme if scheme in proxies else "all"
    proxy = proxies.get(name)
    if not proxy:
        return None
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if not usable:
        raise ProxyUnusable(
            f"{name.upper()}_PROXY is no http:// or https:// proxy: change it, or name the host in NO_PROXY"
        )
    return proxy


def _through_proxy(proxy: str) -> urllib3.ProxyManager:
    """By way of a proxy as the environment names it: perhaps with a user and a password, perhaps without a scheme."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    headers = None
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=user)
    port = f":{parts.port}" if parts.port else ""
    return urllib3.ProxyManager(f"{parts.scheme}://{host}{port}", proxy_headers=headers)


def _root(error: BaseException) -> BaseException:
    """The innermost cause, such as a ConnectionRefusedError; its text could hold anything."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
