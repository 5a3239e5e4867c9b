"""The process-wide gate of writing transactions, in which the recorder goes first.

One writer at a time, on every database: what a transaction has read stands until it commits, nobody deadlocks, and
waiting is fair, which busy waiting for a database's own lock is not.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DatabaseError, SQLAlchemyError

GATE_WAIT_S = 30.0
LONG_S = 1.0  # to hold the gate
MAX_WAITING = 96  # at a gate that is held for long; there are more threads for requests


class DatabaseUnusable(SQLAlchemyError):
    """Nothing can be written now; the message says why, and shows no value."""


class WriteGate:
    """A lock whose urgent callers go before all others, but not twice in a row while another waits; the others in turn.

    Without that bound, a recorder that always has something to commit would keep every submit and cancel out. Without
    the order, who writes slice after slice would: it asks again before anybody else has woken up.
    While another program has the database locked, one of the others tries and the rest are turned away, and before
    that is known, those that are too many: they would all wait, and no thread would be left to say so.
    """

    def __init__(self, is_locked: Callable[[DatabaseError], bool], wait_s: float = GATE_WAIT_S) -> None:
        self._is_locked = is_locked  # whether another program has the database
        self._condition = threading.Condition()
        self._held = False
        self._lines: dict[bool, deque[object]] = {True: deque(), False: deque()}  # who waits, by urgency
        self._others_next = False
        self._since_s = 0.0  # when it was last taken
        self._locked = False  # whether the last one in found it so
        self._wait_s = wait_s

    @contextmanager
    def hold(self, urgent: bool) -> Iterator[None]:
        """Raises DatabaseUnusable for a caller that is turned away, or that has waited too long."""
        line, me = self._lines[urgent], object()
        with self._condition:
            line.append(me)
            try:
                self._await_turn(urgent, me)
            finally:
                line.remove(me)
            self._held, self._others_next, self._since_s = True, urgent, time.monotonic()
        locked = False
        try:
            yield
        except DatabaseError as error:
            locked = self._is_locked(error)
            raise
        finally:
            with self._condition:
                self._held, self._locked = False, locked
                self._condition.notify_all()

    def _await_turn(self, urgent: bool, me: object) -> None:
        wait_until_s = time.monotonic() + self._wait_s
        while self._held or self._next_line()[0] is not me:
            now_s = time.monotonic()
            crowded = len(self._lines[False]) > MAX_WAITING and now_s > self._since_s + LONG_S
            if not urgent and (self._locked or crowded or now_s > wait_until_s):
                self._condition.notify_all()  # the recorder may have been waiting for this one's turn to pass
                raise DatabaseUnusable("it is locked" if self._locked else "too many wait to write")
            self._condition.wait(None if urgent else LONG_S)

    def _next_line(self) -> deque[object]:
        """The line whose first is the next to have the lock; somebody waits."""
        others = self._lines[False]
        return others if others and (self._others_next or not self._lines[True]) else self._lines[True]
