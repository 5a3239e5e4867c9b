"""A gzip member unpacked a bounded piece at a time, however small a bomb it was packed into. Source: RFC 1952."""

import zlib
from collections.abc import Iterator

GZIP_WITH_HEADER = 31  # zlib's window bits


def new_member() -> "zlib._Decompress":
    return zlib.decompressobj(GZIP_WITH_HEADER)


def inflate(member: "zlib._Decompress", packed: bytes, piece_bytes: int) -> Iterator[bytes]:
    """What the member has of this piece, up to `piece_bytes` at a time, or nothing; `unused_data` is behind its end.

    Raises zlib.error for data that is no gzip, or is damaged.
    """
    yield (unpacked := member.decompress(packed, piece_bytes))
    while not member.eof and (member.unconsumed_tail or len(unpacked) == piece_bytes):
        yield (unpacked := member.decompress(member.unconsumed_tail, piece_bytes))
