"""The service in numbers: what a scrape shows, how requests are counted, who may scrape, and when it is ready."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from gpt_worker import api
from gpt_worker.api.access import is_local
from gpt_worker.assembly import EMBEDDED_STARTING
from gpt_worker.domain import VISIBLE, DeliveryStatus, FileState, JobStatus
from gpt_worker.keys import KeyReport, LearnedLimits
from gpt_worker.lanes import LaneState
from gpt_worker.metrics import RequestMetrics, Snapshot, Stored, make_registry
from gpt_worker.ownership import DataDirLock
from gpt_worker.store import jobs as job_store
from gpt_worker.store.jobs import JobProgress, StatusCount
from tests import factories

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def key(**changes: Any) -> KeyReport:
    fields: dict[str, Any] = {
        "name": "key 0",
        "tail": "cret",
        "base_url": "http://127.0.0.1:9/v1",
        "group": None,
        "state": LaneState.READY,
        "until": None,
        "in_flight": 0,
        "threads": 1,
        "bound_by": None,
        "requests": 0,
        "tokens": 0,
        "rate_limited": 0,
        "limits": {},
        "last_error": None,
    }
    return KeyReport(**{**fields, **changes})


def snapshot(**changes: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "version": "1.2.3",
        "model": "gpt-ours",
        "keys": [],
        "stored": None,
        "commits": 0,
        "outcomes": 0,
        "inbox": 0,
        "recorder_healthy": True,
        "drive_failures": 0,
        "drive_healthy": True,
        "places": 96,
        "places_free": 96,
    }
    return Snapshot(**{**fields, **changes})


def scrape(requests: RequestMetrics | None = None, **changes: Any) -> Samples:
    """Every sample by its name and labels, read by Prometheus' own parser."""
    text = generate_latest(make_registry(requests or RequestMetrics(), lambda: snapshot(**changes))).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"gpt_worker_{name}", tuple(sorted(labels.items()))))


# The service


def test_jobs_and_tasks_are_counted_by_where_they_stand() -> None:
    jobs = {
        **dict.fromkeys(VISIBLE, StatusCount()),
        JobStatus.QUEUED: StatusCount(1, pending=10),
        JobStatus.RUNNING: StatusCount(2, answered=5, failed=1, pending=4),
        JobStatus.CANCELLED: StatusCount(1, answered=1, pending=2),
    }

    samples = scrape(stored=Stored(jobs, dict.fromkeys(DeliveryStatus, 3), dict.fromkeys(FileState, 4)))

    assert value(samples, "jobs", status="running") == 2
    assert value(samples, "jobs", status="failed") == 0
    assert value(samples, "tasks", state="pending") == 16
    assert value(samples, "tasks", state="answered") == 6
    assert value(samples, "tasks", state="failed") == 1
    assert (value(samples, "queue_jobs"), value(samples, "queue_tasks")) == (3, 14)
    assert value(samples, "deliveries", status="preparing") == 3
    assert value(samples, "database_up") == 1


def test_database_that_cannot_be_read_leaves_the_rest_standing() -> None:
    samples = scrape(stored=None, commits=7)

    assert value(samples, "database_up") == 0
    assert value(samples, "jobs", status="running") is None
    assert value(samples, "recorder_commits_total") == 7


def test_recorder_places_and_version_are_told() -> None:
    samples = scrape(outcomes=9, inbox=2, recorder_healthy=False, places_free=90)

    assert value(samples, "recorder_outcomes_total") == 9
    assert value(samples, "recorder_inbox") == 2
    assert value(samples, "recorder_healthy") == 0
    assert (value(samples, "held_places"), value(samples, "held_places_free")) == (96, 90)
    assert value(samples, "build_info", version="1.2.3") == 1


def test_each_key_is_told_under_its_name() -> None:
    report = key(
        name="key 3",
        group="org-a/proj-b",
        state=LaneState.OUT_OF_QUOTA,
        in_flight=4,
        threads=8,
        requests=100,
        tokens=5000,
        rate_limited=2,
    )

    samples = scrape(keys=[key(), report])

    assert value(samples, "key_info", key="key 3", group="org-a/proj-b") == 1
    assert value(samples, "key_info", key="key 0", group="") == 1
    states = {state: value(samples, "key_state", key="key 3", state=state) for state in LaneState}
    assert states == {**dict.fromkeys(LaneState, 0), LaneState.OUT_OF_QUOTA: 1}
    names = ("in_flight", "threads", "requests_total", "tokens_total", "rate_limited_total")
    assert [value(samples, f"key_{name}", key="key 3") for name in names] == [4, 8, 100, 5000, 2]


def test_limits_of_other_models_are_told_without_their_names() -> None:
    limits = {
        "gpt-ours": LearnedLimits(600, 300, None, None),
        "ann@example.org": LearnedLimits(100, 90, 1000, 10),
        "secret": LearnedLimits(500, 50, 4000, 3000),
        "silent": LearnedLimits(None, None, None, None),
    }

    samples = scrape(keys=[key(limits=limits)])

    told = {
        labels: amount for (name, labels), amount in samples.items() if name == "gpt_worker_key_remaining"
    }
    assert told == {
        (("key", "key 0"), ("model", "gpt-ours"), ("of", "requests")): 300,
        (("key", "key 0"), ("model", "(other)"), ("of", "requests")): 50,
        (("key", "key 0"), ("model", "(other)"), ("of", "tokens")): 10,
    }
    assert value(samples, "key_limit", key="key 0", model="(other)", of="requests") == 500
    assert value(samples, "key_limit", key="key 0", model="(other)", of="tokens") == 1000


def test_two_registries_share_nothing() -> None:
    counted = RequestMetrics()
    counted.count("GET", "/jobs", 200, 0.1)

    assert value(scrape(counted), "http_requests_total", method="GET", route="/jobs", status="200") == 1
    assert value(scrape(), "http_requests_total", method="GET", route="/jobs", status="200") is None


# The counts in the database


def test_counts_come_from_the_jobs_and_leave_out_what_nobody_sees(tmp_path: Path) -> None:
    database = factories.database(folder=tmp_path)
    for status in JobStatus:
        for _ in range(2):
            job = factories.store_job(database=database, tasks=10, status=status)
            with database.write() as session:
                job_store.add_progress(session, {job.id: JobProgress(answered=3, failed=1)})

    with database.read() as session:
        counts = job_store.count_by_status(session)

    assert counts == dict.fromkeys(VISIBLE, StatusCount(2, answered=6, failed=2, pending=12))
    database.close()


def test_empty_service_has_every_status(tmp_path: Path) -> None:
    database = factories.database(folder=tmp_path)

    with database.read() as session:
        counts = job_store.count_by_status(session)

    assert counts == dict.fromkeys(VISIBLE, StatusCount())
    database.close()


# Requests


@pytest.mark.parametrize(
    ("method", "rule", "labels"),
    [
        ("GET", "/jobs/<id>", {"method": "GET", "route": "/jobs/<id>"}),
        ("GET", None, {"method": "GET", "route": "(none)"}),
        ("ANN@EXAMPLE.ORG", None, {"method": "(other)", "route": "(none)"}),
    ],
)
def test_request_is_counted_by_its_rule(method: str, rule: str | None, labels: Mapping[str, str]) -> None:
    requests = RequestMetrics()

    requests.count(method, rule, 404, 0.1)

    assert value(scrape(requests), "http_requests_total", status="404", **labels) == 1


def test_durations_are_cumulative() -> None:
    requests = RequestMetrics()
    for took_s in (0.004, 0.005, 0.2, 400.0):
        requests.count("GET", "/jobs", 200, took_s)

    samples = scrape(requests)

    name = "http_request_duration_seconds"
    buckets = {
        le: value(samples, f"{name}_bucket", route="/jobs", le=le)
        for le in ("0.005", "0.1", "0.25", "300.0", "+Inf")
    }
    assert buckets == {"0.005": 2, "0.1": 2, "0.25": 3, "300.0": 3, "+Inf": 4}
    assert value(samples, f"{name}_count", route="/jobs") == 4
    assert value(samples, f"{name}_sum", route="/jobs") == pytest.approx(400.209)


# Who may scrape


@pytest.mark.parametrize(
    ("address", "headers", "local"),
    [
        ("127.0.0.1", ["Host", "User-Agent"], True),
        ("127.8.9.10", [], True),
        ("::1", [], True),
        ("::ffff:127.0.0.1", [], True),
        ("::ffff:10.0.0.1", [], False),
        ("10.0.0.1", [], False),
        ("", [], False),
        (None, [], False),
        ("localhost", [], False),
        ("127.0.0.1", ["Forwarded"], False),
        ("127.0.0.1", ["X-FORWARDED-FOR"], False),
        ("127.0.0.1", ["x-forwarded-host"], False),
        ("::1", ["X-Real-Ip"], False),
        ("::1", ["Via"], False),
    ],
)
def test_local_is_the_machine_itself_and_no_proxy_on_it(
    address: str | None, headers: list[str], local: bool
) -> None:
    assert is_local(address, headers) is local


# Readiness


class Parts:
    """As much of a service as readiness looks at."""

    def __init__(self, data_dir: Path) -> None:
        self.stopping = False
        self.ready = True
        self.model_name = "gpt-ours"
        self.usable = 2
        self.database = self
        self.database_error: Exception | None = None
        self.trouble: str | None = None
        self.settings = SimpleNamespace(data_dir=data_dir)
        self.recorder = SimpleNamespace(healthy=True)
        self.down: str | None = None
        self.dispatcher = SimpleNamespace(
            usable_lanes=lambda _model: self.usable, inspect=lambda look: look([self], 0.0)
        )
        self.result_files = SimpleNamespace(trouble=None)

    @contextmanager
    def read(self) -> Iterator[Any]:
        if self.database_error:
            raise self.database_error
        yield SimpleNamespace(execute=lambda _statement: None)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    lock = DataDirLock(tmp_path)
    lock.acquire(0)
    yield Parts(tmp_path)
    lock.release()


def readyz(parts: Parts) -> Any:
    app = api.make_app("0")
    api.register(app)
    app.extensions["gpt_worker"] = parts
    return app.test_client().get("/readyz")


def assert_not_ready(reply: Any, reason: str) -> None:
    assert reply.status_code == 503
    assert reply.mimetype == "application/problem+json"
    assert reply.json["detail"] == reason
    assert int(reply.headers["Retry-After"]) > 0


def test_ready_when_all_is_well(parts: Parts) -> None:
    reply = readyz(parts)

    assert (reply.status_code, reply.json) == (200, {"status": "ready", "degraded": []})


def test_a_drive_that_fails_is_ready_and_degraded(parts: Parts) -> None:
    parts.result_files.trouble = "it refuses access"

    reply = readyz(parts)

    assert (reply.status_code, reply.json["degraded"]) == (200, ["drive: it refuses access"])


def test_no_usable_key_is_ready_and_degraded(parts: Parts) -> None:
    parts.usable = 0

    reply = readyz(parts)

    assert (reply.status_code, reply.json) == (200, {"status": "ready", "degraded": ["no usable key"]})


def test_embedded_model_that_is_away_says_why(parts: Parts) -> None:
    parts.usable, parts.down = 0, EMBEDDED_STARTING

    assert readyz(parts).json == {"status": "ready", "degraded": ["the embedded model is starting"]}


def test_not_ready_while_it_starts(parts: Parts) -> None:
    parts.ready = False

    assert_not_ready(readyz(parts), "The service is starting.")


def test_not_ready_while_it_stops(parts: Parts) -> None:
    parts.stopping, parts.ready = True, False

    assert_not_ready(readyz(parts), "The service is shutting down.")


def test_not_ready_without_the_database(parts: Parts) -> None:
    parts.database_error = OperationalError("SELECT", {}, Exception("disk I/O error"))

    assert_not_ready(readyz(parts), "The database can't be used.")


def test_not_ready_with_a_database_that_can_be_read_and_is_in_trouble(parts: Parts) -> None:
    parts.trouble = "The database is damaged: put the backup back."

    assert_not_ready(readyz(parts), "The database is damaged: put the backup back.")


def test_not_ready_while_answers_are_not_stored(parts: Parts) -> None:
    parts.recorder.healthy = False

    assert_not_ready(readyz(parts), "The database takes no answers.")


def test_not_ready_when_the_disk_is_low(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=(200 << 20) - 1))

    assert_not_ready(readyz(parts), "Less than 200 MiB of disk are free.")
