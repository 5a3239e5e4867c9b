"""The service in numbers, for Prometheus: a snapshot of its parts, and the requests counted as they are answered.

Both become metric families when they are scraped; nothing here is global to the process. A label's value is one of
the service's own words, a key's name or a route's rule: never a path, an id, an address or a caller's text.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gpt_worker.domain import UNFINISHED, DeliveryStatus, FileState, JobStatus
from gpt_worker.keys import KeyReport, LearnedLimits
from gpt_worker.lanes import LaneState
from gpt_worker.store.jobs import StatusCount

OTHER = "(other)"
NO_ROUTE = "(none)"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


# The service


@dataclass(frozen=True, slots=True)
class Stored:
    """What the database knows."""

    jobs: Mapping[JobStatus, StatusCount]
    deliveries: Mapping[DeliveryStatus, int]
    files: Mapping[FileState, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The service at one moment; `stored` is None when the database can't be read."""

    version: str
    model: str
    keys: Sequence[KeyReport]
    stored: Stored | None
    commits: int
    outcomes: int
    inbox: int
    recorder_healthy: bool
    drive_failures: int
    drive_healthy: bool
    places: int
    places_free: int


class ServiceCollector(Collector):
    """Takes a snapshot at each scrape."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def collect(self) -> Iterable[Metric]:
        snapshot = self._take()
        yield InfoMetricFamily("gpt_worker_build", "What runs here", {"version": snapshot.version})
        yield _gauge("database_up", "Whether the database can be read", int(snapshot.stored is not None))
        if snapshot.stored is not None:
            yield from _stored(snapshot.stored)
        yield from _recorder(snapshot)
        yield from _drive(snapshot)
        yield _gauge("held_places", "Requests that may be held open at one time", snapshot.places)
        yield _gauge("held_places_free", "How many more may be held open now", snapshot.places_free)
        yield from _keys(snapshot.keys)
        yield from _limits(snapshot.keys, snapshot.model)


def _gauge(name: str, text: str, value: float | None = None, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"gpt_worker_{name}", text, value, None if value is not None else labels)


def _counter(
    name: str, text: str, value: float | None = None, labels: Sequence[str] = ()
) -> CounterMetricFamily:
    return CounterMetricFamily(f"gpt_worker_{name}", text, value, None if value is not None else labels)


def _stored(stored: Stored) -> Iterator[Metric]:
    jobs = _gauge("jobs", "Jobs that are kept, by status", labels=["status"])
    for status, count in stored.jobs.items():
        jobs.add_metric([status], count.jobs)
    yield jobs

    counts = stored.jobs.values()
    tasks = _gauge("tasks", "Tasks of the jobs that are kept, by state", labels=["state"])
    tasks.add_metric(["pending"], sum(count.pending for count in counts))
    tasks.add_metric(["answered"], sum(count.answered for count in counts))
    tasks.add_metric(["failed"], sum(count.failed for count in counts))
    yield tasks

    unfinished = [stored.jobs[status] for status in UNFINISHED]
    yield _gauge("queue_jobs", "Unfinished jobs", sum(count.jobs for count in unfinished))
    yield _gauge("queue_tasks", "Undecided tasks of unfinished jobs", sum(c.pending for c in unfinished))

    deliveries = _gauge("deliveries", "Webhook deliveries; preparing and pending are owed", labels=["status"])
    for delivery_status, number in stored.deliveries.items():
        deliveries.add_metric([delivery_status], number)
    yield deliveries

    files = _gauge("result_files", "Files of results; pending ones are still to be written", labels=["state"])
    for file_state, number in stored.files.items():
        files.add_metric([file_state], number)
    yield files


def _recorder(snapshot: Snapshot) -> Iterator[Metric]:
    yield _counter("recorder_commits", "Commits that stored what became of tasks", snapshot.commits)
    yield _counter("recorder_outcomes", "Outcomes of calls that were stored", snapshot.outcomes)
    yield _gauge("recorder_inbox", "Outcomes that wait for a commit", snapshot.inbox)
    yield _gauge("recorder_healthy", "Whether commits work", int(snapshot.recorder_healthy))


def _drive(snapshot: Snapshot) -> Iterator[Metric]:
    yield _counter(
        "drive_failures", "Attempts to write or delete a file that failed", snapshot.drive_failures
    )
    yield _gauge("drive_healthy", "Whether the drive can be used", int(snapshot.drive_healthy))


def _keys(keys: Sequence[KeyReport]) -> Iterator[Metric]:
    about = _gauge("key_info", "Keys of one quota group share their limits", labels=["key", "group"])
    state = _gauge("key_state", "1 for the state that the key is in", labels=["key", "state"])
    in_flight = _gauge("key_in_flight", "Calls in flight", labels=["key"])
    threads = _gauge("key_threads", "Threads that serve the key", labels=["key"])
    requests = _counter("key_requests", "Calls sent", labels=["key"])
    tokens = _counter("key_tokens", "Tokens that replies told of", labels=["key"])
    rate_limited = _counter("key_rate_limited", "Replies that refused a call for its rate", labels=["key"])
    for key in keys:
        about.add_metric([key.name, key.group or ""], 1)
        for known in LaneState:
            state.add_metric([key.name, known], int(key.state is known))
        in_flight.add_metric([key.name], key.in_flight)
        threads.add_metric([key.name], key.threads)
        requests.add_metric([key.name], key.requests)
        tokens.add_metric([key.name], key.tokens)
        rate_limited.add_metric([key.name], key.rate_limited)
    yield from (about, state, in_flight, threads, requests, tokens, rate_limited)


def _limits(keys: Sequence[KeyReport], model: str) -> Iterator[Metric]:
    """What the endpoints told, for the service's own model; of those that jobs name, only the scarcest, as "(other)".

    A job may name any model, so its name is a caller's text; GET /keys shows them all.
    """
    labels = ["key", "model", "of"]
    limit = _gauge("key_limit", "The endpoint's limit, of requests or tokens, in its window", labels=labels)
    remaining = _gauge("key_remaining", "What is left of the limit, by our own count", labels=labels)
    for key in keys:
        told = {name: _amounts(limits) for name, limits in key.limits.items()}
        for unit in ("requests", "tokens"):
            shown = {model: told[model][unit]} if unit in told.get(model, {}) else {}
            others = [amounts[unit] for name, amounts in told.items() if name != model and unit in amounts]
            if others:
                shown[OTHER] = min(others, key=lambda amount: amount[1] / max(1, amount[0]))
            for name, (most, left) in shown.items():
                limit.add_metric([key.name, name, unit], most)
                remaining.add_metric([key.name, name, unit], left)
    yield from (limit, remaining)


def _amounts(limits: LearnedLimits) -> dict[str, tuple[int, int]]:
    """Limit and remaining amount by unit, of those that the endpoint told."""
    told = {
        "requests": (limits.requests, limits.requests_remaining),
        "tokens": (limits.tokens, limits.tokens_remaining),
    }
    return {
        unit: (most, left) for unit, (most, left) in told.items() if most is not None and left is not None
    }


# Requests


@dataclass(slots=True)
class _Durations:
    sum_s: float = 0.0
    in_bucket: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))


class RequestMetrics(Collector):
    """Requests as they are answered, by the rule of their route; any thread may count one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._durations: dict[str, _Durations] = {}

    def count(self, method: str, rule: str | None, status: int, took_s: float) -> None:
        route = rule or NO_ROUTE
        with self._lock:
            self._requests[method if method in METHODS else OTHER, route, str(status)] += 1
            durations = self._durations.setdefault(route, _Durations())
            durations.sum_s += took_s
            durations.in_bucket[bisect_left(BUCKETS_S, took_s)] += 1

    def collect(self) -> Iterable[Metric]:
        requests = _counter("http_requests", "Requests answered", labels=["method", "route", "status"])
        durations = HistogramMetricFamily(
            "gpt_worker_http_request_duration_seconds",
            "Time until a request's reply begins",
            labels=["route"],
        )
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        with self._lock:
            for labels, number in sorted(self._requests.items()):
                requests.add_metric(labels, number)
            for route, took in sorted(self._durations.items()):
                buckets = list(zip(bounds, map(float, accumulate(took.in_bucket)), strict=True))
                durations.add_metric([route], buckets, took.sum_s)
        yield requests
        yield durations


def make_registry(requests: RequestMetrics, take: Callable[[], Snapshot]) -> CollectorRegistry:
    """Everything that a scrape shows, the process itself included."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(take))
    registry.register(requests)
    ProcessCollector(registry=registry)
    return registry
