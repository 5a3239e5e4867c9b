"""Which ids of a job have come already, exactly enough and in little memory."""

from struct import Struct

DIGEST_BYTES = 16
BUCKETS = 1 << 16
_digest = Struct("qq").pack


class SeenIds:
    """The ids so far, as 128 bits each in up to 65,536 bytearrays: about 40 MB for 2 million.

    A set of the texts takes 250 MB. The bits are two of Python's own hashes (SipHash with a key of this process), which
    cost a third of a cryptographic digest. With 64 every suspect would have to be looked up again; two different ids
    with the same 128 do not occur (2 million random ones: once in 10²⁶ jobs).
    """

    def __init__(self) -> None:
        self._buckets: dict[int, bytearray] = {}

    def add(self, id_: str) -> bool:
        """Whether the id is new."""
        first = hash(id_)
        digest = _digest(first, hash(id_ + "\0"))
        bucket = self._buckets.get(first % BUCKETS)
        if bucket is None:
            self._buckets[first % BUCKETS] = bytearray(digest)
            return True
        found = bucket.find(digest)
        while found >= 0:
            if found % DIGEST_BYTES == 0:
                return False
            found = bucket.find(digest, found + 1)  # that was the end of one and the beginning of the next
        bucket += digest
        return True
