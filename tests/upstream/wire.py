"""HTTP/1.1 as bytes: a request read from a buffer, the head of a reply written.

Pure. Only what a JSON API over keep-alive connections needs; bodies come with a Content-Length.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from zlib import DEF_MEM_LEVEL, DEFLATED, Z_DEFAULT_STRATEGY, Z_FULL_FLUSH, compressobj, crc32

_PIECE_BYTES = 1 << 20
_CONTENT = b'"content": "'


class MalformedRequest(ValueError):
    """Bytes that are no HTTP request of the kind that is read here."""


@dataclass
class Request:
    """One request. Names of headers are in lower case; `body` is filled once it has arrived whole."""

    method: str
    path: str
    headers: dict[str, str]
    length: int
    keep_alive: bool
    body: bytes = b""


@dataclass
class Reply:
    """One reply; its Content-Length is written by `head`."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    def head(self, length: int) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status} {_PHRASES.get(self.status, 'Unknown')}",
            f"content-type: {self.content_type}",
            f"content-length: {length}",
        ]
        for name, value in self.headers.items():
            lines.append(f"{name}: {value}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def read_head(buffer: bytearray) -> Request | None:
    """Takes one head off the buffer, or nothing when it is not there in whole."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    try:
        method, target, version = first.split(" ")
        length = int(headers.get("content-length", "0"))
    except ValueError as error:
        raise MalformedRequest(first) from error
    if "transfer-encoding" in headers or length < 0:
        raise MalformedRequest("a body comes with a Content-Length here")
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return Request(method, target.partition("?")[0], headers, length, keep_alive)


def huge(body: bytes, size_bytes: int) -> tuple[int, Iterator[bytes]]:
    """The length and the pieces of a completion with a content of `size_bytes`, whose content was empty."""
    before, mark, after = body.partition(_CONTENT)

    def pieces() -> Iterator[bytes]:
        yield before + mark
        left = size_bytes
        while left > 0:
            yield b"a" * min(left, _PIECE_BYTES)
            left -= _PIECE_BYTES
        yield after

    return len(body) + size_bytes, pieces()


def gzip_bomb(body: bytes, size_bytes: int) -> bytes:
    """The same, in gzip: one deflated block of a's repeated, so that a gigabyte costs little to make."""
    packer = compressobj(9, DEFLATED, -15, DEF_MEM_LEVEL, Z_DEFAULT_STRATEGY)

    def block(text: bytes) -> bytes:
        return packer.compress(text) + packer.flush(Z_FULL_FLUSH)

    before, mark, after = body.partition(_CONTENT)
    whole, rest = divmod(size_bytes, _PIECE_BYTES)
    piece = b"a" * _PIECE_BYTES
    packed_piece = block(piece)
    packed = block(before + mark) + packed_piece * whole + block(piece[:rest] + after) + packer.flush()
    checksum = crc32(before + mark)
    for _ in range(whole):
        checksum = crc32(piece, checksum)
    checksum = crc32(piece[:rest] + after, checksum)
    head = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
    length = (len(body) + size_bytes) & 0xFFFFFFFF
    return head + packed + checksum.to_bytes(4, "little") + length.to_bytes(4, "little")
