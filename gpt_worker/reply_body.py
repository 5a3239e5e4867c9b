"""The body of a reply as bytes, whatever its sender does: its framing, its packing and its memory, each with a bound.

http.client takes a chunk of size "-1" for all that ever comes, and joins as many small pieces as somebody cares to
send; urllib3 takes minutes to unpack a gzip of many empty members. So both are read here. Knows nothing of GPT.
"""

import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPException, IncompleteRead
from typing import IO

from gpt_worker.gzip_members import inflate, new_member

PIECE_BYTES = 64 << 10
FREE_BYTES = 1 << 20  # what every reply may take: as much as the longest answer of today's models
BUDGET_BYTES = 32 << 20  # what all larger ones may take together
LOOK_EVERY_S = 0.2
MAX_LINE_BYTES = 65536
MAX_TRAILERS = 100
MAX_CHUNK_LINE_BYTES = 1024
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")  # RFC 9112, 7.1
CHUNK_COST_BYTES = 64  # a chunk counts as so much at least, or tiny ones would take minutes inside the limit

Look = Callable[[], None]  # raises when the call is over


class BodyTooLarge(Exception):
    """There is more of it, as sent or unpacked, than is allowed."""


class BodyUnreadable(HTTPException):
    """It came whole, packed in a way that nobody asked for, or damaged."""


class Hold:
    """A part of the budget, given back when nobody has a use for it, and so for the reply it belongs to, any more."""

    def __init__(self, budget: "Budget", size_bytes: int) -> None:
        self._budget = budget
        self._size_bytes = size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Keep so much, and give the rest back."""
        self._budget.give_back(self._size_bytes - size_bytes)
        self._size_bytes = size_bytes

    def __del__(self) -> None:
        self._budget.give_back(self._size_bytes)


class Budget:
    """So many bytes, for whoever asks first; nobody holds a part and waits for another."""

    def __init__(self, size_bytes: int) -> None:
        self.free_bytes = size_bytes
        # A Condition's own lock is an RLock: a Hold may end, and take it again, in a thread that has it.
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def reserve(self, size_bytes: int, look: Look) -> Hold:
        """Wait for so much, and for the turn; `look` may end that."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                while self._waiting[0] is not turn or self.free_bytes < size_bytes:
                    self._changed.wait(LOOK_EVERY_S)
                    look()
                self.free_bytes -= size_bytes
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        return Hold(self, size_bytes)

    def give_back(self, size_bytes: int) -> None:
        with self._changed:
            self.free_bytes += size_bytes
            self._changed.notify_all()


LARGE_REPLIES = Budget(BUDGET_BYTES)


def read_body(
    file: IO[bytes],
    length: int | None,
    *,
    chunked: bool,
    encoding: str,
    max_bytes: int,
    look: Look,
    budget: Budget = LARGE_REPLIES,
) -> tuple[bytes, Hold | None]:
    """A whole body, and what it holds of the budget until it and all that was made of it are gone.

    `length` None and not chunked: it ends with the connection. `look` is asked between the pieces.

    Raises:
        BodyTooLarge, IncompleteRead, HTTPException for broken framing, BodyUnreadable (all was read then, or the
        connection is of no further use), and what `look` and the file raise.
    """
    packing = encoding.strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip"):
        raise BodyUnreadable("a Content-Encoding that was not asked for")
    if length is not None and length > max_bytes:
        raise BodyTooLarge
    packed = packing not in ("", "identity")
    if length is not None and length <= FREE_BYTES and not packed:  # nearly every reply there is
        body = file.read(length)
        if len(body) < length:
            raise IncompleteRead(b"", length - len(body))
        return body, None
    pieces = _chunks(file, max_bytes) if chunked else _pieces(file, length, max_bytes)
    if packed:
        pieces = _gunzip(pieces)
    return _collect(pieces, max_bytes if packed or length is None else length, max_bytes, look, budget)


def _collect(
    pieces: Iterable[bytes], expected_bytes: int, max_bytes: int, look: Look, budget: Budget
) -> tuple[bytes, Hold | None]:
    body = bytearray()
    hold: Hold | None = None
    try:
        for piece in pieces:
            look()
            size_bytes = len(body) + len(piece)
            if size_bytes > max_bytes:
                raise BodyTooLarge
            if size_bytes > FREE_BYTES and hold is None:
                hold = budget.reserve(expected_bytes, look)
            body += piece
    except BaseException:
        if hold is not None:
            hold.shrink(0)  # the error may be kept, and with it all that was here
        raise
    if hold is not None:
        hold.shrink(len(body))
    return bytes(body), hold


def _pieces(file: IO[bytes], length: int | None, max_bytes: int) -> Iterator[bytes]:
    """A body of a known length, or one that ends with its connection."""
    left = max_bytes + 1 if length is None else length
    while left and (piece := file.read(min(left, PIECE_BYTES))):
        left -= len(piece)
        yield piece
    if length is None and not left:
        raise BodyTooLarge
    if length is not None and left:
        raise IncompleteRead(b"", left)


def _chunks(file: IO[bytes], max_bytes: int) -> Iterator[bytes]:
    """A body in chunks, to the end of its trailers. Source: RFC 9112, 7.1."""
    cost_bytes = 0
    while size := _chunk_size(file.readline(MAX_CHUNK_LINE_BYTES)):
        cost_bytes += max(size, CHUNK_COST_BYTES)
        if cost_bytes > max_bytes:
            raise BodyTooLarge
        while size:
            piece = file.read(min(size, PIECE_BYTES))
            if not piece:
                raise IncompleteRead(b"", size)
            size -= len(piece)
            yield piece
        if file.read(2) != b"\r\n":
            raise HTTPException("a chunk of another size than it said")
    for _ in range(MAX_TRAILERS + 1):
        line = file.readline(MAX_LINE_BYTES)
        if line in (b"\r\n", b"\n", b""):  # some close the connection instead
            return
        if not line.endswith(b"\n"):
            raise IncompleteRead(b"")
    raise HTTPException(f"more than {MAX_TRAILERS} trailers")


def _chunk_size(line: bytes) -> int:
    said = CHUNK_LINE.fullmatch(line)
    if said is None:
        raise HTTPException("a chunk without its size")
    return int(said[1], 16)


def _gunzip(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What one gzip member holds, which is what servers send. Source: RFC 1952."""
    member = new_member()
    for sent in pieces:
        if member.eof:
            raise BodyUnreadable("more than one gzip member")
        try:
            yield from inflate(member, sent, PIECE_BYTES)
        except zlib.error as error:
            raise BodyUnreadable("damaged gzip") from error
    if not member.eof or member.unused_data:
        raise BodyUnreadable("gzip that ends early, or more than one member")
