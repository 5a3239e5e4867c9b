"""Which ids of a job have come already, exactly enough and in little memory."""

import hashlib
from collections import defaultdict

DIGEST_BYTES = 16


class SeenIds:
    """The ids so far, as 128-bit digests in 65,536 bytearrays: about 40 MB for 2 million.

    A set of the texts takes 250 MB. With 64-bit hashes every suspect would have to be looked up again; two different
    ids with one 128-bit BLAKE2 digest do not occur (2 million random ones: once in 10²⁶ jobs).
    """

    def __init__(self) -> None:
        self._buckets: defaultdict[bytes, bytearray] = defaultdict(bytearray)

    def add(self, id_: str) -> bool:
        """Whether the id is new."""
        digest = hashlib.blake2b(id_.encode(), digest_size=DIGEST_BYTES).digest()
        bucket = self._buckets[digest[:2]]
        found = bucket.find(digest)
        while found % DIGEST_BYTES and found > 0:  # the end of one digest and the beginning of the next
            found = bucket.find(digest, found + 1)
        if found >= 0:
            return False
        bucket += digest
        return True
