"""Steps that may hang, and that are left behind then."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Aside:
    """Steps that may hang, each in a daemon thread of its own, which holds up no end of the process.

    There are no more than `at_most` of them, those left behind included.
    """

    def __init__(self, at_most: int) -> None:
        self._free = threading.BoundedSemaphore(at_most)

    def within(self, seconds: float, step: Callable[[], T]) -> T:
        """What the step returns or raises; TimeoutError when it takes too long, and it is left behind or not begun."""
        deadline_s = time.monotonic() + seconds
        if not self._free.acquire(timeout=seconds):
            raise TimeoutError
        outcome: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(step())
            except BaseException as error:
                failure.append(error)
            finally:
                self._free.release()

        thread = threading.Thread(target=run, name="drive call", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._free.release()
            raise
        thread.join(max(0.0, deadline_s - time.monotonic()))
        if failure:
            raise failure[0]
        if not outcome:
            raise TimeoutError
        return outcome[0]
