"""Trying a key by hand, at an endpoint that does as it likes."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.clock import eventually
from tests.service import Service

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"


class OddEndpoint:
    """Says to every request what it was told to say, then nothing more; the connections stay open."""

    def __init__(self) -> None:
        self.says = b""
        self.asked = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                connection.recv(65536)
                self.asked += 1
                with contextlib.suppress(OSError):
                    connection.sendall(self.says)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for one in (self._listener, *self._connections):
            one.close()
        self._thread.join(10)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[OddEndpoint]:
    endpoint = OddEndpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, endpoint: OddEndpoint) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("service")
    with Service(folder, {"GPT_BASE_URL": endpoint.url, "GPT_KEY_0": "sk-a", "GPT_KEY_1": "sk-b"}) as service:
        yield service


def in_thread(call: Callable[[], requests.Response]) -> tuple[threading.Thread, list[requests.Response]]:
    replies: list[requests.Response] = []
    thread = threading.Thread(target=lambda: replies.append(call()))
    thread.start()
    return thread, replies


@pytest.mark.parametrize(
    "says",
    [
        HEAD + b"Content-Length: 5\r\n\r\n<html",
        HEAD + b'Content-Length: 5\r\n\r\n{"dat',
        HEAD + b"Content-Length: 4\r\n\r\nnull",
        HEAD + b"Content-Length: 314572800\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        HEAD + b"Content-Encoding: br\r\nContent-Length: 4\r\n\r\nzzzz",
        b"SMTP ready\r\n\r\n",
    ],
)
def test_endpoint_that_says_no_models_could_not_be_asked(
    service: Service, endpoint: OddEndpoint, says: bytes
) -> None:
    endpoint.says = says

    checked = service.post("/keys/0/check", service.admin)

    assert checked.status_code == 200
    assert checked.json()["state"] == "ready"
    error = checked.json()["last_error"]
    assert (error["code"], error["message"]) == ("connection", "the endpoint could not be asked")


def test_check_is_let_go_when_the_service_stops(service: Service, endpoint: OddEndpoint) -> None:
    endpoint.says, asked, admin = b"", endpoint.asked, service.admin
    service.submit(["hello"], prefer="respond-async")  # a call in flight gets its time to land
    thread, replies = in_thread(lambda: service.post("/keys/0/check", admin))
    eventually(lambda: endpoint.asked == asked + 2)

    service.signal(signal.SIGTERM)

    thread.join(5)
    (reply,) = replies
    assert reply.status_code == 503
    assert "Retry-After" in reply.headers
