"""What was learned of names that callers may make up, such as models: remembered up to a bound."""

import threading
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MAX_MARKS = 10_000  # more than the unfinished jobs of a few users may name: what is learned of theirs lasts


class Marks(dict[K, V]):
    """A dict that forgets its first name for a new one beyond `most`. Any thread may set one."""

    def __init__(self, most: int = MAX_MARKS) -> None:
        super().__init__()
        self._most = most
        self._lock = threading.Lock()

    def __setitem__(self, name: K, value: V) -> None:
        with self._lock:
            if name not in self and len(self) >= self._most:
                del self[next(iter(self))]
            super().__setitem__(name, value)
