"""A small HTTP client that says exactly how far a request came: refused, unanswered, cut in the middle, answered."""

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60.0


class NoReply(Exception):
    """No whole reply came; `cut`: some of it did."""

    def __init__(self, why: str, *, cut: bool, refused: bool = False) -> None:
        super().__init__(why)
        self.cut = cut
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One kept-alive connection; for one thread."""

    def __init__(self, port: int, token: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self._token = token

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Raises NoReply."""
        connection = self._connection
        if connection.sock is None:
            self._connect()
        answered = False
        try:
            connection.request(
                method, path, body, {"Authorization": f"Bearer {self._token}", **(headers or {})}
            )
            response = connection.getresponse()
            answered = True
            content = response.read()
        except http.client.RemoteDisconnected as error:
            connection.close()
            raise NoReply("closed without a reply", cut=False) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            was_cut = answered or isinstance(error, http.client.HTTPException)
            raise NoReply(type(error).__name__, cut=was_cut) from error
        fields = {name.lower(): value for name, value in response.getheaders()}
        if "content-length" not in fields and "transfer-encoding" not in fields and response.status != 204:
            connection.close()
            raise NoReply("a head without an end", cut=True)
        return Reply(response.status, fields, content)

    def _connect(self) -> None:
        try:
            self._connection.connect()
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            self._connection.close()
            raise NoReply(type(error).__name__, cut=False, refused=True) from error

    def close(self) -> None:
        self._connection.close()
