"""The idle service and the edges of a job: start, rest, and the way from the last answer to whoever waits for it."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.figures import Spread, percentile
from bench.ours import serving
from bench.race import keys
from bench.report import Row, judged
from bench.watch import unshared_bytes, usage_of
from bench.work import MODEL
from tests.receiver import Answer, Receiver
from tests.service import Service
from tests.upstream import Call, Fault, FaultKind, KeyRules, Upstream

JOBS = 200
TASKS_A_JOB = 3
LATENCY_S = 0.02
REST_S = 10.0
RESTING_S = 600.0
RULES = keys(KeyRules(latency_s=LATENCY_S) for _ in range(5))
WANTED_INLINE_MS, WANTED_WEBHOOK_MS = 50.0, 200.0
WANTED_START_S, WANTED_MB, WANTED_CPU_PERCENT = 3.0, 120.0, 1.0


def run(scale: float) -> dict[str, Any]:
    jobs = max(10, int(JOBS * scale))
    return {"start_s": _start_s(), **_waits(jobs), **_rest()}


def _start_s() -> float:
    """From the command to `GET /readyz` 200, on an empty data directory: its tables are made meanwhile."""
    with Upstream(RULES) as upstream, tempfile.TemporaryDirectory(prefix="gpt-worker-bench-") as folder:
        service = Service(Path(folder), upstream=upstream)
        begin_s = time.monotonic()
        with service:
            return time.monotonic() - begin_s


def _waits(jobs: int) -> dict[str, list[float]]:
    with (
        Upstream(RULES) as upstream,
        Receiver() as receiver,
        serving(upstream, {"REQUEST_API": receiver.url}) as service,
    ):
        inline = {number: _inline(service, number) for number in range(jobs)}
        inline_s = _since_last_answer(upstream.calls(), inline)
        upstream.reset()
        for number in range(jobs):
            _webhook(service, number)
            receiver.wait_for(number + 1, 30.0)
        arrived = {_number_in(request.body): request.at for request in receiver.received()}
        webhook_s = _since_last_answer(upstream.calls(), arrived)
    return {"inline_s": inline_s, "webhook_s": webhook_s}


def _tasks(number: int) -> dict[str, str]:
    return {str(task): f"{number}: say hello {task}" for task in range(TASKS_A_JOB)}


def _inline(service: Service, number: int) -> float:
    reply = service.submit(_tasks(number), {"model": MODEL, "delivery": "inline"})
    assert reply.status_code == 200, reply.text
    return time.monotonic()


def _webhook(service: Service, number: int) -> None:
    settings = {"model": MODEL, "delivery": "webhook"}
    reply = service.submit(_tasks(number), settings, metadata={"number": str(number)})
    assert reply.status_code == 202, reply.text


def _number_in(webhook: bytes) -> int:
    return int(json.loads(webhook)["data"]["metadata"]["number"])


def _since_last_answer(calls: list[Call], got_at: dict[int, float]) -> list[float]:
    """For each job, the seconds from the upstream's last answer to `got_at`."""
    last: dict[int, float] = {}
    for call in calls:
        job = int(call.user_text.partition(":")[0])
        last[job] = max(last.get(job, 0.0), call.ended_at or 0.0)
    return [got_at[job] - last[job] for job in got_at]


def _rest() -> dict[str, float]:
    """At rest right after the start; and then with every key resting, tasks that wait, and a webhook that waits."""
    later = {"Retry-After": f"{RESTING_S:g}"}
    with (
        Upstream(RULES, log_calls=False) as upstream,
        Receiver([Answer(500, later)]) as receiver,
        serving(upstream, {"REQUEST_API": receiver.url}) as service,
    ):
        time.sleep(1.0)
        fresh = usage_of(service.pid).rss_bytes
        _webhook(service, 0)
        receiver.wait_for(1, 30.0)
        busy = Fault(
            kind=FaultKind.STATUS, times=None, status=429, code="rate_limit_exceeded", retry_after_s=RESTING_S
        )
        upstream.add_fault(busy)
        _webhook(service, 1)
        time.sleep(2.0)
        before, begin_s = usage_of(service.pid), time.monotonic()
        time.sleep(REST_S)
        after, end_s = usage_of(service.pid), time.monotonic()
        states = [key["state"] for key in service.get("/keys", service.admin).json()["data"]]
        assert set(states) == {"resting"}, states
        return {
            "fresh_rss_bytes": fresh,
            "rest_rss_bytes": after.rss_bytes,
            "rest_unshared_bytes": unshared_bytes(service.pid),
            "rest_cpu_share": (after.cpu_s - before.cpu_s) / (end_s - begin_s),
        }


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    def p95_ms(name: str, share: float = 0.95) -> Spread:
        return Spread.of(1000.0 * percentile(each[name], share) for each in repetitions)

    inline, webhook = p95_ms("inline_s"), p95_ms("webhook_s")
    start = Spread.of(each["start_s"] for each in repetitions)
    memory = Spread.of(each["rest_rss_bytes"] / 1e6 for each in repetitions)
    unshared = Spread.of(each["rest_unshared_bytes"] / 1e6 for each in repetitions)
    fresh = Spread.of(each["fresh_rss_bytes"] / 1e6 for each in repetitions)
    cpu = Spread.of(100.0 * each["rest_cpu_share"] for each in repetitions)
    return [
        judged(
            "last answer → inline reply, p95; → webhook arrived, p95",
            f"≤ {WANTED_INLINE_MS:g} ms; ≤ {WANTED_WEBHOOK_MS:g} ms",
            f"{inline.text(' ms')}; {webhook.text(' ms')}",
            [inline.median <= WANTED_INLINE_MS, webhook.median <= WANTED_WEBHOOK_MS],
        ),
        Row(
            "the same, p50",
            "–",
            f"{p95_ms('inline_s', 0.5).text(' ms')}; {p95_ms('webhook_s', 0.5).text(' ms')}",
        ),
        judged(
            "start to ready; memory at rest; CPU at rest with resting keys and a waiting webhook",
            f"≤ {WANTED_START_S:g} s; ≤ {WANTED_MB:g} MB; < {WANTED_CPU_PERCENT:g} % of a core",
            f"{start.text(' s')}; {memory.text(' MB')}; {cpu.text(' %')}",
            [start.median <= WANTED_START_S, memory.median <= WANTED_MB, cpu.median < WANTED_CPU_PERCENT],
        ),
        Row(
            "memory right after the start; at rest, shared pages counted once",
            "–",
            f"{fresh.text(' MB')}; {unshared.text(' MB')}",
        ),
    ]
