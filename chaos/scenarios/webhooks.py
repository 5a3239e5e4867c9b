"""Webhooks under fire: a receiver that refuses, hangs, resets, drips, pours out a gigabyte, or is dead or away.

The schedule outlives kill -9, what is sent stays what it was and is signed anew each time, no redirect is followed,
and while thousands are owed to a dead receiver, nobody else waits.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import requests

from chaos import log
from chaos.options import Options
from chaos.receivers import RETRY_AFTER_S, Arrival, FireReceiver
from chaos.report import Row, fact, none_of
from chaos.watching import MIB, least_rss_bytes, look
from tests.receiver import Receiver
from tests.service import Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

NAME = "webhooks"
Json = dict[str, Any]

KEYS = 3
THREADS_PER_KEY = 8
OWED, OWED_SHORT = 2_000, 400
CLIENTS = 8
PROBES_S, PROBES_SHORT_S = 8.0, 3.0
AWAY_S = 3.0  # shorter than the first wait, so that nothing is refused twice
FIRES = ("500", "302", "410", "429", "reset", "1 GB", "1 GB and 500")
SLOW_FIRES = ("hang", "drip")
EXCHANGE_S = 20.0
EARLY_S, LATE_S = 0.3, 4.0  # beside the time that stands in the database
FRESH_S = 3.0
SECOND_WAIT_S = (240.0, 360.0)
PATIENCE_S = 60.0
ENDED_WITHIN_S = 120.0
DELIVERED_WITHIN_S = 180.0
MOST_POURED_BYTES = 16 * MIB  # what the sockets' buffers swallow
MOST_THREADS = KEYS * THREADS_PER_KEY + 128 + 24
MOST_MORE_BYTES = 48 * MIB
SLOWEST_S = 2.0  # of a probe
SLOWER_THAN = 4.0  # times the median without deliveries, and
SLACK_S = 0.05


def run(options: Options) -> list[Row]:
    keys = {f"sk-chaos-{number}": KeyRules(latency_s=0.01) for number in range(KEYS)}
    with (
        tempfile.TemporaryDirectory(prefix="gpt-worker-chaos-") as folder,
        Upstream(keys) as upstream,
        Receiver() as elsewhere,
        FireReceiver(elsewhere.url) as receiver,
        Service(
            Path(folder),
            {"REQUEST_API": receiver.url, "GPT_THREADS_PER_KEY": str(THREADS_PER_KEY)},
            upstream,
        ) as service,
    ):
        receiver.secret = service.get("/webhooks/secret", service.admin).json()["secret"]
        fire = _Fire(service, receiver, upstream)
        rows = fire.rows()
        owed = options.rounds_or(OWED, OWED_SHORT)
        rows += _Siege(service, receiver, owed, options.seconds_or(PROBES_S, PROBES_SHORT_S)).rows()
        rows += _message_rows(receiver.arrivals(), elsewhere)
        rows.append(none_of("errors in the log", log.faults(service.stderr())))
    return rows


# Every way of not taking a message


@dataclass(frozen=True, slots=True)
class _Planned:
    """When a delivery goes on, as it was told before the kill."""

    delivery_id: str
    due_s: float


class _Fire:
    """One job for each way, with a kill in the middle of it."""

    def __init__(self, service: Service, receiver: FireReceiver, upstream: Upstream) -> None:
        self._service = service
        self._receiver = receiver
        self._upstream = upstream
        self._jobs: dict[str, str] = {}
        self._started_at = 0.0

    def rows(self) -> list[Row]:
        self._receiver.close()
        self._submit("away", fire="200")
        self._wait("away", attempts=1)
        self._receiver.open()
        for fire in FIRES:
            self._submit(fire, fire=fire)
        self._submit("500 twice", fire="500", times="2")
        for fire in SLOW_FIRES:  # the first time they are cut by the kill, the second by the service
            self._submit(fire, fire=fire, times="2")
        self._submit_retried()
        quick = ("away", "500", "302", "429", "reset", "1 GB and 500", "500 twice")
        for name in (*quick, "410", "1 GB"):
            self._wait(name, attempts=1)
        self._wait_arrived(*SLOW_FIRES)
        planned = [self._planned(name) for name in quick]
        self._service.kill()
        self._service.start()
        self._started_at = time.time()
        moved = [
            plan.delivery_id for plan, name in zip(planned, quick, strict=True) if not self._kept(plan, name)
        ]
        for name in (*(name for name in quick if name != "500 twice"), *SLOW_FIRES):
            self._wait(name, status="delivered")
        return [
            none_of("times of the next attempt that a kill changed", moved, len(planned)),
            none_of("second attempts at another time than planned", self._untimely(planned), len(planned)),
            *self._long_wait_rows(),
            *self._ending_rows(),
        ]

    def _submit(self, name: str, data: Json | None = None, **metadata: str) -> None:
        settings = {"delivery": "webhook"}
        reply = self._service.submit(data or {"a": f"hello from {name}"}, settings, metadata=metadata)
        assert reply.status_code == 202, reply.text
        self._jobs[name] = reply.json()["id"]

    def _submit_retried(self) -> None:
        """Its first run is told wrongly if its message is made, or made again, after the second has begun."""
        self._upstream.add_fault(Fault(kind=FaultKind.STATUS, status=400, contains="at first", times=1))
        self._submit("retried", {"a": "refused at first", "b": "fine"}, fire="500", times="1")
        self._service.wait_finished(self._jobs["retried"])
        reply = self._service.post(f"/jobs/{self._jobs['retried']}/retry", self._service.admin)
        assert reply.status_code == 202, reply.text

    def _deliveries(self, name: str) -> list[Json]:
        path = f"/deliveries?job_id={self._jobs[name]}"
        found: list[Json] = self._service.get(path, self._service.admin).json()["data"]
        return found

    def _wait(self, name: str, *, attempts: int = 0, status: str | None = None) -> None:
        def there() -> bool:
            found = self._deliveries(name)
            return bool(found) and all(
                len(delivery["attempts"]) >= attempts and status in (None, delivery["status"])
                for delivery in found
            )

        self._service.wait_until(there, PATIENCE_S)

    def _wait_arrived(self, *names: str) -> None:
        fires = {*names}
        self._service.wait_until(
            lambda: fires <= {arrival.fire for arrival in self._receiver.arrivals()}, PATIENCE_S
        )

    def _planned(self, name: str) -> _Planned:
        [delivery] = self._deliveries(name)
        return _Planned(delivery["id"], _seconds(delivery["next_attempt_at"]))

    def _kept(self, plan: _Planned, name: str) -> bool:
        """Whether it stands as it was, unless it has gone on since."""
        [delivery] = self._deliveries(name)
        return len(delivery["attempts"]) > 1 or _seconds(delivery["next_attempt_at"]) == plan.due_s

    def _untimely(self, planned: Sequence[_Planned]) -> list[str]:
        came: dict[str, list[float]] = defaultdict(list)
        for arrival in self._receiver.arrivals():
            came[arrival.id].append(arrival.at)
        away = planned[0].delivery_id  # whose first attempt met nobody
        breaches = []
        for plan in planned:
            came_at = came[plan.delivery_id][plan.delivery_id != away]
            early_s, late_s = plan.due_s - came_at, came_at - max(plan.due_s, self._started_at)
            if early_s > EARLY_S or late_s > LATE_S:
                breaches.append(f"{plan.delivery_id} {-early_s:+.1f} s, {late_s:+.1f} s after it could")
        return breaches

    def _long_wait_rows(self) -> list[Row]:
        """The wait after the second refusal, and over a kill; then it is asked for."""
        self._wait("500 twice", attempts=2)
        [before] = self._deliveries("500 twice")
        wait_s = _seconds(before["next_attempt_at"]) - _seconds(before["attempts"][1]["sent_at"])
        self._service.kill()
        self._service.start()
        [after] = self._deliveries("500 twice")
        kept = before["next_attempt_at"] == after["next_attempt_at"]
        self._service.post(f"/deliveries/{after['id']}/redeliver", self._service.admin)
        self._wait("500 twice", attempts=3, status="delivered")
        shortest, longest = SECOND_WAIT_S
        wanted = f"{shortest:g} to {longest:g} s, and the same after a kill"
        got = f"{wait_s:.0f} s, {'the same' if kept else 'another'}"
        return [Row("the second wait", wanted, got, shortest <= wait_s <= longest + 1 and kept)]

    def _ending_rows(self) -> list[Row]:
        """How each delivery stands in the end: status, and the status codes or errors of its attempts."""
        self._wait("retried", status="delivered")
        wanted: dict[str, tuple[str, list[object]]] = {
            "500": ("delivered", [500, 200]),
            "302": ("delivered", [302, 200]),
            "410": ("failed", [410]),
            "429": ("delivered", [429, 200]),
            "reset": ("delivered", ["ConnectionError", 200]),
            "away": ("delivered", ["ConnectionError", 200]),
            "1 GB": ("delivered", [200]),
            "1 GB and 500": ("delivered", [500, 200]),
            "500 twice": ("delivered", [500, 500, 200]),
            "hang": ("delivered", ["Timeout", 200]),
            "drip": ("delivered", ["Timeout", 200]),
        }
        breaches, slow_s = [], 0.0
        for name, ending in wanted.items():
            [delivery] = self._deliveries(name)
            attempts = delivery["attempts"]
            told = [attempt["status_code"] or attempt["error"].replace("Read", "") for attempt in attempts]
            if (delivery["status"], told) != ending:
                breaches.append(f"{name}: {delivery['status']} {told}")
            slow_s = max(slow_s, *(attempt["took_s"] for attempt in attempts))
        [waited] = self._deliveries("429")
        first, second = (_seconds(attempt["sent_at"]) for attempt in waited["attempts"])
        poured = max(self._receiver.sent_bytes.values(), default=0)
        return [
            none_of("deliveries that did not end as they must", breaches, len(wanted)),
            Row(
                "Retry-After",
                f"≥ {RETRY_AFTER_S} s",
                f"{second - first:.1f} s",
                second - first >= RETRY_AFTER_S,
            ),
            Row(
                "the longest exchange", f"≤ {EXCHANGE_S + 2:g} s", f"{slow_s:.1f} s", slow_s <= EXCHANGE_S + 2
            ),
            Row(
                "read of a reply of 1 GB",
                f"≤ {MOST_POURED_BYTES / MIB:g} MiB",
                f"{poured / MIB:.1f} MiB",
                0 < poured <= MOST_POURED_BYTES,
            ),
        ]


# Thousands owed to a dead receiver


class _Siege:
    """So many jobs whose webhooks nobody takes, and what others notice of it."""

    def __init__(self, service: Service, receiver: FireReceiver, owed: int, probes_s: float) -> None:
        self._service = service
        self._receiver = receiver
        self._owed = owed
        self._probes_s = probes_s
        self._job_ids: list[str] = []

    def rows(self) -> list[Row]:
        self._probe()  # warm
        calm = self._probe()
        before_bytes = least_rss_bytes(self._service)
        self._receiver.die()
        with ThreadPoolExecutor(CLIENTS) as pool:
            self._job_ids = list(pool.map(self._submit, range(self._owed)))
        self._service.wait_until(self._all_ended, ENDED_WITHIN_S)
        dead = self._probe()
        now = look(self._service)
        assert now is not None
        more_bytes = least_rss_bytes(self._service) - before_bytes
        self._service.kill()
        began_s = time.monotonic()
        self._service.start()
        start_s = time.monotonic() - began_s
        restarted = self._probe()
        self._receiver.close()
        self._receiver.revive()
        away = self._probe(min(AWAY_S, self._probes_s))
        self._receiver.open()
        began_s = time.monotonic()
        undelivered = self._wait_delivered()
        took_s = time.monotonic() - began_s
        return [
            fact(f"with {self._owed} owed: a start after a kill", f"{start_s:.1f} s"),
            *self._probe_rows("a dead receiver", calm, dead),
            *self._probe_rows("a dead receiver, after a kill", calm, restarted),
            *self._probe_rows("a receiver that is away", calm, away),
            Row("threads", f"≤ {MOST_THREADS}", str(now.threads), now.threads <= MOST_THREADS),
            Row(
                "memory, with all owed",
                f"≤ {MOST_MORE_BYTES / MIB:g} MiB more",
                f"{more_bytes / MIB:+.0f} MiB",
                more_bytes <= MOST_MORE_BYTES,
            ),
            Row("owed, and not delivered once the receiver is back", "0", str(undelivered), undelivered == 0),
            fact("delivered within", f"{took_s:.0f} s"),
            none_of("jobs not told by one message", self._untold(), self._owed),
        ]

    def _submit(self, number: int) -> str:
        reply = self._service.submit(
            {"a": f"owed {number}"}, {"delivery": "webhook"}, metadata={"owed": "yes"}
        )
        assert reply.status_code == 202, reply.text
        return str(reply.json()["id"])

    def _all_ended(self) -> bool:
        pages = (
            self._service.get(f"/jobs?limit=1&status={s}", self._service.admin) for s in ("queued", "running")
        )
        return not any(page.json()["data"] for page in pages)

    def _probe(self, seconds: float | None = None) -> dict[str, list[float]]:
        """Seconds that inline jobs and health checks take, one after the other."""
        took: dict[str, list[float]] = {"an inline job": [], "/healthz": []}
        ends_s = time.monotonic() + (seconds or self._probes_s)
        while time.monotonic() < ends_s:
            took["an inline job"].append(_timed(self._ask_inline))
            took["/healthz"].append(_timed(lambda: self._service.get("/healthz")))
            time.sleep(0.02)
        return took

    def _ask_inline(self) -> requests.Response:
        return self._service.submit(["probe"], {"delivery": "inline"})

    def _probe_rows(
        self, beside: str, calm: dict[str, list[float]], probed: dict[str, list[float]]
    ) -> list[Row]:
        rows = []
        for what, took in probed.items():
            most_s = SLOWER_THAN * median(calm[what]) + SLACK_S
            rows.append(
                Row(
                    f"{what} beside {beside}: median; slowest",
                    f"≤ {most_s * 1000:.0f} ms; ≤ {SLOWEST_S:g} s",
                    f"{median(took) * 1000:.0f} ms (alone {median(calm[what]) * 1000:.0f}); {max(took):.2f} s",
                    median(took) <= most_s and max(took) <= SLOWEST_S,
                )
            )
        return rows

    def _wait_delivered(self) -> int:
        """How many are still owed, in the end."""
        ends_s = time.monotonic() + DELIVERED_WITHIN_S
        while (owed := self._count_owed()) and time.monotonic() < ends_s:
            time.sleep(0.25)
        return owed

    def _count_owed(self) -> int:
        metrics = self._service.get("/metrics").text
        lines = [line for line in metrics.splitlines() if line.startswith("gpt_worker_deliveries{")]
        return sum(int(float(line.split()[-1])) for line in lines if "preparing" in line or "pending" in line)

    def _untold(self) -> list[str]:
        ids: dict[str, set[str]] = defaultdict(set)
        for arrival in self._receiver.arrivals():
            ids[_job_id(arrival)].add(arrival.id)
        return [job_id for job_id in self._job_ids if len(ids[job_id]) != 1]


def _timed(ask: Callable[[], requests.Response]) -> float:
    began_s = time.monotonic()
    reply = ask()
    assert reply.status_code == 200, reply.text
    return time.monotonic() - began_s


# Every message that came


def _message_rows(arrivals: Sequence[Arrival], elsewhere: Receiver) -> list[Row]:
    by_id: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        by_id[arrival.id].append(arrival)
    unsigned = [f"{arrival.id} {arrival.flaw}" for arrival in arrivals if arrival.flaw is not None]
    stale = [
        f"{arrival.id} signed {arrival.at - arrival.signed_at:.1f} s before"
        for arrival in arrivals
        if not -1.0 <= arrival.at - arrival.signed_at <= FRESH_S
    ]
    changed = [id_ for id_, of_id in by_id.items() if len({arrival.request.body for arrival in of_id}) > 1]
    resigned = [
        id_
        for id_, of_id in by_id.items()
        for first, second in pairwise(of_id)
        if second.at - first.at > 2 and second.signed_at <= first.signed_at
    ]
    followed = len(elsewhere.received())
    return [
        none_of("messages whose body changed between attempts", changed, len(by_id)),
        none_of("signatures that do not hold", unsigned, len(arrivals)),
        none_of("signatures that were not made for their attempt", [*stale, *resigned], len(arrivals)),
        Row("redirects followed", "0", str(followed), followed == 0),
    ]


def _job_id(arrival: Arrival) -> str:
    return arrival.request.body.partition(b'"data":{"id":"')[2][:32].decode()


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
