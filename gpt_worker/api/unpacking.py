"""Bodies as streams of small pieces: as they were sent, unpacked, and bounded.

Nothing here holds more of a body than a piece, however small a bomb it was packed into.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from werkzeug.exceptions import BadRequest, ClientDisconnected

from gpt_worker.errors import TooLarge
from gpt_worker.gzip_members import inflate, new_member

PIECE_BYTES = 64 << 10
CHECK_EVERY_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, section 2.3.1; no text in UTF-8 begins so


def sent_pieces(stream: IO[bytes], length: int | None) -> Iterator[bytes]:
    """The body as it comes; `length` is what Content-Length promised.

    Raises ClientDisconnected if less came: the server's stream ends there as if the body were whole.
    """
    received = 0
    while piece := stream.read(PIECE_BYTES):
        received += len(piece)
        yield piece
    if length is not None and received < length:
        raise ClientDisconnected


def file_pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The rest of a file."""
    while piece := file.read(PIECE_BYTES):
        yield piece


def bounded(
    pieces: Iterable[bytes], max_bytes: int, limit: str, check: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """The same pieces, up to `max_bytes`; `check` may stop them at the first one and once a MiB.

    Raises TooLarge, which names the limit.
    """
    passed = unchecked = 0
    for piece in pieces:
        if check is not None and (unchecked == 0 or unchecked >= CHECK_EVERY_BYTES):
            check()
            unchecked = 0
        passed += len(piece)
        unchecked += len(piece)
        if passed > max_bytes:
            raise too_large(max_bytes, limit)
        yield piece


def too_large(max_bytes: int, limit: str) -> TooLarge:
    """The body is over the limit of this name."""
    return TooLarge(f"The body may have at most {max_bytes} bytes, also unpacked ({limit}).")


def not_packed(pieces: Iterable[bytes], otherwise: str) -> Iterator[bytes]:
    """The same pieces, of what was not said to be gzip. Raises BadRequest, in these words, where it is all the same."""
    begun = False
    for piece in pieces:
        if not begun and piece.startswith(GZIP_MAGIC):
            raise BadRequest(otherwise)
        begun = True
        yield piece


def gunzip(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What gzip data holds; several members are one after the other, and zeros may pad the end. RFC 1952.

    Raises BadRequest for data that is no gzip, is damaged, or ends early.
    """
    member = None
    members = 0
    for sent in pieces:
        piece = sent
        while piece:
            if member is None:
                piece = piece.lstrip(b"\0") if members else piece
                if not piece:
                    break
                member = new_member()
                members += 1
            try:
                yield from filter(None, inflate(member, piece, PIECE_BYTES))
            except zlib.error as error:
                raise BadRequest("The body is not gzip, or is damaged.") from error
            piece = member.unused_data
            member = None if member.eof else member
    if member is not None or not members:
        raise BadRequest("The gzip data ends early.")
