"""The budget of held requests: inline waits, streams, downloads and uploads may not take every thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

WEB_THREADS = 128
SPARE_THREADS = 32  # always left for requests that are answered at once


class Places:
    """So many requests may be held at once."""

    def __init__(self, places: int = WEB_THREADS - SPARE_THREADS) -> None:
        self.total = places
        self._lock = threading.Lock()
        self._free = places

    @property
    def free(self) -> int:
        """How many more may be held now."""
        return self._free

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Whether there was a place; it is given back at the end of the block."""
        with self._lock:
            held = self._free > 0
            self._free -= held
        try:
            yield held
        finally:
            with self._lock:
                self._free += held
