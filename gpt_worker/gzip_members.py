"""gzip a bounded piece at a time: unpacked, however small a bomb it was packed into, and packed. Source: RFC 1952."""

import zlib
from collections.abc import Iterable, Iterator

GZIP_WITH_HEADER = 31  # zlib's window bits
LEVEL = 4  # half the time of the usual 6, for a twentieth more bytes
PIECE_BYTES = 256 << 10


def new_member() -> "zlib._Decompress":
    return zlib.decompressobj(GZIP_WITH_HEADER)


def inflate(member: "zlib._Decompress", packed: bytes, piece_bytes: int) -> Iterator[bytes]:
    """What the member has of this piece, up to `piece_bytes` at a time, or nothing; `unused_data` is behind its end.

    Raises zlib.error for data that is no gzip, or is damaged.
    """
    yield (unpacked := member.decompress(packed, piece_bytes))
    while not member.eof and (member.unconsumed_tail or len(unpacked) == piece_bytes):
        yield (unpacked := member.decompress(member.unconsumed_tail, piece_bytes))


def pack(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """These pieces as one member."""
    packer = zlib.compressobj(LEVEL, wbits=GZIP_WITH_HEADER)
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def verified(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """One member as it is; its last piece only once all of it is known to be sound. Raises zlib.error if it is not."""
    member = new_member()
    held = b""
    for piece in pieces:
        if held:
            yield held
        for _ in inflate(member, piece, PIECE_BYTES):
            pass
        held = piece
    if not member.eof:
        raise zlib.error("the file ends too early")
    yield held


def unpack(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What is in one member, whatever its pieces. Raises zlib.error if it is damaged, or ends too early."""
    member = new_member()
    for piece in pieces:
        yield from filter(None, inflate(member, piece, PIECE_BYTES))
    if not member.eof:
        raise zlib.error("the file ends too early")
