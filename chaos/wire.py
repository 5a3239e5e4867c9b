"""HTTP by hand, over raw sockets: what is sent is up to the caller, what comes back must be whole replies."""

import re
import socket
import struct
from dataclasses import dataclass

STATUS_LINE = re.compile(rb"HTTP/1\.\d ([1-5]\d\d)(?: [^\r\n]*)?\r\n")
BEGINNING = b"HTTP/1."  # gunicorn answers an HTTP/1.9 in kind
NO_BODY = (204, 304)


class Garbled(Exception):
    """What came is not a sequence of whole replies."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One final reply; names of headers are in lower case."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def content_type(self) -> bytes:
        return self.headers.get(b"content-type", b"")


def connect(port: int, timeout_s: float = 30.0, receive_bytes: int | None = None) -> socket.socket:
    """A connection to the service; `receive_bytes` makes it a small window."""
    sock = socket.socket()
    try:
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(timeout_s)
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


def reset(sock: socket.socket) -> None:
    """Close it by a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def parse_replies(received: bytes, *, ended: bool) -> tuple[list[Reply], bytes]:
    """The whole replies, and what is left behind them; `ended`: no more will come.

    Replies to HEAD have a length and no body; as the sender's methods may be mangled, they are known by what follows.
    Raises Garbled for what can't become a reply any more.
    """
    replies: list[Reply] = []
    left = received
    while left:
        found = _parse_one(left, ended=ended)
        if found is None:
            break
        reply, left = found
        if reply.status >= 200:  # the others announce one
            replies.append(reply)
    if left and ended:
        raise Garbled(f"cut off: {left[:80]!r}")
    return replies, left


def _parse_one(data: bytes, *, ended: bool) -> tuple[Reply, bytes] | None:
    """The first reply and what follows it; None while it is not whole."""
    line = STATUS_LINE.match(data)
    if line is None:
        if b"\r\n" in data or not BEGINNING.startswith(data[: len(BEGINNING)]):
            raise Garbled(f"no status line: {data[:80]!r}")
        return None
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    status = int(line[1])
    headers: dict[bytes, bytes] = {}
    for field in data[line.end() : end + 2].splitlines():
        name, colon, value = field.partition(b":")
        if not colon or name != name.strip():
            raise Garbled(f"no header: {field[:80]!r}")
        headers[name.lower()] = value.strip()
    rest = data[end + 4 :]
    if status < 200 or status in NO_BODY:
        return Reply(status, headers, b""), rest
    if rest.startswith(BEGINNING) or (not rest and ended):  # to a HEAD
        return Reply(status, headers, b""), rest
    if b"content-length" in headers:
        length = int(headers[b"content-length"])
        return (Reply(status, headers, rest[:length]), rest[length:]) if len(rest) >= length else None
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        chunked = _parse_chunks(rest)
        return None if chunked is None else (Reply(status, headers, chunked[0]), chunked[1])
    return (Reply(status, headers, rest), b"") if ended else None


def _parse_chunks(data: bytes) -> tuple[bytes, bytes] | None:
    body = b""
    while True:
        size, line_end, rest = data.partition(b"\r\n")
        if not line_end:
            return None
        if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
            raise Garbled(f"no chunk: {size[:80]!r}")
        length = int(size, 16)
        if len(rest) < length + 2:
            return None
        if rest[length : length + 2] != b"\r\n":
            raise Garbled("a chunk does not end")
        body += rest[:length]
        data = rest[length + 2 :]
        if length == 0:
            return body, data
