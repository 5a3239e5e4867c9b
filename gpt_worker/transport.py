"""One POST to an endpoint, bounded as a whole: in time, in size, and in where it may go. Knows nothing of GPT.

urllib3 and not the SDK's client, since a call costs far less CPU there. The read timeouts of any client are per read,
so a dripping reply could hold a thread for ever: a watchdog cuts connections at their deadline.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import RemoteDisconnected
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from gpt_worker.addresses import is_loopback

CONNECT_TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 16 << 20
WATCH_EVERY_S = 0.2


class TransportError(Exception):
    """No whole reply came: refused, reset, cut short. The message names no secret."""


class DeadlinePassed(TransportError):
    """The call had not ended at its deadline."""


class ConnectionStale(TransportError):
    """A kept-alive connection was closed before a byte came back: most likely it was closed before we used it."""


class ReplyTooLarge(TransportError):
    """The reply was larger than any answer can be."""


@dataclass(frozen=True, slots=True)
class RawReply:
    """A whole reply; header names are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class _Call:
    deadline_s: float
    owner: "Transport"
    sock: socket.socket | None = None
    reused: bool = True  # until a new connection is made for it
    cut: bool = False


_thread = (
    threading.local()
)  # the call that this thread makes, so that a new connection can be told to the watchdog


class _Watched:
    """Mixed into urllib3's connections: the running call learns which socket carries it.

    The socket and not the connection, which forgets it as soon as a reply says that it will close.
    """

    def _new_conn(self) -> socket.socket:
        new: socket.socket = super()._new_conn()  # type: ignore[misc]
        _thread.call.sock, _thread.call.reused = new, False
        return new

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        _thread.call.sock = getattr(self, "sock", None)  # with TLS around it

    def request(self, *args: Any, **kwargs: Any) -> None:
        _thread.call.sock = getattr(self, "sock", None) or _thread.call.sock
        super().request(*args, **kwargs)  # type: ignore[misc]


class _HttpConnection(_Watched, HTTPConnection):
    pass


class _HttpsConnection(_Watched, HTTPSConnection):
    pass


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
                    if call.cut or call.deadline_s <= now_s:
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
        self.path = parts.path.rstrip("/")
        self.base_url = base_url
        self.forbidden = loopback_only and not is_loopback(base_url)
        options: dict[str, Any] = {"maxsize": threads, "block": False, "retries": False}
        proxy = None if is_loopback(base_url) or proxy_bypass(self.host) else getproxies().get(parts.scheme)
        manager = _through_proxy(proxy, options) if proxy else urllib3.PoolManager(**options)
        if proxy and parts.scheme == "http":
            self.path = base_url.rstrip("/")  # a proxy is told the whole address
        self._pool = manager.connection_from_url(base_url)
        self._pool.ConnectionCls = _HttpsConnection if parts.scheme == "https" else _HttpConnection

    def post(self, path: str, headers: Mapping[str, str], body: bytes, deadline_s: float) -> RawReply:
        """Send and read a whole reply within `deadline_s`; redirects are not followed.

        Raises:
            DeadlinePassed, ReplyTooLarge, ConnectionStale, TransportError.
        """
        if self.forbidden:
            raise TransportError("NODE_ENV=test reaches nothing outside this machine")
        call = _thread.call = _Call(time.monotonic() + deadline_s, self)
        try:
            with _watchdog.watch(call):
                reply = self._exchange(path, headers, body, deadline_s)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if call.cut or time.monotonic() >= call.deadline_s:
                raise DeadlinePassed(f"no whole reply within {deadline_s:g} s") from error
            root = _root(error)
            if isinstance(root, TimeoutError):
                raise TransportError("the endpoint did not accept the connection in time") from error
            if call.reused and isinstance(root, RemoteDisconnected | ConnectionResetError | BrokenPipeError):
                raise ConnectionStale("the endpoint closed the connection") from error
            raise TransportError(f"the connection failed ({type(root).__name__})") from error
        if call.cut:  # what looks like the end of a reply is where we cut it
            raise DeadlinePassed(f"no whole reply within {deadline_s:g} s")
        return reply

    def _exchange(self, path: str, headers: Mapping[str, str], body: bytes, deadline_s: float) -> RawReply:
        response = self._pool.urlopen(
            "POST",
            self.path + path,
            body=body,
            headers=dict(headers),
            retries=False,
            redirect=False,
            assert_same_host=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, deadline_s), read=deadline_s),
        )
        _thread.call.reused = False  # it has answered: whatever happens now, it was not stale
        try:
            data = response.read(MAX_REPLY_BYTES + 1, decode_content=True)
            if len(data) > MAX_REPLY_BYTES:
                raise ReplyTooLarge(f"the reply was larger than {MAX_REPLY_BYTES >> 20} MiB")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return RawReply(response.status, response.headers, data)

    def cut(self) -> None:
        """End every call in flight now; each raises DeadlinePassed."""
        _watchdog.cut_all(self)


def _through_proxy(proxy: str, options: dict[str, Any]) -> urllib3.ProxyManager:
    """By way of a proxy as the environment names it: perhaps with a user and a password, perhaps without a scheme."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    headers = None
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=user)
    port = f":{parts.port}" if parts.port else ""
    return urllib3.ProxyManager(f"{parts.scheme}://{host}{port}", proxy_headers=headers, **options)


def _root(error: BaseException) -> BaseException:
    """The innermost cause, such as a ConnectionRefusedError; its text could hold anything."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
