"""Which ids of a job have come already, exactly enough and in little memory."""

from collections.abc import Iterable
from mmap import mmap
from struct import Struct

DIGEST_BYTES = 16
BUCKETS = 1 << 12
MARKS_BYTES = 1 << 23
_digest = Struct("qq").pack


class SeenIds:
    """The ids so far, as 128 bits each: about 45 MB for 2 million.

    A set of the texts takes 250 MB. The bits are two of Python's own hashes (SipHash with a key of this process), which
    cost a third of a cryptographic digest. With 64 every suspect would have to be looked up again; two different ids
    with the same 128 do not occur (2 million random ones: once in 10²⁶ jobs).

    Most of the time is the memory's, whose places far apart a processor waits for. So a mark tells of nearly every new
    id that it is new, which is one such place, and its digest is written behind others that were written of late.
    """

    def __init__(self) -> None:
        # It takes no memory before it is written to, and a small file writes to little of it.
        self._marks = mmap(-1, MARKS_BYTES)
        self._buckets = [bytearray() for _ in range(BUCKETS)]

    def add(self, id_: str) -> bool:
        """Whether the id is new."""
        return self.add_all((id_,)) is None

    def add_all(self, ids: Iterable[str]) -> int | None:
        """The place of the first id that is not new, or None. Those behind it are left out."""
        marks, buckets = self._marks, self._buckets
        for place, id_ in enumerate(ids):
            first = hash(id_)
            digest = _digest(first, hash(id_ + "\0"))
            bucket = buckets[first >> 40 & BUCKETS - 1]
            mark = first & MARKS_BYTES - 1
            if marks[mark] and _holds(bucket, digest):
                return place
            marks[mark] = 1
            bucket += digest
        return None


def _holds(bucket: bytearray, digest: bytes) -> bool:
    """Whether one of the bucket's digests is this: not the end of one and the beginning of the next."""
    found = bucket.find(digest)
    while found >= 0 and found % DIGEST_BYTES:
        found = bucket.find(digest, found + 1)
    return found >= 0
