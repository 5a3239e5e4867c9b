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
from urllib.parse import urlsplit
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
    connection: Any = None
    reused: bool = False
    cut: bool = False


_thread = (
    threading.local()
)  # the call that this thread makes, so that a new connection can be told to the watchdog


class _Watched:
    """Mixed into urllib3's connections: the running call learns which connection carries it."""

    def request(self, *args: Any, **kwargs: Any) -> None:
        _thread.call.connection = self
        _thread.call.reused = getattr(self, "sock", None) is not None
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
                    _cut(call.connection)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._by_id)
                now_s = time.monotonic()
                late = [call for call in self._by_id.values() if call.deadline_s <= now_s and not call.cut]
                for call in late:
                    call.cut = True
                    _cut(call.connection)
            threading.Event().wait(WATCH_EVERY_S)


def _cut(connection: Any) -> None:
    sock = getattr(connection, "sock", None)
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
        manager = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
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
                return self._exchange(path, headers, body, deadline_s)
        except urllib3.exceptions.TimeoutError as error:
            if isinstance(error, urllib3.exceptions.ConnectTimeoutError) and not call.cut:
                raise TransportError("the endpoint did not accept the connection in time") from error
            raise DeadlinePassed(f"no whole reply within {deadline_s:g} s") from error
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if call.cut or time.monotonic() >= call.deadline_s:
                raise DeadlinePassed(f"no whole reply within {deadline_s:g} s") from error
            root = _root(error)
            if call.reused and isinstance(root, RemoteDisconnected | ConnectionResetError | BrokenPipeError):
                raise ConnectionStale("the endpoint closed the connection") from error
            raise TransportError(f"the connection failed ({type(root).__name__})") from error

    def _exchange(self, path: str, headers: Mapping[str, str], body: bytes, deadline_s: float) -> RawReply:
        response = self._pool.urlopen(
            "POST",
            self.path + path,
            body=body,
            headers=dict(headers),
            retries=False,
            redirect=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, deadline_s), read=deadline_s),
        )
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


def _root(error: BaseException) -> BaseException:
    """The innermost cause, such as a ConnectionRefusedError; its text could hold anything."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error
