"""One POST to a webhook receiver: bounded as a whole, in time and in what is read of the reply, and it can be cut.

What is sent and what the reply means is the outbox's business.
"""

import socket
import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from gpt_worker.addresses import is_loopback

CONNECT_TIMEOUT_S = 5.0
MAX_REPLY_BYTES = 64 << 10
NETWORK_ERRORS = (urllib3.exceptions.HTTPError, OSError)  # requests' own are OSErrors


class Wire:
    """The connection of one exchange, which other threads may cut whatever its owner waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._twin: socket.socket | None = None
        self._over = False
        self.was_cut = False
        self.abandoned = False

    def watch(self, connection: socket.socket) -> None:
        """Hold on to a connection that was just made. A twin, since TLS takes the original over."""
        with self._lock:
            if self._over:
                raise TimeoutError("the exchange is over")
            self._twin = connection.dup()

    def cut(self) -> None:
        """Break the connection: whoever reads or writes it returns at once."""
        with self._lock:
            if self._over:
                return
            self._over = self.was_cut = True
            if self._twin is not None:
                with suppress(OSError):  # the receiver may have been faster
                    self._twin.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Cut because the service stops: the exchange counts as if it had not been."""
        self.abandoned = True
        self.cut()

    def close(self) -> None:
        with self._lock:
            self._over = True
            if self._twin is not None:
                self._twin.close()
                self._twin = None


class _WatchedAdapter(HTTPAdapter):
    """Puts every connection, plain, TLS or through a proxy, on a wire."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        wire = self._wire

        class Watched(pool.ConnectionCls):  # type: ignore[misc]
            def _new_conn(self) -> socket.socket:
                connection: socket.socket = super()._new_conn()
                try:
                    wire.watch(connection)
                except OSError:
                    connection.close()
                    raise
                return connection

        pool.ConnectionCls = Watched
        return pool


@dataclass(frozen=True, slots=True)
class Reply:
    status_code: int
    retry_after: str | None


def post(url: str, headers: dict[str, str], body: bytes, *, wire: Wire, deadline_s: float) -> Reply:
    """POST and read the reply, all within the deadline, however slowly it drips. No redirect is followed.

    What follows the reply's head is read for politeness, up to 64 KiB, and dropped. Chunks are not: http.client takes
    one of size "-1" for all that ever comes.

    Raises requests.Timeout when the wire was cut, else what requests (an OSError) or urllib3 raise.
    """
    # A session each: no connection that went stale, and no cookie, reaches the next attempt.
    with requests.Session() as session:
        session.trust_env = not is_loopback(url)
        session.headers.clear()
        adapter = _WatchedAdapter(wire)
        request = session.prepare_request(requests.Request("POST", url, headers=headers, data=body))
        environment: Any = session.merge_environment_settings(request.url or url, {}, True, None, None)
        timer = threading.Timer(deadline_s, wire.cut)
        timer.daemon = True
        timer.start()
        try:
            # Not session.send: that reads the whole body of a redirect, even of one that it does not follow.
            response = adapter.send(
                request, timeout=(min(CONNECT_TIMEOUT_S, deadline_s), deadline_s), **environment
            )
            with closing(response):
                if wire.was_cut:
                    raise TimeoutError("headers that end with the connection look whole, and are not")
                if not response.raw.chunked:
                    with suppress(*NETWORK_ERRORS):  # the head has said all there is to know
                        response.raw.read(MAX_REPLY_BYTES, decode_content=False)
        except NETWORK_ERRORS as error:
            if wire.was_cut:
                raise requests.Timeout("the exchange took too long") from error
            raise
        finally:
            timer.cancel()
            wire.close()
            adapter.close()
    return Reply(response.status_code, response.headers.get("retry-after"))
