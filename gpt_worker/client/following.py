"""Follows a job to its end: by the server's events, or by asking again and again where there are none.

Restarts and broken connections only interrupt it; it gives up when the server has been away for PATIENCE_S, or has
never been there for FIRST_PATIENCE_S.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpt_worker.client.errors import Busy, ClientError, Passing, Unreachable
from gpt_worker.client.patience import OnWait, Patience
from gpt_worker.client.server import Json, Server, job_path

FINISHED = {"succeeded", "partial", "failed", "cancelled"}
PATIENCE_S = 600.0
FIRST_PATIENCE_S = 30.0
POLL_S = 1.0
FIRST_POLL_S = 0.1
EVENTS_TIMEOUT_S = 40.0  # a heartbeat comes every 15 s
EVENTS_PAUSE_S = 30.0  # after the server had no place for them
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is; a rate or an ETA of None is not known."""

    status: str
    total: int
    answered: int
    failed: int
    tasks_per_s: float | None = None
    eta_s: float | None = None

    @property
    def pending(self) -> int:
        return self.total - self.answered - self.failed


def read_progress(value: Json) -> Progress:
    """The progress in a job, or in a `progress` event. Raises ValueError for neither."""
    counts = value.get("counts")
    if not isinstance(counts, dict):
        raise ValueError("no counts")
    total, answered, failed = (int(counts[name]) for name in ("total", "answered", "failed"))
    return Progress(
        str(value["status"]), total, answered, failed, _number(value, "tasks_per_s"), _number(value, "eta_s")
    )


def _number(value: Json, name: str) -> float | None:
    number: Any = value.get(name)
    return float(number) if isinstance(number, int | float) else None


def is_over(job: Json) -> bool:
    """Whether nothing of the job will change by itself; a cancelled one still takes what is in flight."""
    return job["status"] in FINISHED and job.get("finished_at") is not None


class RateMeter:
    """Tasks a second and ETA from looks at a job, for when the server does not tell."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def measure(self, seen: Progress, now_s: float) -> Progress:
        """The same with a rate, once there are two looks to compare."""
        done = seen.answered + seen.failed
        if self._first is None or done < self._first[1]:
            self._first = (now_s, done)
        elapsed_s, moved = now_s - self._first[0], done - self._first[1]
        if elapsed_s <= 0 or moved <= 0:
            return seen
        rate = moved / elapsed_s
        return Progress(seen.status, seen.total, seen.answered, seen.failed, rate, seen.pending / rate)


def follow(server: Server, job_id: str, on_wait: OnWait) -> Iterator[Progress]:
    """The job's progress until it is over. Raises a ClientError when it can't be followed any longer."""
    if not server.has_answered:
        _find(server, job_id, on_wait)
    patience = Patience(PATIENCE_S, on_wait)
    meter = RateMeter()
    events_at_s = 0.0
    poll_s = FIRST_POLL_S
    while True:
        try:
            job = server.job(job_id)
            patience.reset()
            yield meter.measure(read_progress(job), time.monotonic())
            if is_over(job):
                return
            if time.monotonic() >= events_at_s:
                yield from _events(server, job_id)
        except _NoEvents as error:
            events_at_s = time.monotonic() + error.pause_s
        except Passing as error:
            patience.wait(error)
            continue
        time.sleep(poll_s)
        poll_s = min(POLL_S, poll_s * 1.5)


def _find(server: Server, job_id: str, on_wait: OnWait) -> None:
    """Returns when the server says something, be it that it is busy. Raises Unreachable after FIRST_PATIENCE_S."""
    patience = Patience(FIRST_PATIENCE_S, on_wait)
    patience.begin()
    while not server.has_answered:
        try:
            server.job(job_id, timeout_s=FIRST_PATIENCE_S)
        except Busy:
            return
        except Passing as error:
            _knock_again(patience, error)


def _knock_again(patience: Patience, error: Passing) -> None:
    try:
        patience.wait(error)
    except Passing:
        raise Unreachable(
            f"{error}, and none has in {FIRST_PATIENCE_S:.0f} s: is the address right, and does it run?"
        ) from error


class _NoEvents(Exception):
    """The server gives none for now, or never."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s


def _events(server: Server, job_id: str) -> Iterator[Progress]:
    """What the stream of events tells, until it ends. Raises _NoEvents where there is none."""
    headers = {"Accept": "text/event-stream"}
    path = f"{job_path(job_id)}/events"
    try:
        reply = server.request("GET", path, headers=headers, stream=True, timeout_s=EVENTS_TIMEOUT_S)
    except Busy as error:
        raise _NoEvents(error.retry_after_s or EVENTS_PAUSE_S) from error
    except Passing:
        raise
    except ClientError as error:  # no such route: the job itself was found just now
        raise _NoEvents(NEVER) from error
    with reply:
        for name, data in read_events(server.lines(reply)):
            if name == "finished":
                return
            if name == "progress":
                try:
                    yield read_progress(json.loads(data))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise _NoEvents(NEVER) from None


def read_events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Name and data of each event in a stream. Source: HTML Standard, 9.2.6 "Interpreting an event stream"."""
    name, data = "", list[str]()
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield name or "message", "\n".join(data)
            name, data = "", []
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
