"""A clock that tests move, and patience: with other threads, and with a slow machine."""

import threading
from collections.abc import Callable

from hypothesis import HealthCheck, settings

LOOK_EVERY_S = 0.002
PATIENCE_S = 10.0

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # for every `@given`


class FakeClock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def eventually(condition: Callable[[], object], what: str = "it") -> None:
    """Returns as soon as another thread has made `condition` true; fails if none does."""
    for _ in range(int(PATIENCE_S / LOOK_EVERY_S)):
        if condition():
            return
        threading.Event().wait(LOOK_EVERY_S)
    raise AssertionError(f"{what} never happened")
