"""How a job gets on, told while it runs: its rate, the time left, and who wants to know that something was stored.

The recorder tells the board which jobs a commit has changed; whoever follows one looks again, at most twice a second.
Knows nothing of HTTP and reads no table: looking is passed in.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

PACE_S = 0.5  # between two looks at a job, so that there are at most two `progress` a second
SILENCE_S = 15.0  # after which a comment keeps proxies from closing the connection
NOTICE_S = 1.0  # in which it is noticed that the client has gone
LOOK_AGAIN_S = 5.0  # a deleted job is in no commit of the recorder's
WINDOW_S = 10.0
LONGEST_WINDOW_S = 600.0
LEAST_TASKS = 10  # fewer tell too little: the window grows backwards until it holds them
LEAST_SPAN_S = 0.4
TOLD = ("status", "counts", "usage")


# The rate


class Rate:
    """Tasks decided per second, as this onlooker saw them: over 10 s, or longer while that holds too few tasks."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # when, and how many tasks were decided by then

    def add(self, decided: int, now_s: float) -> None:
        if self._seen and decided < self._seen[-1][1]:
            self._seen.clear()  # the job was retried: what was seen of its last run tells nothing
        self._seen.append((now_s, decided))
        while len(self._seen) > 1 and self._can_begin_at(*self._seen[1]):
            self._seen.popleft()

    def _can_begin_at(self, seen_s: float, decided: int) -> bool:
        now_s, decided_now = self._seen[-1]
        age_s = now_s - seen_s
        return age_s >= LONGEST_WINDOW_S or (age_s >= WINDOW_S and decided_now - decided >= LEAST_TASKS)

    def per_s(self) -> float | None:
        """The rate at the last look; None while too little time has been seen."""
        if not self._seen:
            return None
        (began_s, decided_then), (now_s, decided_now) = self._seen[0], self._seen[-1]
        if now_s - began_s < LEAST_SPAN_S:
            return None
        return (decided_now - decided_then) / (now_s - began_s)


def eta_s(pending: int, tasks_per_s: float | None) -> float | None:
    """Seconds until nothing is pending, at this rate; None if nobody can say."""
    if pending == 0:
        return 0.0
    return pending / tasks_per_s if tasks_per_s else None


# Who wants to know


class Watch:
    """One onlooker's place on the board."""

    def __init__(self, closed: threading.Event) -> None:
        self._changed = threading.Event()
        self._closed = closed

    @property
    def closed(self) -> bool:
        """Whether the service is shutting down."""
        return self._closed.is_set()

    def rest(self, seconds: float) -> None:
        """Let the time pass, whatever changes; shorter only if the board is closed."""
        self._closed.wait(seconds)

    def wait(self, timeout_s: float) -> bool:
        """Whether something has changed since the last call, waiting for it; a board that is closed counts."""
        changed = self._changed.wait(timeout_s)
        self._changed.clear()
        return changed

    def wake(self) -> None:
        self._changed.set()


class ProgressBoard:
    """Tells whoever follows a job that something of it was stored; costs nothing while nobody does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, set[Watch]] = {}
        self._closed = threading.Event()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watch]:
        watch = Watch(self._closed)
        with self._lock:
            self._watches.setdefault(job_id, set()).add(watch)
            if watch.closed:
                watch.wake()
        try:
            yield watch
        finally:
            with self._lock:
                others = self._watches[job_id]
                others.discard(watch)
                if not others:
                    del self._watches[job_id]

    def changed(self, job_ids: Iterable[str]) -> None:
        """A commit has changed what stands of these jobs."""
        if self._watches:
            with self._lock:
                for job_id in job_ids:
                    for watch in self._watches.get(job_id, ()):
                        watch.wake()

    def close(self) -> None:
        """The service shuts down: whoever follows a job stops."""
        self._closed.set()
        with self._lock:
            for watches in self._watches.values():
                for watch in watches:
                    watch.wake()


# Following a job


@dataclass(frozen=True, slots=True)
class Event:
    """What an onlooker is told: `progress`, or `finished` with the job."""

    name: str
    data: Json


def follow(
    look: Callable[[], Json | None],
    watch: Watch,
    *,
    client_left: Callable[[], bool] = lambda: False,
    silence_s: float = SILENCE_S,
    now_s: Callable[[], float] = time.monotonic,
) -> Iterator[Event | None]:
    """The events of a job up to `finished`; None where `silence_s` have passed without one.

    Ends without `finished` when there is no job any more, the client has left or the service shuts down.

    Args:
        look: the job object without its results, as it stands now; None if it is gone.
    """
    rate = Rate()
    told: Json | None = None
    spoke_s = now_s()
    while True:
        looked_s = now_s()
        job = look()
        if job is None:
            return
        counts = job["counts"]
        rate.add(counts["answered"] + counts["failed"], looked_s)
        standing = {name: job[name] for name in TOLD}
        if standing != told:
            yield Event("progress", standing | _speed(rate, counts["pending"]))
            told, spoke_s = standing, now_s()
        if job["finished_at"] is not None:
            yield Event("finished", job)
            return
        watch.rest(max(0.0, looked_s + PACE_S - now_s()))
        changed = False
        while not changed and now_s() - looked_s < LOOK_AGAIN_S:
            changed = watch.wait(min(NOTICE_S, silence_s))
            if watch.closed or client_left():
                return
            if now_s() - spoke_s >= silence_s:
                yield None
                spoke_s = now_s()


def _speed(rate: Rate, pending: int) -> Json:
    per_s = rate.per_s()
    left_s = eta_s(pending, per_s)
    return {
        "tasks_per_s": None if per_s is None else round(per_s, 2),
        "eta_s": None if left_s is None else round(left_s, 1),
    }
