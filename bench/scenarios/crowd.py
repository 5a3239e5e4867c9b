"""Ten thousand small jobs of twenty users, all unfinished at once: how fast they come in, go out, and are listed."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from bench.figures import Spread, number, percentile
from bench.ours import serving
from bench.race import keys
from bench.report import Row, judged
from bench.scenarios.million import FIRST_TENTH, LAST_TENTH, WANTED_STEADY, pace
from bench.watch import Watch
from bench.work import MODEL
from tests.service import Service
from tests.upstream import Fault, FaultKind, KeyRules, Upstream

JOBS, USERS, TASKS_A_JOB = 10_000, 20, 3
CLIENTS = 4
MANY_LEFT, FEW_LEFT = (0.2, 0.3), (0.89, 0.99)  # of the tasks; the first were in memory before the start
LISTINGS = 60
LISTS = {
    "one's own": "/jobs",
    "one's own, 100": "/jobs?limit=100",
    "one's own, by status": "/jobs?status=succeeded&limit=100",
    "one's own, of a status that none has": "/jobs?status=failed&limit=100",
    "everyone's, 100": "/jobs?all=true&limit=100",
}
WANTED_LIST_MS = 50.0
END_TIMEOUT_S = 600.0


def run(scale: float) -> dict[str, Any]:
    users = max(2, int(USERS * min(1.0, scale)))
    jobs = max(50, int(JOBS * scale))
    listings = max(5, int(LISTINGS * min(1.0, scale)))
    with (
        Upstream(keys(KeyRules() for _ in range(5)), log_calls=False) as upstream,
        serving(upstream) as service,
    ):
        load = os.getloadavg()[0]
        tokens = [service.user(f"user-{place}@example.org") for place in range(users)]
        upstream.add_fault(Fault(kind=FaultKind.HANG, times=None))  # so that none of them ends meanwhile
        with Watch(service.pid) as submit_watch:
            submitted_s = _submit_all(service, tokens, jobs)
        queued_s = _listings_s(service, tokens[0], LISTS["one's own, 100"], listings)
        upstream.clear_faults()
        with Watch(service.pid, upstream) as watch:
            upstream.release()
            service.wait_until(lambda: not _unfinished(service), END_TIMEOUT_S)
        lists_s = {
            name: _listings_s(service, service.admin if "all=" in path else tokens[0], path, listings)
            for name, path in LISTS.items()
        }
    tasks = jobs * TASKS_A_JOB
    found = {
        "jobs": jobs,
        "load_before": load,
        "submits": [_submit_pace(submit_watch, submitted_s, *share) for share in (FIRST_TENTH, LAST_TENTH)],
        "paces": [pace(watch.samples, tasks, *share) for share in (MANY_LEFT, FEW_LEFT)],
        "lists_s": lists_s,
        "queued_list_s": queued_s,
        "peak_rss_bytes": watch.peak_rss_bytes(),
    }
    print(f"  {jobs} jobs: {found['submits']}, {found['paces']}", file=sys.stderr, flush=True)
    return found


def _submit_all(service: Service, tokens: Sequence[str], jobs: int) -> list[float]:
    """The users in turn, from a few clients at once; when each job was taken, in order."""
    taken_s: list[float] = []
    places = iter(range(jobs))
    lock = threading.Lock()
    failures: list[str] = []

    def client() -> None:
        while not failures:
            with lock:
                place = next(places, None)
            if place is None:
                return
            tasks = [f"Say hello, number {place}.{task}" for task in range(TASKS_A_JOB)]
            token = tokens[place % len(tokens)]
            reply = service.submit(tasks, {"model": MODEL}, token, prefer="respond-async")
            if reply.status_code != 202:
                failures.append(reply.text)
            with lock:
                taken_s.append(time.monotonic())

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert not failures, failures[0]
    return taken_s


def _submit_pace(watch: Watch, moments_s: Sequence[float], begin: float, end: float) -> dict[str, float]:
    """Jobs a second and CPU a job between two shares of them."""
    first, last = int(begin * len(moments_s)), int(end * len(moments_s))
    begin_s, end_s = moments_s[first], moments_s[last]
    return {
        "jobs_per_s": (last - first) / (end_s - begin_s),
        "cpu_ms": 1000.0 * watch.cpu_s(begin_s, end_s) / (last - first),
    }


def _unfinished(service: Service) -> bool:
    time.sleep(0.1)
    return any(
        service.get(f"/jobs?all=true&limit=1&status={status}", service.admin).json()["data"]
        for status in ("queued", "running")
    )


def _listings_s(service: Service, token: str, path: str, listings: int) -> list[float]:
    taken_s = []
    for _ in range(listings):
        begin_s = time.monotonic()
        reply = service.get(path, token)
        taken_s.append(time.monotonic() - begin_s)
        assert reply.status_code == 200, reply.text
    return taken_s


def rows(repetitions: list[dict[str, Any]]) -> list[Row]:
    count = number(min(each["jobs"] for each in repetitions))
    slowest = Spread.of(
        1000.0 * max(percentile(taken_s, 0.95) for taken_s in each["lists_s"].values())
        for each in repetitions
    )
    queued = Spread.of(1000.0 * percentile(each["queued_list_s"], 0.95) for each in repetitions)
    submits = Spread.of(end["jobs_per_s"] / start["jobs_per_s"] for start, end in _of(repetitions, "submits"))
    per_s = Spread.of(end["jobs_per_s"] for _, end in _of(repetitions, "submits"))
    cpu_ms = Spread.of(end["cpu_ms"] - start["cpu_ms"] for start, end in _of(repetitions, "submits"))
    memory = Spread.of(each["peak_rss_bytes"] / 1e6 for each in repetitions)
    return [
        judged(
            f"crowd: GET /jobs with {count} jobs, p95 of the slowest of {len(LISTS)} lists",
            f"≤ {WANTED_LIST_MS:g} ms",
            slowest.text(" ms"),
            [slowest.median <= WANTED_LIST_MS],
        ),
        Row("crowd: the same, 100 jobs that are all queued", "–", queued.text(" ms")),
        judged(
            f"crowd: submits/s at the end of {count} unfinished jobs ÷ at the start",
            f"≥ {WANTED_STEADY:g}",
            f"{submits.text()} ({per_s.text('/s')} at the end; CPU a job {cpu_ms.text(' ms')} more)",
            [submits.median >= WANTED_STEADY],
        ),
        _dispatch(repetitions),
        Row("crowd: memory at most", "–", memory.text(" MB")),
    ]


def _of(repetitions: list[dict[str, Any]], name: str) -> list[list[dict[str, float]]]:
    """Start and end of each run in which both were seen."""
    return [each[name] for each in repetitions if all(each[name])]


def _dispatch(repetitions: list[dict[str, Any]]) -> Row:
    what = "crowd: tasks/s with most jobs queued ÷ with few left"
    seen = _of(repetitions, "paces")
    if not seen:
        return Row(what, f"≥ {WANTED_STEADY:g}", "over too soon", reached=False)
    ratio = Spread.of(start["tasks_per_s"] / end["tasks_per_s"] for start, end in seen)
    per_s = Spread.of(start["tasks_per_s"] for start, _ in seen)
    cpu = Spread.of(start["cpu_ms"] / end["cpu_ms"] for start, end in seen)
    told = f"{ratio.text()} ({per_s.text('/s')} with most queued; CPU a task {cpu.text()})"
    return judged(what, f"≥ {WANTED_STEADY:g}", told, [ratio.median >= WANTED_STEADY])
