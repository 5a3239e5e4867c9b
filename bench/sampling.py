"""Looks at something again and again in a thread of its own, and keeps what it saw; what to look at is the caller's."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

S = TypeVar("S")


class Sampling(Generic[S]):
    """Looks when its `with` begins, every `every_s` while it lasts, and when it ends; None is not kept."""

    def __init__(self, look: Callable[[], S | None], every_s: float) -> None:
        self._look = look
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[S] = []

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        sample = self._look()
        if sample is not None:
            self.samples.append(sample)
