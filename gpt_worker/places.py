"""The budgets of held requests: inline waits, streams, downloads and uploads may not take every thread, nor one user
all that there is for them; and what is large in memory takes turns."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

WEB_THREADS = 128
SPARE_THREADS = 32  # always left for requests that are answered at once
PLACES = WEB_THREADS - SPARE_THREADS
PLACES_EACH = 80  # nearly all, since one user may be the only one; the rest is for others
SMALL_BODY_BYTES = 64 * 1024  # are there before a thread is spent on their request
STRANGERS = ""  # who is held where nobody asks who they are: they count as one


class Places:
    """So many requests may be held at once, and so many of them by one owner."""

    def __init__(self, places: int = PLACES, most_each: int = PLACES_EACH) -> None:
        self.total = places
        self.most_each = most_each
        self._changed = threading.Condition()
        self._free = places
        self._held: Counter[str] = Counter()

    @property
    def free(self) -> int:
        """How many more may be held now."""
        return self._free

    @contextmanager
    def hold(self, owner: str = STRANGERS, wait_s: float = 0.0) -> Iterator[bool]:
        """Whether there was, in time, a place for one more of this owner; it is given back at the end of the block."""
        with self._changed:
            held = self._changed.wait_for(lambda: self._has_room(owner), wait_s)
            self._count(owner, held)
        try:
            yield held
        finally:
            with self._changed:
                self._count(owner, -held)
                self._changed.notify_all()

    def _has_room(self, owner: str) -> bool:
        return self._free > 0 and self._held[owner] < self.most_each

    def _count(self, owner: str, held: int) -> None:
        self._free -= held
        self._held[owner] += held
        if not self._held[owner]:
            del self._held[owner]


class Turns:
    """So many at a time; who waits goes in turn, whatever the order they came in.

    Owners who are known go before strangers, but for every second turn; of the known, and of strangers, each has one
    in turn. So a crowd of one owner delays the others by one turn, and no crowd of strangers a known one by more.
    """

    def __init__(self, at_once: int = 1) -> None:
        self._lock = threading.Lock()
        self._free = at_once
        self._known: OrderedDict[str, deque[threading.Event]] = OrderedDict()  # whose turn is next, first
        self._strangers: OrderedDict[str, deque[threading.Event]] = OrderedDict()
        self._last_was_known = False

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        with self._lock:
            return sum(len(turns) for each in (self._known, self._strangers) for turns in each.values())

    @contextmanager
    def hold(self, owner: str, wait_s: float, *, is_known: bool = True) -> Iterator[bool]:
        """Whether it was the owner's turn in time; the next one's is at the end of the block."""
        held = self._take(owner, wait_s, self._known if is_known else self._strangers)
        try:
            yield held
        finally:
            if held:
                self._pass_on()

    def _take(self, owner: str, wait_s: float, waiting: OrderedDict[str, deque[threading.Event]]) -> bool:
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Event()
            waiting.setdefault(owner, deque()).append(turn)
        if turn.wait(wait_s):
            return True
        with self._lock:
            if turn.is_set():  # at the last moment
                return True
            waiting[owner].remove(turn)
            if not waiting[owner]:
                del waiting[owner]
            return False

    def _pass_on(self) -> None:
        with self._lock:
            if not self._known and not self._strangers:
                self._free += 1
                return
            self._last_was_known = bool(self._known) and not (self._last_was_known and self._strangers)
            waiting = self._known if self._last_was_known else self._strangers
            owner, turns = waiting.popitem(last=False)
            turns.popleft().set()
            if turns:
                waiting[owner] = turns  # behind the others
