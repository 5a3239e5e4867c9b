"""Where the HTTP face finds the service, and the client of a request."""

import socket
from collections.abc import Callable

from flask import current_app, request

from gpt_worker.service import Service


def service() -> Service:
    """The parts of the service that this app belongs to."""
    found: Service = current_app.extensions["gpt_worker"]
    return found


def client_left() -> Callable[[], bool]:
    """Whether the client has closed the connection, asked without reading from it."""
    sock: socket.socket | None = request.environ.get("gunicorn.socket")

    def left() -> bool:
        if sock is None:
            return False
        try:
            return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            return True

    return left
