"""Trying again: when, how often, and when to give up. `next_wait_s` decides; `patiently` waits."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from gpt_worker.client.errors import Passing

T = TypeVar("T")

LONGEST_BACKOFF_S = 4.0
LONGEST_RETRY_AFTER_S = 60.0

OnWait = Callable[[Passing, float], None]
"""Told the trouble and the seconds before the next try."""


def next_wait_s(
    error: Passing, attempt: int, troubled_s: float, patience_s: float, jitter: float
) -> float | None:
    """Seconds before attempt + 1, or None to give up.

    Args:
        attempt: the failed tries so far, from 1.
        troubled_s: seconds since the first failure.
        patience_s: the most of them.
        jitter: in [0, 1), from the caller.
    """
    if error.retry_after_s is not None:
        wait_s = min(max(error.retry_after_s, 0.1), LONGEST_RETRY_AFTER_S)
    else:
        wait_s = min(LONGEST_BACKOFF_S, 0.5 * 2 ** min(attempt - 1, 10)) * (0.5 + jitter / 2)
    return wait_s if troubled_s + wait_s <= patience_s else None


class Patience:
    """Waits after each failure, until they have gone on for too long. A success starts it anew."""

    def __init__(self, patience_s: float, on_wait: OnWait) -> None:
        self._patience_s = patience_s
        self._on_wait = on_wait
        self.reset()

    def reset(self) -> None:
        """All is well again."""
        self._attempt = 0
        self._since_s: float | None = None

    def begin(self) -> None:
        """Have it run from now on, not from the first failure, which may be long in coming."""
        self._since_s = time.monotonic()

    def wait(self, error: Passing) -> None:
        """Returns when it is time to try again; raises `error` when it is enough."""
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        self._attempt += 1
        wait_s = next_wait_s(error, self._attempt, now_s - self._since_s, self._patience_s, random.random())
        if wait_s is None:
            raise error
        self._on_wait(error, wait_s)
        time.sleep(wait_s)


def patiently(action: Callable[[], T], patience_s: float, on_wait: OnWait) -> T:
    """What `action` returns, tried again after each `Passing` for `patience_s` at most."""
    patience = Patience(patience_s, on_wait)
    while True:
        try:
            return action()
        except Passing as error:
            patience.wait(error)
